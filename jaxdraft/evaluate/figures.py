"""The report's figures: each function draws one PNG from plain numbers.

They are sized for a telephone's width and stand two or three abreast on a desk. A draft keeps its colour and its marker
in every figure; the colours are Okabe and Ito's, which people with colour-blindness can tell apart.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.evaluate.collect import Stage

SMOOTHED_FRACTION = 0.02  # of a stage's steps

_WIDTH = 4.5  # inches
_HEIGHT = 3.2
_INK = "#222222"
_LONGEST_OF_TWO = 30  # characters of a legend's label with another beside it
_STYLE = {
    "figure.dpi": 160,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "text.parse_math": False,
}
_DISTILLED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OTHERS = ("#7A7A7A", "#000000", "#A6761D", "#B8B8B8")
_MARKERS = ("o", "s", "^", "D", "v", "P")


class Look(NamedTuple):
    """How a stage is drawn wherever it appears."""

    colour: str
    marker: str
    label: str


@dataclass(frozen=True)
class Picture:
    """A finished figure: file name, what it shows in words, and the PNG's bytes."""

    file: str
    alt: str
    png: bytes


def looks(stages: Sequence[Stage]) -> dict[str, Look]:
    """A look for every stage that trained: colours for distilled drafts, black and greys for the others."""
    found, counts = {}, {True: 0, False: 0}
    trained = [stage for stage in stages if stage.metrics]
    # The draft before distillation is the last of the undistilled stages: it gets the first grey.
    for stage in reversed([stage for stage in trained if not stage.distilled]):
        found[stage.name] = _look(stage, _OTHERS, counts)
    for stage in trained:
        if stage.distilled:
            found[stage.name] = _look(stage, _DISTILLED, counts)
    return found


def look_of(known: Mapping[str, Look], name: str) -> Look:
    """The look of ``name``; black for a draft that was trained elsewhere."""
    return known.get(name, Look("#000000", "x", name))


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mean over the last ``SMOOTHED_FRACTION`` of all steps (at least one), shorter at the beginning."""
    window = max(1, round(SMOOTHED_FRACTION * len(values)))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def draw_curves(file: str, stages: Sequence[Stage], known: Mapping[str, Look], key: str, label: str) -> Picture:
    """One metric of several stages over their steps, faint as logged and bold as smoothed."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for stage in stages:
            _curve(axes, stage, look_of(known, stage.name), key)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _legend(figure, axes)

    return _picture(file, f"{label} over steps of {_listed(stages)}", draw)


def draw_loss_panels(file: str, stages: Sequence[Stage], known: Mapping[str, Look]) -> Picture:
    """The loss of each stage in a panel of its own, because different losses have different units."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
        for axes, stage in zip(panels, stages, strict=True):
            look = look_of(known, stage.name)
            _curve(axes, stage, look, "loss")
            axes.set_title(look.label, color=look.colour)
            axes.locator_params(axis="y", nbins=4)
            if not axes.lines:
                axes.set_yticks([])
                axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", va="center", color=_INK)
        figure.supylabel("loss", fontsize=10)
        panels[-1].set_xlabel("step")

    return _picture(file, f"Loss over steps of {_listed(stages)}", draw, height=max(_HEIGHT, 1.2 * len(stages)))


def draw_bars(
    file: str,
    rows: Sequence[Mapping[str, Any]],
    known: Mapping[str, Look],
    metric: str,
    label: str,
    title: str,
    top: float,
) -> Picture:
    """Bars of ``metric`` with its 95% interval: a group for each task and decoding setting, a bar for each draft.

    ``rows`` are results of one block size; ``top`` is the end of the axis, the same for figures to be compared.
    """
    groups = list(dict.fromkeys((row["task"], decoding(row)) for row in rows))
    drafts = list(dict.fromkeys(row["draft"] for row in rows))
    width = 0.8 / len(drafts)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="x")
        for i, draft in enumerate(drafts):
            for row in (row for row in rows if row["draft"] == draft):
                place = groups.index((row["task"], decoding(row))) + (i - (len(drafts) - 1) / 2) * width
                look = look_of(known, draft)
                axes.bar(place, row[metric], 0.9 * width, color=look.colour, label=_once(axes, look.label))
                if interval := row.get(f"{metric}_ci95"):
                    axes.vlines(place, *interval, color=_INK, linewidth=1.2)
        axes.axhline(1, color=_INK, linewidth=1, linestyle="--", label="target alone")
        axes.set_xticks(range(len(groups)), [f"{textwrap.fill(task, 14)}\n({how})" for task, how in groups])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, top)
        axes.set_ylabel(label)
        axes.set_title(title)
        _legend(figure, axes)

    return _picture(file, f"{label}, {title}, by task and draft", draw, height=3.5)


def draw_growth(
    file: str,
    lines: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    known: Mapping[str, Look],
    title: str,
) -> Picture:
    """Block efficiency over a draft's steps with bands; ``before`` gives undistilled drafts as level lines."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, height in before.items():
            look = look_of(known, name)
            axes.axhline(height, color=look.colour, linewidth=1.4, linestyle="--", label=look.label)
        for name in dict.fromkeys(line["draft"] for line in lines):
            look = look_of(known, name)
            points = sorted((line for line in lines if line["draft"] == name), key=lambda line: line["step"])
            steps = [line["step"] for line in points]
            axes.plot(
                steps,
                [line["block_efficiency_offline"] for line in points],
                color=look.colour,
                marker=look.marker,
                markersize=4,
                label=look.label,
            )
            if all("block_efficiency_offline_ci95" in line for line in points):
                bands = np.array([line["block_efficiency_offline_ci95"] for line in points])
                axes.fill_between(steps, bands[:, 0], bands[:, 1], color=look.colour, alpha=0.14, linewidth=0)
        axes.set_xlabel("distillation step")
        axes.set_ylabel("block efficiency\n(tokens per target run)")
        axes.set_title(title)
        _legend(figure, axes)

    return _picture(file, f"Block efficiency over steps, {title}", draw)


