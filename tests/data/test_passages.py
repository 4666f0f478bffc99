"""Passages: nothing lost, nothing in two splits."""

import pytest

from jaxdraft.data.passages import Beginnings, Passages
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
    prompts = Beginnings(passages, tokens=8, limit=5).prompts(tokenizer)
    assert len(prompts) == 5
    documents = list(passages.documents())
    for prompt in prompts:
        assert len(prompt.tokens) == 8
        assert prompt.tokens[0] == tokenizer.bos_id
        assert any(document.startswith(prompt.text) for document in documents)
    with pytest.raises(ConfigError, match="no eval passage of more than 9999 tokens"):
        Beginnings(passages, tokens=9999).prompts(tokenizer)


def test_a_wrong_split_is_named(text):
    with pytest.raises(ConfigError, match="must be one of train, seed, eval"):
        Passages(text, "test")
