"""Runs that go on with other devices and other processes: F12 and F15."""

import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from jaxdraft.files import sha256
from jaxdraft.tracking import read_jsonl
from tests.distributed import layouts
from tests.faults.bench import RECIPE, Bench, Outcome, called, fault
from tests.faults.interruptions import LONGER, STEPS, longer
from tests.faults.progress import newest_checkpoint, opened, progress

# Processes, devices of each, mesh: what a run was begun with and what it goes on with.
Layout = tuple[int, int, tuple[str, ...]]
MOVES: list[tuple[Layout, Layout]] = [
    ((1, 1, ()), (1, 8, ())),
    ((1, 8, ()), (1, 1, ())),
    ((1, 8, ()), (1, 8, ("--set", "mesh.fsdp=4", "--set", "mesh.tensor=2"))),
    ((2, 1, ()), (1, 1, ())),
]
# Relative L2 of float32 parameters over 100 steps, and of the loss (RELIABILITY, tier C).
TOLERANCE = 1e-5


@fault("F12", "a restart in the middle of training, 1 to 8 devices, 8 to 1, 8 to 4×2, 2 processes to 1", slow=True)
def moved(bench: Bench) -> Outcome:
    before = ("tokenizer", "corpus", "target")
    # At the recipe's own rate rounding grows a thousandfold in 24 steps, also where nothing happens.
    arguments = (*LONGER, "--set", "target.learning_rate=1e-3", "--only", *before)
    expected = _copy(longer(bench), bench.new("moved"), before[:2])
    layouts.run(RECIPE, expected, 1, 1, *arguments)
    injected, held, notes, worst = 0, 0, [], {"loss": 0.0, "parameters": 0.0}
    for i in range(max(len(MOVES), bench.effort)):
        first, then = MOVES[i % len(MOVES)]
        workdir, name = _copy(expected, bench.new("moved"), before[:2]), f"{first[:2]} to {then}"
        _killed(workdir, "target", bench.random.randrange(2, STEPS - 4), first, arguments)
        if not 0 < newest_checkpoint(workdir / "target") < STEPS:  # there is no middle to go on from
            continue
        injected += 1
        try:
            layouts.run(RECIPE, workdir, then[0], then[1], *then[2], *arguments)
            found = layouts.differences(expected, workdir)
        except (AssertionError, RuntimeError) as error:
            notes.append(f"{name}: {str(error)[-300:]}")
            continue
        worst = {key: max(value, float(found[key])) for key, value in worst.items()}
        held += found["loss"] < TOLERANCE and found["parameters"] < TOLERANCE
    figures = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    return Outcome(injected, int(held), "; ".join([f"differ by at most {figures}", *notes]))


@fault("F15", "SIGKILL of 1 to 3 processes that write answers, restarted as 1 to 3 others", slow=True)
def rewritten(bench: Bench) -> Outcome:
    reference = longer(bench)
    expected, total = _made(reference), progress(reference / "responses")
    workdir = _copy(reference, bench.new("rewritten"), ("tokenizer", "corpus", "target"))
    arguments, held = (*LONGER, "--only", "responses"), 0
    before = sorted(bench.random.randrange(1, total) for _ in range(bench.effort))
    processes = [bench.random.choice((1, 2, 3)) for _ in before]
    landed = [_killed(workdir, "responses", at, (n, 1, ()), arguments) for at, n in zip(before, processes, strict=True)]
    try:
        layouts.run(RECIPE, workdir, 2, 1, *arguments)
    except RuntimeError as error:
        return Outcome(sum(landed), 0, str(error)[-300:])
    lines = [line for path in sorted((workdir / "responses").glob("responses-*.jsonl")) for line in read_jsonl(path)]
    once = sorted(line["number"] for line in lines) == list(range(len(lines)))
    held = sum(landed) if once and _made(workdir) == expected else 0
    return Outcome(sum(landed), held, f"{len(lines)} answers; killed as {', '.join(map(str, processes))}")


@fault("F15", "answers written so many at a time")
def batched(bench: Bench) -> Outcome:
    workdir = _copy(bench.undisturbed, bench.new("batched"), ("tokenizer", "corpus", "target"))
    arguments = ("--set", "responses.batch_size=7", "--only", "responses")
    code, said = called("run", str(RECIPE), "--workdir", str(workdir), *arguments)
    answers = lambda made: {name: digest for name, digest in _made(made).items() if name.endswith(".jsonl")}
    held = code == 0 and answers(workdir) == answers(bench.undisturbed)
    return Outcome(1, int(held), said[-300:] if code else "")


def _copy(workdir: Path, to: Path, stages: Sequence[str]) -> Path:
    """The run as it was when these stages were done."""
    for stage in stages:
        shutil.copytree(workdir / stage, to / stage)
    return to


def _made(workdir: Path) -> dict[str, str]:
    """All that a Generate stage leaves but its record, which knows how long it took."""
    files = [path for path in (workdir / "responses").iterdir() if path.name != "stage.json"]
    return {path.name: sha256(path) for path in files}


def _killed(workdir: Path, stage: str, at: int, layout: Layout, arguments: Sequence[str]) -> bool:
    """Starts the run and kills all its processes when a stage has come so far; says whether they were still at work."""
    folder, (processes, devices, mesh) = workdir / stage, layout
    before, started = opened(folder), layouts.start(RECIPE, workdir, processes, devices, *mesh, *arguments)
    while (opened(folder) == before or progress(folder) < at) and all(process.poll() is None for process in started):
        time.sleep(0.002)
    for process in started:
        process.kill()
    return [process.wait() for process in started] == [-signal.SIGKILL] * processes
