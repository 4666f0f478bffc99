"""Passages: nothing lost, nothing in two splits."""

import json

import pytest

from jaxdraft.data.passages import Beginnings, Continuations, Passages
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Rejected
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError


@pytest.fixture
def text(tmp_path):
    lines = [f"Line {i} says something of its own, number {i * i}." for i in range(800)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return Text(str(tmp_path / "text.txt"))


def test_splits_share_nothing_and_lose_nothing(text):
    splits = {split: list(Passages(text, split, 100).documents()) for split in ("train", "seed", "eval")}
    lines = [line for passages in splits.values() for passage in passages for line in passage.splitlines()]
    assert sorted(lines) == sorted("".join(text.documents()).splitlines())
    assert len(splits["train"]) > len(splits["seed"]) > len(splits["eval"]) > 5


def test_added_text_moves_nothing_between_splits(text, tmp_path):
    before = set(Passages(text, "eval", 40).documents())
    with (tmp_path / "text.txt").open("a") as file:
        file.write("\nOne more line at the end, long enough to stand alone.")
    assert before <= set(Passages(text, "eval", 40).documents())


def test_beginnings_and_their_rests(text, shared_data):
    from jaxdraft.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "models" / "stories260K-hf")
    passages = Passages(text, "eval", 100)
    prompts = list(Beginnings(passages, tokens=8, limit=5).prompts(tokenizer))
    assert len(prompts) == 5
    documents = list(passages.documents())
    for prompt in prompts:
        assert len(prompt.tokens) == 8
        assert prompt.tokens[0] == tokenizer.bos_id
        assert any(document.startswith(prompt.text) for document in documents)
    lengths = [len(tokenizer.encode(document)) for document in documents]
    middle = sorted(lengths)[len(lengths) // 2]
    items = list(Beginnings(passages, tokens=middle).prompts(tokenizer))
    assert [isinstance(item, Prompt) for item in items] == [length > middle for length in lengths]
    assert {item.reason for item in items if isinstance(item, Rejected)} == {f"no more than {middle} tokens"}
    with pytest.raises(ConfigError, match="no eval passage of more than 9999 tokens"):
        list(Beginnings(passages, tokens=9999).prompts(tokenizer))


def test_what_the_text_rejects_passes_through(tmp_path, tokenizer):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Line {i}."}) + "\n{}\n" for i in range(40)))
    passages = Passages(Text(str(tmp_path / "text.jsonl")), "seed", 5)
    documents = list(passages.documents())
    assert [item for item in documents if isinstance(item, Rejected)] == [
        Rejected(f"{tmp_path}/text.jsonl: line {2 * i} (it has )", "no field 'text'") for i in range(1, 41)
    ]
    prompts = [item for item in Beginnings(passages, tokens=2).prompts(tokenizer) if isinstance(item, Prompt)]
    assert [prompt.id for prompt in prompts] == [f"seed:{i}" for i in range(len(documents) - 40)]


def test_a_wrong_split_is_named(text):
    with pytest.raises(ConfigError, match="must be one of train, seed, eval"):
        Passages(text, "test")


def test_continuations_are_cut_where_their_words_say(tmp_path, tokenizer):
    stories = [f"Once upon a time there was a number, and it was {i}." for i in range(200)]
    (tmp_path / "s.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*stories, *stories[:2], ""])
    )
    source = Continuations(Text(str(tmp_path / "s.jsonl")))
    items = list(source.prompts(tokenizer))
    assert [item.reason for item in items[200:]] == ["duplicate", "duplicate", "blank"]
    lengths = set()
    for prompt, story in zip(items, stories, strict=False):
        ids = tokenizer.encode(story)
        assert list(prompt.tokens) == ids[: len(prompt.tokens)]
        assert prompt.text + prompt.reference == tokenizer.decode(ids) == story
        lengths.add(len(prompt.tokens))
    assert lengths == set(range(2, max(len(tokenizer.encode(story)) for story in stories)))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": stories[7]}))
    assert list(Continuations(Text(str(tmp_path / "t.jsonl"))).prompts(tokenizer)) == [items[7]]
    some = list(Continuations(source.text, limit=20, max_tokens=9).prompts(tokenizer))
    assert all(
        item.reason == "more than 9 tokens" if isinstance(item, Rejected) else len(item.tokens) < 10 for item in some
    )
    assert sum(isinstance(item, Prompt) for item in some) == 20
