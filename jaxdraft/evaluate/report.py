"""Writes a run's report: one self-contained HTML page, its figures as PNG and its tables as CSV.

Every number comes from the run directory. What has not run yet is left out with a line that says so.
"""

import base64
import itertools
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxdraft.decode.speculative import token_origins
from jaxdraft.evaluate import figures
from jaxdraft.evaluate.collect import RunDirectory, read_run
from jaxdraft.evaluate.comparison import compare, fewer_drafts, ranked
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
from jaxdraft.evaluate.figures import Look, Picture, decoding
from jaxdraft.evaluate.tables import (
    comparison_tables,
    csv_tables,
    model_table,
    pivot,
    speed_table,
    stage_table,
    write_csvs,
)
from jaxdraft.evaluate.verdict import Summary, number, summarise

SAMPLES_PER_TASK = 2
_LONGEST_PROMPT = 1200  # characters shown
_ACCEPTANCE = {
    "acceptance": "acceptance (1 − TVD)\non training data",
    "acceptance_low": "acceptance, at least\n(from stored targets)",
}


def write_report(workdir: Path) -> Path:
    """Writes ``workdir/report``, replacing an earlier one, and returns the path of its index.html.

    Raises:
      ConfigError: ``workdir`` is not a run directory, or a file in it cannot be read.
    """
    import jinja2

    run = read_run(Path(workdir))
    summary, comparison = summarise(run), compare(run)
    few = fewer_drafts(run, summary.baseline)
    known = figures.looks(few.stages)
    pictures = {
        "answer_lengths": length_pictures(run.stages),
        "losses": _loss_pictures(few, known),
        "comparison": _comparison_pictures(comparison),
        "block_efficiency": _bar_pictures(few, known, "block_efficiency", "block efficiency\n(tokens per target run)"),
        "mbsu": _bar_pictures(few, known, "mbsu", "MBSU\n(× target alone)"),
        "speed": _bar_pictures(few, known, "token_rate_ratio", "measured token rate\n(× target alone)"),
        "while_learning": _learning_pictures(few, known),
        "checkpoints": _checkpoint_pictures(few, known),
        "positions": _position_pictures(few, known),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("jaxdraft.evaluate").joinpath("report.html").read_text("utf-8"))
    page = template.render(_context(run, few, summary, pictures), comparison=comparison_tables(comparison))

    partial = run.folder / "report.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for picture in (picture for section in pictures.values() for picture in section):
        (partial / picture.file).write_bytes(picture.png)
    write_csvs(partial, csv_tables(run, comparison) | dataset_csvs(run.stages))
    (partial / "index.html").write_text(page, encoding="utf-8")
    shutil.rmtree(run.folder / "report", ignore_errors=True)
    partial.rename(run.folder / "report")
    return run.folder / "report" / "index.html"


def _context(
    run: RunDirectory, few: RunDirectory, summary: Summary, pictures: Mapping[str, Sequence[Picture]]
) -> dict[str, Any]:
    """What the page shows; ``few`` is ``run`` with the drafts that are shown one by one."""
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
        "smoothed": f"{figures.SMOOTHED_FRACTION:.0%}",
        "pictures": {
            section: [
                {"alt": picture.alt, "source": "data:image/png;base64," + base64.b64encode(picture.png).decode()}
                for picture in found
            ]
            for section, found in pictures.items()
        },
        "block_efficiency": pivot(few, "block_efficiency"),
        "mbsu": pivot(few, "mbsu"),
        "speed": speed_table(run, summary.best),
        "other_speeds": [(draft, speed_table(few, draft)) for draft in few.drafts if draft != summary.best],
        "learning_block_size": max((line["block_size"] for line in run.while_learning), default=None),
        "checkpoint_block_size": min((line["block_size"] for line in run.checkpoints), default=None),
        "position_block_size": max((row["block_size"] for row in run.results), default=None),
        "samples": _samples(run, summary),
        "samples_missing": _samples_missing(run),
        "repeat": _repeat(run),
    }


# Figures