def draw_positions(file: str, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Look], title: str) -> Picture:
    """Share of blocks in which the draft's first i tokens were all accepted, over i."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row in rows:
            look = look_of(known, row["draft"])
            heights = np.array(row["acceptance_by_position"], np.float64)  # null becomes a gap
            places = range(1, len(heights) + 1)
            axes.plot(places, heights, color=look.colour, marker=look.marker, markersize=4, label=look.label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1)
        axes.set_xlabel("position in the block")
        axes.set_ylabel("accepted up to here\n(share of blocks)")
        axes.set_title(title)
        _legend(figure, axes)

    return _picture(file, f"Acceptance by position, {title}", draw)


def draw_answer_lengths(file: str, name: str, lengths: Mapping[str, Mapping[str, Any]]) -> Picture:
    """How long a Generate stage's answers are: the share of each length, a line per temperature.

    ``lengths`` are those of ``answers.json``; within one of its bins, lengths have equal shares.
    """

    def draw(figure: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        axes = figure.subplots()
        for i, (temperature, spread) in enumerate(lengths.items()):
            counts, width = np.array(spread["histogram"]["counts"]), spread["histogram"]["width"]
            edges, label = np.arange(len(counts) + 1) * width, decoding({"temperature": float(temperature)})
            colour = _DISTILLED[i % len(_DISTILLED)]
            axes.stairs(counts / (counts.sum() * width), edges, color=colour, linewidth=1.6, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of an answer")
        axes.set_ylabel("answers of this length")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(name)
        _legend(figure, axes)

    return _picture(file, f"Lengths of the answers of {name}, by temperature", draw)


def draw_comparison(file: str, rows: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """Block efficiency of groups of drafts with its 95% interval, a line each from the top; colours say what they
    learned from."""
    data = sorted({row["data"] for row in rows})

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        for place, row in enumerate(rows):
            number = data.index(row["data"])
            colour, marker = _DISTILLED[number % len(_DISTILLED)], _MARKERS[number % len(_MARKERS)]
            axes.hlines(place, *row["block_efficiency_ci95"], color=colour, linewidth=1.2)
            label = _once(axes, row["data"])
            axes.plot(row["block_efficiency"], place, marker, color=colour, markersize=4, linestyle="", label=label)
        axes.set_yticks(range(len(rows)), [textwrap.shorten(row["group"], 32) for row in rows], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("block efficiency (tokens per target run)")
        axes.set_title(title)
        _legend(figure, axes)

    return _picture(file, f"Block efficiency, {title}, by group of drafts", draw, height=1.4 + 0.17 * len(rows))


def decoding(row: Mapping[str, Any]) -> str:
    """How a result was decoded, in words: "greedy" or "T 0.6, top-p 0.9"."""
    if not row.get("temperature"):
        return "greedy"
    top_p = row.get("top_p", 1)
    return f"T {row['temperature']:g}" + (f", top-p {top_p:g}" if top_p < 1 else "")


def _look(stage: Stage, colours: Sequence[str], counts: dict[bool, int]) -> Look:
    number = counts[stage.distilled]
    counts[stage.distilled] += 1
    return Look(colours[number % len(colours)], _MARKERS[number % len(_MARKERS)], stage.label)


def _curve(axes: Any, stage: Stage, look: Look, key: str) -> None:
    """Draws the steps that logged ``key``; a stage that has not begun has none."""
    points = [(line["step"], line[key]) for line in stage.metrics if line.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=look.colour, linewidth=0.6, alpha=0.25)
    axes.plot(steps, smooth(values), color=look.colour, label=look.label)


def _once(axes: Any, label: str) -> str:
    """``label`` the first time it is wanted for the legend, afterwards matplotlib's word for none."""
    return "_nolegend_" if label in axes.get_legend_handles_labels()[1] else label


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > _LONGEST_OF_TWO else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _listed(stages: Sequence[Stage]) -> str:
    return ", ".join(stage.name for stage in stages)


def _picture(file: str, alt: str, draw: Callable[[Any], None], height: float = _HEIGHT) -> Picture:
    """Runs ``draw`` on an empty figure. Equal numbers give equal bytes: no date, no version, no user's style."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(file, alt.replace("\n", " "), buffer.getvalue())
