"""A run's tables, as they stand on the report's page and as CSV."""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdraft.evaluate.collect import RunDirectory, Stage
from jaxdraft.evaluate.comparison import ranked
from jaxdraft.evaluate.words import count, decoding, number, seconds

_KINDS = {
    "Prepare": "Cuts text into rows of tokens",
    "Subset": "Takes a uniform sample of rows",
    "TrainTokenizer": "Trains the tokenizer",
    "Score": "Stores the target's distribution beside rows",
    "DraftVocabulary": "Chooses the tokens that drafts may propose",
    "Generate": "Lets the target answer the prompts",
    "Evaluate": "Measures drafts by speculative decoding",
    "Export": "Writes a Hugging Face folder",
}
_SHOWN_ELSEWHERE = ("rows", "tokens", "steps", "parameters", "shape")
_KEY = ("draft", "task", "temperature", "top_p", "batch_size", "block_size")
_OPTIONS = ("top_k", "verification", "drafting", "stop_below")  # of a row that names them
_FIRST = ("stage", "group", *_KEY)
_COMPARED = {
    "Acceptance rate": "acceptance_rate",
    "Block efficiency": "block_efficiency",
    "The same, offline": "block_efficiency_offline",
    "MBSU": "mbsu",
}


class Cell(NamedTuple):
    """A table's cell.

    Attributes:
      text: what it says.
      detail: a smaller second text, such as an interval.
      best: whether it is the best of those it is compared with.
      beside: a third text, what it is to be compared with.
    """

    text: str
    detail: str = ""
    best: bool = False
    beside: str = ""


class Table(NamedTuple):
    """A table to show. The first ``names`` columns hold words, the others numbers."""

    columns: list[Cell]
    rows: list[list[Cell]]
    names: int = 1


def stage_table(stages: Sequence[Stage]) -> Table:
    """What each stage did, with how much, and how long it took."""
    rows = []
    for stage in stages:
        last = stage.metrics[-1] if stage.metrics else {}
        facts = {"steps": last.get("step"), **stage.summary}
        state = "" if stage.status == "done" else stage.status
        amounts = [Cell(count(facts.get(key))) for key in ("rows", "tokens", "steps")]
        purpose = Cell(_purpose(stage), _facts(stage))
        rows.append([Cell(stage.name, state), purpose, *amounts, Cell(_duration(stage.seconds))])
    return Table(headings("Stage", "What it does", "Rows", "Tokens", "Steps", "Time"), rows, names=2)


def _facts(stage: Stage) -> str:
    """What else the stage reported, in one line."""
    others = {key: value for key, value in stage.summary.items() if key not in _SHOWN_ELSEWHERE}
    words = {key: _amount(value) for key, value in others.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in words.items())


def _amount(value: Any) -> str:
    return count(value) if isinstance(value, int) else number(value) if isinstance(value, float) else str(value or "–")


def headings(*names: str) -> list[Cell]:
    """A table's first row."""
    return [Cell(name) for name in names]


def _purpose(stage: Stage) -> str:
    if stage.kind == "Generate" and stage.writers != ["target"]:
        names = " and ".join("the target" if name == "target" else name for name in stage.writers)
        return f"Lets {names} answer the prompts"
    if stage.kind != "Train":
        return _KINDS.get(stage.kind, stage.kind)
    if stage.distilled:
        words = f"Distils from the target with {stage.loss}"
    elif stage.loss in ("", "cross-entropy"):
        words = "Trains on the next token"
    else:
        words = f"Trains with {stage.loss}"
    if (start := stage.settings.get("init")) and start != "random":
        words += f", starting from {start}"
    data = stage.settings.get("data")
    if isinstance(data, dict):
        words += ", on " + " + ".join(f"{share:.0%} {name}" for name, share in data.items())
    elif data:
        words += f", on {data}"
    return words


def model_table(run: RunDirectory, draft: str | None) -> Table | None:
    """Dimensions of the target beside those of ``draft``; None where nothing is known of either."""
    shapes = run.shapes(draft)
    labels = list(dict.fromkeys(label for shape in shapes.values() for label in shape))
    rows = [[Cell(label), *(Cell(_amount(shape.get(label))) for shape in shapes.values())] for label in labels]
    if draft in run.parameters:
        rows.append([Cell("Share of the target"), Cell("100%"), Cell(f"{run.parameters[draft]['ratio']:.2%}")])
    return Table(headings("Model", "Target", "Draft"), rows) if rows else None


