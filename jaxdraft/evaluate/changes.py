"""What a step of a paper's recipe changed: rows of its table against one another, beside the paper's own change.

Two drafts of one seed that are asked the same prompts have much in common, so the interval of a difference is narrower
than the drafts' own intervals suggest. Both are resampled together.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.comparison import (
    RATIOS,
    Setting,
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


class Pairs:
    """What the drafts of a run answered, seed by seed, to be compared."""

    def __init__(self, run: RunDirectory):
        self._answers = answers_by_setting(run)
        self._siblings: dict[str, dict[int | None, str]] = {}
        for group in group_by_seed(run, run.drafts):
            by_seed = {stage.settings.get("seed") if (stage := run.stage(d)) else None: d for d in group.drafts}
            self._siblings |= dict.fromkeys(group.drafts, by_seed)

    def change(self, metric: str, setting: Setting, draft: str, base: str) -> list[float] | None:
        """By how much ``draft`` is above ``base``, relative to it, and the ends of the 95% interval.

        Both stand for all their seeds. Seeds and prompts count that both have; None where there are none, or where the
        change cannot be told because the base may be 0.
        """
        ours, theirs = self._siblings[draft], self._siblings[base]
        seeds = [seed for seed in ours if seed in theirs]
        both = [[self._answers.get((of[seed], setting), {}) for seed in seeds] for of in (ours, theirs)]
        prompts = answered_by_all([*both[0], *both[1]])
        if metric not in RATIOS or not prompts:
            return None
        return pooled_change(*_sums(both[0], prompts, metric), *_sums(both[1], prompts, metric))


def changes(found: Reproduced) -> list[Change]:
    """Every row against the first and against the one above it, of those whose drafts are of its size.

    MBSU and block efficiency change alike: they are told once, in the first of their columns.
    """
    pairs, sizes = Pairs(found.run), {draft: known["ratio"] for draft, known in found.run.parameters.items()}
    every = []
    for i, (row, draft) in enumerate(found.rows):
        alike = [other for other in found.rows[:i] if sizes.get(other[1]) == sizes.get(draft)]
        for base, base_draft in alike[:1] if len(alike) < 2 else (alike[0], alike[-1]):
            told: set[tuple[str, Setting]] = set()
            for column in found.columns:
                result = found.cells.get((row.name, column), {}).get("result")
                if result is None:
                    continue
                asked = _MEASURED.get(column.metric, column.metric), setting_of(result)
                change = None if asked in told else pairs.change(*asked, draft, base_draft)
                told.add(asked)
                if change is not None:
                    theirs, theirs_base = found.printed(row, column), found.printed(base, column)
                    printed = theirs / theirs_base - 1 if theirs is not None and theirs_base else None
                    every.append(Change(row.name, base.name, column, change[0], (change[1], change[2]), printed))
    return every


def _sums(drafts: Sequence[Answers], prompts: Sequence[str], metric: str) -> list[np.ndarray]:
    counts = [[counts_of(draft[prompt]) for prompt in prompts] for draft in drafts]
    return [np.array([[each[key] for each in draft] for draft in counts]) for key in RATIOS[metric]]


def change_table(found: Reproduced, every: Sequence[Change]) -> Table:
    """Rows down, columns across; the paper's change below ours. Empty where there is nothing to compare."""
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


def change_rows(found: Reproduced, every: Sequence[Change]) -> list[dict[str, Any]]:
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
        for change in every
    ]
