"""Puts the papers' tables of finished runs into configs/RESULTS.md: ours beside theirs, as each run's report has them.

    jaxdraft run fastdraft_losses --workdir runs/fastdraft_losses --set scale=small
    python -m tests.results runs/fastdraft_losses

A run's folder bears its recipe's name. What stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced, what
people wrote around it is kept.
"""

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "configs" / "RESULTS.md"


def section(run: Path) -> str:
    """Tables and notes of each exhibit that the run reproduces, with the command, the seeds and the time it took."""
    stages = [json.loads(file.read_text("utf-8")) for file in run.glob("*/stage.json")]
    record = json.loads((run / "run.json").read_text("utf-8"))
    unfinished = [stage["name"] for stage in stages if stage["status"] != "done"]
    if unfinished:
        raise SystemExit(f"{run}: {', '.join(unfinished)} not done: run its recipe again")
    minutes = sum(stage["seconds"] for stage in stages) / 60
    seeds = sorted(set(record["stage_seeds"].values()))
    settings = " ".join(re.sub(r".*/", "", word) if "/" in word else word for word in record["command"][1:])
    settings = settings.replace(f"--workdir {run.name}", f"--workdir runs/{run.name}")
    packages = f"Python {record['python']}, jax {record['packages']['jax']}"
    head = f"`jaxdraft {settings}`: {minutes:.0f} minutes ({packages}), seeds {', '.join(map(str, seeds))}."
    report = (run / "report" / "report.md").read_text("utf-8")
    parts = [part for part in re.split(r"^## ", report, flags=re.MULTILINE) if part.startswith(("Direct A", "FastD"))]
    return "\n\n".join([head, *(_exhibit(part) for part in parts)])


def _exhibit(part: str) -> str:
    """An exhibit without its pictures and the list of what differs in set-up, which the recipe's docstring tells."""
    title, *blocks = part.strip().split("\n\n")
    kept = [block for block in blocks if not block.startswith(("![", "Beside *", "| Set-up", "The same in both"))]
    return "\n\n".join([f"#### {title}", *filter(None, kept)])


def main(runs: list[str]) -> None:
    text = RESULTS.read_text("utf-8")
    for run in map(Path, runs):
        begin, end = f"<!-- {run.name} -->", f"<!-- /{run.name} -->"
        if begin not in text:
            raise SystemExit(f"{RESULTS.name} has no place for {run.name}: write {begin} and {end}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{section(run)}\n{end}{rest.partition(end)[2]}"
    RESULTS.write_text(text, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
