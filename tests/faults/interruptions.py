"""Processes killed and stopped: F1 to F4."""

import contextlib
import functools
import shutil
import signal
import subprocess
import time
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.distributed import layouts
from tests.faults.bench import RECIPE, Bench, Outcome, called, fault, hashes, run, start
from tests.faults.progress import newest_checkpoint, opened, progress, status

# Long enough for many signals to land inside every stage.
STEPS = 24
LONGER = ("--set", f"steps={STEPS}", "--set", "questions=30")
KILLED = ("corpus", "pretrain", "responses", "distill", "evaluate", "export")
SHIM = Path(__file__).with_name("kill_at.c")
# Where calls are counted, and up to which: a save of a checkpoint is about 90, a shard with its record about 12.
WRITING = {"corpus": 16, "target/checkpoints": 130, "responses": 16}
WRITERS = ("tokenizer", "corpus", "target", "responses")
# Seconds from a signal to the end: of one process, of several, of those that have lost one, whose heartbeat is missed
# after 30. One that never ends is ended.
ONE_STOPS, ALL_STOP, ONE_LOST, NEVER = 5.0, 30.0, 60.0, 180.0


class Struck(NamedTuple):
    """What became of a process that was sent a signal.

    Attributes:
      running: whether it was in the stage that was meant.
      progress: how far the stage had come.
      code: its exit code.
      seconds: from the signal to its end.
      said: on standard error.
    """

    running: bool
    progress: int
    code: int
    seconds: float
    said: str


@functools.cache
def longer(bench: Bench) -> Path:
    """The recipe with ``LONGER``, run by one process that nothing happened to."""
    workdir = bench.folder / "longer"
    done = run(workdir, *LONGER)
    assert done.returncode == 0, done.stderr
    return workdir


def strike(
    bench: Bench,
    workdir: Path,
    stage: str,
    number: signal.Signals,
    *,
    when: Callable[[Path], bool] = lambda folder: True,
    within: float = 0.02,
    arguments: Sequence[str] = LONGER,
    **environment: str,
) -> Struck:
    """Starts the command and sends it a signal in a stage, when its folder says so and a random moment later.

    Args:
      within: that moment in seconds, at most.
    """
    folder = workdir / stage
    before = opened(folder)
    process = start(workdir, *arguments, **environment)
    while process.poll() is None and not (opened(folder) != before and when(folder)):
        time.sleep(0.002)
    time.sleep(bench.random.uniform(0, within))
    running, came, sent = status(folder) == "running", progress(folder), time.monotonic()
    process.send_signal(number)
    try:
        said = process.communicate(timeout=NEVER)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    return Struck(running and process.returncode != 0, came, process.returncode, time.monotonic() - sent, said)


def come_to(at: int) -> Callable[[Path], bool]:
    return lambda folder: progress(folder) >= at


