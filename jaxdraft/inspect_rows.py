"""``jaxdraft inspect RUN --stage NAME``: random rows of a stage as text, or a Generate stage's account and answers.

Tokens that are no labels are told apart from those that are. What is shown was written by anyone: corpora, prompts and
models. It reaches the terminal as text, and not as what controls it.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdraft.data.quarantine import QUARANTINE
from jaxdraft.data.records import MANIFEST, PackedRows, read_manifest
from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.evaluate.words import decoding
from jaxdraft.home import Home
from jaxdraft.inspect import print_facts
from jaxdraft.models.hub import model_folder
from jaxdraft.tokenizers import Tokenizer, common_prefix, load_tokenizer
from jaxdraft.untrusted import bounded_lines, check_fields, damaged, is_plain_name, printable, read_json

_ACCOUNT = "answers.json"
_WITH_ROWS = ("Prepare", "Subset", "Generate", "Score")
_REMEDY = "delete it and run the recipe again"
_SET_ASIDE = 5  # rows of the quarantine that are shown
_OF_ANSWERS = {"prompts": dict, "answers": dict, "writers": dict, "finish": dict, "duplicates": int, "tokens": int}
_OF_ANSWERS |= {"lengths": dict, "shards": list}
_OF_LINE = {"id": str, "writer": str, "prompt": str, "temperature": object, "top_p": object}
_OF_ANSWER = {"finish": str, "prompt_tokens": list, "tokens": list}
_RECIPE = {"stages": list, "target": object, "tokenizer": object}
_DIM, _PLAIN = "\033[2m", "\033[0m"


def inspect_stage(home: Home, name: str, count: int, seed: int) -> None:
    """Prints random rows of a stage, or random answers of a Generate stage after its account.

    Args:
      home: the run directory.
      name: of the stage.
      count: how many are shown; all where there are fewer.
      seed: of the choice.

    Raises:
      ConfigError: no run directory, no such stage, one that makes no rows or is not done, or files of it that are
        damaged or were made with another tokenizer.
    """
    home.fetch_records()
    if not (home.folder / "recipe.json").is_file():
        raise ConfigError(f"{home} is not a run directory: it has no recipe.json; `jaxdraft run` makes one")
    recipe = _read_json(home.folder / "recipe.json", _RECIPE)
    kind = _finished(home, name, recipe["stages"])
    tokenizer = _tokenizer(home, recipe)
    home.fetch(name, (MANIFEST, _ACCOUNT, QUARANTINE))
    folder, rng = home.folder / name, np.random.default_rng(seed)
    if read_manifest(folder)["tokenizer"] != tokenizer.fingerprint():
        raise ConfigError(f"{folder} was made with another tokenizer than {tokenizer.folder} holds now")
    if kind == "Generate":
        account = _read_json(folder / _ACCOUNT, _OF_ANSWERS)
        with damaged(folder / _ACCOUNT, f": {_REMEDY}"):
            print_facts(_account(account))
            for shard in account["shards"]:
                check_fields(shard, {"file": str, "answers": int, "sha256": str})
            if not account["shards"] or not all(0 < shard["answers"] < 1 << 31 for shard in account["shards"]):
                raise ValueError("no shards, or one without answers")
        _print_set_aside(folder / QUARANTINE)
        _print_answers(home, name, account["shards"], tokenizer, rng, count)
    else:
        home.fetch(name)
        packed = PackedRows(folder, verify=False)  # the hash of every shard is a lot to wait for
        with damaged(folder / MANIFEST, f": {_REMEDY}"):
            print_facts(_rows(packed.manifest))
        _print_set_aside(folder / QUARANTINE)
        _print_rows(packed, tokenizer, rng, count)


def _finished(home: Home, name: str, stages: Sequence[Mapping[str, Any]]) -> str:
    """The kind of a stage that is done and made rows."""
    with damaged(home.folder / "recipe.json", f": {_REMEDY}"):
        for stage in stages:
            check_fields(stage, {"name": str, "kind": str})
        kinds = {stage["name"]: stage["kind"] for stage in stages}
    if name not in kinds:
        raise ConfigError(unknown_name("stage", name, list(kinds)))
    if kinds[name] not in _WITH_ROWS:
        others = ", ".join(other for other, kind in kinds.items() if kind in _WITH_ROWS) or "none"
        raise ConfigError(
            f"{name} is a {kinds[name]} stage, which makes no rows and no answers; stages that do: {others}"
        )
    record = home.folder / name / "stage.json"
    if not record.is_file():
        raise ConfigError(f"{name} has not run yet: `jaxdraft run` with this run directory makes it")
    if (status := _read_json(record, {"status": str})["status"]) != "done":
        raise ConfigError(f"{name} is not done ({status}): the same `jaxdraft run` goes on with it")
    return kinds[name]


def _tokenizer(home: Home, recipe: Mapping[str, Any]) -> Tokenizer:
    """That of a stage or of a model folder, as the recipe says; without a word on it, the target's."""
    given = recipe["target"] if recipe["tokenizer"] is None else recipe["tokenizer"]
    if isinstance(given, str):
        if not is_plain_name(given):
            raise ConfigError(f"{home}/recipe.json: tokenizer {printable(given)!r} is no stage's name")
        home.fetch(given)
        return load_tokenizer(home.folder / given)
    with damaged(home.folder / "recipe.json", f": {_REMEDY}"):
        check_fields(given, {"path": str, "revision": object})
        path, revision = given["path"], given["revision"] and str(given["revision"])
    return load_tokenizer(model_folder(path, revision))


