"""``jaxdraft verify RUN``: whether every file of a run directory is still what the run's records say.

Records hold hashes of hashes: ``stage.json`` those of the stage's files and of what it read, ``manifest.json`` and
``answers.json`` those of their shards, ``checkpoints/N.json`` those of a checkpoint. All are computed anew, and each
stage is held against the ones that it read. Nothing is written, no model is loaded and no device is used.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jaxdraft import file_hashes
from jaxdraft.data.records import MANIFEST, random_access
from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.files import sha256, sizes
from jaxdraft.home import CHECKPOINTS, RECORD, SUPERSEDED, Home, saved_steps
from jaxdraft.inspect import as_bytes
from jaxdraft.provenance import output_hash, stage_fingerprint
from jaxdraft.redaction import HIDDEN
from jaxdraft.remote import is_url
from jaxdraft.settings import changes
from jaxdraft.tracking import progress_bar
from jaxdraft.untrusted import check_fields, damaged, is_below, is_plain_name, printable, read_json

_ACCOUNT = "answers.json"
# What a stage keeps for itself, and no later one reads.
OWN = (RECORD, "timing.jsonl", "profile/*", "measured/*", "rows-*.json", "responses-*.json", f"{CHECKPOINTS}/*")
_FIELDS = {
    "name": str,
    "settings": dict,
    "shape": object,
    "inputs": dict,
    "seed": int,
    "fingerprint": str,
    "status": str,
}
_DONE = {"outputs": dict, "output": str}
_AGAIN = "run the same command again"


@dataclasses.dataclass
class Checked:
    """What was found in a stage's folder.

    Attributes:
      name: of the stage; of one that was set aside ``superseded/NAME.N``.
      status: ``"done"``, ``"running"`` or ``"not run"``.
      files: how many were hashed.
      size: their bytes.
      problems: what is wrong, a sentence each that names the file and the remedy.
      remarks: what else there is to say.
    """

    name: str
    status: str = "not run"
    files: int = 0
    size: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)


def verify(home: Home, only: str | None = None, superseded: bool = False) -> list[Checked]:
    """Hashes a run directory anew and says what is wrong with each of its stages.

    Args:
      home: the run directory.
      only: the one stage to look at; ``None`` takes all, and ``run.json``.
      superseded: look at what was set aside too.

    Raises:
      ConfigError: no run directory, or no such stage.
    """
    recipe = read_recipe(home)
    stages = {stage["name"]: stage for stage in recipe["stages"]}
    if only is not None and only not in stages:
        raise ConfigError(unknown_name("stage", only, list(stages)))
    chosen = list(stages) if only is None else [only]
    records = {name: _record(home.folder / name) for name in stages}
    unfetched: dict[str, str] = {}
    for name in chosen:
        try:
            home.fetch(name)
        except (ConfigError, OSError) as error:  # what did come from a bucket is looked at all the same
            unfetched[name] = str(error)
    places = {name: home.folder / name for name in chosen}
    if superseded:
        aside = sorted((home.folder / SUPERSEDED).glob("*"))
        places |= {f"{SUPERSEDED}/{folder.name}": folder for folder in aside}
        records |= {f"{SUPERSEDED}/{folder.name}": _record(folder) for folder in aside}
    with progress_bar(sum(sum(sizes(place).values()) for place in places.values()), "verify", "B") as bar:
        found = [_Folder(place, bar.update).check(name, records[name]) for name, place in places.items()]
        bar.update(bar.total - bar.n)  # files that have no hash
    for checked in found:
        checked.problems += [unfetched[checked.name]] if checked.name in unfetched else []
        record = records[checked.name]
        if checked.name in stages and isinstance(record, dict):
            checked.problems += _out_of_place(record, stages[checked.name], recipe["seed"], records)
    if only is None:
        found.append(_check_run(home, records))
    return found


def read_recipe(home: Home) -> dict[str, Any]:
    """``recipe.json`` of a run directory, whose records are brought up to date.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    home.fetch_records()
    path = home.folder / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"{home} is not a run directory: it has no recipe.json; `jaxdraft run` makes one")
    recipe = read_json(path, fields={"stages": list, "seed": int})
    with damaged(path):
        for stage in recipe["stages"]:
            check_fields(stage, {"name": str, "kind": str})
            if not is_plain_name(stage["name"]):
                raise ValueError(f"{stage['name']!r} is no stage's name")
    return recipe


