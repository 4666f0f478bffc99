"""Figures of a paper's table or figure as a run has it, the paper's own numbers as open markers."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdraft.evaluate.figures import draw_bars
from jaxdraft.evaluate.papers import Column
from jaxdraft.evaluate.plotting import COLOURS, MARKERS, Look, Picture
from jaxdraft.evaluate.reproduction import METRICS, Reproduced
from jaxdraft.evaluate.training_figures import draw_growth
from jaxdraft.evaluate.words import decoding


def paper_pictures(found: Reproduced) -> list[Picture]:
    """Bars with the paper's numbers as open markers; growth where the paper shows that."""
    if found.declared.published.over_checkpoints:
        return _growth_pictures(found)
    known = {draft: Look(*_look(i), row.name) for i, (row, draft) in enumerate(found.rows)}
    groups: dict[tuple[Any, ...], list[Column]] = {}
    for column in found.columns:
        if column.block_size is not None:
            twice = any(other != column and other[:2] + other[3:] == column[:2] + column[3:] for other in found.columns)
            how = column.temperature if twice else None
            groups.setdefault((column.metric, column.block_size, how), []).append(column)
    return [_bars(found, f"{found.slug}_{i}.png", columns, known) for i, columns in enumerate(groups.values(), start=1)]


def _look(place: int) -> tuple[str, str]:
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]


def _bars(found: Reproduced, file: str, columns: Sequence[Column], known: Mapping[str, Look]) -> Picture:
    metric, gamma = METRICS[columns[0].metric], columns[0].block_size
    rows = []
    for column in columns:
        for row, draft in found.rows:
            cell = found.cells.get((row.name, column), {})
            where = {"draft": draft, "task": found.task_name(column), "temperature": column.temperature}
            rows.append({**where, **cell, "paper": found.printed(row, column)})
    temperatures = {column.temperature for column in columns}
    how = f", {decoding({'temperature': columns[0].temperature})}" if len(temperatures) == 1 else ""
    title = f"{metric.name} at γ = {gamma}{how}"
    printed = "computed from the paper" if found.theirs == "computed" else "the paper"
    return draw_bars(file, rows, known, "value", title, metric.unit, beside_alone=metric.beside_alone, printed=printed)


def _growth_pictures(found: Reproduced) -> list[Picture]:
    """Over checkpoints a figure for each task; rows without checkpoints are level lines."""
    pictures = []
    known = {draft: Look(*_look(i), row.name) for i, (row, draft) in enumerate(found.rows)}
    for i, column in enumerate(found.columns, start=1):
        results = {draft: cell["result"] for row, draft in found.rows if (cell := found.cells.get((row.name, column)))}
        growing = {draft for draft in results if (stage := found.run.stage(draft)) and stage.distilled}
        same = ("task", "temperature", "block_size")
        lines = [
            line
            for line in found.run.distinct_checkpoints
            if line["draft"] in growing and all(line[key] == results[line["draft"]][key] for key in same if key in line)
        ]
        before = {draft: row["block_efficiency"] for draft, row in results.items() if draft not in growing}
        printed = {f"the paper, {row.name}": value for row, _ in found.rows if (value := found.printed(row, column))}
        title = f"Block efficiency at γ = {column.block_size}, {found.task_name(column)}"
        pictures.append(draw_growth(f"{found.slug}_{i}.png", lines, before, known, title, printed))
    return pictures
