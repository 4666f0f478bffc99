"""The training loop: feeds the step, writes its metrics down one step late, saves, and resumes where it stood."""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.data.pipeline import Batches
from jaxdraft.distributed import on_lead
from jaxdraft.errors import Interrupted
from jaxdraft.losses import Loss
from jaxdraft.models import Decoder
from jaxdraft.models.decoder import Params, model_shardings
from jaxdraft.sharding import batch_sharding, row_groups
from jaxdraft.stopping import MESSAGE, asked, at_once, deferred
from jaxdraft.tracking import StepLog, progress_bar, read_jsonl, say
from jaxdraft.train.state import OptimizerSettings, abstract_state, create_state, state_shardings
from jaxdraft.train.step import build_step

Rows = Sequence[tuple[str, int]]
_SKIPPED_IN_A_ROW = 3  # updates, that end a run
_ROWS_NAMED = 16


def train(
    folder: Path,
    *,
    draft: Decoder,
    params: Params,
    loss: Loss,
    batches: Batches,
    optimizer: OptimizerSettings,
    mesh: Mesh,
    frozen: Mapping[str, tuple[Decoder, Params]] | None = None,
    seed: int = 0,
    accumulate: int = 1,
    save_every: int = 1000,
    keep_every: int | None = None,
    measure: Callable[[Params], Sequence[dict[str, Any]]] | None = None,
    measure_every: int = 1000,
    profile: tuple[int, int] | None = None,
    checkpoints_folder: Path | str | None = None,
    before_save: Callable[..., None] | None = None,
    identity: Mapping[str, Any] | None = None,
    until: int | None = None,
) -> Params:
    """Trains to the last step and returns the parameters; a second call with the same folder goes on where it stood.

    An update of numbers that are not finite is skipped; its line in ``metrics.jsonl`` says so, with ``"skipped": 1``
    and null for what is no number. A signal ends training after the step at hand, which is saved.

    Args:
      folder: gets ``checkpoints/``, ``metrics.jsonl`` and ``block_efficiency.jsonl`` (byte-identical however often
        the run was interrupted) and ``timing.jsonl``.
      draft: the model that learns.
      params: its initial parameters.
      loss: what it learns.
      batches: the global batch of every step.
      optimizer: steps and rates.
      mesh: the devices.
      frozen: the models in the loop that do not learn, with their parameters: ``target``, ``reference``.
      seed: of what the loss draws.
      accumulate: micro-batches per update.
      save_every: steps between checkpoints to resume from.
      keep_every: steps between checkpoints kept for good.
      measure: gives the lines of ``block_efficiency.jsonl`` for the parameters it is shown: before the first step,
        after the last, and in between.
      measure_every: steps between measurements.
      profile: first step to trace into ``profile/``, and the one to stop before.
      checkpoints_folder: where checkpoints go instead of ``folder / "checkpoints"``; may be a URL.
      before_save: called with the paths of the logs before each save, whose steps they are then to hold.
      identity: what all this depends on, as JSON: a checkpoint of another identity is refused.
      until: a step to end at, and save, before the last.

    Raises:
      ConfigError: the newest checkpoint is of another identity.
      FloatingPointError: three updates in a row were skipped; the message names their steps and rows.
      Interrupted: a signal came.
      OSError: no checkpoint is intact, or a file cannot be written.
    """
    end = optimizer.steps if until is None else until
    shardings = state_shardings(draft.config, optimizer, mesh)
    models = {name: model for name, (model, _) in (frozen or {}).items()}
    frozen_shardings = {name: model_shardings(model.config, mesh) for name, model in models.items()}
    frozen_params = {
        name: jax.device_put(weights, frozen_shardings[name]) for name, (_, weights) in (frozen or {}).items()
    }
    step_fn = build_step(draft, models, loss, optimizer, mesh, shardings, frozen_shardings, accumulate, seed)

    with (
        jax.set_mesh(mesh),
        Checkpoints(checkpoints_folder or folder / "checkpoints", keep_every, identity) as checkpoints,
    ):
        restored = checkpoints.restore_newest(abstract_state(optimizer, draft.config, shardings))
        start, state = restored or (0, create_state(optimizer, params, shardings))
        if start < end:
            compiled = step_fn.lower(state, frozen_params, _place(batches, start, mesh, accumulate)).compile()
        measured = [] if measure is None else sorted({*range(0, optimizer.steps, measure_every), optimizer.steps})
        log = _Log(folder, start, optimizer.steps, measured=measured, rows=batches.rows)
        tracer = _Tracer(folder / "profile", *(profile or (-1, -1)))
        saved = start

        def save(step: int) -> None:
            nonlocal saved
            log.flush()
            log.sync()
            if before_save is not None:
                before_save(*log.files)
            checkpoints.save(step, state)
            saved = step

        with deferred(), contextlib.closing(log):
            for step in range(start, end + 1):
                if measure is not None and step in measured:
                    log.flush()
                    if saved < step:  # a measurement that does not come back to Python, as it is compiled, ends all
                        save(step)
                        checkpoints.wait()
                    with at_once():
                        lines = measure(state.params)
                    log.measured(step, lines)
                if step == end:
                    break
                tracer.before(step, state)
                batch = _place(batches, step, mesh, accumulate)
                state, metrics = compiled(state, frozen_params, batch)
                log.dispatched(step + 1, metrics)
                is_due = (step + 1) % save_every == 0 or (keep_every and (step + 1) % keep_every == 0)
                if (stopping := asked()) or is_due or step + 1 == end:
                    save(step + 1)
                if stopping:
                    checkpoints.wait()
                    raise Interrupted(MESSAGE)
            log.flush()
            checkpoints.wait()
        tracer.finish(start, state)
    return state.params