def _record(folder: Path) -> dict[str, Any] | str | None:
    """A stage's record, what is wrong with it, or ``None`` where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    remedy = f"delete the folder {folder} to run the stage again"
    try:
        record = read_json(path, fields=_FIELDS, remedy=remedy)
        with damaged(path, f": {remedy}"):
            check_fields(record, _DONE if record["status"] == "done" else {})
    except ConfigError as error:
        return str(error)
    return record


class _Folder:
    """The folder of a stage while it is hashed; ``progress`` is told the bytes."""

    def __init__(self, folder: Path, progress: Callable[[int], object]):
        self._folder, self._progress = folder, progress
        self._hashes: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    def check(self, name: str, record: dict[str, Any] | str | None) -> Checked:
        """All that the folder's own records tell of it."""
        checked = Checked(name)
        if isinstance(record, str):
            checked.status, checked.problems = "damaged", [record]
        elif record is not None:
            checked.status = record["status"]
            problems = list(self._own(record))
            for part in (self._rows, self._answers, self._parts):
                try:
                    with damaged(self._folder, f": {_AGAIN}"):
                        problems += part()
                except ConfigError as error:
                    problems.append(str(error))
            checked.files = len(self._hashes)
            checked.size = sum(self._sizes.values())
            self._checkpoints(checked)
            checked.problems = list(dict.fromkeys([*problems, *checked.problems]))
            if checked.status == "done":
                self._unknown(checked, record["outputs"])
        return checked

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            self._hashes[name] = sha256(self._folder / name)
            self._sizes[name] = (self._folder / name).stat().st_size
            self._progress(self._sizes[name])
        return self._hashes[name]

    def _compare(self, name: str, expected: str) -> Iterator[str]:
        path = self._folder / name
        if not path.is_file():
            yield f"{path} is gone: {_AGAIN}"
        elif self._hash(name) != expected:
            yield f"{path} is damaged or was changed, by its sha256: delete it and {_AGAIN}"

    def _own(self, record: Mapping[str, Any]) -> Iterator[str]:
        place, remedy = self._folder / RECORD, f"delete the folder {self._folder} to run the stage again"
        made_of = (record["settings"], record["shape"], record["inputs"], record["seed"])
        hidden = HIDDEN in json.dumps(made_of)  # the fingerprint is of what stood there
        if not hidden and record["fingerprint"] != stage_fingerprint(*made_of):
            yield f"{place}: fingerprint is not that of its settings, shape, inputs and seed: {remedy}"
        for name, expected in record.get("outputs", {}).items():
            if is_below(name):
                yield from self._compare(name, expected)
            else:
                yield f"{place}: output {name!r} is not a file of this folder: {remedy}"
        if record["status"] == "done" and record["output"] != output_hash(record["outputs"]):
            yield f"{place}: output is not the hash of outputs: {remedy}"

    def _rows(self) -> Iterator[str]:
        if not (self._folder / MANIFEST).is_file():
            return
        manifest = read_json(self._folder / MANIFEST)
        for total in ("rows", "tokens", "labels"):
            if manifest[total] != (found := sum(shard[total] for shard in manifest["shards"])):
                yield f"{self._folder / MANIFEST}: {total} is {manifest[total]}, its shards have {found}: {_AGAIN}"
        for shard in manifest["shards"]:
            yield from self._shard(shard)

    def _shard(self, shard: Mapping[str, Any]) -> Iterator[str]:
        path = self._folder / _plain(shard["file"])
        wrong = list(self._compare(path.name, shard["sha256"]))
        yield from wrong
        if not wrong and shard["rows"] != (rows := random_access(path).num_records()):
            yield f"{path} has {rows} rows, its record says {shard['rows']}: delete it and {_AGAIN}"

    def _answers(self) -> Iterator[str]:
        if not (self._folder / _ACCOUNT).is_file():
            return
        for shard in read_json(self._folder / _ACCOUNT)["shards"]:
            path = self._folder / _plain(shard["file"])
            wrong = list(self._compare(path.name, shard["sha256"]))
            yield from wrong
            if not wrong and shard["answers"] != (lines := path.read_bytes().count(b"\n")):
                yield f"{path} has {lines} answers, {_ACCOUNT} says {shard['answers']}: delete it and {_AGAIN}"

    def _parts(self) -> Iterator[str]:
        """What a stage keeps of its parts, so that one that was stopped can go on with them."""
        for path in sorted(self._folder.glob("rows-*.json")):
            if shard := read_json(path)["shard"]:
                yield from self._shard(shard)
        for path in sorted(self._folder.glob("responses-*.json")):
            for name, expected in read_json(path)["sha256"].items():
                yield from self._compare(_plain(name), expected)

    def _checkpoints(self, checked: Checked) -> None:
        folder = self._folder / CHECKPOINTS
        saved = set(saved_steps(self._folder))
        recorded = {
            int(path.stem)
            for path in folder.glob("[0-9]*.json")
            if file_hashes.is_complete(path) or path.with_suffix("").is_dir()  # else it was never finished
        }
        if bare := sorted(saved - recorded):
            checked.remarks.append(f"{folder}: {', '.join(map(str, bare))} without hashes: a restore checks the arrays")
        for step in sorted(recorded):
            try:
                wrong = file_hashes.damage(folder / str(step), folder / f"{step}.json")
            except FileNotFoundError as error:
                wrong = [f"{error.filename} is gone"]
            now = set(saved_steps(self._folder)) if wrong and checked.status != "done" else set()
            if step not in now and step < max(now, default=0):
                continue  # a newer one took its place; its record goes when the next is saved
            checked.problems += [f"{sentence}: a restore takes an older checkpoint" for sentence in wrong]
        for step in saved:
            files = sizes(folder / str(step))
            size = sum(files.values())
            checked.files, checked.size = checked.files + len(files), checked.size + size
            self._progress(size)

    def _unknown(self, checked: Checked, outputs: Mapping[str, str]) -> None:
        """Files that no record speaks of."""
        known = lambda name: name in outputs or name in self._hashes or any(fnmatch(name, own) for own in OWN)
        if others := sorted(name for name in sizes(self._folder) if not known(name)):
            shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            checked.remarks.append(f"of no record: {shown}")


