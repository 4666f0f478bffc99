"""Writes a run's report: one self-contained HTML page, the same in Markdown, its figures as PNG and its tables as CSV.

Every number comes from the run directory, and what the papers print from the package. What has not run yet is left out
with a line that says so.
"""

import base64
import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxdraft.evaluate.changes import change_rows, change_table, changes
from jaxdraft.evaluate.collect import RunDirectory, read_run
from jaxdraft.evaluate.comparison import compare, fewer_drafts
from jaxdraft.evaluate.dataset_report import (
    answer_stages,
    answer_table,
    dataset_csvs,
    left_out_table,
    length_pictures,
    length_table,
    source_table,
    text_stages,
    text_table,
)
from jaxdraft.evaluate.markdown import markdown
from jaxdraft.evaluate.paper_figures import paper_pictures
from jaxdraft.evaluate.pictures import pictures
from jaxdraft.evaluate.plotting import Picture, looks
from jaxdraft.evaluate.reproduction import csv_rows, reproductions, result_tables
from jaxdraft.evaluate.samples import first_of_each_task, samples, viewer
from jaxdraft.evaluate.set_up import agreements, differences
from jaxdraft.evaluate.sizes import size_pictures, size_rows, size_table
from jaxdraft.evaluate.tables import (
    block_size_table,
    comparison_tables,
    csv_tables,
    latency_table,
    model_table,
    perplexity_table,
    pivot,
    speed_table,
    stage_table,
    write_csvs,
)
from jaxdraft.evaluate.training_figures import SMOOTHED_FRACTION
from jaxdraft.evaluate.verdict import Summary, summarise


def write_report(workdir: Path) -> Path:
    """Writes ``workdir/report``, replacing an earlier one, and returns the path of its index.html.

    Raises:
      ConfigError: ``workdir`` is not a run directory, or a file in it cannot be read.
    """
    run = read_run(Path(workdir))
    summary, comparison = summarise(run), compare(run)
    reproduced = reproductions(run, comparison)
    changed = {exhibit.slug: changes(exhibit) for exhibit in reproduced}
    few = fewer_drafts(run, summary.baseline)
    sizes = size_rows(run)
    found = {
        "answer_lengths": length_pictures(run.stages),
        "sizes": size_pictures(sizes),
        **pictures(few, looks(few.stages), comparison, summary.best),
    }
    papers: list[dict[str, Any]] = [
        {
            "title": exhibit.title,
            "paper": exhibit.paper,
            "csv": f"{exhibit.slug}.csv",
            "results": result_tables(exhibit),
            "changes": change_table(exhibit, changed[exhibit.slug]),
            "differences": differences(exhibit),
            "agreements": agreements(exhibit),
            "notes": exhibit.notes,
            "pictures": paper_pictures(exhibit),
        }
        for exhibit in reproduced
    ]
    context = _context(run, few, summary) | {"pictures": found, "papers": papers}
    context |= {"comparison": comparison_tables(comparison), "sizes": size_table(sizes)}

    partial = run.folder / "report.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for picture in (p for section in (*found.values(), *(paper["pictures"] for paper in papers)) for p in section):
        (partial / picture.file).write_bytes(picture.png)
    write_csvs(
        partial,
        csv_tables(run, comparison)
        | dataset_csvs(run.stages)
        | {"sizes": sizes}
        | {e.slug: csv_rows(e) for e in reproduced}
        | {f"{e.slug}_changes": lines for e in reproduced if (lines := change_rows(e, changed[e.slug]))},
    )
    (partial / "report.md").write_text(markdown(context), encoding="utf-8")
    (partial / "index.html").write_text(_page(context), encoding="utf-8")
    shutil.rmtree(run.folder / "report", ignore_errors=True)
    partial.rename(run.folder / "report")
    return run.folder / "report" / "index.html"


def _page(context: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["inline"] = _inline
    script = _resource("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(_resource("report.html")).render(context, script=script, script_digest=digest)


def _resource(name: str) -> str:
    return resources.files("jaxdraft.evaluate").joinpath(name).read_text("utf-8")


def _inline(picture: Picture) -> str:
    """The picture as an address of itself."""
    return "data:image/png;base64," + base64.b64encode(picture.png).decode()


def _context(run: RunDirectory, few: RunDirectory, summary: Summary) -> dict[str, Any]:
    """What page and Markdown show besides pictures; ``few`` is ``run`` with the drafts that are shown one by one."""
    shown = samples(run, summary.baseline)
    return {
        "title": run.recipe.get("title") or run.recipe.get("name") or run.folder.name,
        "description": run.recipe.get("description", ""),
        "summary": summary,
        "stages": stage_table(few.stages),
        "drafts_left_out": len(run.stages) - len(few.stages),
        "models": model_table(run, summary.best),
        "text": text_table(run.stages),
        "sources": source_table(run.stages),
        "answers": answer_table(run.stages),
        "answer_lengths": length_table(run.stages),
        "documents_left_out": left_out_table(text_stages(run.stages)),
        "answers_left_out": left_out_table(answer_stages(run.stages)),
        "acceptance_low": any(stage.logged("acceptance_low") for stage in few.stages),
        "smoothed": f"{SMOOTHED_FRACTION:.0%}",
        "block_efficiency": pivot(few, "block_efficiency"),
        "mbsu": pivot(few, "mbsu"),
        "perplexity": perplexity_table(run),
        "speed": speed_table(run, summary.best),
        "latencies": latency_table(run, summary.best),
        "block_sizes": block_size_table(few),
        "other_speeds": [(draft, speed_table(few, draft)) for draft in few.drafts if draft != summary.best],
        "learning_block_size": max((line["block_size"] for line in run.while_learning), default=None),
        "checkpoint_block_size": min((line["block_size"] for line in run.checkpoints), default=None),
        "position_block_size": max((row["block_size"] for row in run.results), default=None),
        "samples": first_of_each_task(shown, summary.best),
        "viewer": _data(viewer(shown, summary.best)),
        "samples_missing": _samples_missing(run),
        "repeat": _repeat(run),
    }


def _data(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _samples_missing(run: RunDirectory) -> str:
    if not run.samples:
        return "No samples yet: they come with an Evaluate stage."
    return "No tokenizer was found in the run or beside its target, so the samples cannot be shown as text."


def _repeat(run: RunDirectory) -> list[tuple[str, str]]:
    """Facts of run.json by name, the command first."""
    record = {"command": None, "seed": run.recipe.get("seed"), "git": None, **run.record}
    return [(key.replace("_", " "), _plain(value, key)) for key, value in record.items() if value not in (None, "", {})]


def _plain(value: Any, key: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return "\n".join(f"{name} {_plain(inner)}" for name, inner in value.items() if name != "type")
    if isinstance(value, list | tuple):
        words = [item if isinstance(item, str) else json.dumps(item) for item in value]
        return shlex.join(words) if key == "command" else "\n".join(words)
    return str(value)
