"""What the report says of data: the text that was packed, and the distillation set that the target wrote.

All of it is counted in ``manifest.json`` of packed rows and in ``answers.json`` of a Generate stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdraft.evaluate import plotting
from jaxdraft.evaluate.collect import Stage
from jaxdraft.evaluate.plotting import COLOURS, Picture, legend
from jaxdraft.evaluate.tables import Cell, Table, headings
from jaxdraft.evaluate.words import count, decoding, number

_ORIGIN = ("revision", "licence")
_LENGTHS = ("answers", "mean", "median", "p95", "max")


def text_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Those that packed text."""
    return [stage for stage in stages if stage.kind == "Prepare" and stage.manifest]


def answer_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Those whose prompts were answered."""
    return [stage for stage in stages if stage.account]


def text_table(stages: Sequence[Stage]) -> Table:
    """What became of documents: a line for each stage that packed text."""
    rows = []
    for stage in text_stages(stages):
        manifest, counts = stage.manifest, stage.manifest["counts"]
        documents = counts.get("documents", counts.get("examples"))
        tokens, dropped = counts.get("tokens"), counts.get("dropped_tokens")
        set_aside = sum(manifest.get("quarantined", {}).values())
        amounts = _amounts(documents, tokens, manifest["rows"], manifest["length"], dropped, set_aside)
        rows.append([Cell(stage.name), *amounts])
    return Table(headings("Stage", "Documents", "Tokens", "Rows", "Tokens a row", "Dropped", "Set aside"), rows)


def source_table(stages: Sequence[Stage]) -> Table:
    """Where text is from, at which revision and under which licence: a line for each source."""
    rows = [
        [Cell(stage.name), Cell(source["type"], _settings(source)), *(_known(source, key) for key in _ORIGIN)]
        for stage in text_stages(stages)
        for source in _sources(stage.manifest)
    ]
    return Table(headings("Stage", "Source", "Revision", "Licence"), rows, names=4)


def _known(source: Mapping[str, Any], key: str) -> Cell:
    return Cell(str(source.get(key) or "–"))


def _sources(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of each source and, before them, what it says itself of where its text is from."""
    settings = manifest["source"]["settings"]
    known = manifest["source"].get("provenance", [{}] * len(settings))
    return [{**given, **found} for given, found in zip(settings, known, strict=True)]


def _settings(source: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in source.items() if key not in ("type", *_ORIGIN) and value is not None}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if isinstance(value, str | int | float))


def answer_table(stages: Sequence[Stage]) -> Table:
    """What became of prompts: a line for each Generate stage."""
    rows = []
    for stage in answer_stages(stages):
        account = stage.account
        prompts, answers = account["prompts"], account["answers"]
        rows.append(
            [
                Cell(stage.name),
                *_amounts(prompts["read"], prompts["asked"], sum(prompts["skipped"].values())),
                *_amounts(answers["asked"], answers["written"], sum(answers["errors"].values())),
                Cell(_by_eos(account)),
                *_amounts(account["duplicates"], account["tokens"]),
            ]
        )
    columns = [Cell("Stage"), *(Cell("Prompts", what) for what in ("read", "asked", "skipped"))]
    columns += [Cell("Answers", what) for what in ("asked for", "written", "failed", "ended by EOS", "duplicates")]
    return Table([*columns, Cell("Tokens", "of answers")], rows)


def _amounts(*values: float | None) -> list[Cell]:
    return [Cell(count(value)) for value in values]


def _by_eos(account: Mapping[str, Any]) -> str:
    written = account["answers"]["written"]
    return f"{account['finish'].get('eos', 0) / written:.1%}" if written else "–"


def length_table(stages: Sequence[Stage]) -> Table:
    """How long answers are: a line for each Generate stage and temperature."""
    rows = [
        [
            Cell(stage.name),
            Cell(decoding({"temperature": float(temperature)})),
            *(Cell(number(spread[key], 1) if key == "mean" else count(spread[key])) for key in _LENGTHS),
        ]
        for stage in answer_stages(stages)
        for temperature, spread in stage.account["lengths"].items()
    ]
    return Table(headings("Stage", "Temperature", "Answers", "Mean", "Median", "95% are at most", "Longest"), rows, 2)


def left_out_table(stages: Sequence[Stage]) -> Table:
    """What gave neither text nor an answer, and why: a line for each reason."""
    rows = [
        [Cell(stage.name), Cell(what), Cell(reason), Cell(count(amount))]
        for stage in stages
        for what, reasons in _left_out(stage)
        for reason, amount in reasons.items()
    ]
    return Table(headings("Stage", "What", "Reason", "Number"), rows, names=3)


def _left_out(stage: Stage) -> Iterator[tuple[str, Mapping[str, int]]]:
    if stage.account:
        yield "prompt skipped", stage.account["prompts"]["skipped"]
        yield "answer failed", stage.account["answers"]["errors"]
    elif stage.kind == "Prepare":
        yield "text set aside", stage.manifest.get("quarantined", {})


def length_pictures(stages: Sequence[Stage]) -> list[Picture]:
    """A figure for each Generate stage."""
    return [
        _draw_lengths(f"answer_lengths_{i}.png", stage.name, stage.account["lengths"])
        for i, stage in enumerate(answer_stages(stages), start=1)
    ]


def _draw_lengths(file: str, name: str, lengths: Mapping[str, Mapping[str, Any]]) -> Picture:
    """The share of answers of each length, a line per temperature; within a bin of the histogram all have the same."""

    def draw(figure: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        axes = figure.subplots()
        for i, (temperature, spread) in enumerate(lengths.items()):
            counts, width = np.array(spread["histogram"]["counts"]), spread["histogram"]["width"]
            edges, label = np.arange(len(counts) + 1) * width, decoding({"temperature": float(temperature)})
            colour = COLOURS[i % len(COLOURS)]
            axes.stairs(counts / (counts.sum() * width), edges, color=colour, linewidth=1.6, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of an answer")
        axes.set_ylabel("answers of this length")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(f"Length of the answers of {name}")
        legend(figure, axes)

    return plotting.picture(file, f"Lengths of the answers of {name}, by temperature", draw)


def dataset_csvs(stages: Sequence[Stage]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The same as CSV tables: text, distillation_set and answer_lengths."""
    texts = [
        {
            "stage": stage.name,
            **{key: stage.manifest[key] for key in ("rows", "length", "labels")},
            **stage.manifest["counts"],
            "set_aside": stage.manifest.get("quarantined", {}),
            "sources": _sources(stage.manifest),
        }
        for stage in text_stages(stages)
    ]
    accounts = [
        {
            "stage": stage.name,
            **{f"prompts_{key}": value for key, value in stage.account["prompts"].items()},
            **{f"answers_{key}": value for key, value in stage.account["answers"].items()},
            **{key: stage.account[key] for key in ("finish", "writers", "duplicates", "tokens")},
        }
        for stage in answer_stages(stages)
    ]
    lengths = [
        {"stage": stage.name, "temperature": temperature, **spread}
        for stage in answer_stages(stages)
        for temperature, spread in stage.account["lengths"].items()
    ]
    return {"text": texts, "distillation_set": accounts, "answer_lengths": lengths}
