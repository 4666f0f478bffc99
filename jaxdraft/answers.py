"""A Generate stage's answers on disk: shards that exist only when they are whole, and an account of every question.

A shard holds questions of one writer and one length bucket. What is in it depends neither on who writes it nor on what
is written beside it, so any process may write any shard, once or again. Its record, a file of the same name, is written
last: number of answers, sha256 of each file, and what they were made by.
"""

import collections
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.data.pipeline import Example
from jaxdraft.data.records import Format
from jaxdraft.data.token_scores import TokenScores, read_scores, with_prompt, write_scores
from jaxdraft.errors import ConfigError
from jaxdraft.files import sha256, write_json
from jaxdraft.questions import Question
from jaxdraft.tracking import read_jsonl, write_jsonl

ACCOUNT = "answers.json"
_QUANTILES = {"median": 0.5, "p95": 0.95}
_BINS = 16


class Shard(NamedTuple):
    """Questions that are answered in one file.

    Attributes:
      questions: of one writer and one bucket, in the stage's order.
      path: the file; it holds a line for each question, in this order.
    """

    questions: list[Question]
    path: Path

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def scores(self) -> Path:
        """What the target said of the answers' tokens, where that is kept."""
        return self.path.with_suffix(".array_record")

    @property
    def files(self) -> list[Path]:
        """Those of its files that there are, but for its record."""
        return [path for path in (self.path, self.scores) if path.exists()]

    @property
    def writer(self) -> str:
        return self.questions[0].writer


def cut(questions: Sequence[Question], size: int, folder: Path) -> list[Shard]:
    """All questions in shards of at most ``size``."""
    group = lambda question: (question.writer, question.bucket)
    groups = itertools.groupby(sorted(questions, key=group), key=group)
    parts = [part for _, members in groups for part in _batched(list(members), size)]
    return [Shard(part, folder / f"responses-{i:05d}-of-{len(parts):05d}.jsonl") for i, part in enumerate(parts)]