def _plain(name: str) -> str:
    if not is_plain_name(name):
        raise ConfigError(f"{name!r} is not a file of this folder")
    return name


def _out_of_place(
    record: Mapping[str, Any], planned: Mapping[str, Any], seed: int, records: Mapping[str, Any]
) -> Iterator[str]:
    """Where a stage is not that of ``recipe.json``, or has read what is no longer there."""
    settings = {name: value for name, value in planned.items() if name != "kind"}
    if different := changes(record, {**record, "settings": settings, "seed": seed}):
        yield f"{record['name']} is not the stage of recipe.json, {'; '.join(different)}: {_AGAIN}"
    for name, read in record["inputs"].items():
        other = records.get(name)
        if isinstance(other, dict) and (other["status"] != "done" or other["output"] != read):
            now = "has been made anew since" if other["status"] == "done" else "is being made anew"
            yield f"{record['name']} has read {name}, which {now}: {_AGAIN}"


def _check_run(home: Home, records: Mapping[str, Any]) -> Checked:
    """``run.json``, where it says what the stages made."""
    checked = Checked("run.json", "not there")
    path = home.folder / "run.json"
    if not path.is_file():
        checked.remarks.append("the run was stopped before its first stage")
        return checked
    checked.status, checked.files, checked.size = "done", 1, path.stat().st_size
    try:
        outputs = read_json(path, remedy=_AGAIN).get("outputs", {})
        with damaged(path, f": {_AGAIN}"):
            check_fields({"outputs": outputs}, {"outputs": dict})
    except ConfigError as error:
        checked.problems.append(str(error))
        return checked
    for name, output in outputs.items():
        record = records.get(name)
        if isinstance(record, dict) and record["status"] == "done" and record["output"] != output:
            checked.problems.append(f"{path} has another output of {name} than its {RECORD}: {_AGAIN}")
    return checked


def print_checked(home: Home, found: Sequence[Checked], superseded: bool = False) -> None:
    """A line for each stage, then what is wrong and what else there is to say."""
    width = max(len(checked.name) for checked in found)
    for checked in found:
        sound = {"done": "intact", "running": "intact, not done"}.get(checked.status, checked.status)
        verdict = f"{len(checked.problems)} wrong" if checked.problems else sound
        size = f"{checked.files:>6,} files {as_bytes(checked.size):>8}" if checked.files else " " * 21
        print(f"{printable(checked.name):<{width}} {size}  {verdict}")
    notes = [remark for checked in found for remark in checked.remarks]
    if home.is_held():
        notes.append("a run is at work in it now: what it had not written to its end may look wrong")
    if is_url(str(home)):
        notes.append("checkpoints in a bucket are checked when they are restored")
        notes.append(f"{SUPERSEDED}/ in a bucket is not looked at")
    elif not superseded and (aside := len(list((home.folder / SUPERSEDED).glob("*")))):
        notes.append(f"left out: {SUPERSEDED}/, {aside} stages; --superseded looks at them too")
    for mark, lines in (("wrong", [problem for checked in found for problem in checked.problems]), ("note", notes)):
        for line in lines:
            print(f"{mark}: {printable(line)}")
