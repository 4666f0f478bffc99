"""What a long run holds: memory, file descriptors and threads of the real command over 10,000 tiny steps.

    python -m tests.faults.endurance --out FOLDER

Watched from outside, through ``/proc``. A checkpoint in the making holds buffers, files and threads for a moment, so
each window of steps is judged by the least that was seen in it: what leaks never comes back down.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

from tests.faults.bench import start

STAGE = "target"
TOLERANCE = 1.05
# Freed memory is given back at once: else the allocator's reserve is counted, which grows with the threads' arenas.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Holding(NamedTuple):
    """What a process holds.

    Attributes:
      step: the last one written down.
      memory: resident, in MiB.
      descriptors: open files.
      threads: all of them.
    """

    step: int
    memory: float
    descriptors: int
    threads: int


def endure(workdir: Path, steps: int, saves: int, early: int, stage: str = STAGE) -> list[Holding]:
    """Trains a stage of the tiny recipe and returns the least it held before an early step and before the last."""
    settings = {f"{stage}.steps": steps, f"{stage}.save_every": steps // saves}
    arguments = (word for name, value in settings.items() for word in ("--set", f"{name}={value}"))
    process = start(workdir, *arguments, **ALLOCATOR)
    try:
        seen = list(_watched(process, workdir / stage))
    finally:
        process.kill()
        process.communicate()
    span = steps // 20
    return [_least([x for x in seen if end - span < x.step <= end]) for end in (early, steps)]


def grown(early: Holding, late: Holding) -> list[str]:
    """What the later of two has more of than it may; empty where all is well."""
    allowed = {"memory": TOLERANCE, "descriptors": 1.0, "threads": TOLERANCE}  # a pool may fill up late
    return [
        f"{name}: {was:.6g} after {early.step} steps, {now:.6g} after {late.step}"
        for name, factor in allowed.items()
        if (now := getattr(late, name)) > factor * (was := getattr(early, name))
    ]


def _watched(process: "Popen[str]", folder: Path) -> Iterator[Holding]:
    """While the stage trains, some fifty times a second."""
    proc = Path(f"/proc/{process.pid}")
    while process.poll() is None and not (folder / "model").exists():
        if step := _steps(folder / "metrics.jsonl"):
            pages = int((proc / "statm").read_text().split()[1])
            held = (len(list((proc / kind).iterdir())) for kind in ("fd", "task"))
            yield Holding(step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, *held)
        time.sleep(0.02)


def _steps(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _least(seen: Sequence[Holding]) -> Holding:
    columns: Any = zip(*seen, strict=True)
    steps, *held = columns
    return Holding(max(steps), *map(min, held))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, for the run")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--stage", default=STAGE, help=f"of tests/tiny_recipe.py (default: {STAGE})")
    options = parser.parse_args()
    early, late = endure(options.out, options.steps, options.saves, options.steps // 10, options.stage)
    print("| steps | memory, MiB | descriptors | threads |\n|---|---|---|---|")
    for held in (early, late):
        print(f"| {held.step:,} | {held.memory:.1f} | {held.descriptors} | {held.threads} |")
    more = grown(early, late)
    print("\n".join(more) or "nothing has grown")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
