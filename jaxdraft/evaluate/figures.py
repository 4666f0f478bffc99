"""Figures of what was measured: bars, acceptance by position and by class of token, and groups of drafts."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.plotting import COLOURS, INK, MARKERS, Look, Picture, legend, look_of, mark_target_alone, once
from jaxdraft.evaluate.words import decoding, number

_MOST_NUMBERS = 12  # bars that have their number above them
_MOST_UPRIGHT = 4  # groups of bars whose names stand upright
_TALL = 3.5  # inches


def draw_bars(
    file: str,
    rows: Sequence[Mapping[str, Any]],
    known: Mapping[str, Look],
    metric: str,
    title: str,
    label: str,
    *,
    top: float | None = None,
    beside_alone: bool = True,
    printed: str = "",
) -> Picture:
    """Bars of ``metric`` with its 95% interval: a group for each task and decoding setting, a bar for each draft.

    Args:
      file: name of the picture's file.
      rows: results of one block size; a row without the metric has no bar.
      known: looks of the drafts.
      metric: field of the rows.
      title: what the figure shows.
      label: of the axis, with the unit.
      top: the end of the axis, the same for figures to be compared.
      beside_alone: whether 1 is what the target does alone.
      printed: what the open markers are, at the height of a row's ``paper``.
    """
    groups = list(dict.fromkeys((row["task"], decoding(row)) for row in rows))
    drafts = list(dict.fromkeys(row["draft"] for row in rows))
    width = 0.8 / len(drafts)
    is_named = len(rows) <= _MOST_NUMBERS and not any(row.get("paper") is not None for row in rows)
    again = {draft for i, draft in enumerate(drafts) if look_of(known, draft).colour in _colours(known, drafts[:i])}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="x")
        for i, draft in enumerate(drafts):
            look, hatch = look_of(known, draft), "////" if draft in again else ""
            for row in (row for row in rows if row["draft"] == draft):
                place = groups.index((row["task"], decoding(row))) + (i - (len(drafts) - 1) / 2) * width
                if row.get(metric) is not None:
                    _bar(axes, place, 0.9 * width, row, metric, look, is_named, hatch)
                if row.get("paper") is not None:
                    mark = {"markerfacecolor": "white", "markeredgecolor": INK, "markersize": 5, "zorder": 3}
                    axes.plot(place, row["paper"], "D", linestyle="", label=once(axes, printed), **mark)
        if beside_alone:
            mark_target_alone(axes)
        if len(groups) <= _MOST_UPRIGHT:
            axes.set_xticks(range(len(groups)), [f"{textwrap.fill(task, 14)}\n({how})" for task, how in groups])
        else:
            slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
            axes.set_xticks(range(len(groups)), [f"{task}\n({how})" for task, how in groups], **slanted)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, top)
        axes.set_ylabel(label)
        axes.set_title(title)
        legend(figure, axes)

    return plotting.picture(file, f"{title}, {label}, by task and draft", draw, _TALL)


def _colours(known: Mapping[str, Look], drafts: Sequence[str]) -> set[str]:
    return {look_of(known, draft).colour for draft in drafts}


def _bar(
    axes: Any,
    place: float,
    width: float,
    row: Mapping[str, Any],
    metric: str,
    look: Look,
    is_named: bool,
    hatch: str = "",
) -> None:
    """A bar with its interval and, where there is room, its number; hatched where another has its colour."""
    edge = {"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {}
    axes.bar(place, row[metric], width, color=look.colour, label=once(axes, look.label), **edge)
    end = row[metric]
    if interval := row.get(f"{metric}_ci95"):
        axes.vlines(place, *interval, color=INK, linewidth=1.2)
        end = max(end, interval[1])
    if is_named:
        offset = {"xytext": (0, 2), "textcoords": "offset points"}
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.annotate(number(row[metric]), (place, end), **offset, ha="center", fontsize=7, color=INK, bbox=ground)


def draw_positions(file: str, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Look], title: str) -> Picture:
    """Share of blocks in which the draft's first i tokens were all accepted, over i."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row in rows:
            look = look_of(known, row["draft"])
            heights = np.array(row["acceptance_by_position"], np.float64)  # null becomes a gap
            places = range(1, len(heights) + 1)
            axes.plot(places, heights, color=look.colour, marker=look.marker, markersize=4, label=look.label)
            if bands := row.get("acceptance_by_position_ci95"):
                low, high = np.array(bands, np.float64).T
                axes.fill_between(places, low, high, color=look.colour, alpha=0.14, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1)
        axes.set_xlabel("draft token of a block")
        axes.set_ylabel("share of blocks\naccepted up to here")
        axes.set_title(f"Acceptance by position\n{title}")
        legend(figure, axes)

    return plotting.picture(file, f"Acceptance by position, {title}", draw)


