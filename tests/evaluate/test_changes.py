"""Rows of a paper's table against one another: made-up answers of three losses and two seeds, and the sums by hand."""

import json

import pytest

from jaxdraft.evaluate.changes import change_rows, change_table, changes
from jaxdraft.evaluate.collect import read_run
from jaxdraft.evaluate.comparison import compare
from jaxdraft.evaluate.reproduction import Reproduced, reproductions
from tests.evaluate.test_comparison import make_run, trained

ROWS = {"KLD": "kl-0", "TVD": "tvd-0", "TVD++": "tvdpp-0"}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> Reproduced:
    folder = tmp_path_factory.mktemp("run")
    losses = {"kl": "KL", "tvd": "TVD", "tvdpp": "TVDPlusPlus"}
    make_run(
        folder,
        [trained(f"{name}-{seed}", seed, loss={"type": loss}) for name, loss in losses.items() for seed in (0, 1)],
    )
    recipe = json.loads((folder / "recipe.json").read_text())
    declared = {"paper": "direct-alignment", "exhibit": "Figure 1", "rows": ROWS, "tasks": {"xsum": "story"}}
    (folder / "recipe.json").write_text(json.dumps({**recipe, "reproduces": [declared]}))
    run = read_run(folder)
    (found,) = reproductions(run, compare(run))
    return found


def test_a_change_is_of_all_seeds_together(reproduced: Reproduced) -> None:
    def block_efficiency(draft: str, block_size: int) -> float:
        lines = [
            line
            for line in reproduced.run.samples
            if line["draft"] in (f"{draft}-0", f"{draft}-1")
            and (line["task"], line["block_size"]) == ("story", block_size)
        ]
        return sum(len(line["tokens"]) for line in lines) / sum(len(line["accepted"]) for line in lines)

    found = changes(reproduced)
    for change in found:
        row, base = (ROWS[name].removesuffix("-0") for name in (change.row, change.base))
        of_column = change.column.block_size or 0
        assert change.value == pytest.approx(block_efficiency(row, of_column) / block_efficiency(base, of_column) - 1)
        assert change.ci95[0] < change.value < change.ci95[1]
        assert change.theirs is None  # the paper prints no numbers for this figure
    pairs = [("TVD", "KLD"), ("TVD++", "KLD"), ("TVD++", "TVD")]  # the first, and the one above
    # The figure has columns of block efficiency too, which changes as MBSU does.
    assert [(change.row, change.base, change.column.metric, change.column.block_size) for change in found] == [
        (*pair, "mbsu", block_size) for pair in pairs for block_size in (3, 5)
    ]


def test_the_table_has_the_columns_that_are_told(reproduced: Reproduced) -> None:
    found = changes(reproduced)
    table = change_table(reproduced, found)
    assert [cell.detail for cell in table.columns[1:]] == ["γ = 3, greedy", "γ = 5, greedy"]
    assert [(line[0].text, line[0].detail) for line in table.rows] == [
        ("TVD", "against KLD"),
        ("TVD++", "against KLD"),
        ("TVD++", "against TVD"),
    ]
    assert table.rows[0][1].text == f"{found[0].value:+.1%}"
    assert len(change_rows(reproduced, found)) == len(found)
