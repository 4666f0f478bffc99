"""Reads a run directory into plain Python values, for the report.

Nothing has to be there: a stage that has not run has no numbers, a run without an evaluation has no results.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.words import decoding
from jaxdraft.untrusted import read_json

# What a reader calls a model's dimensions -> the names ModelConfig and Hugging Face's config.json give them.
_SHAPE = {
    "Family": ("family", "model_type"),
    "Layers": ("num_layers", "num_hidden_layers"),
    "Hidden size": ("hidden_size",),
    "MLP width": ("intermediate_size",),
    "Attention heads": ("num_heads", "num_attention_heads"),
    "Key/value heads": ("num_kv_heads", "num_key_value_heads"),
    "Vocabulary": ("vocab_size",),
}
# Losses and weights as the papers write them.
_LOSSES = {
    "CrossEntropy": "cross-entropy",
    "ReverseKL": "reverse KL",
    "TVDPlusPlus": "TVD++",
    "TVDPlusPlusGlobal": "TVD++ (global σ)",
    "TVDPlusPlusLiteral": "TVD++ (literal)",
    "TVDPlusPlusSampled": "TVD++ (sampled)",
    "LogAcceptance": "−log α",
    "LKHybrid": "LK hybrid",
    "DPACE": "D-PACE",
}


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe: what it was asked to do, and what it wrote down.

    Attributes:
      metrics: a dict per step.
      manifest: of its rows; empty where it made none.
      account: of a Generate stage's answers; empty likewise.
    """

    name: str
    kind: str
    status: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    seconds: float | None
    metrics: list[dict[str, Any]]
    on_answers: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    account: dict[str, Any] = field(default_factory=dict)

    @property
    def distilled(self) -> bool:
        """Whether the stage learned from the target: from its distribution, or from what it had answered."""
        return self.on_answers or self.compared

    @property
    def compared(self) -> bool:
        """Whether the target's distribution was there, live or stored: only then is there an acceptance to log."""
        return self.logged("acceptance") or self.logged("acceptance_low")

    def logged(self, key: str) -> bool:
        """Whether any step logged ``key``."""
        return any(key in line for line in self.metrics)

    @property
    def writers(self) -> list[str]:
        """Of a Generate stage: who answered."""
        return _writers(self.settings)

    @property
    def loss(self) -> str:
        """Name of the loss, or "" where there is none."""
        loss = self.settings.get("loss")
        return _loss_name(loss) if isinstance(loss, dict) else ""

    @property
    def label(self) -> str:
        """The stage's name, with its loss where that is what tells it from its neighbours."""
        return f"{self.name} ({self.loss})" if self.distilled and self.loss else self.name


