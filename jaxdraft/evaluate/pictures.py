"""Which figures a run's report has."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.comparison import ranked
from jaxdraft.evaluate.figures import draw_bars, draw_classes, draw_comparison, draw_positions, draw_speedups
from jaxdraft.evaluate.plotting import Look, Picture
from jaxdraft.evaluate.training_figures import draw_curves, draw_growth, draw_loss_panels
from jaxdraft.evaluate.words import decoding

_ACCEPTANCE = {
    "acceptance": ("Acceptance on training data", "1 − TVD"),
    "acceptance_low": ("Acceptance on training data, at least", "1 − TVD, lower bound\nfrom stored targets"),
}
# Section of the page -> metric, what its bars show, in which unit.
_BARS = {
    "block_efficiency": ("block_efficiency", "Block efficiency", "tokens per run of the target"),
    "mbsu": ("mbsu", "Memory-bound speed-up (MBSU)", "times the target alone"),
    "speed": ("token_rate_ratio", "Measured token rate", "times the target alone"),
}


def pictures(
    run: RunDirectory, known: Mapping[str, Look], comparison: Sequence[dict[str, Any]], best: str | None
) -> dict[str, list[Picture]]:
    """The figures of each section of the page.

    Args:
      run: with the drafts that are shown one by one.
      known: their looks.
      comparison: of drafts pooled over seeds.
      best: the draft whose speed is looked at closely.
    """
    found = {
        "losses": _losses(run, known),
        "comparison": _comparison(comparison),
        "while_learning": _while_learning(run, known),
        "checkpoints": _checkpoints(run, known),
        "positions": _positions(run, known),
        "classes": _classes(run, known),
        "best_block_size": _best_block_size(run, best),
    }
    return {**found, **{section: _bars(run, known, *bars) for section, bars in _BARS.items()}}


def _losses(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    distilled = [stage for stage in run.stages if stage.distilled]
    others = [stage for stage in run.stages if stage.metrics and not stage.distilled]
    found = []
    if others:
        found.append(draw_curves("loss.png", others, known, "loss", "loss (nats per token)", "Training loss"))
    for key, (title, label) in _ACCEPTANCE.items():
        if compared := [stage for stage in distilled if stage.logged(key)]:
            found.append(draw_curves(f"{key}.png", compared, known, key, label, title))
    if distilled:
        found.append(draw_loss_panels("loss_distillation.png", distilled, known))
    return found


def _bars(run: RunDirectory, known: Mapping[str, Look], metric: str, what: str, unit: str) -> list[Picture]:
    """A figure for each block size and, of what depends on it, for each batch size."""
    rows = run.results if metric == "token_rate_ratio" else run.distinct_results
    measured = [row for row in _ordered(run, rows) if row.get(metric) is not None]
    top = 1.1 * max([1.0, *(max([row[metric], *row.get(f"{metric}_ci95", ())]) for row in measured)])
    several = len({row.get("batch_size") for row in measured}) > 1
    groups: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in sorted(measured, key=lambda row: (row["block_size"], row.get("batch_size") or 0)):
        groups.setdefault((row["block_size"], row.get("batch_size") if several else None), []).append(row)
    return [
        draw_bars(
            f"{metric}_gamma_{block_size}" + (f"_batch_{batch}.png" if batch else ".png"),
            _ordered(run, found),
            known,
            metric,
            f"{what} at γ = {block_size}" + (f", batch {batch}" if batch else ""),
            unit,
            top=top,
        )
        for (block_size, batch), found in groups.items()
    ]


def _comparison(comparison: Sequence[dict[str, Any]]) -> list[Picture]:
    """A figure for each task and decoding setting, at the largest block size."""
    return [
        draw_comparison(
            f"comparison_{i}.png", [group[-1] for group in groups], f"{title}, γ = {groups[0][-1]['block_size']}"
        )
        for i, (title, groups) in enumerate(ranked(comparison).items(), start=1)
    ]


def _while_learning(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    """A figure for each temperature, at the largest block size."""
    distilled = [stage.name for stage in run.stages if stage.distilled]
    largest = max((line["block_size"] for line in run.while_learning), default=None)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.while_learning:
        if line["draft"] in distilled and line["block_size"] == largest:
            groups.setdefault(decoding(line), []).append(line)
    return [
        draw_growth(f"while_learning_{i}.png", lines, {}, known, f"Block efficiency at γ = {largest}, {how}")
        for i, (how, lines) in enumerate(groups.items(), start=1)
    ]


def _checkpoints(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    distilled = [stage.name for stage in run.stages if stage.distilled]
    lines = [line for line in run.distinct_checkpoints if line["draft"] in distilled]
    block_size = min((line["block_size"] for line in lines), default=None)
    lines = [line for line in lines if line["block_size"] == block_size]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        how = f" ({decoding(line)})" if "temperature" in line else ""
        groups.setdefault(line["task"] + how, []).append(line)
    found = []
    for i, (how, mine) in enumerate(groups.items(), start=1):
        before = {
            row["draft"]: row["block_efficiency_offline"]
            for row in run.distinct_results
            if row["block_size"] == block_size
            and how in (row["task"], f"{row['task']} ({decoding(row)})")
            and row["draft"] not in distilled
            and row.get("block_efficiency_offline") is not None
        }
        title = f"Block efficiency at γ = {block_size}, {how}"
        found.append(draw_growth(f"checkpoints_{i}.png", mine, before, known, title))
    return found


def _positions(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    return [
        draw_positions(f"positions_{i}.png", rows, known, title)
        for i, (title, rows) in enumerate(_at_largest(run, "acceptance_by_position").items(), start=1)
    ]


def _classes(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    return [
        draw_classes(f"classes_{i}.png", rows, known, title)
        for i, (title, rows) in enumerate(_at_largest(run, "acceptance_by_class").items(), start=1)
    ]


def _at_largest(run: RunDirectory, key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Results at the largest block size that have ``key``, by task and decoding setting."""
    largest = max((row["block_size"] for row in run.results), default=None)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in _ordered(run, run.distinct_results):
        if row["block_size"] == largest and row.get(key):
            groups.setdefault(f"{row['task']} ({decoding(row)})", []).append(row)
    return groups


def _best_block_size(run: RunDirectory, best: str | None) -> list[Picture]:
    """Of the best draft a figure for each task and decoding setting, with a line for each batch size."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for found in run.curves:
        if found["draft"] == best:
            groups.setdefault(f"{found['task']} ({decoding(found)})", []).append(found)
    return [
        draw_speedups(f"best_block_size_{i}.png", curves, f"Speed-up over γ, {title}")
        for i, (title, curves) in enumerate(groups.items(), start=1)
    ]


def _ordered(run: RunDirectory, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with the drafts in the order in which they were trained."""
    return sorted(rows, key=lambda row: run.drafts.index(row["draft"]))
