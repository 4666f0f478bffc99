"""The papers' numbers are those that they print, and a recipe can say of each table which stages reproduce it."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.metrics import mbsu
from jaxdraft.evaluate.papers import TASKS, Column, Exhibit, Reproduction, papers
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import CrossEntropy
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Evaluate, HFModel, Prepare, Recipe, Train

EXHIBITS = [(paper, name) for paper in papers() for name in papers()[paper].exhibits]
FASTDRAFT = papers()["fastdraft"].exhibits


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """The papers' texts by name."""
    data = os.environ.get("JAXDRAFT_SHARED_DATA")
    folder = (Path(data) if data else Path(__file__).parents[3] / "shared" / "data").parent / "papers"
    files = {"fastdraft": "fastdraft_2411.11055.txt", "direct-alignment": "direct_alignment_2403.00858.txt"}
    if not folder.is_dir():
        pytest.skip(f"the papers' texts are not here ({folder})")
    return {paper: (folder / file).read_text() for paper, file in files.items()}


def printed_rows(text: str, table: str) -> list[list[float]]:
    """The numbers of each line of a table, in order; cells that hold those of several lines are taken apart."""
    (start,) = [match.end() for match in re.finditer(rf"^{table}: .*$", text, re.MULTILINE)]
    block = re.split(r"\n\n(?![^\n]*\t)", text[start:].lstrip("\n"))[0]
    rows = []
    for line in block.splitlines():
        cells = [re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?=\s|$)", cell) for cell in line.split("\t")]
        height = max(map(len, cells))
        stacked = [cell for cell in cells if len(cell) == height]
        rows += [[float(number) for number in row] for row in zip(*stacked, strict=True)]
    return rows


def is_end_of(values: list[float], printed: list[float]) -> bool:
    return len(printed) >= len(values) and printed[len(printed) - len(values) :] == values


def decimal(values: tuple[float | None, ...]) -> list[float]:
    assert None not in values
    return [float(value) for value in values if value is not None]


@pytest.mark.parametrize("name", [name for name in FASTDRAFT if name.startswith("Table") and name != "Table 5"])
def test_tables_are_as_printed(texts: dict[str, str], name: str) -> None:
    printed = printed_rows(texts["fastdraft"], name)
    rows = [decimal(row.values) for row in FASTDRAFT[name].rows.values()]
    if name in ("Table 2", "Table 3"):  # printed one under the other, greedy and then sampled
        half = len(rows[0]) // 2
        rows = [row[:half] for row in rows] + [row[half:] for row in rows]
    found = [next((i for i, numbers in enumerate(printed) if is_end_of(row, numbers)), None) for row in rows]
    assert found == sorted(found, key=lambda place: (place is None, place)), f"{name}: rows in another order"
    assert None not in found, f"{name}: {rows[found.index(None)]} is not printed"


def test_configurations_are_as_printed(texts: dict[str, str]) -> None:
    columns = [decimal(row.values) for row in FASTDRAFT["Table 5"].rows.values()]
    printed = printed_rows(texts["fastdraft"], "Table 5")
    for numbers in zip(*columns, strict=True):
        assert list(numbers) in printed
    text = texts["direct-alignment"]
    shape = decimal(papers()["direct-alignment"].exhibits["Table 1"].rows["Llama 2-Chat-Drafter"].values)
    names = ("Layers", "Attention heads", "Intermediate dim", "Hidden dim")
    printed_shape = [re.search(rf"^{name}\t[\d,]+\t([\d,]+)$", text, re.MULTILINE) for name in names]
    assert [float(match[1].replace(",", "")) for match in printed_shape if match] == shape


def test_what_a_figure_s_text_prints(texts: dict[str, str]) -> None:
    text = " ".join(texts["direct-alignment"].split())
    assert "(CNN-dailymail) from 2.29 for base draft to 2.4 for fine-tuned draft" in text
    assert r"increases by around $\sim 21\%$ with more fine-tuning" in text
    assert r"up to 2.3 block efficiency and $2.4 \times$ speed-up" in text
    exhibit = papers()["direct-alignment"].exhibits["Figure 2"]
    place = exhibit.columns.index(Column("block_efficiency", "cnn-dailymail", 0.0, 3))
    assert exhibit.rows["base"].values[place] == 2.29
    assert [value for row in exhibit.rows.values() for value in row.values if value is not None] == [2.29]


