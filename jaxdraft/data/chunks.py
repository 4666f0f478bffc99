"""Text in chunks, which are tokenised one by one in any order, and packed in theirs.

Chunks and units of chunks end where the text alone says so. What a chunk holds is documents, which are concatenated and
cut, or conversations or answered prompts, which stay whole.
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

import numpy as np

from jaxdraft.data.conversations import Conversation, labelled
from jaxdraft.data.pipeline import Encoded, encode, pack_concatenate, pack_whole
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Quarantine, Rejected
from jaxdraft.data.records import Block
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer, common_prefix

A = TypeVar("A")
B = TypeVar("B")

# Pinned: with other numbers text is cut at other places, and rows differ.
CHUNK_CHARACTERS = 1 << 16
UNIT_CHUNKS = 1024
UNIT_CHARACTERS = 1 << 27  # a unit is held in memory: of documents longer than a chunk it has fewer chunks


class Chunk(NamedTuple):
    """Consecutive documents, conversations or prompts.

    Attributes:
      unit: number of the unit that it is a part of.
      items: these.
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
        return _pack_examples(parts, self.length, counts, rows)


@dataclass(frozen=True)
class References:
    """The prompts of sources with their references as the answers, each in a row; answer and EOS are the labels.

    A token that reaches over the border between prompt and answer counts as the answer's. What a row cannot hold of an
    answer is left out.
    """

    tokenizer: Tokenizer
    length: int

    @property
    def settings(self) -> list[Any]:
        return [self.tokenizer.fingerprint(), self.length, "references"]

    def read(self, source: Any) -> Iterator[Prompt | Rejected]:
        for prompt in source.prompts(self.tokenizer):
            if isinstance(prompt, Prompt) and prompt.messages is not None:
                yield Rejected(f"prompt {prompt.id}", "a conversation: give its answer too, and labels='assistant'")
            elif isinstance(prompt, Prompt) and not prompt.reference:
                yield Rejected(f"prompt {prompt.id}", "no reference")
            else:
                yield prompt

    def text(self, item: Prompt) -> str:
        return json.dumps([item.id, item.tokens, item.text, item.reference])

    def encode(self, items: Sequence[Prompt]) -> Part:
        if not items:
            return Part(0, [])
        answered = encode([f"{prompt.text}{prompt.reference}" for prompt in items], self.tokenizer)
        ends = np.cumsum(answered.lengths)[:-1]
        examples, rejected = [], []
        for prompt, ids in zip(items, np.split(answered.tokens, ends), strict=True):
            tokens = ids.tolist()
            known = common_prefix(prompt.tokens, tokens)
            if known < len(prompt.tokens) and tuple(self.tokenizer.encode(prompt.text)) != prompt.tokens:
                rejected.append(Rejected(f"prompt {prompt.id}", "its tokens are not those of its text"))
            elif known >= self.length:
                rejected.append(Rejected(f"prompt {prompt.id}", f"it fills a row of {self.length} tokens"))
            else:
                examples.append({"tokens": tokens, "loss_mask": [0] * known + [1] * (len(tokens) - known)})
        return Part(sum(len(example["tokens"]) for example in examples), examples, rejected)

    def pack(self, parts: Iterable[Part], counts: Counter[str], rows: int) -> Iterator[Block]:
        def fitting(part: Part) -> Part:
            cut = [{name: values[: self.length] for name, values in example.items()} for example in part.content]
            counts["cut_answers"] += sum(len(example["tokens"]) > self.length for example in part.content)
            return part._replace(content=cut)

        return _pack_examples(map(fitting, parts), self.length, counts, rows)


def _pack_examples(parts: Iterable[Part], length: int, counts: Counter[str], rows: int) -> Iterator[Block]:
    examples = itertools.chain.from_iterable(part.content for part in parts)
    made = 0
    for row in itertools.islice(pack_whole(examples, length, counts), rows):
        made += 1
        yield {name: values[None] for name, values in row.items()}
    counts["dropped_tokens"] += counts["tokens"] + counts["padding"] - made * length


def chunks(sources: Sequence[Any], form: Form) -> Iterator[Chunk]:
    """All that the sources hold, in their order.

    Raises:
      ConfigError: as the sources do, or nothing that one of them holds fits.
    """
    quarantine = Quarantine()
    unit = of_unit = in_unit = 0  # its number, chunks and characters
    items: list[Any] = []
    before, written, size = Counter[str](), 0, 0
    content = hashlib.sha256()

    def chunk() -> Chunk:
        counts, rejected = quarantine.counts - before, quarantine.rows[written:]
        content.update(json.dumps([counts, rejected]).encode())
        return Chunk(unit, items, counts, rejected, content.digest())

    for item in itertools.chain.from_iterable(quarantine.accepted(form.read(source)) for source in sources):
        text = form.text(item)
        items.append(item)
        size += len(text)
        content.update(f"{len(text)} ".encode())
        content.update(text.encode())
        if size >= CHUNK_CHARACTERS:
            yield chunk()
            of_unit, in_unit = of_unit + 1, in_unit + size
            if of_unit == UNIT_CHUNKS or in_unit >= UNIT_CHARACTERS:
                unit, of_unit, in_unit = unit + 1, 0, 0
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
