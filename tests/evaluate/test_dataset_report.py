"""What the report says of packed text and of the distillation set."""

import csv
import html
import json
import re

import numpy as np
import pytest

from jaxdraft.data.quarantine import Rejected
from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.report import write_report

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
ROWS = [{key: np.ones(8, np.int32) for key in ("tokens", "segment_ids", "loss_mask")}] * 3


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(plotting, "picture", lambda file, alt, draw, height=0: plotting.Picture(file, alt, b""))


def page_of(run) -> str:
    return write_report(run.folder).read_text()


def cells(page: str, section: str) -> list[list[str]]:
    """The rows of all of a section's tables, a cell's small text after its first with a space."""
    (found,) = re.findall(rf'<section id="{section}">(.*?)</section>', page, re.DOTALL)
    text = lambda cell: html.unescape(re.sub(r"<[^>]+>", "", cell.replace("<small>", " ")))
    return [
        [text(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(<td.*?)</tr>", found)
    ]


def table(run, name: str) -> list[dict[str, str]]:
    with (run.folder / "report" / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.usefixtures("no_figures")
def test_a_distillation_set_is_counted(made_run):
    prompts = [*map(str, range(10)), Rejected("a", "too long"), Rejected("b", "too long"), Rejected("c", "no field")]
    repeated = ["0", "0"]  # prompts whose answers are equal too
    failed = {"1@0": "HTTP 500", "2@1": "HTTP 500", "3@1": "timed out"}
    answer = lambda q: {"error": failed[q.id]} if q.id in failed else "yes" if q.temperature else "no no"
    made_run.answers("responses", prompts + repeated, answer)
    made_run.answers("held-out", ["a"], lambda q: "yes", temperatures=(0.3,))
    found = cells(page_of(made_run), "distillation_set")
    no, yes = (len(made_run.tokenizer.encode(text, bos=False)) + 1 for text in ("no no", "yes"))
    tokens = 11 * no + 10 * yes
    assert found == [
        ["responses", "15", "12", "3", "24", "21", "3", "100.0%", "4", str(tokens)],
        ["held-out", "1", "1", "0", "1", "1", "0", "100.0%", "0", str(yes)],
        ["responses", "prompt skipped", "too long", "2"],
        ["responses", "prompt skipped", "no field", "1"],
        ["responses", "answer failed", "HTTP 500", "2"],
        ["responses", "answer failed", "timed out", "1"],
        ["responses", "greedy", "11", f"{no}.0", str(no), str(no), str(no)],
        ["responses", "T 1", "10", f"{yes}.0", str(yes), str(yes), str(yes)],
        ["held-out", "T 0.3", "1", f"{yes}.0", str(yes), str(yes), str(yes)],
    ]
    first, second = table(made_run, "distillation_set")
    assert (first["prompts_read"], first["answers_written"], first["tokens"]) == ("15", "21", str(tokens))
    assert json.loads(first["prompts_skipped"]) == {"too long": 2, "no field": 1}
    assert json.loads(second["answers_errors"]) == {}
    assert [row["temperature"] for row in table(made_run, "answer_lengths")] == ["0", "1", "0.3"]


@pytest.mark.usefixtures("no_figures")
def test_answers_that_did_not_end(made_run):
    folder = made_run.answers("responses", ["a", "b"], lambda q: "yes")
    account = json.loads((folder / "answers.json").read_text())
    account["finish"] = {"eos": 3, "length": 1}
    (folder / "answers.json").write_text(json.dumps(account))
    assert cells(page_of(made_run), "distillation_set")[0][7] == "75.0%"


def test_each_set_has_a_figure_of_its_own_lengths(made_run):
    one = made_run.answers("one", [str(i) for i in range(6)], lambda q: "yes " * (1 + int(q.prompt.id)))
    made_run.answers("two", ["a"], lambda q: "yes", temperatures=(0.3,))
    report = write_report(made_run.folder).parent
    before = {path.name: path.read_bytes() for path in report.glob("*.png")}
    assert sorted(before) == ["answer_lengths_1.png", "answer_lengths_2.png"]
    account = json.loads((one / "answers.json").read_text())
    counts = account["lengths"]["1"]["histogram"]["counts"]
    assert sum(counts) == 6
    counts[0], counts[-1] = counts[-1], counts[0]
    (one / "answers.json").write_text(json.dumps(account))
    write_report(made_run.folder)
    after = {path.name: path.read_bytes() for path in report.glob("*.png")}
    assert [name for name in before if after[name] != before[name]] == ["answer_lengths_1.png"]


def test_bins_hold_equally_many_lengths(made_run):
    """Bins of a fraction of a token would hold now one length, now two: teeth that no answer has."""
    size = len(made_run.tokenizer.encode("a", bos=False))
    folder = made_run.answers("responses", [str(i) for i in range(20)], lambda q: "a" * int(q.prompt.id), (0.0,))
    spread = json.loads((folder / "answers.json").read_text())["lengths"]["0"]
    counts, width = spread["histogram"]["counts"], spread["histogram"]["width"]
    assert isinstance(width, int)
    assert len(counts) <= 16
    assert (len(counts) - 1) * width <= spread["max"] < len(counts) * width
    assert sum(counts) == 20
    assert size == 1


SOURCES = [
    {"type": "HubFiles", "repository": "owner/name", "revision": "abc123", "licence": "ODC-BY-1.0", "limit": None},
    {"type": "TextFile", "path": "a.txt", "fields": ["text"]},
]


@pytest.mark.usefixtures("no_figures")
def test_text_is_counted_and_its_sources_named(made_run):
    counts = {"documents": 1234, "tokens": 30, "dropped_tokens": 6}
    folder = made_run.rows("corpus", ROWS, source={"settings": SOURCES}, counts=counts)
    made_run.rows("half", ROWS, kind="Subset", source={"settings": SOURCES}, counts={"of_rows": 6})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["quarantined"] = {"no field 'text'": 4, "not UTF-8": 1}
    manifest["source"]["provenance"] = [{}, {"files": ["a.txt"], "revision": None, "licence": "public domain"}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cells(page_of(made_run), "text") == [
        ["corpus", "1,234", "30", "3", "8", "6", "5"],
        ["corpus", "HubFiles repository owner/name", "abc123", "ODC-BY-1.0"],
        ["corpus", "TextFile path a.txt", "–", "public domain"],
        ["corpus", "text set aside", "no field 'text'", "4"],
        ["corpus", "text set aside", "not UTF-8", "1"],
    ]
    (first,) = table(made_run, "text")
    assert (first["stage"], first["documents"], first["labels"]) == ("corpus", "1234", "24")
    assert [source["licence"] for source in json.loads(first["sources"])] == ["ODC-BY-1.0", "public domain"]


@pytest.mark.usefixtures("no_figures")
def test_nothing_in_the_data_becomes_markup(made_run):
    prompts = [HOSTILE, Rejected(HOSTILE, HOSTILE)]
    answer = lambda q: {"error": HOSTILE} if q.temperature else HOSTILE
    made_run.answers("responses", prompts, answer)
    made_run.rows("corpus", ROWS, source={"settings": [{"type": HOSTILE, "licence": HOSTILE, "path": HOSTILE}]})
    page = page_of(made_run)
    assert "<script" not in page
    assert not re.search(r"<[^>]*onerror", page)
    assert html.unescape(page).count(HOSTILE) == 5  # skipped, failed; a source's type, path and licence


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_data_says_nothing_of_it(made_run):
    made_run.plan("responses", "Generate")
    made_run.record("corpus", "Prepare")
    page = page_of(made_run)
    assert "Distillation set" not in page
    assert 'id="text"' not in page
    assert not list((made_run.folder / "report").glob("*answer*"))
