"""``jaxdraft replay RUN --stage NAME``: some steps of a Train stage once more, held against what was written down.

They are done by the stage's own loop, from one of its checkpoints, in a temporary folder: nothing is written into the
run. Metric lines have to be the same bytes, and a state that has a checkpoint the same fingerprint.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdraft.checkpoint import saved_fingerprint
from jaxdraft.context import Context
from jaxdraft.diff import fields
from jaxdraft.errors import ConfigError
from jaxdraft.home import CHECKPOINTS, Home, saved_steps
from jaxdraft.provenance import differences, environment
from jaxdraft.recipe import Recipe, Train
from jaxdraft.remote import is_url
from jaxdraft.run import plan_stage
from jaxdraft.settings import shortened
from jaxdraft.stages import train_stage
from jaxdraft.tracking import read_jsonl, say
from jaxdraft.untrusted import read_json

METRICS = "metrics.jsonl"
_LOGS = (METRICS, "block_efficiency.jsonl", "timing.jsonl")


class Replayed(NamedTuple):
    """What came of it.

    Attributes:
      start: the step of the checkpoint that it began from; 0 is the stage's start.
      end: the last step.
      repeated: how many steps before the first whose lines differ.
      difference: the first one, in words; empty where there is none.
      has_state: whether there was a checkpoint to hold the last state against.
    """

    start: int
    end: int
    repeated: int
    difference: str
    has_state: bool


def replay(recipe: Recipe, home: Home, name: str, start: int | None = None, steps: int | None = None) -> Replayed:
    """Trains some steps of a stage again.

    Args:
      recipe: that of the run.
      home: the run directory.
      name: of the Train stage.
      start: the step of the checkpoint to begin from, 0 for the stage's start; ``None`` is the last but one.
      steps: how many; ``None`` goes on to the next checkpoint, or else to the last step that was written down.

    Raises:
      ConfigError: no such stage, one whose settings or inputs are others now, or no such checkpoint.
      OSError: the checkpoint is damaged.
    """
    stage = recipe.stage(name)
    if not isinstance(stage, Train):
        raise ConfigError(f"{name} is a {type(stage).__name__} stage: only Train stages have steps to repeat")
    if is_url(str(home)):
        raise ConfigError(f"{home}: copy the run to a disk of this machine and replay it there")
    context = Context(recipe, home)
    _check_current(stage, context)
    folder = home.folder / name
    kept, written = saved_steps(folder), [line["step"] for line in read_jsonl(folder / METRICS)]
    start, end = _range(name, kept, len(written), start, steps)
    for field, (old, new) in _other_machine(context).items():
        say(f"note: {field} was {shortened(old)} and is {shortened(new)}: equal bytes are not promised (Tier C)")
    with tempfile.TemporaryDirectory(prefix="jaxdraft-replay-") as place:
        scratch = Path(place) / name
        scratch.mkdir()
        for log in _LOGS:  # the loop cuts them off where the checkpoint stands
            if (folder / log).exists():
                shutil.copyfile(folder / log, scratch / log)
        if start:
            shutil.copytree(folder / CHECKPOINTS / str(start), scratch / CHECKPOINTS / str(start))
            record = Path(CHECKPOINTS) / f"{start}.json"
            if (folder / record).exists():
                shutil.copyfile(folder / record, scratch / record)
        *_, logs = train_stage(stage, context, scratch, scratch / CHECKPOINTS, until=end)
        found = min((first for log in logs for first in _difference(folder / log.name, log, start, end)), default=None)
        repeated = end - start if found is None else max(0, found[0] - 1 - start)
        difference = "" if found is None else found[1]
        if not difference and end in kept:
            recorded, again = (saved_fingerprint(run / CHECKPOINTS, end) for run in (folder, scratch))
            if recorded != again:
                difference = f"the state after step {end} is another than its checkpoint's"
    return Replayed(start, end, repeated, difference, end in kept)


def _check_current(stage: Train, context: Context) -> None:
    """The stage as the recipe has it now, and what it reads, are those that it was trained with."""
    made: dict[str, str] = {}
    for other in context.recipe.stages:
        plan = plan_stage(other, context, made)
        if other is stage:
            if plan.state not in ("done", "unfinished"):
                raise ConfigError(f"{stage.name} cannot be repeated: {plan.reason}")
            return
        if plan.state == "done":
            made[other.name] = plan.output


def _range(name: str, kept: Sequence[int], written: int, start: int | None, steps: int | None) -> tuple[int, int]:
    before = [0, *(step for step in kept if step < written)]
    if start is None:
        start = before[-1]
    if start not in before:
        there = ", ".join(map(str, before))
        raise ConfigError(f"{name} has no checkpoint of step {start} to go on from: there are {there}")
    end = next((step for step in kept if step > start), written) if steps is None else start + steps
    if not start < end <= written:
        raise ConfigError(f"{name} has {written} steps: after step {start} there are {written - start} to repeat")
    return start, end


def _other_machine(context: Context) -> dict[str, tuple[Any, Any]]:
    """What ``run.json`` has otherwise than this process."""
    path = context.workdir / "run.json"
    recorded = read_json(path) if path.is_file() else {}
    now = {**environment(), "mesh": dict(context.mesh.shape)}
    return differences({key: recorded.get(key) for key in now}, now)


def _difference(recorded: Path, again: Path, start: int, end: int) -> Iterator[tuple[int, str]]:
    """The first step whose lines are not the same bytes, and in which field."""
    one, other = (list(_of_steps(path, start, end)) for path in (recorded, again))
    for a, b in zip(one, other, strict=False):
        if a != b:
            before, now = json.loads(a), json.loads(b)
            yield before["step"], f"{again.name}, step {before['step']}, {next(fields(before, now), 'other bytes')}"
            return
    if len(one) != len(other):
        yield end, f"{again.name} has {len(one)} lines of these steps, and again {len(other)}"


def _of_steps(log: Path, start: int, end: int) -> Iterator[str]:
    """The lines after step ``start``, as they are written; what was measured before the first step too."""
    for line in log.read_text("utf-8").split("\n")[:-1]:
        step = json.loads(line)["step"]
        if start < step <= end or start == step == 0:
            yield line