def pivot(run: RunDirectory, metric: str) -> Table:
    """Tasks and block sizes down, drafts across; the best of each row marked."""
    cells = {(row["task"], decoding(row), row["block_size"], row["draft"]): row for row in run.distinct_results}
    rows = []
    for task, how, block_size in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((task, how, block_size, draft)) for draft in run.drafts]
        best = max(row[metric] for row in found if row)
        names = [Cell(task, how), Cell(str(block_size))]
        rows.append(names + [measured(row, metric, best) if row else Cell("–") for row in found])
    losses = {name: stage.loss if (stage := run.stage(name)) else "" for name in run.drafts}
    return Table([*headings("Task", "γ"), *(Cell(name, loss) for name, loss in losses.items())], rows)


def measured(row: Mapping[str, Any], metric: str, best: float | None = None, digits: int = 2) -> Cell:
    """A number with its interval, marked where it equals ``best``."""
    interval = row.get(f"{metric}_ci95")
    detail = " – ".join(number(end, digits) for end in interval) if interval else ""
    return Cell(number(row.get(metric), digits), detail, best is not None and row[metric] == best)


def perplexity_table(run: RunDirectory) -> Table:
    """Perplexity of the target and of each draft; empty where none was measured."""
    found = {**({"target": run.target_perplexity} if run.target_perplexity else {}), **run.perplexity}
    columns = {Cell("Perplexity", "per token"): "perplexity", Cell("Perplexity", "per word"): "word_perplexity"}
    columns[Cell("Bits", "per byte")] = "bits_per_byte"
    rows = [
        [
            Cell(name),
            Cell(row["text"], f"{count(row['tokens'])} tokens, windows of {row['length']:,}"),
            *(measured(row, key) for key in columns.values()),
        ]
        for name, row in found.items()
    ]
    return Table([*headings("Model", "Text"), *columns], rows, names=2)


def comparison_tables(rows: Sequence[dict[str, Any]]) -> dict[str, Table]:
    """For each task and decoding setting a table of groups of drafts, the best of each column marked."""
    return {title: _comparison_table(groups) for title, groups in ranked(rows).items()}


def _comparison_table(groups: Sequence[Sequence[dict[str, Any]]]) -> Table:
    block_sizes = sorted({row["block_size"] for group in groups for row in group})
    columns = [*headings("Drafts", "Learned from", "Seeds")]
    lines = [[Cell(row["group"], row["loss"]), Cell(row["data"]), Cell(str(row["seeds"]))] for row, *_ in groups]
    for block_size, (name, metric) in itertools.product(block_sizes, _COMPARED.items()):
        columns.append(Cell(name, f"γ = {block_size}"))
        cells = [next((row for row in group if row["block_size"] == block_size), None) for group in groups]
        best = max((row[metric] for row in cells if row and row[metric] is not None), default=None)
        for line, row in zip(lines, cells, strict=True):
            line.append(measured(row, metric, best, digits=3) if row else Cell("–"))
    return Table(columns, lines, names=2)


def speed_table(run: RunDirectory, draft: str | None) -> Table:
    """Tokens per second alone and with ``draft``, and their ratio as measured and as predicted."""
    columns = {
        "Tokens/s alone": "tokens_per_second_autoregressive",
        "Tokens/s with draft": "tokens_per_second",
        "Measured ratio": "token_rate_ratio",
        "Predicted ratio": "predicted_speedup",
    }
    rows = [row for row in run.results if row["draft"] == draft]
    lines = [[*_where(row, run), *(measured(row, key) for key in columns.values())] for row in rows]
    return Table([*_where_headings(run), *headings(*columns)], lines)


def latency_table(run: RunDirectory, draft: str | None) -> Table:
    """Time per output token with ``draft`` and alone, and of the steps that it is made of; empty where not measured."""
    columns = {
        Cell("Per token", "alone"): "tpot_autoregressive",
        Cell("Per token", "with draft"): "tpot",
        Cell("Draft step", "l_D"): "draft_latency",
        Cell("Target step", "1 token"): "target_latency_1",
        Cell("Target step", "γ + 1 tokens"): "target_latency_block",
        Cell("Compiling", "with draft, once"): "compile_seconds",
    }
    rows = [row for row in run.results if row["draft"] == draft]
    known = {head: key for head, key in columns.items() if any(row.get(key) is not None for row in rows)}
    lines = [[*_where(row, run), *(_timed(row, key) for key in known.values())] for row in rows]
    return Table([*_where_headings(run), *known], lines if known else [])


