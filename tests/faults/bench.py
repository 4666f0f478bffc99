"""The frame of the fault suite (F1 to F15): what a fault is, and the run that it is done to.

A fault is a function that does something bad so and so often to a real run and counts how often the promise held. The
oracle is always the undisturbed run: the hashes of everything that repeats to the byte. ``tests/faults/test_faults.py``
runs every fault a few times, ``python -m tests.faults`` as often as asked for, and prints the table of the README.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxdraft.cli import main
from jaxdraft.diff import TIMES

RECIPE = Path(__file__).parents[1] / "tiny_recipe.py"
# Their bytes depend on recipe and seed alone.
REPEATABLE = (
    "*/metrics.jsonl",
    "*/block_efficiency.jsonl",
    "*/responses-*.jsonl",
    "*/samples.jsonl",
    "*/*/samples.jsonl",
)
REPEATABLE += ("*/*.array_record", "*/manifest.json", "*/*.safetensors", "*/*/*.safetensors", "*/tokenizer*")


class Outcome(NamedTuple):
    """What became of a fault.

    Attributes:
      injected: how often it was done.
      held: how often everything was as promised.
      note: what the table says beside it.
    """

    injected: int
    held: int
    note: str = ""


class Fault(NamedTuple):
    """One line of the table.

    Attributes:
      number: ``"F1"`` to ``"F15"``; a line may have several faults.
      injection: what is done.
      run: does it ``bench.effort`` times, or that many times each.
      slow: not among the quick tests.
    """

    number: str
    injection: str
    run: Callable[["Bench"], Outcome]
    slow: bool


FAULTS: list[Fault] = []


def fault(number: str, injection: str, slow: bool = False) -> Callable[..., Any]:
    """Makes a function of a ``Bench`` a line of the suite."""

    def entered(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        FAULTS.append(Fault(number, injection, run, slow))
        return run

    return entered


class Bench:
    """Where faults are done.

    Attributes:
      folder: for all that is made.
      effort: how often each is done; 1 in the quick tests, 3 in the slow ones, 30 in the long run.
      random: draws where and when.
    """

    def __init__(self, folder: Path, effort: int, seed: int = 0):
        self.folder, self.effort, self.random = folder, effort, random.Random(seed)
        self._copies = 0

    @functools.cached_property
    def undisturbed(self) -> Path:
        """The whole recipe, run by one process that nothing happened to."""
        workdir = self.folder / "undisturbed"
        done = run(workdir)
        assert done.returncode == 0, done.stderr
        return workdir

    @functools.cached_property
    def expected(self) -> dict[str, str]:
        return hashes(self.undisturbed)

    def new(self, name: str) -> Path:
        """A folder that does not exist yet."""
        self._copies += 1
        return self.folder / f"{name}-{self._copies}"


def command(workdir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jaxdraft.cli", "run", str(RECIPE), "--workdir", str(workdir), *arguments]


def start(workdir: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The real command as a process that can be disturbed."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command(workdir, *arguments),
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(workdir: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command as a process, to its end."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        command(workdir, *arguments), env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def called(*arguments: str) -> tuple[int, str]:
    """The real command in this process: exit code, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(arguments)
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
    return code, said.getvalue()


def hashes(workdir: Path) -> dict[str, str]:
    """Of everything in a run that repeats to the byte, of what the results say, and of the last checkpoints' arrays."""
    files = sorted({file for pattern in REPEATABLE for file in workdir.glob(pattern)})
    files = [file for file in files if file.relative_to(workdir).parts[0] != "superseded"]
    found = {str(file.relative_to(workdir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    for file in sorted(workdir.glob("*/*/results.json")):
        text = json.dumps(_timeless(json.loads(file.read_text())), sort_keys=True)
        found[str(file.relative_to(workdir))] = hashlib.sha256(text.encode()).hexdigest()
    for folder in sorted(workdir.glob("*/checkpoints")):
        last = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)
        if last is not None:
            meta = json.loads((folder / str(last) / "meta" / "metadata").read_text())
            found[str(folder.relative_to(workdir))] = f"{last}: {meta['fingerprint']}"
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(x) for key, x in value.items() if not any(word in key for word in TIMES)}
    return [_timeless(x) for x in value] if isinstance(value, list) else value
