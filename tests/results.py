"""Puts the tables of finished runs into configs/RESULTS.md, as the report of each has them: of papers, with the numbers
that they print. What became of their claims goes there too, and into README.md.

    jaxdraft run fastdraft_losses --workdir runs/fastdraft_losses --set scale=small
    python -m tests.results runs/fastdraft_losses

A run's folder bears the name of its place, which is its recipe's. What stands between ``<!-- NAME -->`` and
``<!-- /NAME -->`` is replaced, what people wrote around it is kept.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from jaxdraft.evaluate.changes import Pairs
from jaxdraft.evaluate.collect import RunDirectory, read_run
from jaxdraft.evaluate.comparison import setting_of

RESULTS, README = (Path(__file__).parents[1] / name for name in ("configs/RESULTS.md", "README.md"))


class Claim(NamedTuple):
    """What a paper says of two drafts, and where it is looked for: in a run, on a task at a temperature."""

    words: str
    paper: str
    run: str
    metric: str
    draft: str
    base: str
    task: str
    temperature: float


DIRECT, STAGES, MIXES = "direct_alignment_llama2_115m", "fastdraft_phi3_50m", "fastdraft_code_mixes"
LOSSES, TEXT = "fastdraft_losses", "fastdraft_target_text"
TAU, ACCEPTED = "block_efficiency", "acceptance_rate"
CLAIMS = [
    *(
        Claim("distilled with TVD++ against pretrained", said, DIRECT, TAU, "tvdpp-0", "pretrain-0", task, T)
        for task, T, said in (("open", 0.6, "Dolly about +21 %"), ("summary", 0.0, ""), ("code", 0.0, ""))
    ),
    *(
        Claim(f"TVD++ against {name}", "above it", DIRECT, TAU, "tvdpp-0", f"{name.lower()}-0", task, T)
        for name in ("KL", "TVD")
        for task, T in (("open", 0.6), ("summary", 0.0))
    ),
    Claim("TVD++ from nothing against pretrained", "", DIRECT, TAU, "scratch-0", "pretrain-0", "open", 0.6),
    Claim("TVD++ against pretrained, German", "below it", DIRECT, TAU, "tvdpp-0", "pretrain-0", "translate", 0.0),
    *(
        Claim(
            "fine-tuned on the target's text against the original",
            said,
            TEXT,
            ACCEPTED,
            "on-responses-0",
            "on-originals-0",
            task,
            0.0,
        )
        for task, said in (("summary", "+6 %"), ("text", "+5 %"), ("open", "+13 %"))
    ),
    *(
        Claim(f"{name} from stored targets against cross-entropy", said, LOSSES, ACCEPTED, draft, "ce-0", "open", 0.0)
        for name, draft, said in (("KL", "kl-0", "0 %"), ("TVD", "tvd-0", "−2 %"))
    ),
    *(
        Claim(
            "continued on code and text against text alone",
            said,
            STAGES,
            ACCEPTED,
            "continue-0",
            "pretrain-0",
            task,
            0.0,
        )
        for task, said in (("code", "+115 %"), ("text", "+3 %"), ("open", "−5 %"))
    ),
    *(
        Claim(
            "code after text against both mixed",
            said,
            MIXES,
            ACCEPTED,
            "text-code5-text2_5-0",
            "mixed-text5-code5-0",
            task,
            0.0,
        )
        for task, said in (("code", "+5 %"), ("text", "+7 %"), ("open", "+19 %"))
    ),
]
BLOCK_SIZE = 3
TITLES = ("Direct Alignment, ", "FastDraft, "), "Speed-up over the size", "Seeds pooled: "  # the first that there are


def claims(folder: Path) -> str:
    """Each claim of which its run is there, at γ 3, with the interval of the change over prompts and seeds."""
    lines = ["| what against what | task | paper | here, 95 % interval |", "|---|---|---|---|"]
    pairs: dict[str, tuple[RunDirectory, Pairs]] = {}
    for claim in CLAIMS:
        if not (folder / claim.run / "report").is_dir():
            continue
        if claim.run not in pairs:
            run = read_run(folder / claim.run)
            pairs[claim.run] = run, Pairs(run)
        run, answers = pairs[claim.run]
        wanted = {"draft": claim.draft, "task": claim.task, "temperature": claim.temperature, "block_size": BLOCK_SIZE}
        line = next(line for line in run.samples if wanted.items() <= line.items())
        value, low, high = answers.change(claim.metric, setting_of(line), claim.draft, claim.base) or [math.nan] * 3
        how = "greedy" if claim.temperature == 0 else f"T {claim.temperature:g}"
        here = f"{value:+.0%} ({low:+.0%} to {high:+.0%})".replace("-", "−")
        lines.append(f"| {claim.words} | {claim.task}, {how} | {claim.paper} | {here} |")
    return "\n".join(lines)


def section(run: Path) -> str:
    """Tables and notes of what the run reproduces or sweeps, with the command, the seeds and the time it took."""
    stages = [json.loads(file.read_text("utf-8")) for file in run.glob("*/stage.json")]
    record = json.loads((run / "run.json").read_text("utf-8"))
    unfinished = [stage["name"] for stage in stages if stage["status"] != "done"]
    if unfinished:
        raise SystemExit(f"{run}: {', '.join(unfinished)} not done: run its recipe again")
    minutes = sum(stage["seconds"] for stage in stages) / 60
    seeds = sorted({stage["settings"]["seed"] for stage in stages if stage["kind"] == "Train"})
    settings = " ".join(re.sub(r"[^=]*/", "", word) for word in record["command"][1:])
    settings = settings.replace(f"--workdir {run.name}", f"--workdir runs/{run.name}")
    packages = f"Python {record['python']}, jax {record['packages']['jax']}"
    head = f"`jaxdraft {settings}`: {minutes:.0f} minutes ({packages}), seeds {', '.join(map(str, seeds))}."
    report = (run / "report" / "report.md").read_text("utf-8")
    parts = re.split(r"^## ", report, flags=re.MULTILINE)
    kinds = ([part for part in parts if part.startswith(titles)] for titles in TITLES)
    return "\n\n".join([head, *map(_exhibit, next(filter(None, kinds)))])


def _exhibit(part: str) -> str:
    """An exhibit without its pictures and the list of what differs in set-up, which the recipe's docstring tells."""
    title, *blocks = part.strip().split("\n\n")
    kept = [block for block in blocks if not block.startswith(("![", "Beside *", "| Set-up", "The same in both"))]
    return "\n\n".join([f"#### {title}", *filter(None, kept)])


def main(runs: list[str]) -> None:
    text = RESULTS.read_text("utf-8")
    for run in map(Path, runs):
        text = _put(text, run.name, section(run))
    if runs:
        found = claims(Path(runs[0]).parent)
        text = _put(text, "claims", found)
        README.write_text(_put(README.read_text("utf-8"), "claims", found), "utf-8")
    RESULTS.write_text(text, "utf-8")


def _put(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text:
        raise SystemExit(f"there is no place for {name}: write {begin} and {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    main(sys.argv[1:])