def test_computed_numbers_follow_from_the_tables() -> None:
    """FastDraft's equations 4 and 5 of its tables' acceptance rates."""
    first, second, table = FASTDRAFT["Figure 1"], FASTDRAFT["Figure 2"], FASTDRAFT["Table 7"]
    for name, row in first.rows.items():
        for column, value in zip(first.columns, row.values, strict=True):
            rate = table.rows[name].values[table.columns.index(column._replace(metric="acceptance_rate"))]
            assert rate is not None
            assert value == pytest.approx(mbsu(1 + 3 * rate, row.parameters / 3.8e9, 3), abs=5e-4)
    sources = {"base": ("Table 14", "Phi3-mini 50M, PT")}
    for name, row in second.rows.items():
        for column, value in zip(second.columns, row.values, strict=True):
            source, line = sources.get(name, ("Table 8" if column.task == "humaneval" else "Table 9", name))
            exhibit = FASTDRAFT[source]
            rate = exhibit.rows[line].values[exhibit.columns.index(column._replace(metric="acceptance_rate"))]
            assert rate is not None
            assert value == pytest.approx(1 + 3 * rate, abs=1e-9)


def test_tables_that_repeat_each_other_agree() -> None:
    """Where they do not, a note says so; that nobody mends it here without looking."""
    values: dict[tuple[Any, ...], dict[str, float]] = {}
    for name, exhibit in FASTDRAFT.items():
        for row in exhibit.rows.values():
            for column, value in zip(exhibit.columns, row.values, strict=True):
                if value is not None and column.metric == "acceptance_rate" and row.data == "5 B tokens of FineWeb":
                    values.setdefault((row.parameters, row.target.name, column), {})[name] = value
    differing = {key[2]: found for key, found in values.items() if len(set(found.values())) > 1}
    assert differing == {
        Column("acceptance_rate", "tinystories", 0.6, 3): {
            "Table 1": 0.277,
            "Table 2": 0.227,
            "Table 4": 0.277,
            "Table 7": 0.277,
        },
        Column("acceptance_rate", "dolly", 0.0, 3): {"Table 2": 0.259, "Table 7": 0.258, "Table 14": 0.258},
    }
    assert any("0.277" in note and "0.258" in note for note in FASTDRAFT["Table 2"].notes)


def published(paper: str, name: str) -> Exhibit:
    return papers()[paper].exhibits[name]


def make_recipe(*reproduces: Reproduction, stages: tuple[str, ...], tasks: tuple[Task, ...], **settings: Any) -> Recipe:
    train = lambda name: Train(
        name, data="corpus", loss=CrossEntropy(), batch_size=1, steps=1, learning_rate=1e-3, warmup_steps=0
    )
    return Recipe(
        title="Tables",
        target=HFModel("target"),
        draft=ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1),
        stages=(
            Prepare("corpus", sources=(), length=8),
            *map(train, stages),
            Evaluate("evaluate", drafts=stages, tasks=tasks, **settings),
        ),
        reproduces=reproduces,
    )


def every_task(exhibit: Exhibit) -> tuple[Task, ...]:
    """The tasks of an exhibit, each as often as it is decoded there."""
    decoded = dict.fromkeys((column.task, column.temperature) for column in exhibit.columns if column.block_size)
    return tuple(
        Task(task if not temperature else f"{task}, sampled", (), temperature) for task, temperature in decoded if task
    ) or (Task("any", ()),)


@pytest.mark.parametrize(("paper", "name"), EXHIBITS)
def test_a_recipe_can_declare_every_table(paper: str, name: str) -> None:
    """By the names of its tasks alone."""
    exhibit = published(paper, name)
    rows = {row: f"stage-{i}" for i, row in enumerate(exhibit.rows)}
    tasks, stages = every_task(exhibit), tuple(rows.values())
    declared = Reproduction(paper, name, rows)
    recipe = make_recipe(declared, stages=stages, tasks=tasks, over_checkpoints=True)
    measured = [(task.name, task.temperature) for task in tasks]
    for column in exhibit.columns:
        if column.block_size is not None:
            suffix = ", sampled" if column.temperature else ""
            assert declared.task_for(column, measured) == (f"{column.task}{suffix}", column.temperature)
    assert recipe.reproduces == (declared,)


