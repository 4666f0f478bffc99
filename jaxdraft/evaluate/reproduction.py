"""A paper's table or figure beside ours: the numbers of both."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxdraft.evaluate.collect import RunDirectory
from jaxdraft.evaluate.comparison import group_by_seed
from jaxdraft.evaluate.papers import TASKS, Column, Paper, Reproduction, Row, papers
from jaxdraft.evaluate.tables import Cell, Table, measured
from jaxdraft.evaluate.words import decoding, listed


class Metric(NamedTuple):
    """How a metric is written.

    Attributes:
      name: of it.
      unit: in words.
      digits: after the point.
      beside_alone: whether the target alone has 1.
      lowest: whether the lowest is the best.
    """

    name: str
    unit: str
    digits: int
    beside_alone: bool = False
    lowest: bool = False


METRICS = {
    "acceptance_rate": Metric("Acceptance rate", "share of draft tokens accepted", 3),
    "block_efficiency": Metric("Block efficiency", "tokens per run of the target", 2, beside_alone=True),
    "mbsu": Metric("MBSU", "times the target alone", 2, beside_alone=True),
    "token_rate_ratio": Metric("Token rate", "times the target alone", 2, beside_alone=True),
    "perplexity": Metric("Perplexity", "lower is better", 1, lowest=True),
    "hidden_size": Metric("Hidden size", "", 0),
    "intermediate_size": Metric("MLP width", "", 0),
    "num_layers": Metric("Layers", "", 0),
    "num_heads": Metric("Attention heads", "", 0),
    "num_kv_heads": Metric("Key/value heads", "", 0),
    "vocab_size": Metric("Vocabulary", "", 0),
}


@dataclass(frozen=True)
class Reproduced:
    """A table or figure as the run has it.

    Attributes:
      declared: what the recipe says.
      run: which has the results.
      columns: of the exhibit those of which there is a number of ours.
      cells: our number of each row and column, with ``value``, its interval, and the result it is from.
    """

    declared: Reproduction
    run: RunDirectory
    columns: list[Column]
    cells: Mapping[tuple[str, Column], Mapping[str, Any]]

    @property
    def paper(self) -> Paper:
        return papers()[self.declared.paper]

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return f"{self.paper.short}, {self.declared.exhibit}: {self.declared.published.title}"

    @property
    def slug(self) -> str:
        """Beginning of its files' names."""
        return f"{self.declared.paper}_{self.declared.exhibit}".lower().replace(" ", "_").replace("-", "_")

    @property
    def rows(self) -> list[tuple[Row, str]]:
        """Rows of the exhibit that are reproduced, in its order, each with its draft."""
        known, mine = self.declared.published.rows, self.declared.rows
        return [(row, mine[name]) for name, row in known.items() if name in mine]

    @property
    def theirs(self) -> str:
        """What the paper's numbers are called."""
        return "computed" if self.declared.published.computed else "paper"

    def printed(self, row: Row, column: Column) -> float | None:
        """The paper's number."""
        return row.values[self.declared.published.columns.index(column)]

    def task_name(self, column: Column) -> str:
        """What is measured in a column: the paper's task, or text, or what stands for it."""
        theirs = TASKS[str(column.task)]
        if column.metric == "perplexity":
            ours = next(known["text"] for known in self.run.perplexity.values())
            return theirs if ours.startswith(str(column.task)) else f"{ours} for {theirs}"
        results = [cell["result"] for (_, other), cell in self.cells.items() if other == column]
        ours = listed(row["task"] for row in results)
        return theirs if ours.split(",")[0] == column.task else f"{ours} for {theirs}"

    @property
    def notes(self) -> list[str]:
        """What has to be known of its numbers, and what of it is missing here."""
        published = self.declared.published
        notes = [published.computed] if published.computed else []
        notes += published.notes
        if missing := [name for name in published.rows if name not in self.declared.rows]:
            notes.append(f"Not reproduced here: {', '.join(missing)}.")
        measured_tasks = {column.task for column in self.columns}
        if missing := [TASKS[task] for task in published.tasks if task not in measured_tasks]:
            notes.append(f"Not measured here: {', '.join(missing)}.")
        return notes


def reproductions(run: RunDirectory, comparison: Sequence[Mapping[str, Any]]) -> list[Reproduced]:
    """Those that the recipe declares and of which there is at least one number.

    Args:
      run: the run.
      comparison: of its drafts pooled over seeds: a row that names one of several stands for all of them.
    """
    groups = {draft: group.name for group in group_by_seed(run, run.drafts) for draft in group.drafts}
    results: dict[str, list[Mapping[str, Any]]] = {
        draft: [
            *(row for row in comparison if row["group"] == groups.get(draft) and row["seeds"] > 1),
            *(row for row in run.distinct_results if row["draft"] == draft),
        ]
        for draft in run.drafts
    }
    found = [_reproduced(run, _declared(given), results) for given in run.recipe.get("reproduces", ())]
    return [reproduced for reproduced in found if reproduced.cells]


def _declared(given: Mapping[str, Any]) -> Reproduction:
    return Reproduction(**{key: value for key, value in given.items() if key != "type"})


