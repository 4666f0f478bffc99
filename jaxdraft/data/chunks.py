"""Text in chunks, which are tokenised one by one in any order, and packed in theirs.

Chunks and units of chunks end where the text alone says so. What a chunk holds is documents, which are concatenated and
cut, or conversations, which stay whole.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from jaxdraft.data.conversations import Conversation, labelled
from jaxdraft.data.pipeline import Encoded, encode, pack_concatenate, pack_whole
from jaxdraft.data.quarantine import Quarantine, Rejected
from jaxdraft.data.records import Block
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer

A = TypeVar("A")
B = TypeVar("B")

# Pinned: with other numbers text is cut at other places, and rows differ.
CHUNK_CHARACTERS = 1 << 16
UNIT_CHUNKS = 1024


class Chunk(NamedTuple):
    """Consecutive documents or conversations.

    Attributes:
      unit: number of the unit that it is a part of.
      items: the documents, or conversations.
      counts: rows rejected before the last of them, by reason.
      rejected: those of these rows that are written down.
      sha256: of all this.
    """

    unit: int
    items: list[Any]
    counts: Counter[str]
    rejected: list[Rejected]
    sha256: bytes


class Part(NamedTuple):
    """A chunk as tokens.

    Attributes:
      tokens: how many.
      content: as the form packs it.
      rejected: items that give none.
    """

    tokens: int
    content: Any
    rejected: Sequence[Rejected] = ()


class Form(Protocol):
    """How a source's items become rows.

    Attributes:
      length: tokens of a row.
      settings: what rows depend on besides the text.
    """

    @property
    def length(self) -> int: ...

    @property
    def settings(self) -> list[Any]: ...

    def read(self, source: Any) -> Iterator[Any]:
        """A source's items, with a ``Rejected`` in the place of each that cannot be had."""
        ...

    def text(self, item: Any) -> str:
        """All that an item says."""
        ...

    def encode(self, items: Sequence[Any]) -> Part: ...

    def pack(self, parts: Iterable[Part], counts: Counter[str], rows: int) -> Iterator[Block]:
        """Blocks of at most so many rows; ``counts`` gets what there is to tell of them."""
        ...


@dataclass(frozen=True)
class Documents:
    """The documents of sources, concatenated and cut: ``jaxdraft.data.pipeline.pack_concatenate``."""

    tokenizer: Tokenizer
    length: int
    segments: bool

    @property
    def settings(self) -> list[Any]:
        return [self.tokenizer.fingerprint(), self.length, self.segments]

    def read(self, source: Any) -> Iterator[str | Rejected]:
        return source.documents()

    def text(self, item: str) -> str:
        return item

    def encode(self, items: Sequence[str]) -> Part:
        found = encode(items, self.tokenizer)
        return Part(len(found.tokens), found)

    def pack(self, parts: Iterable[Part], counts: Counter[str], rows: int) -> Iterator[Block]:
        encoded: Iterator[Encoded] = (part.content for part in parts)
        return pack_concatenate(encoded, self.length, counts, segments=self.segments, rows=rows)


@dataclass(frozen=True)
class Conversations:
    """The conversations of sources, each whole in a row: ``jaxdraft.data.conversations.labelled``."""

    tokenizer: Tokenizer
    length: int
    labels: Literal["assistant", "all"]
    eos_ids: Collection[int]

    @property
    def settings(self) -> list[Any]:
        tokens = self.tokenizer.fingerprint(), self.tokenizer.template_fingerprint()
        return [*tokens, self.length, self.labels, sorted(self.eos_ids)]

    def read(self, source: Any) -> Iterator[Conversation | Rejected]:
        return source.conversations()

    def text(self, item: Conversation) -> str:
        return json.dumps([item.id, [dict(message) for message in item.messages]])

    def encode(self, items: Sequence[Conversation]) -> Part:
        examples, rejected = [], []
        for id, messages in items:
            try:
                tokens, mask = labelled(self.tokenizer, messages, self.labels, eos_ids=self.eos_ids)
                examples.append({"tokens": tokens, "loss_mask": mask})
            except ChatTemplateError as error:
                rejected.append(Rejected(f"conversation {id}", str(error)))
        return Part(sum(len(example["tokens"]) for example in examples), examples, rejected)

    def pack(self, parts: Iterable[Part], counts: Counter[str], rows: int) -> Iterator[Block]:
        examples = itertools.chain.from_iterable(part.content for part in parts)
        made = 0
        for row in itertools.islice(pack_whole(examples, self.length, counts), rows):
            made += 1
            yield {name: values[None] for name, values in row.items()}
        counts["dropped_tokens"] += counts["tokens"] + counts["padding"] - made * self.length


def chunks(sources: Sequence[Any], form: Form) -> Iterator[Chunk]:
    """All that the sources hold, in their order.

    Raises:
      ConfigError: as the sources do, or nothing that they hold fits.
    """
    quarantine = Quarantine()
    numbers = itertools.count()
    items: list[Any] = []
    before, written, size = Counter[str](), 0, 0
    content = hashlib.sha256()

    def chunk() -> Chunk:
        counts, rejected = quarantine.counts - before, quarantine.rows[written:]
        content.update(json.dumps([counts, rejected]).encode())
        return Chunk(next(numbers) // UNIT_CHUNKS, items, counts, rejected, content.digest())

    for item in quarantine.accepted(itertools.chain.from_iterable(map(form.read, sources))):
        text = form.text(item)
        items.append(item)
        size += len(text)
        content.update(f"{len(text)} ".encode())
        content.update(text.encode())
        if size >= CHUNK_CHARACTERS:
            yield chunk()
            items, size, content = [], 0, hashlib.sha256()
            before, written = quarantine.counts.copy(), len(quarantine.rows)
    if items or quarantine.counts != before:
        yield chunk()


def in_order(pool: concurrent.futures.Executor, work: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """``map``, with ``ahead`` items given to the pool before a result is waited for."""
    running: collections.deque[concurrent.futures.Future[B]] = collections.deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