@pytest.mark.parametrize(("paper", "name"), EXHIBITS)
def test_every_row_has_all_its_numbers(paper: str, name: str) -> None:
    exhibit = published(paper, name)
    assert len(set(exhibit.columns)) == len(exhibit.columns)
    assert all(len(row.values) == len(exhibit.columns) for row in exhibit.rows.values())
    assert {column.task for column in exhibit.columns if column.task} <= set(TASKS)


GOOD: dict[str, Any] = {"paper": "fastdraft", "exhibit": "Table 3", "rows": {"CE": "distill"}, "tasks": {}}
STORIES = {"tinystories": ("story", "story, sampled")}
WRONG = {
    "paper": ({"paper": "fast-draft"}, "did you mean 'fastdraft'?"),
    "exhibit": ({"exhibit": "Tabel 3"}, "no table or figure of fastdraft 'Tabel 3': did you mean 'Table 3'?"),
    "row": ({"rows": {"KLD": "distill"}}, "Table 3: no row 'KLD': did you mean 'KL'?"),
    "no rows": ({"rows": {}}, "rows is empty: name a stage for at least one of CE, "),
    "task": ({"tasks": {"tinystory": "story"}}, "no task 'tinystory': did you mean 'tinystories'?"),
    "stage": ({"rows": {"CE": "distil"}}, "row 'CE': no Train stage 'distil': did you mean 'distill'?"),
    "stage of another kind": ({"rows": {"CE": "corpus"}}, "row 'CE': no Train stage 'corpus'"),
    "task of the recipe": ({"tasks": {"dolly": "storys"}}, "no task of an Evaluate stage 'storys': did you mean"),
    "nothing measured": ({"tasks": {}}, "no Evaluate stage measures 'distill' (row 'CE') on one of cnn-dailymail"),
    "not decoded so": ({"exhibit": "Table 4", "rows": {"Phi3-mini 50M, PT": "distill"}}, "no Evaluate stage measures"),
    "draft not measured": ({"rows": {"CE": "other"}}, "no Evaluate stage measures 'other'"),
    "no checkpoints": (
        {"paper": "direct-alignment", "exhibit": "Figure 2", "rows": {"KLD": "distill"}, "tasks": {"xsum": "story"}},
        "give an Evaluate stage over_checkpoints=True",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_declaration_names_the_remedy(what: str) -> None:
    changed, message = WRONG[what]
    recipe = make_recipe(stages=("distill",), tasks=(Task("story", ()),))
    other = dataclasses.replace(recipe.stages[1], name="other")
    tasks = {} if what in ("nothing measured", "not decoded so") else {"tinystories": "story"}
    declare = lambda: dataclasses.replace(
        recipe,
        stages=(*recipe.stages, other),
        reproduces=(Reproduction(**{**GOOD, "tasks": tasks, **changed}),),
    )
    with pytest.raises(ConfigError) as raised:
        declare()
    assert message in str(raised.value)


def test_a_table_is_declared_once() -> None:
    declared = Reproduction("fastdraft", "Table 5", {"Phi3-mini 50M": "distill"})
    with pytest.raises(ConfigError, match="reproduces names fastdraft, Table 5 twice"):
        make_recipe(declared, declared, stages=("distill",), tasks=(Task("story", ()),))


def test_the_nearest_temperature_stands_for_a_sampled_task() -> None:
    declared = Reproduction(**{**GOOD, "tasks": STORIES})
    sampled = Column("acceptance_rate", "tinystories", 0.6, 3)
    measured = [("story", 0.0), ("story, sampled", 1.0), ("story, sampled", 0.7), ("other", 0.6)]
    assert declared.task_for(sampled, measured) == ("story, sampled", 0.7)
    assert declared.task_for(sampled._replace(temperature=0.0), measured) == ("story", 0.0)
    assert declared.task_for(sampled._replace(temperature=0.0), measured[1:]) is None
    assert declared.task_for(sampled._replace(task="dolly"), [("dollys", 0.6), ("dolly, long", 0.5)]) == (
        "dolly, long",
        0.5,
    )