# Packed rows


def _rows(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "rows", f"{manifest['rows']:,} of {manifest['length']:,} tokens"
    others = "dimmed" if sys.stdout.isatty() else "between ‹ and ›"
    yield "labels", f"{manifest['labels']:,} of {manifest['tokens']:,} tokens; the others stand {others}"
    if stored := manifest.get("target_logits"):
        yield "stored", f"the target's {stored['k']} most likely tokens, at temperature {stored['temperature']:g}"
    if counts := manifest["counts"]:
        yield "packing", _listed({key.replace("_", " "): value for key, value in counts.items()})
    if quarantined := manifest.get("quarantined"):
        yield "set aside", _listed(quarantined)


def _print_rows(packed: PackedRows, tokenizer: Tokenizer, rng: np.random.Generator, count: int) -> None:
    for number in sorted(rng.choice(len(packed), min(count, len(packed)), replace=False).tolist()):
        row = packed[number]
        segments, labels, last = row["segment_ids"], row["loss_mask"] > 0, int(row["segment_ids"].max())
        size = int(np.count_nonzero(segments))
        facts = [_number(last, "segment"), _number(size, "token"), _number(int(labels.sum()), "label")]
        print(f"\nrow {number} of {len(packed):,}: {', '.join(facts)}, {packed.length - size} padding")
        for segment in range(1, last + 1):
            places = np.flatnonzero(segments == segment)
            mask = labels[places]
            told = f"  segment {segment}: {_number(len(places), 'token')}, {_number(int(mask.sum()), 'label')}"
            print(told + _target_of(row, places[mask]))
            _print_text(tokenizer, row["tokens"][places].tolist(), mask.tolist())


def _target_of(row: Mapping[str, np.ndarray], labels: np.ndarray) -> str:
    """What the stored target thinks of these labels; what it says of a token stands at the one before it."""
    if "target_ids" not in row or not len(labels):
        return ""
    k = row["target_ids"].shape[-1]
    probability = np.exp(row["target_log_probs"][labels - 1, k].astype(np.float32)).mean()
    first = (row["target_ids"][labels - 1, 0] == row["tokens"][labels]).mean()
    return f"; the target gives a label {probability:.3f} on average, {first:.0%} are its first choice"


# Answers


def _account(account: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    prompts, answers = account["prompts"], account["answers"]
    skipped, errors = prompts["skipped"], answers["errors"]
    yield "prompts", f"{prompts['read']:,} read, {prompts['asked']:,} asked, {_total('skipped', skipped)}"
    yield "answers", f"{answers['asked']:,} asked, {answers['written']:,} written, {_total('failed', errors)}"
    yield "written by", _listed(account["writers"])
    yield "ended by", _listed(account["finish"])
    yield "duplicates", f"{account['duplicates']:,}"
    yield "tokens", f"{account['tokens']:,}"
    for temperature, spread in account["lengths"].items():
        long = ", ".join(f"{name} {spread[name]:,}" for name in ("mean", "median", "p95", "max"))
        yield decoding({"temperature": float(temperature)}), f"{_number(spread['answers'], 'answer')}; tokens: {long}"


def _print_answers(
    home: Home,
    name: str,
    shards: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    count: int,
) -> None:
    """Reads no shard but those that hold the answers that were chosen."""
    ends = np.cumsum([shard["answers"] for shard in shards])
    chosen = np.sort(rng.choice(ends[-1], min(count, ends[-1]), replace=False))
    for i, numbers in itertools.groupby(chosen.tolist(), key=lambda n: int(np.searchsorted(ends, n, side="right"))):
        lines = _shard_lines(home, name, shards[i])
        with damaged(home.folder / name / shards[i]["file"], f": {_REMEDY}"):
            for number in numbers:
                place = number - int(ends[i]) + shards[i]["answers"]
                _print_answer(json.loads(lines[place]), f"{shards[i]['file']}, line {place + 1}", tokenizer)


def _print_answer(line: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> None:
    check_fields(line, _OF_LINE | ({"error": str} if "error" in line else _OF_ANSWER))
    facts = [line["writer"], decoding(line)]
    if "error" in line:
        facts.append(f"no answer: {line['error']}")
    else:
        facts.append(f"ended by {line['finish']}, {_number(len(line['tokens']), 'token')}")
    print(f"\n{printable(line['id'])} ({where})")
    print(f"  {printable(', '.join(facts))}")
    if "error" in line:
        _print_spans([(line["prompt"], False)])
    else:
        prompt, answer = line["prompt_tokens"], line["tokens"]
        _print_text(tokenizer, prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _shard_lines(home: Home, name: str, shard: Mapping[str, Any]) -> list[str]:
    file = shard["file"]
    if not is_plain_name(file):
        raise ConfigError(f"{home}/{name}/{_ACCOUNT}: shard {printable(file)!r} is not a file of this folder")
    home.fetch(name, (file,))
    content = _there(home.folder / name / file).read_bytes()
    if hashlib.sha256(content).hexdigest() != shard["sha256"]:
        raise ConfigError(f"{home}/{name}/{file} is damaged, by its sha256 in {_ACCOUNT}: delete it and run again")
    return content.decode("utf-8").split("\n")


# What both have in common


def _print_set_aside(path: Path) -> None:
    """The first rows of the quarantine, where there are any."""
    if not path.is_file():
        return
    print(f"\nset aside, the first of {path.name}")
    with path.open("rb") as file, damaged(path, f": {_REMEDY}"):
        for line in itertools.islice(bounded_lines(file, path), _SET_ASIDE):
            row = json.loads(line)
            print(printable(f"  {row['where']}: {row['reason']}"))


def _print_text(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[bool]) -> None:
    """The text of ids, special tokens and all. A character of several tokens belongs to the one that completes it."""
    text = tokenizer.decode(ids, skip_special=False)
    spans: list[tuple[str, bool]] = []
    start = end = 0
    for is_label, run in itertools.groupby(labels):
        end += len(list(run))
        stop = max(start, common_prefix(tokenizer.decode(ids[:end], skip_special=False), text))
        spans.append((text[start:stop], is_label))
        start = stop
    _print_spans(spans)


def _print_spans(spans: Sequence[tuple[str, bool]]) -> None:
    """Text with what is no label dimmed on a terminal, elsewhere between ‹ and ›."""
    before, after = (_DIM, _PLAIN) if sys.stdout.isatty() else ("‹", "›")
    shown = [(printable(text, keep="\n\t"), is_label) for text, is_label in spans]
    text = "".join(text if is_label else f"{before}{text}{after}" for text, is_label in shown)
    print("    " + text.replace("\n", "\n    "))


def _number(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _total(what: str, reasons: Mapping[str, int]) -> str:
    return f"{sum(reasons.values()):,} {what}" + (f": {_listed(reasons)}" if reasons else "")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path} is missing: run the recipe again, which makes what is gone")
    return path


def _read_json(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """An object that has these fields."""
    return read_json(_there(path), fields=fields, remedy=_REMEDY)
