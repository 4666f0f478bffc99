"""How far a run has come, seen from outside while another process is at it."""

import contextlib
import json
from pathlib import Path

# A file of each is there when one of the stage's parts is whole.
PARTS = ("rows-*.json", "responses-*.json", "measured/*.json")


def progress(folder: Path) -> int:
    """A Train stage's steps that are written down; of another stage the parts that are whole."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        return metrics.read_bytes().count(b"\n")
    return sum(1 for pattern in PARTS for _ in folder.glob(pattern))


def opened(folder: Path) -> int:
    """Another number each time that a stage begins or goes on."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "stage.json").stat().st_mtime_ns
    return 0


def status(folder: Path) -> str:
    """``"running"``, ``"done"``, or nothing where a stage has not begun."""
    with contextlib.suppress(FileNotFoundError):
        return str(json.loads((folder / "stage.json").read_text())["status"])
    return ""


def newest_checkpoint(folder: Path) -> int:
    """The newest step with a whole checkpoint; 0 where there is none."""
    return max((int(path.name) for path in folder.glob("checkpoints/[0-9]*") if path.name.isdigit()), default=0)
