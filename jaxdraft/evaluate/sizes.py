"""Speed-up against the size of drafts: where at least three sizes of distilled drafts were measured."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.comparison import group_by_seed
from jaxdraft.evaluate.plotting import COLOURS, INK, MARKERS, Picture, legend, mark_target_alone
from jaxdraft.evaluate.tables import Cell, Table, headings
from jaxdraft.evaluate.words import decoding, number

_FEWEST = 3  # sizes
_SETTING = ("task", "temperature", "top_p", "batch_size")
_SHOWN = {"mbsu": "MBSU", "measured_speedup": "measured", "predicted_speedup": "predicted (Eq. 2)"}


def size_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """A row per distilled draft, task, decoding setting and batch size, smallest draft first; none for fewer sizes.

    Each has ``draft, seeds, parameters``, ``ratio`` (c, of the target's parameters) and, where it was measured, the
    mean over seeds of ``mbsu``, ``measured_speedup`` and ``predicted_speedup`` at the γ where that mean is highest,
    ``…_block_size``, and from which to which seed, ``…_range``; ``block_efficiency`` is at MBSU's γ.
    """
    distilled = {stage.name for stage in run.stages if stage.distilled}
    groups = group_by_seed(run, [draft for draft in run.drafts if draft in distilled and draft in run.parameters])
    groups.sort(key=lambda group: run.parameters[group.drafts[0]]["ratio"])
    if len({run.parameters[group.drafts[0]]["ratio"] for group in groups}) < _FEWEST:
        return []
    rows = []
    for group in groups:
        results = [row for row in run.results if row["draft"] in group.drafts]
        known = run.parameters[group.drafts[0]]
        for setting in dict.fromkeys(_setting(row) for row in results):
            mine = [row for row in results if _setting(row) == setting]
            predicted = [
                point
                for found in run.curves
                if found["draft"] in group.drafts and _setting(found) == setting
                for point in found["curve"]
                if point["block_size"]
            ]
            row = {"draft": group.name, **dict(zip(_SETTING, setting, strict=True)), "seeds": len(group.drafts)}
            row |= {"parameters": known["draft"], "ratio": known["ratio"]}
            row |= _best("mbsu", mine, "mbsu") | _best("measured_speedup", mine, "token_rate_ratio")
            row |= _best("predicted_speedup", predicted, "predicted_speedup")
            if "mbsu" in row:
                row |= _pooled("block_efficiency", _by_block_size(mine, "block_efficiency")[row["mbsu_block_size"]])
            rows.append(row)
    return rows


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in _SETTING)


def _best(name: str, rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    values = _by_block_size(rows, metric)
    if not values:
        return {}
    block_size = max(values, key=lambda size: statistics.fmean(values[size]))
    return {**_pooled(name, values[block_size]), f"{name}_block_size": block_size}


def _pooled(name: str, of_seeds: Sequence[float]) -> dict[str, Any]:
    return {name: statistics.fmean(of_seeds), f"{name}_range": [min(of_seeds), max(of_seeds)]}


def _by_block_size(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[int, list[float]]:
    """The values of all seeds."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row.get(metric) is not None:
            values.setdefault(row["block_size"], []).append(row[metric])
    return values


def size_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """``size_rows`` by task, the fastest draft of each marked."""
    columns = {
        Cell("Block efficiency", "lowest – highest seed, at the γ of MBSU"): "block_efficiency",
        Cell("MBSU", "lowest – highest seed"): "mbsu",
        Cell("Speed-up", "measured"): "measured_speedup",
        Cell("Speed-up", "predicted"): "predicted_speedup",
    }
    lines = []
    for found in _by_setting(rows):
        best = {metric: max((row[metric] for row in found if metric in row), default=None) for metric in _SHOWN}
        for row in found:
            batch = f", batch {row['batch_size']}" if row["batch_size"] else ""
            names = [
                Cell(row["task"], f"{decoding(row)}{batch}"),
                Cell(row["draft"], f"{row['ratio']:.1%} of the target"),
            ]
            lines.append([*names, *(_at_best(row, metric, best.get(metric)) for metric in columns.values())])
    return Table([*headings("Task", "Draft"), *columns], lines, names=2)


def _at_best(row: Mapping[str, Any], metric: str, best: float | None) -> Cell:
    """A mean, from which to which seed, and its γ."""
    if metric not in row:
        return Cell("–")
    low, high = row[f"{metric}_range"]
    block_size = row.get(f"{metric}_block_size")
    of_seeds = f"{number(low)} – {number(high)}" if row["seeds"] > 1 else ""
    return Cell(number(row[metric]), of_seeds, row[metric] == best, f"γ = {block_size}" if block_size else "")


def size_pictures(rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """A figure for each task, decoding setting and batch size of ``size_rows``."""
    return [_draw(f"sizes_{i}.png", found) for i, found in enumerate(_by_setting(rows), start=1)]


def _by_setting(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    return list(groups.values())


def _draw(file: str, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Speed-ups over c, each draft at its best γ; the optimum of each is a star."""
    batch = rows[0]["batch_size"]
    title = f"Speed-up over size, {rows[0]['task']} ({decoding(rows[0])})" + (f", batch {batch}" if batch else "")

    def draw(figure: Any) -> None:
        from matplotlib.ticker import NullFormatter, PercentFormatter

        axes = figure.subplots()
        for colour, marker, (metric, name) in zip(COLOURS, MARKERS, _SHOWN.items(), strict=False):
            points = [row for row in rows if row.get(metric) is not None]
            if not points:
                continue
            best = max(points, key=lambda row: row[metric])
            said = f"{name}: {number(best[metric])}× at {best['ratio']:.1%}, γ = {best[f'{metric}_block_size']}"
            shares, means = [row["ratio"] for row in points], [row[metric] for row in points]
            axes.plot(shares, means, color=colour, marker=marker, markersize=4, label=said)
            axes.vlines(shares, *zip(*(row[f"{metric}_range"] for row in points), strict=True), color=colour, alpha=0.4)
            star = {"color": colour, "markersize": 12, "markeredgecolor": INK, "markeredgewidth": 0.6, "zorder": 4}
            axes.plot(best["ratio"], best[metric], "*", **star)
        mark_target_alone(axes)
        axes.set_xscale("log")
        axes.set_xticks(sorted({row["ratio"] for row in rows}))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", rotation=35)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("parameters of the draft, of the target's")
        axes.set_ylabel("times the target alone\nat the best γ")
        axes.set_title(title)
        legend(figure, axes)

    return plotting.picture(file, title, draw)
