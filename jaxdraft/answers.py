"""A Generate stage's answers on disk: shards that exist only when they are whole, and an account of every question.

A shard holds questions of one writer and one length bucket. What is in it depends neither on who writes it nor on what
is written beside it, so any process may write any shard, once or again. Its record, a file of the same name, is written
after it: number of answers, sha256, and what they were made by.
"""

import collections
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.errors import ConfigError
from jaxdraft.questions import Question
from jaxdraft.tracking import read_jsonl, write_json, write_jsonl

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


def commit(shard: Shard, lines: Sequence[Mapping[str, Any]], generator: Mapping[str, Any]) -> list[Path]:
    """Writes a shard and then its record, and returns both files."""
    write_jsonl(shard.path, lines)
    record = {"answers": len(lines), "sha256": _sha256(shard.path), "generator": dict(generator)}
    write_json(shard.record, record)
    return [shard.path, shard.record]


def missing(shards: Sequence[Shard], generator: Mapping[str, Any], say: Callable[[str], None]) -> list[int]:
    """Which shards are still to be written; one that is damaged is named and counts among them.

    Raises:
      ConfigError: a shard was made by another generator.
    """
    found = []
    for i, shard in enumerate(shards):
        if not (shard.record.exists() and shard.path.exists()):
            found.append(i)
            continue
        record = json.loads(shard.record.read_text("utf-8"))
        if differing := [key for key, value in generator.items() if record["generator"].get(key) != value]:
            key = differing[0]
            raise ConfigError(
                f"{shard.path}: written with {key} {record['generator'].get(key)!r}, here it is {generator[key]!r}: "
                f"go on where it was begun, or delete {shard.path.parent} to write all answers anew"
            )
        if record["sha256"] != _sha256(shard.path):
            say(f"    {shard.path} is damaged (its sha256 is not that of its record) and is written again")
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
            {"file": shard.path.name, "answers": len(shard.questions), "sha256": _sha256(shard.path)}
            for shard in shards
        ],
    }


def examples(
    shards: Iterable[Shard], prompt_labels: Callable[[Question], Sequence[int]]
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, loss mask) of every question that was answered; ``prompt_labels`` is the mask of its prompt."""
    for shard in shards:
        for question, line in zip(shard.questions, read_jsonl(shard.path), strict=True):
            if "error" not in line:
                prompt, answer = line["prompt_tokens"], line["tokens"]
                yield prompt + answer, [*prompt_labels(question), *[1] * len(answer)]


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