def draw_classes(file: str, rows: Sequence[Mapping[str, Any]], known: Mapping[str, Look], title: str) -> Picture:
    """Share of draft tokens accepted in each class of token with its 95% interval, a bar for each draft."""
    kinds = [kind for kind in rows[0]["acceptance_by_class"] if any(_proposed(row, kind) for row in rows)]
    width = 0.8 / len(rows)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="x")
        for i, row in enumerate(rows):
            look = look_of(known, row["draft"])
            for place, kind in enumerate(kinds):
                found = row["acceptance_by_class"][kind]
                if found["proposed"]:
                    left = place + (i - (len(rows) - 1) / 2) * width
                    _bar(axes, left, 0.9 * width, found, "rate", look, len(rows) * len(kinds) <= _MOST_NUMBERS)
        most = {kind: max(_proposed(row, kind) for row in rows) for kind in kinds}
        axes.set_xticks(range(len(kinds)), [f"{kind}\n({most[kind]:,})" for kind in kinds], fontsize=8)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("class of token (proposed, at most)")
        axes.set_ylabel("share accepted")
        axes.set_title(f"Acceptance by class of token\n{title}")
        legend(figure, axes)

    return plotting.picture(file, f"Acceptance by class of token, {title}", draw, _TALL)


def _proposed(row: Mapping[str, Any], kind: str) -> int:
    return row["acceptance_by_class"].get(kind, {}).get("proposed", 0)


def draw_comparison(file: str, rows: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """Block efficiency of groups of drafts with its 95% interval, a line each from the top; colours say what they
    learned from."""
    data = sorted({row["data"] for row in rows})

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False, axis="y")
        for place, row in enumerate(rows):
            kind = data.index(row["data"])
            colour, marker = COLOURS[kind % len(COLOURS)], MARKERS[kind % len(MARKERS)]
            axes.hlines(place, *row["block_efficiency_ci95"], color=colour, linewidth=1.2)
            label = once(axes, row["data"])
            axes.plot(row["block_efficiency"], place, marker, color=colour, markersize=4, linestyle="", label=label)
        axes.set_yticks(range(len(rows)), [textwrap.shorten(row["group"], 32) for row in rows], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("tokens per run of the target")
        axes.set_title(f"Block efficiency\n{title}")
        legend(figure, axes)

    return plotting.picture(file, f"Block efficiency, {title}, by group of drafts", draw, 1.4 + 0.17 * len(rows))


def draw_speedups(file: str, curves: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """Speed-up over block sizes: a line as predicted for each batch size with its best γ named, markers as measured.

    ``curves`` are entries of ``best_block_size`` in results.json, γ = 0 being the target alone.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, found in enumerate(curves):
            colour, marker, points = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], found["curve"]
            sizes, heights = zip(*[(point["block_size"], point["predicted_speedup"]) for point in points], strict=True)
            best, height = max(zip(sizes, heights, strict=True), key=lambda pair: pair[1])
            said = f"best γ = {best} ({number(height)}×)" if best else "best without a draft"
            axes.plot(sizes, heights, color=colour, label=f"batch {found['batch_size']}, predicted: {said}")
            star = {"color": colour, "markersize": 12, "markeredgecolor": INK, "markeredgewidth": 0.6, "zorder": 4}
            axes.plot(best, height, "*", **star)
            measured = [point for point in points if point.get("measured_speedup") is not None]
            for point in measured:
                if interval := point.get("measured_speedup_ci95"):
                    axes.vlines(point["block_size"], *interval, color=colour, linewidth=1.2)
            places = [point["block_size"] for point in measured], [point["measured_speedup"] for point in measured]
            style = {"color": colour, "markersize": 6, "markeredgecolor": "white", "linestyle": ""}
            axes.plot(*places, marker, **style, label=f"batch {found['batch_size']}, measured")
        mark_target_alone(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("γ, draft tokens per block")
        axes.set_ylabel("times the target alone")
        axes.set_title(title)
        legend(figure, axes)

    return plotting.picture(file, f"{title}, predicted and measured, for each batch size", draw, _TALL)
