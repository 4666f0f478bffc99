"""Answers cut into blocks for the report's viewer."""

import json
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jaxdraft.evaluate import samples as samples_module
from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.samples import Block, Sample, blocks, first_of_each_task, samples, viewer
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import Tokenizer, load_tokenizer

END = 0
LETTERS = cast(
    Tokenizer,
    SimpleNamespace(
        eos_id=END,
        decode=lambda ids: "…",
        fragments=lambda ids: ["" if token == END else chr(96 + token) for token in ids],
    ),
)


def line(tokens: str, accepted: list[int], rejected: str | None = None, **more: Any) -> dict[str, Any]:
    """A line of samples.jsonl whose tokens are letters: "." is the end token, and "-" in ``rejected`` is none."""
    known = {".": END, "-": -1}
    ids = lambda text: [known.get(letter, ord(letter) - 96) for letter in text]
    found = {"prompt_tokens": ids("xy"), "tokens": ids(tokens), "accepted": accepted, "block_size": 3, **more}
    return found if rejected is None else {**found, "rejected": ids(rejected)}


def test_blocks() -> None:
    found = blocks(LETTERS, line("abcdefgh", [2, 3, 0], "p-q"))
    assert found == [Block(3, 2, "ab", "p", "c"), Block(3, 3, "def", None, "g"), Block(3, 0, "", "q", "h")]
    assert [block.is_bonus for block in found] == [False, True, False]
    assert found[0].summary == "2 of 3 draft tokens accepted, then the target's own"
    assert found[1].summary == "3 of 3 draft tokens accepted, and one more from the target"


@pytest.mark.parametrize(
    ("tokens", "accepted", "kept"), [("abcdef", [2, 3], 3), ("abcde", [2, 3], 2), ("abcd", [2, 1], 1)]
)
def test_a_block_that_is_cut_has_no_token_of_the_target(tokens: str, accepted: list[int], kept: int) -> None:
    last = blocks(LETTERS, line(tokens, accepted, "ppp"[: len(accepted)]))[-1]
    assert last == Block(3, kept, tokens[3:], None, None)
    assert last.summary == f"{kept} of 3 draft tokens stand here; the answer ends inside the block"


def test_what_was_not_written_down_is_left_out() -> None:
    assert blocks(LETTERS, line("abc", [1, 0])) == [Block(3, 1, "a", None, "b"), Block(3, 0, "", None, "c")]


def test_a_draft_may_stop_early() -> None:
    found = blocks(LETTERS, line("abcd", [1, 1], "-p", drafted=[1, 2]))
    assert found == [Block(1, 1, "a", None, "b"), Block(2, 1, "c", "p", "d")]
    assert found[0].is_bonus


def test_the_end_is_written_out() -> None:
    assert blocks(LETTERS, line("ab.", [1, 0], "..")) == [
        Block(3, 1, "a", "⟨end⟩", "b"),
        Block(3, 0, "", "⟨end⟩", "⟨end⟩"),
    ]


def trained(folder: Path) -> Tokenizer:
    train_sentencepiece([str(textwrap.__doc__), Path(textwrap.__file__).read_text()], folder, 400)
    return load_tokenizer(folder)


def test_texts_of_tokens_make_the_text(tmp_path: Path) -> None:
    """Also of characters that are spread over several tokens."""
    text = "Wörter über Bäume — 樹木 und Äpfel.\n" * 8
    tokenizer = trained(tmp_path)
    tokens = tokenizer.encode(text, bos=False)
    for start in range(12, 30):
        rest = tokens[start : start + 60]
        one_each = {"prompt_tokens": tokens[:start], "tokens": rest, "accepted": [0] * len(rest), "block_size": 1}
        shown = [block.own for block in blocks(tokenizer, one_each)]
        assert shown == tokenizer.fragments(tokens[: start + 60])[start:], start


def make_run(folder: Path, prompts: int, drafts: int, batch_sizes: tuple[int, ...] = (1,)) -> RunDirectory:
    trained(folder / "tokenizer")
    setting = {"task": "story", "temperature": 0.0, "top_p": 1.0, "block_size": 3}
    lines = [
        {
            **setting,
            "batch_size": batch,
            "draft": f"d{i}",
            "id": prompt,
            "prompt_tokens": [9],
            "tokens": [9, 9],
            "accepted": [1],
        }
        for batch in batch_sizes
        for i in range(drafts)
        for prompt in range(prompts)
    ]
    run = SimpleNamespace(samples=lines, tokenizer_folder=lambda: folder / "tokenizer")
    return cast(RunDirectory, run)


def test_the_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = samples(make_run(tmp_path, prompts=20, drafts=3, batch_sizes=(1, 8)), "d0")
    assert [(sample.draft, sample.prompt_id) for sample in few] == [
        (f"d{i}", str(n)) for i in range(3) for n in range(8)
    ]
    assert {sample.before for sample in few} == {None, 1}
    assert all((sample.before is None) == (sample.draft == "d0") for sample in few)
    monkeypatch.setattr(samples_module, "_MOST_TOKENS", 100)
    assert len(samples(make_run(tmp_path, prompts=9, drafts=10), None)) == 10 * 5  # two tokens each
    assert len(samples(make_run(tmp_path, prompts=9, drafts=100), None)) == 100 * 2


def test_the_viewer_has_every_sample() -> None:
    block = Block(3, 2, "ab", "p", "c")
    made = [
        Sample(draft, task, how, size, prompt, f"text of {prompt}", [block], 3, None)
        for draft in ("first", "second")
        for task, how in (("story", "greedy"), ("story", "T 0.6"))
        for size in (5, 3)
        for prompt in ("one", "two")
    ]
    data = json.loads(json.dumps(viewer(made, "second")))
    assert (data["drafts"], data["best"], data["sizes"]) == (["first", "second"], 1, [3, 5])
    assert data["tasks"] == ["story (greedy)", "story (T 0.6)"]
    assert data["prompts"]["1"] == {"one": "text of one", "two": "text of two"}
    assert len(data["answers"]) == len(made)
    assert data["answers"]["1/0/5/two"] == [[[3, 2, "ab", "p", "c"]], 3, None]
    static = first_of_each_task(made, "second")
    assert [(s.decoding, s.prompt_id) for s in static] == [(h, p) for h in ("greedy", "T 0.6") for p in ("one", "two")]
    assert {(sample.draft, sample.block_size) for sample in static} == {("second", 5)}


def test_a_text_does_not_begin_within_a_character() -> None:
    """Of bytes that do not make characters all are lost, as Hugging Face's byte fallback has it."""

    def decode(ids: Any, skip_special: bool = True) -> str:
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(ids)

    byte_wise = cast(Tokenizer, SimpleNamespace(eos_id=0, decode=decode))
    byte_wise.fragments = lambda ids: Tokenizer.fragments(byte_wise, ids)  # type: ignore[method-assign]
    prompt, answer = list("水木火".encode()), list("土金".encode())
    one_each = {"prompt_tokens": prompt, "tokens": answer, "accepted": [0] * 6, "block_size": 1}
    assert [block.own for block in blocks(byte_wise, one_each)] == ["", "", "土", "", "", "金"]
