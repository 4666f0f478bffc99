"""Speed-up over the size of drafts: a made-up run of three sizes and two seeds, and the means done by hand."""

import json
from pathlib import Path

import pytest

from jaxdraft.evaluate.collect import read_run
from jaxdraft.evaluate.sizes import size_pictures, size_rows, size_table
from jaxdraft.evaluate.tables import Cell

SETTING = {"task": "open", "temperature": 0.0, "top_p": 1.0, "batch_size": 1}


def make_run(folder: Path, widths: tuple[int, ...]) -> Path:
    stages = []
    for width in widths:
        for seed in (0, 1):
            name = f"h{width}-{seed}"
            settings = {"name": name, "kind": "Train", "seed": seed, "loss": {"type": "KL"}, "model": {"width": width}}
            stages.append(settings)
            results = {
                "draft_stage": name,
                "parameters": {"target": 1000, "draft": width, "ratio": width / 1000},
                "runs": [
                    {
                        **SETTING,
                        "block_size": size,
                        "block_efficiency": 2.0,
                        "mbsu": mbsu + seed,
                        "token_rate_ratio": rate,
                    }
                    for size, mbsu, rate in ((1, 1.0, 0.9), (3, 1.4, 0.7))
                ],
            }
            for file, value in (
                (folder / name / "stage.json", {"status": "done", "settings": settings}),
                (folder / name / "metrics.jsonl", {"step": 1, "loss": 1.0, "acceptance": 0.5}),
                (folder / "evaluate" / name / "results.json", results),
            ):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(value) + "\n")
    recipe = {"name": "sizes", "target": {"path": str(folder)}, "stages": [*stages, {"name": "evaluate"}]}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def test_each_size_at_its_best_block_size(tmp_path: Path) -> None:
    rows = size_rows(read_run(make_run(tmp_path, (150, 20, 60))))
    assert [(row["draft"], row["ratio"], row["seeds"]) for row in rows] == [
        ("h20", 0.02, 2),
        ("h60", 0.06, 2),
        ("h150", 0.15, 2),
    ]
    for row in rows:
        assert (row["mbsu"], row["mbsu_range"], row["mbsu_block_size"]) == (pytest.approx(1.9), [1.4, 2.4], 3)
        assert (row["measured_speedup"], row["measured_speedup_block_size"]) == (pytest.approx(0.9), 1)
    assert [picture.file for picture in size_pictures(rows)] == ["sizes_1.png"]


def test_the_table_marks_the_fastest_at_its_block_size(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, (20, 60, 150)))
    for row in run.results:
        if row["draft"].startswith("h60"):
            row["mbsu"] += 1
    table = size_table(size_rows(run))
    assert [(row[1].text, row[1].detail) for row in table.rows] == [
        ("h20", "2.0% of the target"),
        ("h60", "6.0% of the target"),
        ("h150", "15.0% of the target"),
    ]
    assert [row[3] for row in table.rows] == [
        Cell("1.90", "1.40 – 2.40", False, "γ = 3"),
        Cell("2.90", "2.40 – 3.40", True, "γ = 3"),
        Cell("1.90", "1.40 – 2.40", False, "γ = 3"),
    ]
    assert table.rows[0][2] == Cell("2.00", "2.00 – 2.00")
    assert table.rows[0][5] == Cell("–")  # nothing was predicted


def test_two_sizes_are_no_curve(tmp_path: Path) -> None:
    assert size_rows(read_run(make_run(tmp_path, (20, 60)))) == []