@dataclass(frozen=True)
class RunDirectory:
    """All that a report shows.

    Attributes:
      folder: the run directory.
      recipe, record: recipe.json and run.json; empty where the file is missing.
      stages: in the recipe's order, also those that have not run.
      results: one dict per draft, task, block size and decoding setting, with INTERFACE.md's fields and ``draft``,
        the stage that trained the draft.
      curves: predicted speed-up over block sizes with the best one, per draft, task, decoding setting and batch size.
      samples: the lines of samples.jsonl with the same ``draft``.
      checkpoints: the lines of checkpoints.jsonl.
      while_learning: the lines of block_efficiency.jsonl with ``draft``, the stage that wrote it.
      parameters: draft stage -> {"target", "draft", "ratio"}.
      circumstances: draft stage -> what all its results have in common, such as the number format and the devices.
      perplexity: draft stage -> ``perplexity`` and what else is known of it, where it was measured.
      target_perplexity: the same of the target; empty where it was not measured.
    """

    folder: Path
    recipe: dict[str, Any]
    record: dict[str, Any]
    stages: list[Stage]
    results: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    while_learning: list[dict[str, Any]]
    parameters: dict[str, dict[str, float]]
    circumstances: dict[str, dict[str, Any]]
    perplexity: dict[str, dict[str, Any]]
    target_perplexity: dict[str, Any]

    def stage(self, name: str) -> Stage | None:
        """The stage called ``name``."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def label(self, draft: str) -> str:
        """What the page calls ``draft``."""
        stage = self.stage(draft)
        return stage.label if stage else draft

    @property
    def drafts(self) -> list[str]:
        """Evaluated drafts, in the order in which they were trained."""
        found = {row["draft"] for row in self.results}
        ordered = [stage.name for stage in self.stages if stage.name in found]
        return ordered + sorted(found - set(ordered))

    @property
    def distinct_results(self) -> list[dict[str, Any]]:
        """Of results that differ only in their batch size, on which nothing but speed depends, the smallest one's."""
        return of_smallest_batch(self.results)

    @property
    def distinct_checkpoints(self) -> list[dict[str, Any]]:
        """The same of checkpoints, which may have been decoded with."""
        return of_smallest_batch(self.checkpoints)

    def tokenizer_folder(self) -> Path | None:
        """Folder with the run's tokenizer: a stage's, otherwise the target's."""
        folders = [self.folder / stage.name / sub for stage in self.stages for sub in ("", "model")]
        if self.target_folder:
            folders.append(self.target_folder)
        names = ("tokenizer.model", "tokenizer.json")
        return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)

    @property
    def target_folder(self) -> Path | None:
        """The Hugging Face folder that the recipe names as its target; None for a target that a stage trains."""
        target = self.recipe.get("target")
        return Path(target["path"]) if isinstance(target, dict) else None

    def max_new_tokens(self, result: Mapping[str, Any]) -> int | None:
        """How long answers might get in a result, from it or from the recipe's task; None where neither says."""
        tasks = [task for stage in self.recipe.get("stages", ()) for task in stage.get("tasks", ())]
        named: dict[str, Any] = next((task for task in tasks if task["name"] == result["task"]), {})
        return result.get("max_new_tokens", named.get("max_new_tokens"))

    def shapes(self, draft: str | None) -> dict[str, dict[str, Any]]:
        """Dimensions of "target" and "draft", with "Parameters", as far as they are known.

        Args:
          draft: the stage that trained it; None for the last one that trained anything but the target.
        """
        target = self.stage(str(self.recipe.get("target")))
        trained = [stage.name for stage in self.stages if "shape" in stage.summary and stage is not target]
        own = self.stage(draft or (trained[-1] if trained else ""))
        shapes = {
            "target": _shape(target.summary if target else {}, self._target_config()),
            "draft": _shape(own.summary if own else {}, self.recipe.get("draft") or {}),
        }
        for role, known in shapes.items():
            known.update({"Parameters": self.parameters[draft][role]} if draft in self.parameters else {})
        if "Vocabulary" in shapes["target"]:
            shapes["draft"].setdefault("Vocabulary", shapes["target"]["Vocabulary"])  # they share it
        return shapes

    def _target_config(self) -> dict[str, Any]:
        return _read_if_there(self.target_folder / "config.json") if self.target_folder else {}


