"""``jaxdraft diff RUN RUN``: where two runs part, down to the step, the field and the token.

Stages are compared in their order, and of each the files in the order in which they came about, so the first difference
that is told is the one to look into. Whatever is a time, or follows from one, is left out.
"""

import filecmp
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.data.records import MANIFEST, PackedRows, random_access
from jaxdraft.errors import ConfigError
from jaxdraft.files import sizes
from jaxdraft.home import RECORD, Home
from jaxdraft.models.folder import opened
from jaxdraft.provenance import differences
from jaxdraft.settings import shortened
from jaxdraft.tracking import progress_bar
from jaxdraft.untrusted import damaged, is_below, printable, read_json
from jaxdraft.verify import OWN, read_recipe

# A field whose name has one of these in it is a time or follows from one.
TIMES = ("second", "latency", "token_rate", "tpot", "speedup", "predicted", "by_time", "best_block")
# In the order in which they come about.
_ORDER = ("metrics.jsonl", "block_efficiency.jsonl", "*.jsonl", "*.array_record", "*.safetensors", "*")
SOFTWARE = "software"
_SOFTWARE = ("jaxdraft", "git", "python", "platform", "packages", "xla_flags", "backend")
_DEVICES = ("devices", "device_kind", "processes", "mesh", "decode_mesh")
_SHOWN = 5
_NEAR = 10_000


class Compared(NamedTuple):
    """A part of two runs.

    Attributes:
      name: ``"recipe"``, ``"software"`` or a stage.
      found: the differences, in words.
      verdict: what is to be said where there are none.
    """

    name: str
    found: Sequence[str]
    verdict: str = "identical"


def diff(first: Home, second: Home) -> list[Compared]:
    """Compares two run directories: the recipe, the software, and stage by stage what was made.

    Raises:
      ConfigError: one is no run directory, or a file that has to be read is damaged.
    """
    homes = first, second
    recipes = list(map(read_recipe, homes))
    runs = [read_json(path) if (path := home.folder / "run.json").is_file() else {} for home in homes]
    names = list(dict.fromkeys(stage["name"] for recipe in recipes for stage in recipe["stages"]))
    for home, name in itertools.product(homes, names):
        home.fetch(name)
    pairs = {name: [_Made(home.folder / name) for home in homes] for name in names}
    of_recipe = differences(*({key: value for key, value in recipe.items() if key != "stages"} for recipe in recipes))
    software = differences(*({key: run.get(key) for key in (*_SOFTWARE, *_DEVICES)} for run in runs))
    found = [Compared("recipe", list(_told(of_recipe))), Compared(SOFTWARE, list(_told(software)))]
    with progress_bar(sum(made.size for made, _ in pairs.values()), "diff", "B") as bar:
        for name, (one, other) in pairs.items():
            found.append(_compared(name, one, other, names))
            bar.update(one.size)
    return found


def print_compared(compared: Sequence[Compared]) -> bool:
    """Prints a table and returns whether the runs are equal: other software alone is no difference."""
    width = max(len(part.name) for part in compared)
    for part in compared:
        lines = part.found[:_SHOWN] or [part.verdict]
        if len(part.found) > _SHOWN:
            lines = [*lines, f"and {len(part.found) - _SHOWN} more"]
        for i, line in enumerate(lines):
            print(f"{printable(part.name) if i == 0 else '':<{width}}  {printable(line)}")
    differing = [part for part in compared if part.found and part.name != SOFTWARE]
    print(
        f"first difference: {printable(f'{differing[0].name}, {differing[0].found[0]}')}" if differing else "identical"
    )
    return not differing


