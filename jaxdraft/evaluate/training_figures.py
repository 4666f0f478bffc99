"""Figures of how drafts learned: curves over their steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.collect import Stage
from jaxdraft.evaluate.plotting import INK, Look, Picture, legend, look_of

SMOOTHED_FRACTION = 0.02  # of a stage's steps


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mean over the last ``SMOOTHED_FRACTION`` of all steps (at least one), shorter at the beginning."""
    window = max(1, round(SMOOTHED_FRACTION * len(values)))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def draw_curves(
    file: str, stages: Sequence[Stage], known: Mapping[str, Look], key: str, label: str, title: str
) -> Picture:
    """One metric of several stages over their steps, faint as logged and bold as smoothed."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for stage in stages:
            _curve(axes, stage, look_of(known, stage.name), key)
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        axes.set_title(title)
        legend(figure, axes)

    return plotting.picture(file, f"{title} over the steps of {_listed(stages)}", draw)


def draw_loss_panels(file: str, stages: Sequence[Stage], known: Mapping[str, Look]) -> Picture:
    """The loss of each stage in a panel of its own, because different losses have different units."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
        figure.suptitle("Distillation loss of each draft", x=0.02, ha="left", fontsize=10, fontweight="bold")
        for axes, stage in zip(panels, stages, strict=True):
            look = look_of(known, stage.name)
            _curve(axes, stage, look, "loss")
            axes.set_title(look.label, color=look.colour)
            axes.locator_params(axis="y", nbins=4)
            if not axes.lines:
                axes.set_yticks([])
                axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", va="center", color=INK)
        figure.supylabel("loss, each in its own unit", fontsize=10)
        panels[-1].set_xlabel("training step")

    height = max(plotting.HEIGHT, 0.4 + 1.2 * len(stages))
    return plotting.picture(file, f"Loss over the steps of {_listed(stages)}", draw, height)


def draw_growth(
    file: str,
    lines: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    known: Mapping[str, Look],
    title: str,
    printed: Mapping[str, float] | None = None,
) -> Picture:
    """Block efficiency over a draft's steps: a line with a band, computed offline; open markers where decoded.

    Args:
      lines: with ``draft`` and ``step``, and ``block_efficiency_offline``, ``block_efficiency`` or both.
      before: undistilled drafts, as level lines.
      printed: what a paper prints, by what it is of: open markers at the left.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, height in before.items():
            look = look_of(known, name)
            axes.axhline(height, color=look.colour, linewidth=1.4, linestyle="--", label=look.label)
        for name in dict.fromkeys(line["draft"] for line in lines):
            look = look_of(known, name)
            points = sorted((line for line in lines if line["draft"] == name), key=lambda line: line["step"])
            offline = [line for line in points if line.get("block_efficiency_offline") is not None]
            steps, heights = _over_steps(offline, "block_efficiency_offline")
            axes.plot(steps, heights, color=look.colour, marker=look.marker, markersize=4, label=look.label)
            if offline and all("block_efficiency_offline_ci95" in line for line in offline):
                bands = np.array([line["block_efficiency_offline_ci95"] for line in offline])
                axes.fill_between(steps, bands[:, 0], bands[:, 1], color=look.colour, alpha=0.14, linewidth=0)
            decoded = [line for line in points if line.get("block_efficiency") is not None]
            empty = {"markersize": 5, "markerfacecolor": "white", "markeredgecolor": look.colour, "linestyle": ""}
            axes.plot(*_over_steps(decoded, "block_efficiency"), look.marker, **empty, zorder=3)
        if any(line.get("block_efficiency") is not None for line in lines):
            axes.plot([], [], "o", markerfacecolor="white", markeredgecolor=INK, linestyle="", label="seen by decoding")
        for label, height in (printed or {}).items():
            open_marker = {"markersize": 7, "markerfacecolor": "white", "markeredgecolor": INK, "linestyle": ""}
            axes.plot(0.03, height, "D", transform=axes.get_yaxis_transform(), **open_marker, label=label)
        axes.set_xlabel("distillation step")
        axes.set_ylabel("tokens per run of the target")
        axes.set_title(title)
        legend(figure, axes)

    return plotting.picture(file, f"{title}, over distillation steps", draw)


def _over_steps(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def _curve(axes: Any, stage: Stage, look: Look, key: str) -> None:
    """Draws the steps that logged ``key``; a stage that has not begun has none."""
    points = [(line["step"], line[key]) for line in stage.metrics if line.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=look.colour, linewidth=0.6, alpha=0.25)
    axes.plot(steps, smooth(values), color=look.colour, label=look.label)


def _listed(stages: Sequence[Stage]) -> str:
    return ", ".join(stage.name for stage in stages)