def read_run(folder: Path) -> RunDirectory:
    """Reads ``folder``.

    Raises:
      ConfigError: it is not a run directory, or a file in it is not what its name promises.
    """
    recipe_file = folder / "recipe.json"
    if not recipe_file.is_file():
        raise ConfigError(f"{folder} is not a run directory: it has no recipe.json; `jaxdraft run` makes one")
    recipe = _read_json(recipe_file)
    planned = recipe.get("stages", [])
    answers = {s["name"] for s in planned if s.get("kind") == "Generate" and "target" in _writers(s)}
    answers |= {s["name"] for s in planned if s.get("kind") == "Score" and s["data"] in answers}
    stages = [_read_stage(folder, stage, answers) for stage in planned]
    results, curves, samples, checkpoints, while_learning = [], [], [], [], []
    parameters, circumstances, perplexity, target_perplexity = {}, {}, {}, {}
    for stage in stages:
        measured = read_lines(folder / stage.name / "block_efficiency.jsonl")
        while_learning += [{"draft": stage.name, **line} for line in measured]
        checkpoints += read_lines(folder / stage.name / "checkpoints.jsonl")
        for file in sorted((folder / stage.name).glob("*/results.json")):
            content = _read_json(file)
            draft = content.get("draft_stage", file.parent.name)
            results += [{**run, "draft": draft} for run in content["runs"]]
            found = ({**curve, "draft": draft} for curve in content.get("best_block_size", ()))
            curves += [_with_intervals(curve, results) for curve in found]
            samples += [{**line, "draft": draft} for line in read_lines(file.parent / "samples.jsonl")]
            parameters[draft] = content["parameters"]
            circumstances[draft] = content.get("settings", {})
            if content.get("perplexity"):
                perplexity[draft], target_perplexity = content["perplexity"], content.get("target_perplexity", {})
    return RunDirectory(
        folder,
        recipe,
        _read_if_there(folder / "run.json"),
        stages,
        results,
        curves,
        samples,
        checkpoints,
        while_learning,
        parameters,
        circumstances,
        perplexity,
        target_perplexity,
    )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; none where it is missing. A last line that is still being written is left out.

    Raises:
      ConfigError: a line is not JSON.
    """
    if not file.is_file():
        return []
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number} is not JSON ({error}): delete its stage's folder") from error
    return lines


def _with_intervals(curve: dict[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A curve whose measured points have the intervals of the results that they are of."""
    of = lambda row: (row["draft"], row["task"], decoding(row), row.get("batch_size"))
    key = "measured_speedup_ci95"
    known = {row["block_size"]: row[key] for row in results if of(row) == of(curve) and key in row}
    points = [
        {**point, key: known[point["block_size"]]}
        if "measured_speedup" in point and point["block_size"] in known
        else point
        for point in curve["curve"]
    ]
    return {**curve, "curve": points}


def of_smallest_batch(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of results that differ only in their batch size, the smallest one's."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row.get("batch_size", 1)):
        found.setdefault((row.get("draft"), row.get("step"), row["task"], decoding(row), row["block_size"]), row)
    kept = {id(row) for row in found.values()}
    return [row for row in rows if id(row) in kept]


def _read_json(file: Path) -> dict[str, Any]:
    return read_json(file, remedy="delete it and run the recipe again")


def _read_if_there(file: Path) -> dict[str, Any]:
    return _read_json(file) if file.is_file() else {}


def _read_stage(folder: Path, planned: dict[str, Any], answers: set[str]) -> Stage:
    name = planned["name"]
    done = _read_if_there(folder / name / "stage.json")
    data = planned.get("data") or ()
    return Stage(
        on_answers=not answers.isdisjoint([data] if isinstance(data, str) else data),
        name=name,
        kind=str(planned.get("kind", done.get("kind", ""))),
        status=done.get("status", "not run"),
        settings=done.get("settings") or planned,
        summary=done.get("summary") or {},
        seconds=done.get("seconds"),
        metrics=read_lines(folder / name / "metrics.jsonl"),
        manifest=_read_if_there(folder / name / "manifest.json"),
        account=_read_if_there(folder / name / "answers.json"),
    )


def _loss_name(loss: dict[str, Any]) -> str:
    name = _LOSSES.get(loss["type"], str(loss["type"]))
    if terms := loss.get("terms"):
        names = [(share, _loss_name(term).replace("cross-entropy", "CE")) for share, term in terms]
        name = " + ".join(term if share == 1 else f"{share:g} {term}" for share, term in names)
    if weights := loss.get("weights"):
        name += f", {_LOSSES.get(weights['type'], weights['type'])} weights"
    return name


def _writers(settings: dict[str, Any]) -> list[str]:
    writer = settings.get("writer", "target")
    return [writer] if isinstance(writer, str) else list(writer)


def _shape(summary: dict[str, Any], otherwise: dict[str, Any]) -> dict[str, Any]:
    """A model's dimensions in a reader's words, from what its stage reported or else from its configuration."""
    config = summary.get("shape", otherwise)
    shape = {label: next((config[key] for key in keys if config.get(key)), None) for label, keys in _SHAPE.items()}
    shape["Parameters"] = summary.get("parameters")
    return {label: value for label, value in shape.items() if value is not None}
