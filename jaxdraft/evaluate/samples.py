"""The report's sample viewer: answers cut into blocks, and each block into what became of its tokens."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.words import decoding, number
from jaxdraft.tokenizers import Tokenizer, load_tokenizer

SHOWN_WITHOUT_SCRIPT = 2  # answers of each task

_MOST_TOKENS = 80_000  # on the page
_PROMPTS = (2, 8)  # of each task, at least and at most, whatever their length
_LONGEST_PROMPT = 1200  # characters shown
_CONTEXT = 8  # tokens before a text that is decoded


class Block(NamedTuple):
    """What one run of the target made of a draft's proposals, as text.

    Attributes:
      drafted: how many tokens the draft proposed.
      kept: how many of them stand in the answer.
      accepted: their text.
      refused: the first that the target refused; None where there was none, or where it was not written down.
      own: the target's token after them; None where an end token or the limit cut it off.
    """

    drafted: int
    kept: int
    accepted: str
    refused: str | None
    own: str | None

    @property
    def is_bonus(self) -> bool:
        """Whether the target's token came on top of a block that it accepted as a whole."""
        return self.kept == self.drafted

    @property
    def summary(self) -> str:
        """The block in words."""
        if self.own is None:
            return f"{self.kept} of {self.drafted} draft tokens stand here; the answer ends inside the block"
        ends = "and one more from the target" if self.is_bonus else "then the target's own"
        return f"{self.kept} of {self.drafted} draft tokens accepted, {ends}"


class Sample(NamedTuple):
    """An answer to show.

    Attributes:
      draft, task, decoding, block_size, prompt_id: which it is.
      prompt: its end, or its beginning and its end.
      blocks: the answer.
      tokens: how many it has.
      before: target runs that the draft before distillation needed for the same text; None where that is not known.
    """

    draft: str
    task: str
    decoding: str
    block_size: int
    prompt_id: str
    prompt: str
    blocks: list[Block]
    tokens: int
    before: int | None

    @property
    def rate(self) -> str:
        """Tokens per run of the target."""
        return number(self.tokens / max(1, len(self.blocks)))


def samples(run: RunDirectory, baseline: str | None) -> list[Sample]:
    """The first answers of each task, of every draft and block size; none where no tokenizer was found.

    Args:
      run: whose samples.
      baseline: the draft before distillation.
    """
    folder = run.tokenizer_folder()
    lines = list(_chosen(run.samples))
    if folder is None or not lines:
        return []
    tokenizer = load_tokenizer(Path(folder))
    runs_before = {_key(line): len(line["accepted"]) for line in run.samples if line["draft"] == baseline}
    return [
        Sample(
            line["draft"],
            line["task"],
            decoding(line),
            line["block_size"],
            str(line["id"]),
            _shortened(tokenizer.decode(line["prompt_tokens"]).strip()),
            blocks(tokenizer, line),
            len(line["tokens"]),
            runs_before.get(_key(line)) if not line.get("temperature") and line["draft"] != baseline else None,
        )
        for line in lines
    ]


def viewer(found: Sequence[Sample], best: str | None) -> dict[str, Any]:
    """What the page's script reads: choices, prompts, and blocks as lists.

    Args:
      found: all samples.
      best: the draft that is chosen first.
    """
    drafts = list(dict.fromkeys(sample.draft for sample in found))
    tasks = list(dict.fromkeys((sample.task, sample.decoding) for sample in found))
    sizes = sorted({sample.block_size for sample in found})
    prompts: dict[str, dict[str, str]] = {}
    answers: dict[str, Any] = {}
    for sample in found:
        place = tasks.index((sample.task, sample.decoding))
        prompts.setdefault(str(place), {})[sample.prompt_id] = sample.prompt
        key = f"{drafts.index(sample.draft)}/{place}/{sample.block_size}/{sample.prompt_id}"
        answers[key] = [list(block) for block in sample.blocks], sample.tokens, sample.before
    return {
        "drafts": drafts,
        "best": drafts.index(best) if best in drafts else 0,
        "tasks": [f"{task} ({how})" for task, how in tasks],
        "sizes": sizes,
        "prompts": prompts,
        "answers": answers,
    }


def first_of_each_task(found: Sequence[Sample], draft: str | None) -> list[Sample]:
    """A few answers of ``draft`` at its largest block size, for readers without scripts."""
    mine = [sample for sample in found if sample.draft == draft]
    largest = max((sample.block_size for sample in mine), default=None)
    shown: dict[tuple[str, str], list[Sample]] = {}
    for sample in mine:
        group = shown.setdefault((sample.task, sample.decoding), [])
        if sample.block_size == largest and len(group) < SHOWN_WITHOUT_SCRIPT:
            group.append(sample)
    return [sample for group in shown.values() for sample in group]


def blocks(tokenizer: Tokenizer, line: Mapping[str, Any]) -> list[Block]:
    """The blocks of a line of samples.jsonl."""
    prompt, tokens, accepted = line["prompt_tokens"], line["tokens"], line["accepted"]
    texts = _texts(tokenizer, prompt, tokens)
    drafted = line.get("drafted", [line["block_size"]] * len(accepted))
    refused = line.get("rejected", [-1] * len(accepted))
    found, start = [], 0
    for count, proposed, token in zip(accepted, drafted, refused, strict=True):
        end = min(start + count, len(tokens))
        is_shown = token >= 0 and end < len(tokens)
        struck = _texts(tokenizer, [*prompt, *tokens[:end]], [token])[0] if is_shown else None
        own = texts[end] if end < len(tokens) else None
        found.append(Block(proposed, end - start, "".join(texts[start:end]), struck, own))
        start = end + 1
    return found


def _texts(tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text of each token, decoded after a few of those before it that do not begin within a character."""
    start = max(0, len(before) - _CONTEXT)
    while start and tokenizer.decode(before[start:]).startswith("\N{REPLACEMENT CHARACTER}"):
        start -= 1
    context = before[start:]
    texts = tokenizer.fragments([*context, *tokens])[len(context) :]
    return [_named(tokenizer, token, text) for token, text in zip(tokens, texts, strict=True)]


def _named(tokenizer: Tokenizer, token: int, text: str) -> str:
    return "⟨end⟩" if token == tokenizer.eos_id and not text else text


def _chosen(lines: Sequence[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The first prompts of each task, so many that the page stays small; of several batch sizes the first."""
    settings = {_setting(line) for line in lines}
    mean = sum(len(line["tokens"]) for line in lines) / max(1, len(lines))
    least, most = _PROMPTS
    limit = max(least, min(most, int(_MOST_TOKENS / max(1, len(settings) * mean))))
    ids: dict[tuple[Any, ...], list[str]] = {}
    for line in lines:
        shown = ids.setdefault(_setting(line), [])
        if len(shown) < limit and str(line["id"]) not in shown:
            shown.append(str(line["id"]))
            yield line


def _setting(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["draft"], line["task"], decoding(line), line["block_size"]


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["task"], decoding(line), line["block_size"], str(line["id"])


def _shortened(text: str) -> str:
    half = _LONGEST_PROMPT // 2
    if len(text) <= _LONGEST_PROMPT:
        return text
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