class _Made:
    """What a stage has made."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / RECORD
        self.record = read_json(path, fields={"status": str}) if path.is_file() else None
        outputs = (self.record or {}).get("outputs")
        if outputs is not None and not (isinstance(outputs, dict) and all(map(is_below, outputs))):
            raise ConfigError(f"{path} is damaged (outputs that are no files of this folder)")
        if outputs is None:
            outputs = [name for name in sizes(folder) if not any(fnmatch(name, own) for own in OWN)]
        rank = lambda name: next(i for i, pattern in enumerate(_ORDER) if fnmatch(Path(name).name, pattern))
        self.files = sorted(
            (name for name in outputs if (folder / name).is_file()), key=lambda name: (rank(name), name)
        )

    @property
    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def _compared(name: str, one: _Made, other: _Made, stages: Sequence[str]) -> Compared:
    if one.record is None or other.record is None:
        where = "not run" if one.record is other.record else "only in the first" if one.record else "only in the second"
        return Compared(name, [] if where == "not run" else [where], "not run")
    verdict = "identical" if one.record["status"] == other.record["status"] == "done" else "identical so far, not done"
    return Compared(name, list(_of_stage(one, other, stages)), verdict)


def _of_stage(one: _Made, other: _Made, stages: Sequence[str]) -> Iterator[str]:
    records = [made.record or {} for made in (one, other)]
    for field in ("settings", "shape", "seed"):
        yield from _told(differences(*({field: record.get(field)} for record in records)))
    inputs = differences(*(record.get("inputs", {}) for record in records))
    yield from (f"input {name} differs" for name in inputs if name not in stages)
    yield from _told(differences(*({"status": record.get("status")} for record in records)))
    for file in dict.fromkeys([*one.files, *other.files]):
        if file not in one.files or file not in other.files:
            yield f"{file}: only in the {'first' if file in one.files else 'second'}"
        else:
            with damaged(one.folder / file, f", or {other.folder / file}: `jaxdraft verify` says which"):
                found = _of_file(one.folder / file, other.folder / file)
            if found:
                yield f"{file}{found}"


def _told(found: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for name, (one, other) in found.items():
        yield f"{name}: {shortened(one)} and {shortened(other)}"


def _of_file(one: Path, other: Path) -> str:
    """Where two files differ; empty where they differ in nothing but times."""
    if filecmp.cmp(one, other, shallow=False):
        return ""
    if one.suffix == ".jsonl":
        return _lines(one, other)
    if one.suffix == ".json":
        found = next(fields(read_json(one), read_json(other)), None)
        return f", {found}" if found else ""
    if one.suffix == ".safetensors":
        return _tensors(one, other)
    if one.suffix == ".array_record":
        return _rows(one, other)
    return _text(one, other)


def _lines(one: Path, other: Path) -> str:
    with one.open(encoding="utf-8") as first, other.open(encoding="utf-8") as second:
        for number, (a, b) in enumerate(itertools.zip_longest(first, second), start=1):
            if a is None or b is None:
                return f": ends before line {number} in the {'first' if a is None else 'second'}"
            if a == b:
                continue
            try:
                before, now = json.loads(a), json.loads(b)
            except ValueError as error:
                raise ConfigError(f"{one} and {other}: line {number} is damaged ({error})") from error
            if found := next(fields(before, now), None):
                step = f"step {before['step']}" if "step" in before else ""
                return f", {step or before.get('id') or f'line {number}'}, {found}"
    return ""


def fields(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Each field, or place in a list, where two JSON values differ, with both."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if not any(word in key for word in TIMES):
                yield from fields(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif isinstance(one, list) and isinstance(other, list):
        for i, (a, b) in enumerate(itertools.zip_longest(one, other)):
            yield from fields(a, b, f"{name}[{i}]")
    elif one != other:
        yield f"{name}: {shortened(one)} and {shortened(other)}{_distance(one, other)}"


def _distance(one: Any, other: Any) -> str:
    """How far two numbers are apart: in units in the last place where both are float32 and near."""
    if not (isinstance(one, float) and isinstance(other, float)):
        return ""
    a, b = np.float32(one), np.float32(other)
    apart = abs(_ordinal(a) - _ordinal(b))
    if one == float(a) and other == float(b) and apart <= _NEAR:
        return f" ({apart:,} ulp)"
    return f" ({abs(one - other) / max(abs(one), abs(other)):.1e} relative)"


def _ordinal(value: np.float32) -> int:
    """Neighbouring floats have neighbouring numbers."""
    bits = int(value.view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _tensors(one: Path, other: Path) -> str:
    with opened(one) as first, opened(other) as second:
        names = sorted({*first.keys(), *second.keys()})
        found = [(name, told) for name in names if (told := _tensor(first, second, name))]
    if not found:
        return ": other metadata"
    return f": {len(found)} of {len(names)} tensors differ, the first is {found[0][0]}: {found[0][1]}"


def _tensor(first: Any, second: Any, name: str) -> str:
    if not (name in first.keys() and name in second.keys()):  # noqa: SIM118 - not a dict
        return "only in the first" if name in first.keys() else "only in the second"  # noqa: SIM118
    a, b = first.get_tensor(name), second.get_tensor(name)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
    if a.tobytes() == b.tobytes():
        return ""
    far = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return f"{np.count_nonzero(far):,} of {a.size:,} elements, by up to {far.max():.2e}"


def _rows(one: Path, other: Path) -> str:
    """Records of ArrayRecord files; of packed rows also the column and the position."""
    try:
        readers = random_access(one), random_access(other)
        counts = [reader.num_records() for reader in readers]
        for i in range(min(counts)):
            a, b = (reader.read([i])[0] for reader in readers)
            if a != b:
                return f", row {i}{_column(one, other, i)}"
    except RuntimeError as error:
        raise ConfigError(f"{one} or {other} is damaged ({error}): `jaxdraft verify` says which") from error
    return f": {counts[0]:,} and {counts[1]:,} rows" if counts[0] != counts[1] else ""


def _column(one: Path, other: Path, row: int) -> str:
    if not all(path.with_name(MANIFEST).is_file() for path in (one, other)):
        return ""
    packed = [PackedRows(path.parent, verify=False) for path in (one, other)]
    shards = [list(itertools.takewhile(lambda s: s["file"] != one.name, rows.manifest["shards"])) for rows in packed]
    if len(shards[0]) == len(packed[0].manifest["shards"]):
        return ""  # beside answers: what the target thought of them
    starts = [sum(shard["rows"] for shard in before) for before in shards]
    a, b = (rows[start + row] for rows, start in zip(packed, starts, strict=True))
    for name in a:
        if name not in b or a[name].shape != b[name].shape:
            return f", {name}: of another form"
        if len(places := np.argwhere(a[name] != b[name])):
            place = tuple(places[0])
            return f", {name}, position {place[0]}: {a[name][place]} and {b[name][place]}"
    return ""


def _text(one: Path, other: Path) -> str:
    lines = itertools.zip_longest(one.read_bytes().split(b"\n"), other.read_bytes().split(b"\n"))
    for number, (a, b) in enumerate(lines, start=1):
        if a != b:
            shown = [shortened((line or b"").decode(errors="replace")) for line in (a, b)]
            return f", line {number}: {shown[0]} and {shown[1]}"
    return ""
