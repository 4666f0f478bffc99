"""Rows that do not fit: counted by reason and written down with where they are, never dropped in silence."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from jaxdraft.errors import ConfigError

T = TypeVar("T")

QUARANTINE = "quarantine.jsonl"
_HOPELESS = 10_000  # first rows of a source of which at least one has to fit
_KEPT = 10_000  # rows that are written down; all are counted


class Rejected(NamedTuple):
    """In place of a document or a prompt: a row that gives none.

    Attributes:
      where: file and row.
      reason: why, in words that are the same for every such row.
    """

    where: str
    reason: str


class Misfit(Exception):
    """Why a row gives nothing: a reason, and what is particular to this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail

    def at(self, where: str) -> Rejected:
        return Rejected(f"{where} ({self.detail})" if self.detail else where, self.reason)


def first(items: Iterable[T | Rejected], limit: int | None) -> Iterator[T | Rejected]:
    """The items up to the one that is number ``limit`` of those that are no ``Rejected``.

    Raises:
      ConfigError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: it must be at least 1, or None for all")
    left = limit
    for item in items:
        yield item
        if left is not None and not isinstance(item, Rejected):
            left -= 1
            if not left:
                return


class Quarantine:
    """What a stage's sources rejected.

    Attributes:
      counts: rows by reason.
      rows: the first of them.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rows: list[Rejected] = []

    def accepted(self, items: Iterable[T | Rejected]) -> Iterator[T]:
        """The items of a source that are no ``Rejected``.

        Raises:
          ConfigError: not one of the first ten thousand, or of all, fits; the message names the first.
        """
        fits = number = 0
        first: Rejected | None = None
        for number, item in enumerate(items, start=1):
            if isinstance(item, Rejected):
                first = first or item
                self._add(item)
            else:
                fits += 1
                yield item
            if not fits and number == _HOPELESS:
                break
        if first and not fits:
            read = f"of {number:,} rows" if number > 1 else "row"
            raise ConfigError(f"{first.where}: {first.reason}; not one {read} fits")

    def _add(self, row: Rejected) -> None:
        self.counts[row.reason] += 1
        if len(self.rows) < _KEPT:
            self.rows.append(row)

    def take(self, counts: Mapping[str, int], rows: Sequence[Rejected]) -> None:
        """What was rejected elsewhere: how many rows by reason, and the first of them."""
        self.counts.update(counts)
        self.rows += rows[: _KEPT - len(self.rows)]

    def write(self, folder: Path) -> list[Path]:
        """Writes ``quarantine.jsonl``, a line for each of ``rows`` with where it is and why, where any was rejected.

        Returns:
          the files written: that one, or none.
        """
        path = folder / QUARANTINE
        path.unlink(missing_ok=True)
        if not self.rows:
            return []
        path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in self.rows), "utf-8")
        return [path]
