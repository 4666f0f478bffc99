"""What a run writes down while it works: metric lines that repeat to the byte, timings beside them, a progress bar."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class StepLog:
    """A JSONL file with one line per step that a resumed run continues where its checkpoint stands.

    Args:
      path: of the file.
      resume_after: lines of later steps, and a line cut short, are dropped first.
    """

    def __init__(self, path: Path, resume_after: int = 0):
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_after]
        path.write_text("".join(kept))
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, **values}``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A bar with rate and remaining time on standard error; silent where that is not a terminal's business."""
    return tqdm(total=total, desc=description, unit=unit, initial=initial, dynamic_ncols=True, mininterval=0.5)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file; empty where there is no file."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
