"""The report in Markdown: verdict, tables, and links to the figures beside it, for a README or an issue."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxdraft.evaluate.plotting import Picture
from jaxdraft.evaluate.tables import Cell, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def markdown(context: Mapping[str, Any]) -> str:
    """The page's content as GitHub's Markdown.

    Args:
      context: what the page is rendered from.
    """
    return "\n\n".join(filter(None, _parts(context))) + "\n"


def markdown_table(table: Table) -> str:
    """A table; columns of numbers are set to the right. Empty without rows."""
    if not table.rows:
        return ""
    ruler = [":--" if i < table.names else "--:" for i in range(len(table.columns))]
    lines = [map(_cell, table.columns), ruler, *(map(_cell, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parts(context: Mapping[str, Any]) -> Iterator[str]:
    pictures, summary = context["pictures"], context["summary"]
    yield f"# {_plain(context['title'])}"
    yield _plain(context["description"])
    yield _plain(" ".join(summary.sentences))
    yield "\n".join(f"- **{_plain(f.value)}** {_plain(f.name)}: {_plain(f.detail)}" for f in summary.figures)
    for paper in context["papers"]:
        yield f"## {_plain(paper['title'])}"
        yield f"Beside *{_plain(paper['paper'].title)}* (arXiv {paper['paper'].arxiv}). Ours with 95% intervals."
        for title, table in paper["results"].items():
            yield f"{_plain(title)}:"
            yield markdown_table(table)
        if paper["changes"].rows:
            yield "What changed, with intervals of the change:"
        yield markdown_table(paper["changes"])
        yield _images(paper["pictures"])
        yield " ".join(map(_plain, paper["notes"]))
        yield markdown_table(paper["differences"])
        yield _plain(paper["agreements"])
    yield "## What was trained"
    yield markdown_table(context["stages"])
    yield markdown_table(context["models"]) if context["models"] else ""
    yield from _section("Text", context["text"], context["sources"], context["documents_left_out"])
    yield from _section("Distillation set", context["answers"], context["answers_left_out"], context["answer_lengths"])
    yield _images(pictures["answer_lengths"])
    yield from _gallery("Losses over steps", pictures["losses"])
    for title, table in context["comparison"].items():
        yield f"## Seeds pooled: {_plain(title)}"
        yield markdown_table(table)
    yield _images(pictures["comparison"])
    yield from _section("Block efficiency, tokens per run of the target", context["block_efficiency"])
    yield _images(pictures["block_efficiency"])
    yield from _section("MBSU, times the target alone", context["mbsu"])
    yield _images(pictures["mbsu"])
    yield from _section("Perplexity", context["perplexity"])
    yield from _gallery("Block efficiency while it learned", pictures["while_learning"])
    yield from _gallery("Block efficiency over checkpoints", pictures["checkpoints"])
    yield from _gallery("Acceptance by position", pictures["positions"])
    yield from _gallery("Acceptance by class of token", pictures["classes"])
    yield from _section("Speed-up over the size of the draft", context["sizes"])
    yield _images(pictures["sizes"])
    yield from _section(f"Speed with {summary.best}", context["speed"], context["latencies"], context["block_sizes"])
    yield _images([*pictures["speed"], *pictures["best_block_size"]])


def _section(title: str, *tables: Table) -> Iterator[str]:
    """A heading and its tables, unless all are empty."""
    if any(table.rows for table in tables):
        yield f"## {_plain(title)}"
    yield from map(markdown_table, tables)


def _gallery(title: str, pictures: Sequence[Picture]) -> Iterator[str]:
    if pictures:
        yield f"## {_plain(title)}"
        yield _images(pictures)


def _images(pictures: Sequence[Picture]) -> str:
    return "\n".join(f"![{_plain(picture.alt)}]({picture.file})" for picture in pictures)


def _cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text)
    return "<br>".join([text, *(_plain(more) for more in (cell.detail, cell.beside) if more)])


def _plain(text: str) -> str:
    """Text with nothing in it that Markdown would take for markup, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