def _place(batches: Batches, step: int, mesh: Mesh, accumulate: int) -> dict[str, jax.Array]:
    """The global batch, of which each process reads the rows that its own devices hold.

    Filled up with rows of nothing, which weigh nothing, where it does not divide over devices and micro-batches.
    """
    sharding, multiple = batch_sharding(mesh), row_groups(mesh) * accumulate
    size = -(-len(batches) // multiple) * multiple
    spans = [index[0].indices(size) for index in sharding.addressable_devices_indices_map((size,)).values() if index]
    first, end = min(begin for begin, _, _ in spans), max(end for _, end, _ in spans)
    first = min(first, len(batches) - 1)  # a process that holds filler alone has to know its shape
    rows = batches.part(step, slice(first, end))

    def on_device(values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        begin, end, _ = index[0].indices(size)
        part = values[begin - first : end - first]
        return np.pad(part, [(0, end - begin - len(part)), *[(0, 0)] * (part.ndim - 1)])

    return {
        name: jax.make_array_from_callback((size, *x.shape[1:]), sharding, functools.partial(on_device, x))
        for name, x in rows.items()
    }


class _Tracer:
    """JAX's profiler over a range of steps, with nothing of the steps around it."""

    def __init__(self, folder: Path, first: int, end: int):
        self._folder, self._first, self._end, self._running = folder, first, end, False

    def before(self, step: int, state: Any) -> None:
        if step == self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        if step == self._end:
            self._stop(step, state)

    def finish(self, start: int, state: Any) -> None:
        """After the last step of a run that began with step ``start``."""
        steps = int(state.step)
        self._stop(steps, state)
        if self._end > 0 and not start <= self._first < steps:
            say(f"    nothing traced: this run made steps {start} to {steps - 1}, asked for was {self._first}")

    def _stop(self, step: int, state: Any) -> None:
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
            say(f"    steps {self._first} to {step - 1} traced into {self._folder}")


class _Log:
    """Writes step n - 1 after step n was dispatched, so that the device never waits for the host."""

    def __init__(self, folder: Path, start: int, steps: int, measured: Sequence[int], rows: Callable[[int], Rows]):
        done = range(1, start + 1)
        self._rows = rows
        self._metrics = StepLog(folder / "metrics.jsonl", done)
        self._timing = StepLog(folder / "timing.jsonl", done)
        self._efficiency: StepLog | None = None
        if measured:
            self._efficiency = StepLog(folder / "block_efficiency.jsonl", [step for step in measured if step < start])
        self._shown: dict[str, str] = {}
        self._bar = progress_bar(steps, folder.name, "step", initial=start)
        self._name = folder.name
        self._skipped: list[int] = on_lead(lambda: _skipped_last(folder / "metrics.jsonl"))
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._clock = time.perf_counter()

    @property
    def files(self) -> list[Path]:
        return [log.path for log in (self._metrics, self._timing, self._efficiency) if log is not None]

    def dispatched(self, step: int, metrics: dict[str, Any]) -> None:
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        is_skipped = values.pop("skipped")
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        rate = values["tokens"] / seconds
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(step, known | ({"skipped": 1} if is_skipped else {}))
        self._timing.write(step, {"seconds": round(seconds, 6), "tokens_per_second": round(rate, 1)})
        shown = {"loss": f"{values['loss']:.3f}", "tok/s": f"{rate:,.0f}"}
        for name, sign in {"acceptance": "", "acceptance_low": "≥ "}.items():
            if name in values:
                shown["acceptance"] = f"{sign}{values[name]:.3f}"
        self._bar.set_postfix(shown | self._shown, refresh=False)
        self._bar.update(1)
        self._skipped = [*self._skipped, step] if is_skipped else []
        if is_skipped:
            what = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
            say(f"    step {step}: {what or 'parameters'} not finite, the update is skipped")
        if len(self._skipped) == _SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{self._name}: the updates of {len(self._skipped)} steps in a row were not finite and were skipped: "
                f"{'; '.join(f'step {step}, rows {_named(self._rows(step - 1))}' for step in self._skipped)}. Look at "
                "those rows, or train anew with a lower learning_rate"
            )

    def sync(self) -> None:
        for log in (self._metrics, self._timing, self._efficiency):
            if log is not None:
                log.sync()

    def measured(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        assert self._efficiency is not None
        self._efficiency.write(step, *lines)
        largest = max(line["block_size"] for line in lines)
        shown = [line for line in lines if line["block_size"] == largest]
        self._shown = {
            name: "/".join(f"{line[key]:.2f}" for line in shown)
            for name, key in {f"τ{largest}": "block_efficiency_offline", "decoded": "block_efficiency"}.items()
            if key in shown[0]
        }
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        self._timing.write(step, {"measuring_seconds": round(seconds, 6)})

    def close(self) -> None:
        self._bar.close()
        for log in (self._metrics, self._timing, self._efficiency):
            if log is not None:
                log.close()


def _skipped_last(metrics: Path) -> list[int]:
    """The steps at the end of a log whose updates were skipped, one after another."""
    lines = itertools.takewhile(lambda line: "skipped" in line, reversed(read_jsonl(metrics)))
    return [line["step"] for line in lines][::-1]


def _named(rows: Rows) -> str:
    named = ", ".join(f"{source} {index}" for source, index in rows[:_ROWS_NAMED])
    return named if len(rows) <= _ROWS_NAMED else f"{named} and {len(rows) - _ROWS_NAMED} more"