def moments(bench: Bench, steps: int, count: int) -> list[int]:
    """So many places among a stage's steps, the first to be reached first."""
    return sorted(bench.random.randrange(steps) for _ in range(count))


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """What is missing, extra or other than in the undisturbed run."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def finished(workdir: Path, expected: Path, arguments: Sequence[str] = LONGER) -> list[str]:
    """Runs to the end; returns what is then otherwise than expected."""
    done = run(workdir, *arguments)
    return [done.stderr[-300:]] if done.returncode else differing(hashes(workdir), hashes(expected))


def saved(folder: Path) -> bool:
    """Whether the last step that a Train stage wrote down has a checkpoint."""
    return newest_checkpoint(folder) == progress(folder)


@fault("F1", "SIGKILL while a draft is distilled")
def killed_once(bench: Bench) -> Outcome:
    return _distilled(bench, signal.SIGKILL, lambda struck, folder: True)


@fault("F3", "SIGTERM while a draft is distilled")
def stopped_once(bench: Bench) -> Outcome:
    return _distilled(bench, signal.SIGTERM, _as_promised, *_unsaved("distill"))


def _unsaved(stage: str) -> list[str]:
    """Settings under which what a stage saves before its end is what a signal made it save."""
    return ["--set", f"{stage}.save_every={STEPS}", "--set", f"{stage}.keep_every={STEPS}"]


def _as_promised(struck: Struck, folder: Path) -> bool:
    return struck.code == 75 and struck.seconds < ONE_STOPS and saved(folder)


def _distilled(
    bench: Bench, number: signal.Signals, promised: Callable[[Struck, Path], bool], *settings: str
) -> Outcome:
    """One signal in a stage that goes on beside all that was done before it."""
    workdir, only = bench.new("distilled"), (*settings, "--only", "distill")
    shutil.copytree(bench.undisturbed, workdir, ignore=shutil.ignore_patterns("distill", "evaluate", "export"))
    struck = strike(bench, workdir, "distill", number, when=come_to(1), arguments=only)
    is_promised = promised(struck, workdir / "distill")
    code, said = called("run", str(RECIPE), "--workdir", str(workdir), *only)
    of_stage = lambda found: {name: digest for name, digest in found.items() if name.startswith("distill/")}
    is_same = code == 0 and of_stage(hashes(workdir)) == of_stage(bench.expected)
    is_held = struck.running and is_promised and is_same
    return Outcome(int(struck.running), int(is_held), f"at step {struck.progress}; {said[-300:] if code else ''}")


@fault("F1", "SIGKILL at random times in prepare, pretrain, generate, distill, evaluate and export", slow=True)
def killed(bench: Bench) -> Outcome:
    reference, workdir = longer(bench), bench.new("killed")
    landed: dict[str, list[int]] = {stage: [] for stage in KILLED}
    for stage in KILLED:
        for at in moments(bench, max(1, progress(reference / stage) - 1), bench.effort):
            if status(workdir / stage) == "done":
                break
            # A third of them while it loads, compiles and restores.
            early = bench.random.random() < 0.3
            when = come_to(0 if early else at)
            struck = strike(bench, workdir, stage, signal.SIGKILL, when=when, within=1.0 if early else 0.02)
            landed[stage] += [struck.progress] if struck.running else []
    wrong = finished(workdir, reference)
    spoilt = {name.split("/")[0] for name in wrong}
    held = 0 if spoilt - landed.keys() else sum(len(landed[stage]) for stage in landed.keys() - spoilt)
    places = ", ".join(f"{stage} {len(times)} at {len(set(times))} places" for stage, times in landed.items())
    return Outcome(sum(map(len, landed.values())), held, "; ".join([places, *wrong[:5]]))


@fault("F2", "SIGKILL at a file-system call of a save, of a row shard's or an answer shard's commit", slow=True)
def killed_at_a_call(bench: Bench) -> Outcome:
    if shutil.which("cc") is None:
        raise unittest.SkipTest("no C compiler")  # which pytest knows too
    reference, workdir, shim = longer(bench), bench.new("calls"), bench.new("kill_at").with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SHIM, "-ldl"], check=True)
    injected = held = 0
    notes = []
    for below, calls_made in WRITING.items():
        stage, calls = below.split("/")[0], set()
        for _ in range(bench.effort):
            if status(workdir / stage) == "done":  # the call that was chosen did not come
                shutil.rmtree(workdir / stage)
            before = newest_checkpoint(workdir / "target")
            at = bench.random.randint(1, calls_made)
            shimmed = {"LD_PRELOAD": str(shim), "KILL_BELOW": f"{workdir}/{below}/", "KILL_AT": str(at)}
            done = run(workdir, *LONGER, "--only", *WRITERS[: WRITERS.index(stage) + 1], **shimmed)
            landed = done.returncode == -signal.SIGKILL
            kept = newest_checkpoint(workdir / "target") >= before and "checkpoint skipped" not in done.stderr
            injected, held = injected + landed, held + (landed and kept)
            calls |= {at} if landed else set()
            notes += [] if kept else [f"call {at}: {done.stderr[-300:]}"]
        notes.append(f"{below}: {len(calls)} calls")
    wrong = finished(workdir, reference)
    return Outcome(injected, 0 if wrong else held, "; ".join(notes + wrong[:5]))


# What a stage's folder shows when it is in the midst of it, and for how long at least.
STOPPED: dict[str, tuple[str, Callable[[Path], bool], float]] = {
    "prepare": ("corpus", come_to(0), 0.1),
    "compile": ("target", come_to(0), 1.0),
    "train": ("pretrain", come_to(1), 0.01),
    "generate": ("responses", come_to(1), 0.05),
    "save": ("distill", lambda folder: any(folder.glob("checkpoints/*tmp*")), 0.0),
    "evaluate": ("evaluate", come_to(1), 2.0),
}


@fault("F3", "SIGTERM in prepare, compile, train, save, generate and evaluate", slow=True)
def stopped(bench: Bench) -> Outcome:
    reference, workdir, arguments = longer(bench), bench.new("stopped"), (*LONGER, *_unsaved("pretrain"))
    injected = held = 0
    notes, slowest = [], 0.0
    for what, (stage, when, within) in STOPPED.items():
        for i in range(-(-bench.effort // 3)):
            if status(workdir / stage) == "done":
                break
            cold = {"JAX_COMPILATION_CACHE_DIR": str(bench.new("cold"))} if what == "compile" else {}
            struck = strike(
                bench, workdir, stage, signal.SIGTERM, when=when, within=within, arguments=arguments, **cold
            )
            if not struck.running:
                continue
            folder, steps = workdir / stage, progress(workdir / stage)
            is_saved = what not in ("train", "save") or (saved(folder) and steps >= struck.progress)
            promised = struck.code == 75 and struck.seconds < ONE_STOPS and is_saved
            injected, held, slowest = injected + 1, held + promised, max(slowest, struck.seconds)
            if not promised:
                notes.append(
                    f"{what} {i}: exit {struck.code} after {struck.seconds:.1f} s, step {newest_checkpoint(folder)} "
                    f"saved of {steps}: {struck.said[-300:]}"
                )
    wrong = finished(workdir, reference, arguments)
    notes = [f"at most {slowest:.1f} s to the exit", *notes, *wrong[:5]]
    return Outcome(injected, 0 if wrong else held, "; ".join(notes))


@fault("F4", "SIGTERM to one of two processes, Ctrl-C to both, SIGKILL of one", slow=True)
def one_of_two(bench: Bench) -> Outcome:
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
    count = max(len(numbers), bench.effort)
    apart = 100  # steps from one to the next: they pass quickly, and two processes need a while to agree where to stop
    steps = ("--set", f"target.steps={apart * (count + 1)}", "--set", "target.save_every=20")
    arguments = (*steps, "--only", "tokenizer", "corpus", "target")
    reference, workdir = bench.new("two"), bench.new("one-of-two")
    layouts.run(RECIPE, reference, 2, 1, *arguments)
    injected = held = 0
    notes, slowest, folder = [], dict.fromkeys(numbers, 0.0), workdir / "target"
    for i in range(count):
        number, before = numbers[i % len(numbers)], opened(folder)
        whom = (0, 1) if number == signal.SIGINT else (bench.random.randrange(2),)
        started = layouts.start(RECIPE, workdir, 2, 1, *arguments)
        try:
            while _at_work(started) and (opened(folder) == before or progress(folder) < apart * i + 4):
                time.sleep(0.002)
            landed, sent = _at_work(started), time.monotonic()
            for index in whom:
                started[index].send_signal(number)
            codes = [_end(process) for process in started]
            slowest[number] = max(slowest[number], seconds := time.monotonic() - sent)
        finally:
            for process in started:
                process.kill()
        if number == signal.SIGKILL:
            promised = 0 not in codes and seconds < ONE_LOST
        else:
            promised = codes == [75, 75] and seconds < ALL_STOP and saved(folder)
        injected, held = injected + landed, held + (landed and promised)
        if not promised:
            where = f"{newest_checkpoint(folder)} of {progress(folder)} saved"
            notes.append(f"{number.name} to {whom}: exits {codes} after {seconds:.0f} s, {where}: {_said(workdir)}")
    try:
        layouts.run(RECIPE, workdir, 2, 1, *arguments)
        wrong = differing(hashes(workdir), hashes(reference))
    except RuntimeError as error:
        wrong = [str(error)[-300:]]
    longest = ", ".join(f"{number.name} {seconds:.1f} s" for number, seconds in slowest.items())
    notes = [f"to the last exit at most {longest}", *notes, *wrong[:5]]
    return Outcome(injected, 0 if wrong else held, "; ".join(notes))


def _at_work(started: Sequence["subprocess.Popen[str]"]) -> bool:
    return all(process.poll() is None for process in started)


def _end(process: "subprocess.Popen[str]") -> int:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(NEVER)
    process.kill()
    return process.wait()


def _said(workdir: Path) -> str:
    return " | ".join(layouts.log_of(workdir, index).read_text()[-300:] for index in range(2))
