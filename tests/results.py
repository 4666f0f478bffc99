"""Puts the tables of finished runs into configs/RESULTS.md, as the report of each has them: of papers, with the numbers
that they print. What became of their claims goes there too, and into README.md.

    jaxdraft run fastdraft_losses --workdir runs/fastdraft_losses --set scale=small
    python -m tests.results runs/fastdraft_losses

A run's folder bears the name of its place, which is its recipe's. What stands between ``<!-- NAME -->`` and
``<!-- /NAME -->`` is replaced, what people wrote around it is kept.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from jaxdraft.evaluate.changes import Pairs
from jaxdraft.evaluate.collect import RunDirectory, read_run
from jaxdraft.evaluate.comparison import setting_of

RESULTS, README = (Path(__file__).parents[1] / name for name in ("configs/RESULTS.md", "README.md"))


class Claim(NamedTuple):
    """What a paper says of two drafts of a run, and on which tasks, at which temperature, it is looked for.

    Attributes:
      said: by task and temperature what the paper prints, or what is computed from that, "" for nothing.
    """

    words: str
    run: str
    metric: str
    draft: str
    base: str
    said: dict[tuple[str, float], str]


DIRECT, STAGES, LARGER = "direct_alignment_llama2_115m", "fastdraft_phi3_50m", "fastdraft_llama31_150m"
SIZES, MIXES, TEXT, LOSSES = (f"fastdraft_{name}" for name in ("data_size", "code_mixes", "target_text", "losses"))
TAU, ACCEPTED, MBSU = "block_efficiency", "acceptance_rate", "mbsu"
OPEN, SUMMARY, PASSAGE, CODE = ((task, 0.0) for task in ("open", "summary", "text", "code"))
SAMPLED = "open", 0.6
CLAIMS = [
    Claim(
        "distilled with TVD++ against pretrained",
        *(DIRECT, TAU, "tvdpp-0", "pretrain-0"),
        {SAMPLED: "Dolly about +21 %, loss not named", SUMMARY: "CNN/DailyMail about +5 %", CODE: ""},
    ),
    *(
        Claim(
            f"TVD++ against {name}",
            *(DIRECT, TAU, "tvdpp-0", f"{name.lower()}-0"),
            {SAMPLED: "above or on par", SUMMARY: "above or on par"},
        )
        for name in ("KL", "TVD")
    ),
    Claim("TVD++ without pretraining against with", DIRECT, TAU, "scratch-0", "tvdpp-0", {SAMPLED: "below"}),
    Claim("TVD++ against pretrained, German", DIRECT, TAU, "tvdpp-0", "pretrain-0", {("translate", 0.0): "below"}),
    Claim(
        "10 B of text against 5",
        *(SIZES, ACCEPTED, "pretrain-50M-10BT-0", "pretrain-50M-5BT-0"),
        {SUMMARY: "−7 %", PASSAGE: "+2 %", OPEN: "−6 %"},
    ),
    Claim(
        "the larger draft's MBSU against the smaller one's",
        *(SIZES, MBSU, "pretrain-120M-5BT-0", "pretrain-50M-5BT-0"),
        {SUMMARY: "+1 %, computed", PASSAGE: "+2 %, computed", OPEN: "+1 %, computed"},
    ),
    Claim(
        "code after text against both mixed",
        *(MIXES, ACCEPTED, "text-code5-text2_5-0", "mixed-text5-code5-0"),
        {CODE: "+5 %", SUMMARY: "−1 %", PASSAGE: "+7 %", OPEN: "+19 %"},
    ),
    Claim(
        "code after text against text after code",
        *(MIXES, ACCEPTED, "text-code5-text2_5-0", "code-text5-code2_5-0"),
        {CODE: "+1 %", SUMMARY: "+1 %", PASSAGE: "+7 %", OPEN: "+7 %"},
    ),
    *(
        Claim(f"continued on code and text against text alone{of}", run, ACCEPTED, "continue-0", "pretrain-0", said)
        for of, run, said in (
            ("", STAGES, {CODE: "+115 %", SUMMARY: "0 %", PASSAGE: "+3 %", OPEN: "−5 %"}),
            (", larger draft", LARGER, {CODE: "+133 %", SUMMARY: "+1 %", PASSAGE: "+3 %", OPEN: "+11 %"}),
        )
    ),
    *(
        Claim(f"fine-tuned after that{of}", run, ACCEPTED, "finetune-0", "continue-0", said)
        for of, run, said in (
            ("", STAGES, {CODE: "−1 %", SUMMARY: "+14 %", PASSAGE: "+6 %", OPEN: "+60 %"}),
            (", larger draft", LARGER, {CODE: "+6 %", SUMMARY: "+9 %", PASSAGE: "+8 %", OPEN: "+23 %"}),
        )
    ),
    Claim(
        "fine-tuned on the target's answers against the originals",
        *(TEXT, ACCEPTED, "on-responses-0", "on-originals-0"),
        {SUMMARY: "+6 %", PASSAGE: "+5 %", OPEN: "+13 %"},
    ),
    Claim(
        "fine-tuned on the originals against pretrained",
        *(TEXT, ACCEPTED, "on-originals-0", "pretrain-0"),
        {SUMMARY: "+2 %", PASSAGE: "−4 %", OPEN: "+27 %"},
    ),
    *(
        Claim(f"{name} from stored targets against cross-entropy", LOSSES, ACCEPTED, draft, "ce-0", said)
        for name, draft, said in (
            ("KL", "kl-0", {SUMMARY: "−1 %", PASSAGE: "−1 %", OPEN: "0 %"}),
            ("TVD", "tvd-0", {SUMMARY: "+2 %", PASSAGE: "+2 %", OPEN: "−2 %"}),
        )
    ),
]
BLOCK_SIZE = 3
TITLES = ("Direct Alignment, ", "FastDraft, "), "Speed-up over the size", "Seeds pooled: "  # the first that there are


def claims(folder: Path, before: str) -> str:
    """Each claim at γ 3, with the interval of the change over prompts and seeds; without its run as it was before."""
    lines = ["| what against what | task | paper | here, 95 % interval |", "|---|---|---|---|"]
    known = {line.split(" | ")[0]: line for line in before.splitlines()}
    pairs: dict[str, tuple[RunDirectory, Pairs]] = {}
    for claim in CLAIMS:
        if not (folder / claim.run / "report").is_dir():
            lines += filter(None, [known.get(f"| {claim.words}")])
            continue
        if claim.run not in pairs:
            run = read_run(folder / claim.run)
            pairs[claim.run] = run, Pairs(run)
        tasks = [f"{task}, {'greedy' if T == 0 else f'T {T:g}'}" for task, T in claim.said]
        found = [_change(claim, *pairs[claim.run], task, T) for task, T in claim.said]
        lines.append(
            f"| {claim.words} | {'<br>'.join(tasks)} | {'<br>'.join(claim.said.values())} | {'<br>'.join(found)} |"
        )
    return "\n".join(lines)


def _change(claim: Claim, run: RunDirectory, answers: Pairs, task: str, temperature: float) -> str:
    wanted = {"draft": claim.draft, "task": task, "temperature": temperature, "block_size": BLOCK_SIZE}
    line = next((line for line in run.samples if wanted.items() <= line.items()), None)
    if line is None:
        raise SystemExit(f"{run.folder}: {claim.draft} was not measured on {task!r}: run its recipe to the end")
    setting = setting_of(line)
    metric = TAU if claim.metric == MBSU else claim.metric
    change = answers.change(metric, setting, claim.draft, claim.base) or [math.nan] * 3
    if claim.metric == MBSU:  # τ / (c γ + 1)
        cost, of_base = (run.parameters[of]["ratio"] * BLOCK_SIZE + 1 for of in (claim.draft, claim.base))
        change = [(1 + each) * of_base / cost - 1 for each in change]
    return "{:+.0%} ({:+.0%} to {:+.0%})".format(*change).replace("-", "−")


def section(run: Path) -> str:
    """Tables and notes of what the run reproduces or sweeps, with the command, the seeds and the time it took."""
    if not (run / "run.json").is_file():
        raise SystemExit(
            f"{run} is no run directory: give folders that `jaxdraft run` wrote, such as runs/fastdraft_losses"
        )
    stages = [json.loads(file.read_text("utf-8")) for file in run.glob("*/stage.json")]
    record = json.loads((run / "run.json").read_text("utf-8"))
    unfinished = [stage["name"] for stage in stages if stage["status"] != "done"]
    if unfinished:
        raise SystemExit(f"{run}: {', '.join(unfinished)} not done: run its recipe again")
    minutes = sum(stage["seconds"] for stage in stages) / 60
    seeds = sorted({stage["settings"]["seed"] for stage in stages if stage["kind"] == "Train"})
    settings = " ".join(re.sub(r"[^=]*/", "FOLDER/" if "=" in word else "", word) for word in record["command"][1:])
    settings = settings.replace(f"--workdir {run.name}", f"--workdir runs/{run.name}")
    packages = f"Python {record['python']}, jax {record['packages']['jax']}"
    head = f"`jaxdraft {settings}`: {minutes:.0f} minutes ({packages}), seeds {', '.join(map(str, seeds))}."
    report = (run / "report" / "report.md").read_text("utf-8")
    parts = re.split(r"^## ", report, flags=re.MULTILINE)
    kinds = ([part for part in parts if part.startswith(titles)] for titles in TITLES)
    shown = next(filter(None, kinds), None)
    if shown is None:
        raise SystemExit(f"{run}: its report has no table of a paper, of sizes or of pooled seeds")
    return "\n\n".join([head, *map(_exhibit, shown)])


def _exhibit(part: str) -> str:
    """An exhibit without its pictures and the list of what differs in set-up, which the recipe's docstring tells."""
    title, *blocks = part.strip().split("\n\n")
    kept = [block for block in blocks if not block.startswith(("![", "Beside *", "| Set-up", "The same in both"))]
    return "\n\n".join([f"#### {title}", *filter(None, kept)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs, each named after its place in RESULTS.md")
    runs: list[Path] = parser.parse_args().runs
    text = RESULTS.read_text("utf-8")
    for run in runs:
        text = _put(text, run.name, section(run))
    found = claims(runs[0].parent, _place(text, "claims")[1])
    README.write_text(_put(README.read_text("utf-8"), "claims", found), "utf-8")
    RESULTS.write_text(_put(text, "claims", found), "utf-8")


def _place(text: str, name: str) -> tuple[str, str, str]:
    """What is before a place, in it, and behind it."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    content, ended, behind = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"there is no place for {name}: name the run's folder as its recipe, or write {begin}{end}")
    return before + begin, content, end + behind


def _put(text: str, name: str, content: str) -> str:
    before, _, behind = _place(text, name)
    return f"{before}{content}\n{behind}"


if __name__ == "__main__":
    main()
