"""What the report's figures have in common: size, style, and a look for each draft.

They are sized for a telephone's width and stand two or three abreast on a desk. A draft keeps its colour and its marker
in every figure; the colours are Okabe and Ito's, which people with colour-blindness can tell apart.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxdraft.evaluate.collect import Stage

INK = "#222222"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
HEIGHT = 3.2  # inches

_WIDTH = 4.5
_OTHERS = ("#7A7A7A", "#000000", "#A6761D", "#B8B8B8")
_LONGEST_OF_TWO = 30  # characters of a legend's label with another beside it
_LINES, _LINE = 3, 0.19  # of a legend for which there is room, and the inches of another
_STYLE = {
    "figure.dpi": 160,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "text.parse_math": False,
}


class Look(NamedTuple):
    """How a draft is drawn wherever it appears."""

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
            found[stage.name] = _look(stage, COLOURS, counts)
    return found


def look_of(known: Mapping[str, Look], name: str) -> Look:
    """The look of ``name``; black for a draft that was trained elsewhere."""
    return known.get(name, Look("#000000", "x", name))


def once(axes: Any, label: str) -> str:
    """``label`` the first time it is wanted for the legend, afterwards matplotlib's word for none."""
    return "_nolegend_" if label in axes.get_legend_handles_labels()[1] else label


def legend(figure: Any, axes: Any) -> None:
    """A legend below everything, in two columns where the labels are short; a long one makes the figure taller."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > _LONGEST_OF_TWO else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    lines = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + _LINE * max(0, lines - _LINES))


def mark_target_alone(axes: Any) -> None:
    """A line at 1, named beyond its end: what the target does without a draft."""
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    place = {"xy": (1, 1), "xycoords": axes.get_yaxis_transform(), "xytext": (3, 0), "textcoords": "offset points"}
    axes.annotate("target\nalone", **place, va="center", fontsize=8, color=INK)


def picture(file: str, alt: str, draw: Callable[[Any], None], height: float = HEIGHT) -> Picture:
    """Runs ``draw`` on an empty figure. Equal numbers give equal bytes: no date, no version, no user's style."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(file, alt.replace("\n", " "), buffer.getvalue())


def _look(stage: Stage, colours: Sequence[str], counts: dict[bool, int]) -> Look:
    place = counts[stage.distilled]
    counts[stage.distilled] += 1
    return Look(colours[place % len(colours)], MARKERS[place % len(MARKERS)], stage.label)