def _batched(items: list[Question], size: int) -> Iterator[list[Question]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def commit(
    shard: Shard,
    lines: Sequence[Mapping[str, Any]],
    generator: Mapping[str, Any],
    scores: Sequence[TokenScores] | None = None,
    format: Format | None = None,
) -> list[Path]:
    """Writes a shard and then its record, and returns all its files.

    Args:
      scores: of the lines that are answers; with ``format``, of the rows that will be made of them.
    """
    write_jsonl(shard.path, lines)
    if scores is not None and format is not None:
        write_scores(shard.scores, scores, format)
    hashes = {path.name: sha256(path) for path in shard.files}
    write_json(shard.record, {"answers": len(lines), "sha256": hashes, "generator": dict(generator)})
    return [*shard.files, shard.record]


def missing(shards: Sequence[Shard], generator: Mapping[str, Any], say: Callable[[str], None]) -> list[int]:
    """Which shards are still to be written; one that is damaged is named and counts among them.

    Raises:
      ConfigError: a shard was made by another generator.
    """
    found = []
    for i, shard in enumerate(shards):
        if not shard.record.exists():
            if shard.path.exists():
                say(f"    {shard.path.name} has no record {shard.record.name}; the shard is written again")
            found.append(i)
            continue
        try:
            record = json.loads(shard.record.read_text("utf-8"))
            made_by, hashes = dict(record["generator"]), dict(record["sha256"])
            if record["answers"] != len(shard.questions):
                raise ValueError(record["answers"])
        except (ValueError, LookupError, TypeError):
            say(f"    {shard.record.name} is damaged; the shard is written again")
            found.append(i)
            continue
        if differing := [key for key, value in generator.items() if made_by.get(key) != value]:
            key = differing[0]
            raise ConfigError(
                f"{shard.path}: written with {key} {made_by.get(key)!r}, here it is {generator[key]!r}: "
                f"go on where it was begun, or delete {shard.path.parent} to write all answers anew"
            )
        kept = {path.name: sha256(path) for path in shard.files}
        if lost := [name for name, expected in hashes.items() if kept.get(name) != expected]:
            what = "damaged: its sha256 is not that of its record" if lost[0] in kept else "gone"
            say(f"    {shard.path.with_name(lost[0])} is {what}; the shard is written again")
            found.append(i)
    return found


def account(shards: Sequence[Shard], skipped: Mapping[str, int], generator: Mapping[str, Any]) -> dict[str, Any]:
    """Reads every answer once and says what became of every question.

    Args:
      shards: all of the stage.
      skipped: prompts that gave no question, by reason.
      generator: what wrote the answers.

    Raises:
      ConfigError: a file does not hold its questions, each once; the message names it.
    """
    errors: collections.Counter[str] = collections.Counter()
    finishes: collections.Counter[str] = collections.Counter()
    writers: collections.Counter[str] = collections.Counter()
    lengths: dict[float, list[int]] = collections.defaultdict(list)
    seen_answers: set[bytes] = set()
    prompts: set[str] = set()
    questions = duplicates = 0
    for shard in shards:
        lines = read_jsonl(shard.path)
        if [line["id"] for line in lines] != [question.id for question in shard.questions]:
            raise ConfigError(f"{shard.path} does not hold the answers to its questions: delete it and run again")
        questions += len(lines)
        for question, line in zip(shard.questions, lines, strict=True):
            if "error" not in line and tuple(line["prompt_tokens"]) != question.prompt.tokens:
                raise ConfigError(f"{shard.path} answers other prompts than are asked now: delete it and run again")
            prompts.add(question.prompt.id)
            if "error" in line:
                errors[line["error"]] += 1
                continue
            finishes[line["finish"]] += 1
            writers[line["writer"]] += 1
            lengths[line["temperature"]].append(len(line["tokens"]))
            content = hashlib.sha256(json.dumps([line["prompt_tokens"], line["tokens"]]).encode()).digest()
            duplicates += content in seen_answers
            seen_answers.add(content)
    return {
        "prompts": {"read": len(prompts) + sum(skipped.values()), "asked": len(prompts), "skipped": dict(skipped)},
        "answers": {
            "asked": questions,
            "written": finishes.total(),
            "errors": dict(sorted(errors.items())),
        },
        "finish": dict(sorted(finishes.items())),
        "writers": dict(sorted(writers.items())),
        "duplicates": duplicates,
        "tokens": sum(map(sum, lengths.values())),
        "lengths": {f"{temperature:g}": _spread(found) for temperature, found in sorted(lengths.items())},
        "generator": dict(generator),
        "shards": [
            {"file": shard.path.name, "answers": len(shard.questions), "sha256": sha256(shard.path)} for shard in shards
        ],
    }


def examples(
    shards: Iterable[Shard], prompt_labels: Callable[[Question], Sequence[int]], format: Format | None = None
) -> Iterator[Example]:
    """Every question that was answered, as an example to pack.

    Args:
      prompt_labels: the loss mask of a question's prompt.
      format: of rows that store what the target said as it wrote; else that is left out.
    """
    for shard in shards:
        scores = iter(()) if format is None else read_scores(shard.scores, format)
        for question, line in zip(shard.questions, read_jsonl(shard.path), strict=True):
            if "error" in line:
                continue
            prompt, answer = line["prompt_tokens"], line["tokens"]
            said = {} if format is None else with_prompt(next(scores), len(prompt))._asdict()
            yield {"tokens": prompt + answer, "loss_mask": [*prompt_labels(question), *[1] * len(answer)], **said}


def _spread(lengths: list[int]) -> dict[str, Any]:
    """Tokens of answers: their mean, quantiles, and how many lie in each of at most 16 bins of equally many lengths."""
    width = max(lengths) // _BINS + 1
    counts = np.bincount(np.array(lengths) // width)
    return {
        "answers": len(lengths),
        "mean": round(float(np.mean(lengths)), 2),
        **{name: int(np.quantile(lengths, q, method="higher")) for name, q in _QUANTILES.items()},
        "max": max(lengths),
        "histogram": {"counts": counts.tolist(), "width": width},
    }
