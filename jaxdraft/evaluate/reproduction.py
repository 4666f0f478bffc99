"""A paper's table or figure beside ours: the numbers of both, what differs in how they came about, and pictures."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxdraft.evaluate.collect import RunDirectory, Stage
from jaxdraft.evaluate.figures import draw_bars
from jaxdraft.evaluate.papers import TASKS, Column, Paper, Reproduction, Row, papers
from jaxdraft.evaluate.plotting import COLOURS, MARKERS, Look, Picture
from jaxdraft.evaluate.tables import Cell, Table, headings, measured
from jaxdraft.evaluate.training_figures import draw_growth
from jaxdraft.evaluate.words import amount, count, decoding, number

_NOT_SAID = "not said"


class _Metric(NamedTuple):
    name: str
    unit: str
    digits: int
    beside_alone: bool = False
    lowest: bool = False


_METRICS = {
    "acceptance_rate": _Metric("Acceptance rate", "share of draft tokens accepted", 3),
    "block_efficiency": _Metric("Block efficiency", "tokens per run of the target", 2, beside_alone=True),
    "mbsu": _Metric("MBSU", "times the target alone", 2, beside_alone=True),
    "token_rate_ratio": _Metric("Token rate", "times the target alone", 2, beside_alone=True),
    "perplexity": _Metric("Perplexity", "lower is better", 1, lowest=True),
    "hidden_size": _Metric("Hidden size", "", 0),
    "intermediate_size": _Metric("MLP width", "", 0),
    "num_layers": _Metric("Layers", "", 0),
    "num_heads": _Metric("Attention heads", "", 0),
    "num_kv_heads": _Metric("Key/value heads", "", 0),
    "vocab_size": _Metric("Vocabulary", "", 0),
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
        """What is measured in a column: the paper's task, or what stands for it."""
        theirs = TASKS[str(column.task)]
        results = [cell["result"] for (_, other), cell in self.cells.items() if other == column]
        ours = _listed(row["task"] for row in results)
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


def reproductions(run: RunDirectory) -> list[Reproduced]:
    """Those that the recipe declares and of which there is at least one number."""
    found = [_reproduced(run, _declared(given)) for given in run.recipe.get("reproduces", ())]
    return [reproduced for reproduced in found if reproduced.cells]


def _declared(given: Mapping[str, Any]) -> Reproduction:
    return Reproduction(**{key: value for key, value in given.items() if key != "type"})


def _reproduced(run: RunDirectory, declared: Reproduction) -> Reproduced:
    cells = {}
    for column in declared.published.columns:
        for name, draft in declared.rows.items():
            if (cell := _ours(run, declared, column, draft)) is not None:
                cells[name, column] = cell
    columns = [column for column in declared.published.columns if any(column == place[1] for place in cells)]
    return Reproduced(declared, run, columns, cells)


def _ours(run: RunDirectory, declared: Reproduction, column: Column, draft: str) -> dict[str, Any] | None:
    """Our number in a cell."""
    if column.metric == "perplexity":
        return {"value": run.perplexity[draft]} if draft in run.perplexity else None
    if column.task is None:
        size = run.shapes(draft)["draft"].get(_METRICS[column.metric].name)
        return None if size is None else {"value": size}
    rows = [row for row in run.distinct_results if row["draft"] == draft and row["block_size"] == column.block_size]
    wanted = declared.task_for(column, [(row["task"], row.get("temperature", 0)) for row in rows])
    row = next((row for row in rows if (row["task"], row.get("temperature", 0)) == wanted), None)
    if row is None or row.get(column.metric) is None:
        return None
    interval = row.get(f"{column.metric}_ci95")
    return {"value": row[column.metric], "result": row, **({"value_ci95": interval} if interval else {})}


def result_tables(found: Reproduced) -> dict[str, Table]:
    """Ours with its interval and the paper's number below, by what a table shows: one for each metric that is decoded.

    Rows down and columns across, the best of ours in each column marked.
    """
    decoded = list(dict.fromkeys(column.metric for column in found.columns if column.block_size is not None))
    tables = {}
    for i, metric in enumerate(decoded or [""]):
        columns = [c for c in found.columns if c.metric == metric or (i == 0 and c.block_size is None)]
        known = _METRICS.get(metric)
        tables[f"{known.name}, {known.unit}" if known else found.declared.published.title] = _table(found, columns)
    return tables


def _table(found: Reproduced, columns: Sequence[Column]) -> Table:
    lines = [[Cell(row.name, draft)] for row, draft in found.rows]
    for column in columns:
        metric = _METRICS[column.metric]
        values = [cell["value"] for (_, other), cell in found.cells.items() if other == column]
        best = None if column.task is None else min(values) if metric.lowest else max(values)
        for line, (row, _) in zip(lines, found.rows, strict=True):
            ours, theirs = found.cells.get((row.name, column)), found.printed(row, column)
            cell = measured(ours, "value", best, metric.digits) if ours else Cell("–")
            beside = "" if theirs is None else f"{found.theirs} {number(theirs, metric.digits)}"
            line.append(cell._replace(beside=beside))
    return Table([Cell("Draft", "stage"), *(_heading(found, column) for column in columns)], lines)


def _heading(found: Reproduced, column: Column) -> Cell:
    if column.block_size is None:
        return Cell(_METRICS[column.metric].name, TASKS.get(str(column.task), ""))
    how = decoding({"temperature": column.temperature})
    return Cell(found.task_name(column), f"γ = {column.block_size}, {how}")


class SetUp(NamedTuple):
    """One thing about how numbers came about, here and in the paper."""

    what: str
    ours: str
    theirs: str


