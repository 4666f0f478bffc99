"""Drafts × tasks × temperatures × batch sizes × block sizes: what is missing is measured, what was found is kept.

A sweep that was stopped goes on with the setting it was at, and one that is asked for more does only that: everything
found is a part (``parts``), and ``results.json`` and ``samples.jsonl`` are views of these.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxdraft import __version__
from jaxdraft.data.prompts import Prompt
from jaxdraft.decode import Acceptance, Speculation
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.cell import Cell, options_of, run_line, sample_lines
from jaxdraft.evaluate.measure import Baseline, Model, Work, acceptances, write_alone, write_with_draft
from jaxdraft.evaluate.metrics import offline_efficiency, with_interval
from jaxdraft.evaluate.parts import Parts
from jaxdraft.evaluate.perplexity import LONGEST, Documents, measure_perplexity
from jaxdraft.evaluate.tasks import Task
from jaxdraft.evaluate.token_classes import TokenClasses
from jaxdraft.evaluate.tpot import Latencies, curve
from jaxdraft.files import write_json
from jaxdraft.sharding import mesh_of
from jaxdraft.stopping import poll
from jaxdraft.tokenizers import Tokenizer
from jaxdraft.tracking import write_jsonl
from jaxdraft.untrusted import read_json

PARTS = "measured"
"""Name of the folder with a sweep's parts."""
TaskPrompts = tuple[Task, Sequence[Prompt]]
"""A task with its prompts."""
_ALONE = ("task", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size")
_SETTING = (*_ALONE, "verification", "drafting", "stop_below")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How everything is decoded.

    Attributes:
      speculations: how drafts propose, one for each block size and alike in all else.
      batch_sizes: prompts decoded at once.
      seed: of all randomness.
      repeats: each batch is timed so often, and the best counts.
      predict_up_to: the largest block size whose speed-up is predicted, whether it is decoded or not. Each size is a
        program of the target to compile.
    """

    speculations: tuple[Speculation, ...]
    batch_sizes: tuple[int, ...] = (1,)
    seed: int = 0
    repeats: int = 2
    predict_up_to: int = 10


class Draft(NamedTuple):
    """A draft that is to be measured.

    Attributes:
      name: of its folder among others' results.
      folder: a Hugging Face folder with its tokenizer, if it has any.
      load: reads it onto a mesh.
    """

    name: str
    folder: Path
    load: Callable[[Mesh], Model]


class Sweep:
    """Measures drafts of one target.

    Args:
      target: the model to be accelerated.
      tasks: with the prompts of each.
      settings: what is varied besides, and how everything is decoded.
      tokenizer: of target and drafts.
      folder: gets the parts, in a folder ``measured``.
      bar: counts answers, and says which are being written.
      earlier: folders of other sweeps whose parts may serve.
      keep: called with the file of every new part.
      text: on which the perplexity of target and drafts is measured; ``None`` measures none.
    """

    def __init__(
        self,
        target: Model,
        tasks: Sequence[TaskPrompts],
        settings: Settings,
        tokenizer: Tokenizer,
        folder: Path,
        bar: tqdm,
        earlier: Sequence[Path] = (),
        keep: Callable[[Path], Any] = lambda _: None,
        text: Documents | None = None,
    ):
        self._target, self._settings, self._bar, self._text = target, settings, bar, text
        self._classes = TokenClasses(tokenizer)
        self._works = [
            [Work(task, prompts, size, settings.seed, settings.repeats) for size in settings.batch_sizes]
            for task, prompts in tasks
        ]
        common = {"target": target.identity, **circumstances(target)}
        self._parts = Parts(folder / PARTS, common, [other / PARTS for other in earlier], keep)
        self._baselines: dict[Work, Baseline] = {}

    def measure(self, draft: Model) -> None:
        """Measures what is missing of one draft."""
        if self._text is not None:
            self._perplexities(draft, self._text)
        for works in self._works:
            seen = functools.cache(functools.partial(self._acceptances, draft, works[0]))
            for work in works:
                baseline = self._baseline(work)
                latencies = Latencies(self._target, draft, work, self._part)
                for speculation in self._settings.speculations:
                    cell = Cell(self._target, draft, work, speculation)
                    of = {"kind": "cell", "draft": draft.identity, **work.identity, **vars(speculation)}
                    self._bar.set_postfix_str(f"{Path(draft.name).name}: {cell}")
                    measure = functools.partial(self._cell, cell, baseline, latencies, seen)
                    self._part(of, measure, len(work.prompts))
                options = options_of(self._settings.speculations[0])
                if "stop_below" not in options:  # else what a block takes is known only when it is decoded
                    up_to = {"predict_up_to": self._settings.predict_up_to}
                    of = {"kind": "curve", "draft": draft.identity, **work.identity, **options, **up_to}
                    self._part(of, functools.partial(self._curve, latencies, seen, options))

    def offline(self, draft: Model) -> Iterator[dict[str, Any]]:
        """Exact block efficiency of a draft in every setting: a pass over what the target wrote, no decoding."""
        for work, *_ in self._works:
            seen = self._acceptances(draft, work)
            for speculation in self._settings.speculations:
                named = {"task": work.task.name, "block_size": speculation.block_size, **work.sampling}
                found = with_interval("block_efficiency_offline", offline_efficiency(seen, speculation))
                yield {**named, **options_of(speculation), **found}

    def results(self, draft: Model) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Contents of ``results.json`` and lines of ``samples.jsonl``: all that was found of this pair in the folder.

        Of a task that is asked for, what was found on other prompts under its name is not among them: nothing would
        tell the two apart. Only the lead can ask.
        """
        cells = sorted((found for _, found in self._found("cell", draft)), key=lambda cell: self._order(cell["run"]))
        runs = [cell["run"] for cell in cells]
        curves = [{**found, "max_new_tokens": of["max_new_tokens"]} for of, found in self._found("curve", draft)]
        longest = {_setting(found): found for found in sorted(curves, key=lambda found: len(found["curve"]))}
        settings = dict.fromkeys(map(_setting, runs))
        alone = {tuple(map(run.get, _ALONE)): run["compile_seconds_autoregressive"] for run in runs}
        perplexities = list(self._parts.all(kind="perplexity", draft=draft.identity))
        asked = [found for of, found in perplexities if self._text and of["text"] == self._text.identity]
        others = [found for _, found in perplexities]
        ratio = draft.num_parameters / self._target.num_parameters
        results = {
            "target": self._target.name,
            "draft": draft.name,
            "parameters": {"target": self._target.num_parameters, "draft": draft.num_parameters, "ratio": ratio},
            "settings": self.header(draft),
            "compile_seconds": round(sum(alone.values()) + sum(run["compile_seconds"] for run in runs), 4),
            **next(iter(asked + others), {}),
            "best_block_size": [_with_measured(longest[setting], runs) for setting in settings if setting in longest],
            "runs": runs,
        }
        return results, [line for cell in cells for line in cell["samples"]]

    def _found(self, kind: str, draft: Model) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Parts of this pair, but for those of a task that is asked for and other prompts than are."""
        prompts = {works[0].task.name: works[0].identity["prompts"] for works in self._works}
        timing = {"seed": self._settings.seed, "repeats": self._settings.repeats}
        for of, found in self._parts.all(kind=kind, draft=draft.identity, **timing):
            if of["prompts"] == prompts.get(of["task"], of["prompts"]):
                yield of, found

    def header(self, draft: Model) -> dict[str, Any]:
        """What all runs in a ``results.json`` have in common."""
        weights = {"target": self._target.identity, "draft": draft.identity}
        timing = {"seed": self._settings.seed, "repeats": self._settings.repeats}
        return {**timing, **circumstances(self._target), "weights": weights}

    def _order(self, run: Mapping[str, Any]) -> tuple[Any, ...]:
        """The tasks that are asked for first, as they are asked for."""
        tasks = [works[0].task.name for works in self._works]
        place = tasks.index(run["task"]) if run["task"] in tasks else len(tasks)
        return place, *(run[name] for name in ("task", "temperature", "batch_size", "block_size"))

    def _perplexities(self, draft: Model, text: Documents) -> None:
        """Of draft and target, over windows that both take."""
        length = min(LONGEST, *(model.decoder.config.max_positions for model in (draft, self._target)))
        of = {"text": text.identity, "length": length}
        target = functools.partial(measure_perplexity, self._target, text, length)
        pair = lambda: {
            "perplexity": measure_perplexity(draft, text, length),
            "target_perplexity": self._part({"kind": "target perplexity", **of}, target),
        }
        self._part({"kind": "perplexity", "draft": draft.identity, **of}, pair)

    def _baseline(self, work: Work) -> Baseline:
        if work not in self._baselines:
            self._bar.set_postfix_str(
                f"the target alone: {work.task.name} at T {work.task.temperature:g}, batch {work.batch_size}"
            )
            write = lambda: write_alone(self._target, work, self._advance).to_json()
            found = self._part({"kind": "alone", **work.identity}, write, len(work.prompts))
            self._baselines[work] = Baseline.from_json(found)
        return self._baselines[work]

    def _acceptances(self, draft: Model, work: Work) -> list[Acceptance]:
        return acceptances(self._target, draft, work, self._baseline(work).answers)

    def _cell(
        self, cell: Cell, baseline: Baseline, latencies: Latencies, seen: Callable[[], list[Acceptance]]
    ) -> dict[str, Any]:
        results, batches = write_with_draft(*cell, self._advance)
        prompts = [prompt.tokens for prompt in cell.work.prompts]
        classes = [self._classes.of(prompt, result.tokens) for prompt, result in zip(prompts, results, strict=True)]
        run = run_line(cell, results, batches, baseline, seen(), latencies, classes)
        return {"run": run, "samples": sample_lines(cell, results, seen())}

    def _curve(
        self, latencies: Latencies, seen: Callable[[], list[Acceptance]], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        work = latencies.work
        efficiency = lambda size: float(offline_efficiency(seen(), Speculation(size, **options))[0])
        points = curve(latencies, efficiency, range(1, self._settings.predict_up_to + 1))
        best = max(points, key=lambda point: point["predicted_speedup"])
        return {
            "task": work.task.name,
            **work.sampling,
            "batch_size": work.batch_size,
            **options,
            "best_block_size": best["block_size"],
            "curve": points,
        }

    def _part(self, of: Mapping[str, Any], measure: Callable[[], Any], answers: int = 0) -> Any:
        """What was found for this description before, or what ``measure`` finds now, which shows its own progress."""
        found = self._parts.find(of)
        if found is None:
            return self._parts.add(of, measure())
        self._advance(answers)
        return found

    def _advance(self, answers: int) -> None:
        self._bar.update(answers)
        poll()


def at_temperatures(tasks: Sequence[TaskPrompts], temperatures: Sequence[float]) -> list[TaskPrompts]:
    """Every task at each of these temperatures in place of its own; as they are where there are none."""
    if not temperatures:
        return list(tasks)
    return [
        (dataclasses.replace(task, temperature=temperature), prompts)
        for task, prompts in tasks
        for temperature in temperatures
    ]


def answers(tasks: Sequence[TaskPrompts], settings: Settings, drafts: int) -> int:
    """How many a sweep's bar counts."""
    prompts = sum(len(prompts) for _, prompts in tasks) * len(settings.batch_sizes)
    return prompts * (1 + drafts * len(settings.speculations))


def circumstances(target: Model) -> dict[str, Any]:
    """What times, and the last bits of numbers, depend on besides models and settings."""
    mesh = mesh_of(target.params)
    device = mesh.devices.flat[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "dtype": str(target.dtype),
        "devices": f"{mesh.size} {device.device_kind}" + (f", {cores} cores" if device.platform == "cpu" else ""),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {"jax": jax.__version__, "jaxdraft": __version__},
    }


def check_same(file: Path, header: Mapping[str, Any]) -> None:
    """Refuses to add to results that were measured otherwise.

    Args:
      file: a ``results.json``, which need not be there.
      header: what its runs have to have in common.

    Raises:
      ConfigError: they do not.
    """
    if not file.exists():
        return
    remedy = "it holds no results of jaxdraft evaluate: delete it, or give another folder"
    theirs = read_json(file, fields={"settings": dict}, remedy=remedy)["settings"]
    if other := [key for key in header if theirs.get(key) != header[key]]:
        key = other[0]
        raise ConfigError(
            f"{file} was measured with {key} {theirs.get(key)!r}, here it is {header[key]!r}: give another folder"
        )


def write_results(folder: Path, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``samples.jsonl`` and then ``results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "samples.jsonl", samples)
    write_json(folder / "results.json", results)


def _setting(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(name) for name in _SETTING)


def _with_measured(found: dict[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A curve with the speed-ups that were measured on it."""
    measured = {run["block_size"]: run["measured_speedup"] for run in runs if _setting(run) == _setting(found)}
    points = [
        {**point, "measured_speedup": measured[point["block_size"]]} if point["block_size"] in measured else point
        for point in found["curve"]
    ]
    return {**found, "curve": points}