def _timed(row: Mapping[str, Any], key: str) -> Cell:
    interval = row.get(f"{key}_ci95") or ()
    return Cell(seconds(row.get(key)), " – ".join(map(seconds, interval)))


def _where(row: Mapping[str, Any], run: RunDirectory) -> list[Cell]:
    """Cells that say which setting a result is of."""
    batch = [Cell(str(row["batch_size"]))] if _several_batches(run) else []
    return [Cell(row["task"], decoding(row)), Cell(str(row["block_size"])), *batch]


def _where_headings(run: RunDirectory) -> list[Cell]:
    return headings("Task", "γ", *(["Batch"] if _several_batches(run) else []))


def _several_batches(run: RunDirectory) -> bool:
    return len({row.get("batch_size") for row in run.results}) > 1


def block_size_table(run: RunDirectory) -> Table:
    """The best block size of each draft, task and batch size: as predicted, and of those that were measured."""
    lines = []
    for found in sorted(run.curves, key=lambda found: run.drafts.index(found["draft"])):
        best = max(found["curve"], key=lambda point: point["predicted_speedup"])
        tried = [point for point in found["curve"] if point.get("measured_speedup") is not None]
        fastest = max(tried, key=lambda point: point["measured_speedup"], default=None)
        lines.append(
            [
                Cell(found["task"], decoding(found)),
                Cell(found["draft"]),
                Cell(str(found["batch_size"])),
                Cell(_block_size(best["block_size"])),
                Cell(f"{number(best['predicted_speedup'])}×"),
                Cell(_block_size(fastest["block_size"]) if fastest else "–"),
                Cell(f"{number(fastest['measured_speedup'])}×" if fastest else "–"),
            ]
        )
    columns = [*headings("Task", "Draft", "Batch"), Cell("Best γ", "predicted"), Cell("Speed-up", "predicted")]
    return Table([*columns, Cell("Best γ", "of those measured"), Cell("Speed-up", "measured")], lines, names=2)


def _block_size(size: int) -> str:
    return str(size) if size else "no draft"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def csv_tables(run: RunDirectory, comparison: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Tables by the name of their file, for ``write_csvs``."""
    nested = ("acceptance_by_position", "acceptance_by_position_ci95", "acceptance_by_class")
    results = [{key: row[key] for key in row if key not in nested} for row in run.results]
    positions = [
        {**{key: row[key] for key in (*_KEY, *_OPTIONS) if key in row}, "position": i, "accepted": share}
        for row in run.results
        for i, share in enumerate(row.get("acceptance_by_position", ()), start=1)
    ]
    classes = [
        {**{key: row[key] for key in (*_KEY, *_OPTIONS) if key in row}, "class": kind, **found}
        for row in run.results
        for kind, found in row.get("acceptance_by_class", {}).items()
    ]
    block_sizes = [
        {**{key: found[key] for key in found if key != "curve"}, **point}
        for found in run.curves
        for point in found["curve"]
    ]
    perplexity = [{"draft": draft, **found} for draft, found in run.perplexity.items()]
    perplexity += [{"draft": "target", **run.target_perplexity}] if run.target_perplexity else []
    stages = [
        {"name": stage.name, "kind": stage.kind, "status": stage.status, "seconds": stage.seconds, **stage.summary}
        for stage in run.stages
    ]
    return {
        "results": results,
        "acceptance_by_position": positions,
        "acceptance_by_class": classes,
        "best_block_size": block_sizes,
        "perplexity": perplexity,
        "comparison": comparison,
        "checkpoints": run.checkpoints,
        "while_learning": run.while_learning,
        "stages": stages,
    }


def write_csvs(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Tables as CSV files of their names, at full precision; none for what there is nothing of."""
    for name, rows in tables.items():
        if rows:
            _write_csv(folder / f"{name}.csv", rows)


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    columns.sort(key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals and ranges as two columns, anything else that is not a scalar as JSON."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith(("_ci95", "_range")) and value:
            flat[f"{key}_low"], flat[f"{key}_high"] = value
        else:
            flat[key] = json.dumps(value) if isinstance(value, list | dict) else value
    return flat