def _loss_pictures(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    distilled = [stage for stage in run.stages if stage.distilled]
    others = [stage for stage in run.stages if stage.metrics and not stage.distilled]
    pictures = []
    if others:
        pictures.append(figures.draw_curves("loss.png", others, known, "loss", "loss (nats per token)"))
    for key, label in _ACCEPTANCE.items():
        if compared := [stage for stage in distilled if stage.logged(key)]:
            pictures.append(figures.draw_curves(f"{key}.png", compared, known, key, label))
    if distilled:
        pictures.append(figures.draw_loss_panels("loss_distillation.png", distilled, known))
    return pictures


def _bar_pictures(run: RunDirectory, known: Mapping[str, Look], metric: str, label: str) -> list[Picture]:
    pictures = []
    measured = [row for row in _ordered(run) if row.get(metric) is not None]
    top = 1.05 * max([1.0, *(max([row[metric], *row.get(f"{metric}_ci95", ())]) for row in measured)])
    for block_size in sorted({row["block_size"] for row in measured}):
        rows = [row for row in measured if row["block_size"] == block_size]
        file, title = f"{metric}_gamma_{block_size}.png", f"γ = {block_size}"
        pictures.append(figures.draw_bars(file, rows, known, metric, label, title, top))
    return pictures


def _comparison_pictures(comparison: Sequence[dict[str, Any]]) -> list[Picture]:
    """A figure for each task and decoding setting, at the largest block size."""
    return [
        figures.draw_comparison(
            f"comparison_{i}.png", [group[-1] for group in groups], f"{title}, γ = {groups[0][-1]['block_size']}"
        )
        for i, (title, groups) in enumerate(ranked(comparison).items(), start=1)
    ]


def _learning_pictures(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    """A figure for each temperature, at the largest block size."""
    distilled = [stage.name for stage in run.stages if stage.distilled]
    largest = max((line["block_size"] for line in run.while_learning), default=None)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.while_learning:
        if line["draft"] in distilled and line["block_size"] == largest:
            groups.setdefault(decoding(line), []).append(line)
    return [
        figures.draw_growth(f"while_learning_{i}.png", lines, {}, known, how)
        for i, (how, lines) in enumerate(groups.items(), start=1)
    ]


def _checkpoint_pictures(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    distilled = [stage.name for stage in run.stages if stage.distilled]
    lines = [line for line in run.checkpoints if line["draft"] in distilled]
    block_size = min((line["block_size"] for line in lines), default=None)
    lines = [line for line in lines if line["block_size"] == block_size]
    pictures = []
    for i, task in enumerate(dict.fromkeys(line["task"] for line in lines), start=1):
        before = {
            row["draft"]: row["block_efficiency_offline"]
            for row in run.results
            if (row["task"], row["block_size"]) == (task, block_size)
            and row["draft"] not in distilled
            and row.get("block_efficiency_offline") is not None
        }
        mine = [line for line in lines if line["task"] == task]
        pictures.append(figures.draw_growth(f"checkpoints_{i}.png", mine, before, known, task))
    return pictures


def _position_pictures(run: RunDirectory, known: Mapping[str, Look]) -> list[Picture]:
    largest = max((row["block_size"] for row in run.results), default=None)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in _ordered(run):
        if row["block_size"] == largest and row.get("acceptance_by_position"):
            groups.setdefault((row["task"], decoding(row)), []).append(row)
    return [
        figures.draw_positions(f"positions_{i}.png", rows, known, f"{task} ({how})")
        for i, ((task, how), rows) in enumerate(groups.items(), start=1)
    ]


def _ordered(run: RunDirectory) -> list[dict[str, Any]]:
    """Results with the drafts in the order in which they were trained."""
    return sorted(run.results, key=lambda row: run.drafts.index(row["draft"]))


# Samples


def _samples(run: RunDirectory, summary: Summary) -> list[dict[str, Any]]:
    """A few answers of the best draft for each task, cut into what it wrote and what the target wrote."""
    folder = run.tokenizer_folder()
    mine = [line for line in run.samples if line["draft"] == summary.best]
    if folder is None or not mine:
        return []
    from jaxdraft.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    largest = max(line["block_size"] for line in mine)
    runs_before = {
        _prompt_key(line): len(line["accepted"]) for line in run.samples if line["draft"] == summary.baseline
    }
    shown: list[dict[str, Any]] = []
    for line in mine:
        group = (line["task"], decoding(line))
        if line["block_size"] != largest or sum(sample["group"] == group for sample in shown) >= SAMPLES_PER_TASK:
            continue
        before = runs_before.get(_prompt_key(line)) if not line.get("temperature") else None
        shown.append(
            {
                "group": group,
                "name": f"{line['task']}, {decoding(line)}, γ = {largest}, prompt {line['id']}",
                "prompt": _shortened(tokenizer.decode(line["prompt_tokens"]).strip()),
                "spans": accepted_spans(_fragments(tokenizer, line), line["accepted"]),
                "tokens": len(line["tokens"]),
                "runs": len(line["accepted"]),
                "rate": number(len(line["tokens"]) / max(1, len(line["accepted"]))),
                "before": before,
            }
        )
    return shown


def _fragments(tokenizer: Any, line: Mapping[str, Any]) -> list[str]:
    prompt = line["prompt_tokens"]
    return tokenizer.fragments([*prompt, *line["tokens"]])[len(prompt) :]


def accepted_spans(fragments: Sequence[str], accepted: Sequence[int]) -> list[tuple[str, bool]]:
    """Runs of text and whether the draft wrote them."""
    drafted = token_origins(accepted, len(fragments))
    runs = itertools.groupby(zip(fragments, drafted, strict=True), key=lambda pair: pair[1])
    spans = [("".join(text for text, _ in run), by_draft) for by_draft, run in runs]
    return [span for span in spans if span[0]]


def _prompt_key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return (line["task"], str(line["id"]), line["block_size"], line.get("temperature"), line.get("top_p"))


def _shortened(text: str) -> str:
    half = _LONGEST_PROMPT // 2
    if len(text) <= _LONGEST_PROMPT:
        return text
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _samples_missing(run: RunDirectory) -> str:
    if not run.samples:
        return "No samples yet: they come with an Evaluate stage."
    return "No tokenizer was found in the run or beside its target, so the samples cannot be shown as text."


# How to repeat it


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