def differences(found: Reproduced) -> Table:
    """What differs in set-up between the run and the paper."""
    rows = [[Cell(what), Cell(ours), Cell(theirs)] for what, ours, theirs in _set_up(found) if ours != theirs]
    return Table(headings("Set-up", "Here", f"{found.paper.short}"), rows, names=3)


def agreements(found: Reproduced) -> str:
    """What is the same in both, as a sentence; empty where nothing is."""
    same = [f"{what} {ours}" for what, ours, theirs in _set_up(found) if ours == theirs]
    return f"The same in both: {'; '.join(same)}." if same else ""


def _set_up(found: Reproduced) -> Iterator[SetUp]:
    run, paper, published = found.run, found.paper, found.declared.published
    drafts = [draft for _, draft in found.rows]
    targets = list(dict.fromkeys(row.target for row, _ in found.rows))
    known = [run.parameters[draft] for draft in drafts if draft in run.parameters]
    name = run.target_folder.name if run.target_folder else str(run.recipe.get("target"))
    size = f", {amount(known[0]['target'])} parameters" if known else ""
    theirs = [f"{target.name}, {amount(target.parameters)} parameters" for target in targets]
    yield SetUp("Target", name + size, _listed(theirs))
    if published.tasks:
        vocabulary = run.shapes(drafts[0])["target"].get("Vocabulary")
        printed = [count(target.vocab_size) for target in targets if target.vocab_size]
        yield SetUp("Vocabulary", count(vocabulary), _listed(printed) or _NOT_SAID)
    if known:
        sizes = [f"{amount(parameters['draft'])} parameters" for parameters in known]
        yield SetUp("Draft", _listed(sizes), _listed([f"{amount(row.parameters)} parameters" for row, _ in found.rows]))
        ratios = [f"{parameters['ratio']:.2%}" for parameters in known]
        yield SetUp("Draft / target", _listed(ratios), _listed([f"{row.ratio:.2%}" for row, _ in found.rows]))
    if published.tasks:
        yield from _decoded(found)
        formats = [run.circumstances.get(draft, {}).get("dtype", "–") for draft in drafts]
        yield SetUp("Weights", _listed(formats), paper.weights or _NOT_SAID)
    if any(column.metric == "token_rate_ratio" for column in found.columns):
        yield SetUp("Machine", _listed(map(str, run.record.get("devices", ()))) or "–", _NOT_SAID)
    if published.tasks:
        for row, draft in found.rows:
            yield SetUp(f"Training of {row.name}", _trained(run, draft), row.data)


def _decoded(found: Reproduced) -> Iterator[SetUp]:
    """Of tasks: what stands for them, and how they are decoded."""
    columns = [column for column in found.columns if column.block_size is not None]
    sizes = sorted({column.block_size for column in columns if column.block_size})
    theirs = sorted({column.block_size for column in found.declared.published.columns if column.block_size})
    yield SetUp("γ", " and ".join(map(str, sizes)), " and ".join(map(str, theirs)))
    for task in dict.fromkeys(column.task for column in columns):
        assert task is not None
        mine = [column for column in columns if column.task == task]
        results = [cell["result"] for (_, column), cell in found.cells.items() if column in mine]
        names = list(dict.fromkeys(row["task"] for row in results))
        asked = _listed([f"{count(row['prompts'])} prompts" for row in results])
        limits = [found.run.max_new_tokens(row) for row in results]
        longest = _listed([f"at most {limit} new tokens" for limit in limits if limit is not None])
        stands = "" if names == [task] else f"{_listed(names, 'and')}: "
        yield SetUp(TASKS[task], stands + ", ".join(filter(None, (asked, longest))), f"prompts and lengths {_NOT_SAID}")
        ours = _listed([decoding(row) for row in results], "and")
        sampled = {"top_p": found.paper.top_p} if found.paper.top_p else {}
        printed = [decoding({"temperature": column.temperature, **sampled}) for column in mine]
        yield SetUp(f"{TASKS[task]} decoded", ours, _listed(printed, "and"))


def _trained(run: RunDirectory, draft: str) -> str:
    """What a draft was trained on, from its first stage to its last."""
    chain: list[Stage] = []
    stage = run.stage(draft)
    while stage is not None and stage not in chain:
        chain.insert(0, stage)
        stage = run.stage(str(stage.settings.get("init")))
    return "; then ".join(map(_learned, chain)) or "–"


def _learned(stage: Stage) -> str:
    data = stage.settings.get("data") or "–"
    words = data if isinstance(data, str) else " + ".join(f"{share:.0%} {name}" for name, share in data.items())
    tokens = stage.summary.get("tokens")
    size = f"{amount(tokens)} tokens of " if tokens else ""
    return f"{size}{words}" + (f", with {stage.loss}" if stage.loss else "")


def _listed(words: Any, last: str = "or") -> str:
    """Different ones of them: "a, b and c"."""
    *others, end = list(dict.fromkeys(words)) or [""]
    return f"{', '.join(others)} {last} {end}" if others else end


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
    metric, gamma = _METRICS[columns[0].metric], columns[0].block_size
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
        (task,) = {row["task"] for row in results.values()}
        growing = {draft for draft in results if (stage := found.run.stage(draft)) and stage.distilled}
        lines = [
            line
            for line in found.run.checkpoints
            if line["draft"] in growing and (line["task"], line["block_size"]) == (task, column.block_size)
        ]
        before = {draft: row["block_efficiency"] for draft, row in results.items() if draft not in growing}
        printed = {f"the paper, {row.name}": value for row, _ in found.rows if (value := found.printed(row, column))}
        title = f"Block efficiency at γ = {column.block_size}, {found.task_name(column)}"
        pictures.append(draw_growth(f"{found.slug}_{i}.png", lines, before, known, title, printed))
    return pictures
