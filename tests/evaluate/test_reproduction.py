"""Every table and figure of the papers, run through with made-up results: ours beside theirs, and what differs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.collect import read_run
from jaxdraft.evaluate.comparison import group_by_seed
from jaxdraft.evaluate.paper_figures import paper_pictures
from jaxdraft.evaluate.papers import SHAPE, Column, papers
from jaxdraft.evaluate.report import write_report
from jaxdraft.evaluate.reproduction import heading, reproductions, result_tables
from jaxdraft.evaluate.set_up import agreements, differences

EXHIBITS = [(paper, name) for paper in papers() for name in papers()[paper].exhibits]
TARGET, DRAFT = 1_000_000, 50_000


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def our_value(row: int, column: int) -> float:
    """A number that no other cell has."""
    return round(0.1 + 0.017 * row + 0.0011 * column, 4)


def make_run(folder: Path, paper: str, name: str, names: dict[str, str] | None = None) -> Path:
    """A run that declares an exhibit and has a result for each of its cells.

    ``names`` gives tasks another name than the paper's.
    """
    exhibit, names = papers()[paper].exhibits[name], names or {}
    stages = {row: f"stage-{i}" for i, row in enumerate(exhibit.rows)}
    loss = {"type": "KL", "weights": None}
    plan: list[dict[str, Any]] = [
        {"name": stage, "kind": "Train", "data": "corpus", "loss": loss, "init": "random"} for stage in stages.values()
    ]
    for stage in plan:
        shape = {key: 16 * (i + 1) for i, key in enumerate(SHAPE)}
        summary = {"tokens": 3_000_000, "parameters": DRAFT, "shape": shape}
        write_json(folder / stage["name"] / "stage.json", {"status": "done", "settings": stage, "summary": summary})
        steps = [{"step": i, "loss": 1.0, "acceptance": 0.5, "tokens": 9} for i in (1, 2)]
        (folder / stage["name"] / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    tasks = [{"name": name, "max_new_tokens": 77} for name in [*names.values(), *exhibit.tasks]]
    checkpoints = []
    for i, stage in enumerate(stages.values()):
        runs: dict[tuple[Any, ...], dict[str, Any]] = {}
        perplexity = None
        for j, column in enumerate(exhibit.columns):
            if column.metric == "perplexity":
                perplexity = {
                    "perplexity": 100 + our_value(i, j),
                    "text": "wikitext-2",
                    "tokens": 280_000,
                    "length": 512,
                }
            elif column.task is not None:
                task = names.get(column.task, column.task)
                setting = {"task": task, "block_size": column.block_size, "temperature": column.temperature}
                run = runs.setdefault(tuple(setting.values()), {**setting, "top_p": 1.0, "prompts": 12})
                value = our_value(i, j)
                run |= {column.metric: value, f"{column.metric}_ci95": [value - 0.01, value + 0.01]}
                run |= {key: 1.5 for key in ("block_efficiency", "mbsu", "acceptance_rate") if key not in run}
                checkpoints += [
                    {"draft": stage, "step": step, **setting, "block_efficiency_offline": 1 + step / 10}
                    for step in (1, 2)
                ]
        parameters = {"target": TARGET, "draft": DRAFT, "ratio": DRAFT / TARGET}
        results = {"draft_stage": stage, "parameters": parameters, "runs": list(runs.values())}
        results |= {"settings": {"dtype": "float32"}}
        if perplexity:
            results |= {"perplexity": perplexity, "target_perplexity": {**perplexity, "perplexity": 12.34}}
        write_json(folder / "evaluate" / stage / "results.json", results)
    lines = "".join(json.dumps(line) + "\n" for line in checkpoints)
    (folder / "evaluate" / "checkpoints.jsonl").write_text(lines)
    declared = {"type": "Reproduction", "paper": paper, "exhibit": name, "rows": stages, "tasks": names}
    plan.append({"name": "evaluate", "kind": "Evaluate", "tasks": tasks})
    recipe = {"title": "Tables", "target": {"path": "some/target-1M"}, "draft": {}, "stages": plan}
    write_json(folder / "recipe.json", {**recipe, "reproduces": [declared]})
    write_json(folder / "run.json", {"devices": ["cpu:0"]})
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting, "picture", lambda file, alt, draw, height=0: plotting.Picture(file, alt, b""))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("paper", "name"), EXHIBITS)
def test_every_cell_is_ours_and_theirs(tmp_path: Path, paper: str, name: str) -> None:
    exhibit = papers()[paper].exhibits[name]
    page = write_report(make_run(tmp_path, paper, name))
    (found,) = reproductions(read_run(tmp_path), [])
    assert (found.columns, [row.name for row, _ in found.rows]) == (list(exhibit.columns), list(exhibit.rows))
    with (page.parent / f"{found.slug}.csv").open() as stream:
        lines = iter(list(csv.DictReader(stream)))
    for i, row in enumerate(exhibit.rows.values()):
        for j, (column, theirs) in enumerate(zip(exhibit.columns, row.values, strict=True)):
            line = next(lines)
            assert (line["row"], line["stage"], line["metric"]) == (row.name, f"stage-{i}", column.metric)
            assert line[found.theirs] == ("" if theirs is None else str(theirs))
            if column.metric in SHAPE:
                assert float(line["value"]) == 16 * (SHAPE.index(column.metric) + 1)
            elif column.metric == "perplexity":
                assert float(line["value"]) == 100 + our_value(i, j)
            else:
                assert float(line["value"]) == our_value(i, j)
                assert float(line["value_ci95_high"]) == our_value(i, j) + 0.01
                assert line["our_task"] == column.task
    assert next(lines, None) is None
    cells = [cell for table in result_tables(found).values() for line in table.rows for cell in line[1:]]
    assert len(cells) == len(exhibit.rows) * len(exhibit.columns)
    assert sum(bool(cell.beside) for cell in cells) == sum(
        v is not None for r in exhibit.rows.values() for v in r.values
    )
    words, text = page.read_text(), (page.parent / "report.md").read_text()
    for note in found.notes:
        assert note.split("'")[0] in words
    for cell in cells:
        assert f">{cell.text}<" in words
        assert cell.beside in words
        assert cell.beside in text


@pytest.mark.parametrize(
    ("paper", "name", "pictures"),
    [
        ("direct-alignment", "Figure 1", 6),  # three metrics, two block sizes
        ("direct-alignment", "Figure 2", 3),  # tasks
        ("fastdraft", "Table 3", 4),  # two block sizes, greedy and sampled
        ("fastdraft", "Table 5", 0),
        ("fastdraft", "Figure 1", 2),
    ],
)
def test_pictures(tmp_path: Path, paper: str, name: str, pictures: int) -> None:
    (found,) = reproductions(read_run(make_run(tmp_path, paper, name)), [])
    drawn = paper_pictures(found)
    assert [picture.file for picture in drawn] == [f"{found.slug}_{i + 1}.png" for i in range(pictures)]
    assert all(picture.png.startswith(b"\x89PNG") for picture in drawn)


@pytest.mark.parametrize(("paper", "name"), [("fastdraft", "Figure 2"), ("direct-alignment", "Figure 2")])
def test_the_paper_s_numbers_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paper: str, name: str) -> None:
    (found,) = reproductions(read_run(make_run(tmp_path, paper, name)), [])
    before = [picture.png for picture in paper_pictures(found)]
    row = papers()[paper].exhibits[name].rows["base"]
    monkeypatch.setitem(vars(row), "values", (row.values[0], None, *row.values[2:]))
    after = [picture.png for picture in paper_pictures(found)]
    assert [old == new for old, new in zip(before, after, strict=True)] == (
        [False] if len(before) == 1 else [True, False, True]
    )


def set_up(folder: Path) -> dict[str, tuple[str, str]]:
    (found,) = reproductions(read_run(folder), [])
    return {row[0].text: (row[1].text, row[2].text) for row in differences(found).rows}


def test_what_differs_is_told_from_the_run(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 4")
    found = set_up(tmp_path)
    targets = "Phi-3-mini-4k-instruct, 3.8 billion parameters or Llama-3.1-8B-Instruct, 8 billion parameters"
    assert found["Target"] == ("target-1M, 1 million parameters", targets)
    assert found["Draft"] == ("50 thousand parameters", "50 million parameters or 150 million parameters")
    assert found["Draft / target"] == ("5.00%", "1.32% or 1.88%")
    assert found["Vocabulary"] == ("–", "32,064 or 128,256")
    assert found["Dolly"] == ("12 prompts, at most 77 new tokens", "prompts and lengths not said")
    assert found["Weights"] == ("float32", "float16 in training")
    assert found["Training of Phi3-mini 50M, PT"] == ("3 million tokens of corpus, with KL", "5 B tokens of FineWeb")
    assert "Dolly decoded" not in found
    (reproduced,) = reproductions(read_run(tmp_path), [])
    assert "γ 3 and 5" in agreements(reproduced)
    assert "Dolly decoded T 0.6" in agreements(reproduced)


@pytest.mark.usefixtures("no_figures")
def test_the_text_of_perplexity_is_told(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 1")
    ours = "wikitext-2, 280 thousand tokens in windows of 512"
    assert set_up(tmp_path)["Perplexity"] == (ours, "WikiText-2, windows not said")
    page = write_report(tmp_path)
    assert ">12.34<" in page.read_text()
    assert "12.34" in (page.parent / "perplexity.csv").read_text()


def test_a_text_that_stands_for_the_paper_s_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 1")

    def named() -> str:
        (reproduced,) = reproductions(read_run(tmp_path), [])
        (told,) = (heading(reproduced, column) for column in reproduced.columns if column.metric == "perplexity")
        return told.detail

    assert named() == "WikiText-2"
    for file in tmp_path.glob("evaluate/*/results.json"):
        file.write_text(file.read_text().replace("wikitext-2", "grimm"))
    assert named() == "grimm for WikiText-2"


def test_perplexity_is_pooled_over_seeds_on_the_same_text(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 1")
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    first = recipe["stages"][0]
    seeds = [{**first, "name": name, "seed": seed} for seed, name in enumerate((first["name"], "second", "third"))]
    write_json(tmp_path / "recipe.json", {**recipe, "stages": [*seeds, *recipe["stages"][1:]]})

    def cell(*measured: tuple[str, float | None, float]) -> dict[str, Any] | None:
        for stage, (text, value, error) in zip(seeds, measured, strict=True):
            write_json(tmp_path / stage["name"] / "stage.json", {"status": "done", "settings": stage})
            interval = [value - error, value + error] if value else [None, None]
            found = {"perplexity": value, "perplexity_ci95": interval, "text": text, "tokens": 9, "length": 4}
            results = {"draft_stage": stage["name"], "parameters": {}, "runs": [], "perplexity": found}
            write_json(tmp_path / "evaluate" / stage["name"] / "results.json", results)
        (reproduced,) = reproductions(read_run(tmp_path), [])
        row = reproduced.rows[0][0].name
        return next((found for at, found in reproduced.cells.items() if at[0] == row and at[1].task), None)

    pooled = cell(("wiki", 100.0, 30.0), ("wiki", 121.0, 1.0), ("another", 30.0, 1.0))
    assert pooled == {"value": pytest.approx(110.0), "value_ci95": [70.0, 130.0]}
    assert cell(("wiki", 100.0, 3.0), ("another", 1.0, 0.5), ("another", 1.0, 0.5)) == {
        "value": 100.0,
        "value_ci95": [97.0, 103.0],
    }
    assert cell(("wiki", 100.0, 3.0), ("wiki", None, 0.0), ("wiki", 100.0, 3.0)) is None, "one is infinite"


def test_other_settings_are_told(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 4")
    for file in tmp_path.glob("evaluate/*/results.json"):
        results = json.loads(file.read_text())
        for run in results["runs"]:
            run |= {"temperature": 0.8, "top_p": 0.9, "verification": "block"}
        results["runs"] = [run for run in results["runs"] if run["block_size"] == 3 and run["task"] != "humaneval"]
        file.write_text(json.dumps(results))
    found = set_up(tmp_path)
    assert found["Dolly decoded"] == ("T 0.8, top-p 0.9, block verification", "T 0.6")
    assert found["γ"] == ("3", "3 and 5")
    (reproduced,) = reproductions(read_run(tmp_path), [])
    assert "Not measured here: HumanEval." in reproduced.notes


@pytest.mark.usefixtures("no_figures")
def test_a_task_that_stands_for_the_paper_s_is_named(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, "fastdraft", "Table 8", {"humaneval": "functions"}))
    assert set_up(tmp_path)["HumanEval"][0] == "functions: 12 prompts, at most 77 new tokens"
    assert "functions for HumanEval" in page.read_text()


def test_how_a_draft_was_trained_goes_back_to_its_start(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 8")
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    file = tmp_path / "stage-1" / "stage.json"
    stage = json.loads(file.read_text())
    stage["settings"] |= {"init": "stage-0", "data": {"answers": 0.9, "corpus": 0.1}, "loss": {"type": "TVDPlusPlus"}}
    file.write_text(json.dumps(stage))
    write_json(tmp_path / "recipe.json", recipe)
    expected = "3 million tokens of corpus, with KL; then 3 million tokens of 90% answers + 10% corpus, with TVD++"
    assert set_up(tmp_path)["Training of FineWeb + 5B code + 1B text"][0] == expected


def test_of_several_batch_sizes_the_smallest_counts(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 8")
    file = tmp_path / "evaluate" / "stage-0" / "results.json"
    results = json.loads(file.read_text())
    results["runs"] = [
        {**run, "batch_size": batch, "acceptance_rate": batch / 100} for run in results["runs"] for batch in (8, 2)
    ]
    file.write_text(json.dumps(results))
    (found,) = reproductions(read_run(tmp_path), [])
    row, _ = found.rows[0]
    assert found.cells[row.name, Column("acceptance_rate", "humaneval", 0.0, 3)]["value"] == 0.02


def test_a_draft_stands_for_all_its_seeds(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 8")
    run, row = read_run(tmp_path), "FineWeb + 5B code"
    for i, stage in enumerate(run.stages[:6]):
        stage.settings["seed"] = i % 2
        stage.settings["data"] = str(i // 2)
    assert next(group.drafts for group in group_by_seed(run, run.drafts)) == ("stage-0", "stage-1")
    setting = {"task": "humaneval", "temperature": 0.0, "top_p": 1.0, "block_size": 3, "prompts": 12}
    pooled = {"group": "stage", "seeds": 2, **setting, "acceptance_rate": 0.77, "acceptance_rate_ci95": [0.7, 0.8]}
    (found,) = reproductions(run, [pooled])
    cell = found.cells[row, Column("acceptance_rate", "humaneval", 0.0, 3)]
    assert (cell["value"], cell["value_ci95"]) == (0.77, [0.7, 0.8])
    assert {line[0].text: line[1].text for line in differences(found).rows}["Seeds"] == "2 and 1"


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_measured_nothing_yet_shows_no_table(tmp_path: Path) -> None:
    make_run(tmp_path, "fastdraft", "Table 8")
    for file in tmp_path.glob("evaluate/*/results.json"):
        file.unlink()
    assert "Beside the papers" not in write_report(tmp_path).read_text()
