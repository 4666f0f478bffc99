"""What a run writes down while it works: metric lines that repeat to the byte, timings beside them, a progress bar."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from jaxdraft.distributed import is_lead, on_lead
from jaxdraft.errors import ConfigError, naming
from jaxdraft.redaction import redacted
from jaxdraft.untrusted import damaged


class StepLog:
    """A JSONL file with the lines of some steps that a resumed run continues where its checkpoint stands.

    Of several processes the lead alone writes it.

    Args:
      path: of the file.
      done: the steps whose lines the checkpoint has behind it; lines of others, and a line cut short, are dropped.

    Raises:
      ConfigError: a step of ``done`` has no line, or a line is damaged.
    """

    def __init__(self, path: Path, done: Sequence[int] = ()):
        self.path = path
        self._file: TextIO | None = None
        on_lead(lambda: self._open(path, done))

    def _open(self, path: Path, done: Sequence[int]) -> None:
        remedy = f"bring it back from a copy, or delete the folder {path.parent} to train it anew"
        with damaged(path, f": {remedy}"):
            kept = [(line, step) for line in _whole_lines(path) if (step := json.loads(line)["step"]) in done]
        if {step for _, step in kept} != set(done):
            raise ConfigError(f"{path} lacks steps before {done[-1]}, from where the checkpoint goes on: {remedy}")
        temporary = path.with_name(path.name + ".tmp")
        with naming(path), temporary.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, *lines: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, **values}`` for each line."""
        if self._file:
            with naming(self.path):
                self._file.write("".join(json.dumps({"step": step, **values}) + "\n" for values in lines))
                self._file.flush()

    def sync(self) -> None:
        """Makes what was written durable: a checkpoint that outlives the machine's end is of no use without it."""
        if self._file:
            with naming(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            with naming(self.path):
                self._file.close()


def say(text: str) -> None:
    """One line for the person who watches, from the lead process."""
    if is_lead():
        print(redacted(text), file=sys.stderr, flush=True)


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """The lead's bar with rate and remaining time on standard error; in a log file a line every half minute."""
    watched = sys.stderr.isatty()
    return tqdm(
        file=sys.stderr if watched else _Lines(),
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        dynamic_ncols=True,
        mininterval=0.5 if watched else 30,
        disable=not is_lead(),
    )


class _Lines:
    """Standard error for a bar in a log: each of its states is a line, which launchers pass on when it is whole."""

    def write(self, text: str) -> None:
        if state := text.strip():
            sys.stderr.write(state + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file; empty where there is no file.

    Raises:
      ConfigError: a line is damaged.
    """
    with damaged(path):
        return [json.loads(line) for line in _whole_lines(path)]


def write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSONL file that exists under its name only when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _whole_lines(path: Path) -> list[str]:
    # Not splitlines: text may hold other line ends, such as U+2028, which JSON leaves as they are.
    return path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
