"""What a step of a paper's recipe changed: rows of its table against one another, beside the paper's own change.

Two drafts of one seed that are asked the same prompts have much in common, so the interval of a difference is narrower
than the drafts' own intervals suggest. Both are resampled together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.evaluate.comparison import (
    RATIOS,
    answered_by_all,
    answers_by_setting,
    counts_of,
    group_by_seed,
    pooled_change,
    setting_of,
)
from jaxdraft.evaluate.papers import Column
from jaxdraft.evaluate.reproduction import Reproduced, heading
from jaxdraft.evaluate.tables import Cell, Table

Answers = Mapping[str, Mapping[str, Any]]  # a draft's, by prompt
_MEASURED = {"mbsu": "block_efficiency"}  # between drafts of one size, MBSU changes as block efficiency does


class Change(NamedTuple):
    """A row of a table against another.

    Attributes:
      row, base: which.
      column: of the table.
      value: the relative change of ours, 0.21 is 21 % more.
      ci95: its interval.
      theirs: the paper's; None where it prints none.
    """

    row: str
    base: str
    column: Column
    value: float
    ci95: tuple[float, float]
    theirs: float | None


def changes(found: Reproduced) -> list[Change]:
    """Every row against the first, and against the one above it, wherever both were measured on the same prompts."""
    answers = answers_by_setting(found.run)
    seeds = {draft: group.drafts for group in group_by_seed(found.run, found.run.drafts) for draft in group.drafts}
    every = []
    for i, (row, draft) in enumerate(found.rows):
        for base, base_draft in found.rows[max(i - 1, 0) : i] if i < 2 else (found.rows[0], found.rows[i - 1]):
            for column in found.columns:
                ours = [
                    [answers.get((other, setting_of(cell["result"])), {}) for other in seeds[each]]
                    for name, each in ((row.name, draft), (base.name, base_draft))
                    if "result" in (cell := found.cells.get((name, column), {}))
                ]
                pooled = _pooled(column.metric, *ours) if len(ours) == 2 else None
                if pooled is None or (column.metric == "mbsu" and not _of_one_size(found, draft, base_draft)):
                    continue
                value, low, high = pooled
                theirs, theirs_base = found.printed(row, column), found.printed(base, column)
                printed = theirs / theirs_base - 1 if theirs is not None and theirs_base else None
                every.append(Change(row.name, base.name, column, value, (low, high), printed))
    return every


def _of_one_size(found: Reproduced, *drafts: str) -> bool:
    return len({found.run.parameters[draft]["ratio"] for draft in drafts}) == 1


def _pooled(metric: str, ours: Sequence[Answers], base: Sequence[Answers]) -> list[float] | None:
    """The change of a metric and its interval over seeds and prompts; None without any in common."""
    metric = _MEASURED.get(metric, metric)
    prompts = answered_by_all([*ours, *base])
    if metric not in RATIOS or len(ours) != len(base) or not prompts:
        return None
    return pooled_change(*_sums(ours, prompts, metric), *_sums(base, prompts, metric))


def _sums(drafts: Sequence[Answers], prompts: Sequence[str], metric: str) -> list[np.ndarray]:
    counts = [[counts_of(draft[prompt]) for prompt in prompts] for draft in drafts]
    return [np.array([[each[key] for each in draft] for draft in counts]) for key in RATIOS[metric]]


def change_table(found: Reproduced) -> Table:
    """Rows down, columns across; the paper's change below ours. Empty where there is nothing to compare."""
    every = changes(found)
    columns = [column for column in found.columns if any(change.column == column for change in every)]
    lines = []
    for pair in dict.fromkeys((change.row, change.base) for change in every):
        mine = {change.column: change for change in every if (change.row, change.base) == pair}
        lines.append([Cell(pair[0], f"against {pair[1]}"), *(_cell(found, mine.get(column)) for column in columns)])
    return Table([Cell("Draft", "change"), *(heading(found, column) for column in columns)], lines)


def _cell(found: Reproduced, change: Change | None) -> Cell:
    if change is None:
        return Cell("–")
    low, high = (f"{end:+.1%}" for end in change.ci95)
    beside = "" if change.theirs is None else f"{found.theirs} {change.theirs:+.1%}"
    return Cell(f"{change.value:+.1%}", f"{low} to {high}", beside=beside)


def change_rows(found: Reproduced) -> list[dict[str, Any]]:
    """The same as lines of a CSV file."""
    return [
        {
            "row": change.row,
            "against": change.base,
            **change.column._asdict(),
            "change": change.value,
            "change_ci95": list(change.ci95),
            found.theirs: change.theirs,
        }
        for change in changes(found)
    ]