def _reproduced(
    run: RunDirectory, declared: Reproduction, results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Reproduced:
    cells = {}
    for column in declared.published.columns:
        for name, draft in declared.rows.items():
            if column.task is None or column.block_size is None:
                cell = _of_draft(run, column, draft)
            else:
                cell = _of_task(declared, column, results.get(draft, ()))
            if cell is not None:
                cells[name, column] = cell
    columns = [column for column in declared.published.columns if any(column == place[1] for place in cells)]
    return Reproduced(declared, run, columns, cells)


def _of_draft(run: RunDirectory, column: Column, draft: str) -> dict[str, Any] | None:
    """A dimension of the draft, or its perplexity."""
    if column.metric == "perplexity":
        return _perplexity(run, draft)
    size = run.shapes(draft)["draft"].get(METRICS[column.metric].name)
    return None if size is None else {"value": size}


def _perplexity(run: RunDirectory, draft: str) -> dict[str, Any] | None:
    """That of a draft and of those that differ only in their seed, on the same text.

    As the text is the same, exp(Σ −ln p / Σ tokens) over the seeds is the geometric mean of theirs. Results have no
    sums per document to resample: the interval goes from the lowest to the highest end of the seeds' own, which are
    over documents, and so is at least as wide as the seeds' range.
    """
    if draft not in run.perplexity:
        return None
    drafts = next(group.drafts for group in group_by_seed(run, list(run.perplexity)) if draft in group.drafts)
    text = lambda of: [run.perplexity[of].get(key) for key in ("text", "tokens", "length", "stride")]
    seeds = [_with_interval(run.perplexity[of], "perplexity") for of in drafts if text(of) == text(draft)]
    known = [seed for seed in seeds if seed is not None]
    if len(known) < len(seeds):  # one is infinite
        return None
    if len(known) == 1:
        return known[0]
    ends = [end for seed in known for end in seed.get("value_ci95", [seed["value"]])]
    return {"value": statistics.geometric_mean(seed["value"] for seed in known), "value_ci95": [min(ends), max(ends)]}


def _of_task(declared: Reproduction, column: Column, results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What was measured by decoding."""
    rows = [row for row in results if row["block_size"] == column.block_size and row.get(column.metric) is not None]
    wanted = declared.task_for(column, [(row["task"], row.get("temperature", 0)) for row in rows])
    row = next((row for row in rows if (row["task"], row.get("temperature", 0)) == wanted), None)
    return None if row is None else {"result": row, **(_with_interval(row, column.metric) or {})}


def _with_interval(row: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    if row.get(metric) is None:
        return None
    interval = row.get(f"{metric}_ci95")
    return {"value": row[metric], **({"value_ci95": interval} if interval else {})}


def result_tables(found: Reproduced) -> dict[str, Table]:
    """Ours with its interval and the paper's number below, by what a table shows: one for each metric that is decoded.

    Rows down and columns across, the best of ours in each column marked.
    """
    decoded = list(dict.fromkeys(column.metric for column in found.columns if column.block_size is not None))
    tables = {}
    for i, metric in enumerate(decoded or [""]):
        columns = [c for c in found.columns if c.metric == metric or (i == 0 and c.block_size is None)]
        known = METRICS.get(metric)
        tables[f"{known.name}, {known.unit}" if known else found.declared.published.title] = _table(found, columns)
    return tables


def _table(found: Reproduced, columns: Sequence[Column]) -> Table:
    lines = [[Cell(row.name, draft)] for row, draft in found.rows]
    for column in columns:
        metric = METRICS[column.metric]
        values = [cell["value"] for (_, other), cell in found.cells.items() if other == column]
        best = None if column.task is None else min(values) if metric.lowest else max(values)
        for line, (row, _) in zip(lines, found.rows, strict=True):
            ours, theirs = found.cells.get((row.name, column)), found.printed(row, column)
            cell = measured(ours, "value", best, metric.digits) if ours else Cell("–")
            beside = "" if theirs is None else f"{found.theirs} {theirs:,.{metric.digits}f}"
            line.append(cell._replace(beside=beside))
    return Table([Cell("Draft", "stage"), *(heading(found, column) for column in columns)], lines)


def heading(found: Reproduced, column: Column) -> Cell:
    """What a column of the exhibit says: the metric, or the task and how it is decoded."""
    if column.block_size is None:
        return Cell(METRICS[column.metric].name, found.task_name(column) if column.task else "")
    how = decoding({"temperature": column.temperature})
    return Cell(found.task_name(column), f"γ = {column.block_size}, {how}")


def csv_rows(found: Reproduced) -> list[dict[str, Any]]:
    """The same, a line for each number."""
    rows = []
    for (row, draft), column in itertools.product(found.rows, found.declared.published.columns):
        cell = found.cells.get((row.name, column), {})
        rows.append(
            {
                "row": row.name,
                "stage": draft,
                **column._asdict(),
                "our_task": cell.get("result", {}).get("task"),
                "value": cell.get("value"),
                "value_ci95": cell.get("value_ci95"),
                found.theirs: found.printed(row, column),
            }
        )
    return rows
