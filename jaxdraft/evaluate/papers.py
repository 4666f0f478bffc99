"""The tables and figures of the two papers, and how a recipe says which of them its stages reproduce.

What the papers print lies in ``papers.json``, where the values of a row are in the order of its ``columns``: each entry
there stands for all its tasks, of each all its temperatures, of each all its block sizes.

    Recipe(
        reproduces=(
            Reproduction(
                "fastdraft",
                "Table 3",
                rows={"CE": "distill-ce", "KL": "distill-kl", "TVD": "distill-tvd"},
                tasks={"dolly": ("open", "open, sampled")},
            ),
        ),
        …
    )

Sources: Direct Alignment (Goel et al. 2024, arXiv 2403.00858); FastDraft (Zafrir et al. 2024, arXiv 2411.11055).
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from importlib import resources
from typing import Any, NamedTuple

from jaxdraft.errors import ConfigError, unknown_name

TASKS = {
    "cnn-dailymail": "CNN/DailyMail",
    "dolly": "Dolly",
    "humaneval": "HumanEval",
    "tinystories": "TinyStories",
    "wikitext-2": "WikiText-2",
    "wmt18-de-en": "WMT18 De-En",
    "xsum": "XSum",
}
"""Names of tasks -> as a reader knows them."""

SHAPE = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")


class Column(NamedTuple):
    """What a number of a table says: a metric, where and how it was measured.

    Attributes:
      metric: a field of results.json, ``"perplexity"``, or one of ``SHAPE``, a dimension of the draft.
      task: of ``TASKS``; None for a dimension.
      temperature: 0 is greedy; None where nothing is decoded.
      block_size: γ; None likewise.
    """

    metric: str
    task: str | None
    temperature: float | None
    block_size: int | None


class PaperTarget(NamedTuple):
    """A paper's target; ``vocab_size`` is None where it does not print it."""

    name: str
    parameters: int
    vocab_size: int | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A draft of a paper, and its numbers.

    Attributes:
      name: as the paper calls it, in brief.
      data: what it was trained on.
      target: what it was trained for.
      parameters: how large it is.
      values: one for each column; None for what the paper only draws.
    """

    name: str
    data: str
    target: PaperTarget
    parameters: int
    values: tuple[float | None, ...]

    @property
    def ratio(self) -> float:
        """c, parameters of the draft / of the target."""
        return self.parameters / self.target.parameters


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """A table or a figure.

    Attributes:
      name: "Table 4" or "Figure 1".
      title: what it shows.
      columns: in the paper's order.
      rows: by name.
      over_checkpoints: whether it shows growth over training.
      computed: for numbers that the paper does not print itself, what they were computed from.
      notes: what has to be known of its numbers.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Row]
    over_checkpoints: bool
    computed: str
    notes: tuple[str, ...]

    @property
    def tasks(self) -> list[str]:
        """Tasks that are decoded, in order."""
        return list(dict.fromkeys(c.task for c in self.columns if c.task and c.block_size))

    @property
    def is_figure(self) -> bool:
        return self.name.startswith("Figure")


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
      title: the whole of it.
      short: what it is called.
      arxiv: its number there.
      weights: number format of its weights; None where it does not say.
      top_p: of its sampled answers; None where it does not say.
      exhibits: its tables and figures by name.
    """

    title: str
    short: str
    arxiv: str
    weights: str | None
    top_p: float | None
    exhibits: Mapping[str, Exhibit]


@functools.cache
def papers() -> dict[str, Paper]:
    """The papers by name."""
    content = json.loads(resources.files("jaxdraft.evaluate").joinpath("papers.json").read_text("utf-8"))
    return {name: _paper(**given) for name, given in content.items()}


def _paper(targets: dict[str, Any], draft: dict[str, Any], exhibits: dict[str, Any], **facts: Any) -> Paper:
    known = {name: PaperTarget(**target) for name, target in targets.items()}
    return Paper(**facts, exhibits={name: _exhibit(name, known, draft, **given) for name, given in exhibits.items()})


def _exhibit(
    name: str,
    targets: Mapping[str, PaperTarget],
    draft: dict[str, Any],
    *,
    title: str,
    columns: list[dict[str, Any]],
    rows: dict[str, dict[str, Any]],
    over_checkpoints: bool = False,
    computed: str = "",
    notes: Iterable[str] = (),
) -> Exhibit:
    where = ("tasks", "temperatures", "block_sizes")
    every = tuple(
        Column(entry["metric"], *place)
        for entry in columns
        for place in itertools.product(*(entry.get(key, [None]) for key in where))
    )
    found = {}
    for row, given in rows.items():
        facts = {"values": [None] * len(every), **draft, **given}
        facts |= {"target": targets[facts["target"]], "values": tuple(facts["values"])}
        found[row] = Row(row, **facts)
    return Exhibit(name, title, every, found, over_checkpoints, computed, tuple(notes))


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A table or figure of a paper that stages of the recipe reproduce; the report shows ours beside theirs.

    Attributes:
      paper: "direct-alignment" or "fastdraft".
      exhibit: "Table 4", "Figure 1".
      rows: row of it -> the Train stage whose draft stands for it; not all have to be there.
      tasks: task of it -> the recipe's task that stands for it, or several that differ in how they are decoded. Without
        an entry it is every task of that name, also followed by a comma and more, such as ``"dolly, sampled"``.

    Raises:
      ConfigError: no such paper, exhibit, row or task.
    """

    paper: str
    exhibit: str
    rows: Mapping[str, str]
    tasks: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.paper not in papers():
            raise ConfigError(unknown_name("paper", self.paper, list(papers())))
        known = papers()[self.paper].exhibits
        if self.exhibit not in known:
            raise ConfigError(unknown_name(f"table or figure of {self.paper}", self.exhibit, list(known)))
        for row in self.rows:
            if row not in self.published.rows:
                raise self._wrong(unknown_name("row", row, list(self.published.rows)))
        for task in self.tasks:
            if task not in self.published.tasks:
                raise self._wrong(unknown_name("task", task, self.published.tasks))
        if not self.rows:
            raise self._wrong(f"rows is empty: name a stage for at least one of {', '.join(self.published.rows)}")

    @property
    def published(self) -> Exhibit:
        """What the paper has there."""
        return papers()[self.paper].exhibits[self.exhibit]

    def check(self, trained: Collection[str], evaluations: Collection[Any]) -> None:
        """Compares with a recipe's stages.

        Args:
          trained: names of the Train stages.
          evaluations: the Evaluate stages.

        Raises:
          ConfigError: a stage or task that does not exist, or nothing that is measured.
        """
        for row, stage in self.rows.items():
            if stage not in trained:
                raise self._wrong(f"row {row!r}: {unknown_name('Train stage', stage, list(trained))}")
        tasks = list(dict.fromkeys(task.name for evaluation in evaluations for task in evaluation.tasks))
        for key, given in self.tasks.items():
            for name in _names(given):
                if name not in tasks:
                    raise self._wrong(f"task {key!r}: {unknown_name('task of an Evaluate stage', name, tasks)}")
        if not self.published.tasks:
            return
        for row, stage in self.rows.items():
            mine = [evaluation for evaluation in evaluations if stage in evaluation.drafts]
            if not any(self._measures(evaluation) for evaluation in mine):
                sizes = sorted({column.block_size for column in self.published.columns if column.block_size})
                raise self._wrong(
                    f"no Evaluate stage measures {stage!r} (row {row!r}) on one of {', '.join(self.published.tasks)}, "
                    f"decoded as there and at γ = {' or '.join(map(str, sizes))}: say with tasks={{…}} which of the "
                    "recipe's tasks stands for it, or leave it out with --set 'reproduces=()'"
                )
        if self.published.over_checkpoints and not any(evaluation.over_checkpoints for evaluation in evaluations):
            raise self._wrong("it is drawn over checkpoints: give an Evaluate stage over_checkpoints=True")

    def _measures(self, evaluation: Any) -> bool:
        """Whether an Evaluate stage measures something of it."""
        tasks = [(task.name, T) for task in evaluation.tasks for T in evaluation.temperatures or (task.temperature,)]
        sizes = evaluation.block_sizes
        return any(self.task_for(column, tasks) and column.block_size in sizes for column in self.published.columns)

    def task_for(self, column: Column, tasks: Iterable[tuple[str, float]]) -> tuple[str, float] | None:
        """The task that stands for a column's: greedy for greedy, else that of the nearest temperature.

        Args:
          column: of the exhibit.
          tasks: name and temperature of every task there is.
        """
        if column.task is None or column.temperature is None:
            return None
        wanted, given = column.temperature, self.tasks.get(column.task)
        names = None if given is None else _names(given)
        fitting = [
            (abs(temperature - wanted), (name, temperature))
            for name, temperature in tasks
            if (name.split(",")[0] == column.task if names is None else name in names)
            and (temperature > 0) == (wanted > 0)
        ]
        return min(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"reproduces {self.paper}, {self.exhibit}: {why}")


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
