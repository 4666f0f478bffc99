"""Rows that do not fit: counted by reason and written down with where they are, never dropped in silence."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from jaxdraft.errors import ConfigError

T = TypeVar("T")

_HOPELESS = 100  # first rows of which at least one has to fit
_KEPT = 10_000  # rows that are written down; all are counted


class Rejected(NamedTuple):
    """In place of a document or a prompt: a row that gives none.

    Attributes:
      where: file and row.
      reason: why, in words that are the same for every such row.
    """

    where: str
    reason: str


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
        """The items that are no ``Rejected``.

        Raises:
          ConfigError: not one of the first hundred, or of all, fits; the message names the first.
        """
        fits = 0
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
            raise ConfigError(f"{first.where}: {first.reason}; not one row before or after it fits")

    def _add(self, row: Rejected) -> None:
        self.counts[row.reason] += 1
        if len(self.rows) < _KEPT:
            self.rows.append(row)

    def write(self, path: Path) -> None:
        """One JSON line for each of ``rows``, with where it is and why; no file where none was rejected."""
        path.unlink(missing_ok=True)
        if self.rows:
            path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in self.rows), "utf-8")
