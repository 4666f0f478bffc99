"""Documents to packed rows, and packed rows to batches.

Packing happens once. Batches are then a pure function of (seed, step) by random access: there is no
iterator to save, so restarts, seeks and other numbers of processes give the same data.

Shapes: B rows per batch, R rows of a block, L row length, k tokens of the target's distribution.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from jaxdraft.errors import ConfigError
from jaxdraft.tokenizers import Tokenizer

_BLOCK_TOKENS = 1 << 16  # packed at once
_PACKING_BINS = 64  # rows held open by first-fit packing
_EXAMPLE_TYPES = {"tokens": np.int32, "loss_mask": np.uint8}
_MAX_DENOMINATOR = 1000  # weights are read as fractions with at most this denominator

Row = dict[str, np.ndarray]


class _Elements(grain.IterDataset):
    """A Python iterable as a grain dataset: read once, in order, without checkpoints."""

    def __init__(self, elements: Iterable[Row]):
        super().__init__()
        self._elements = elements

    def __iter__(self) -> grain.DatasetIterator:
        return _ElementsIterator(iter(self._elements))


class _ElementsIterator(grain.DatasetIterator):
    def __init__(self, elements: Iterator[Row]):
        super().__init__()
        self._elements = elements

    def __next__(self) -> Row:
        return next(self._elements)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("packing is done in one go; it is never resumed in the middle")


class Encoded(NamedTuple):
    """Documents as tokens.

    Attributes:
      tokens: int32[T], one document after another, each with its EOS.
      lengths: int64[D], tokens of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> Encoded:
    """Each text as when serving (BOS where the tokenizer adds one), with EOS behind it.

    Raises:
      ConfigError: the tokenizer names no EOS.
    """
    if tokenizer.eos_id is None:
        raise ConfigError(f"{tokenizer.folder}: the tokenizer names no eos_token, which separates documents")
    documents = tokenizer.encode_batch(texts)
    for ids in documents:
        ids.append(tokenizer.eos_id)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    tokens = np.fromiter(itertools.chain.from_iterable(documents), np.int32, int(lengths.sum()))
    return Encoded(tokens, lengths)


def pack_concatenate(
    encoded: Iterable[Encoded],
    length: int,
    counts: Counter[str] | None = None,
    *,
    segments: bool = True,
    rows: int | None = None,
) -> Iterator[Row]:
    """Documents one after another, cut into rows of `length` (Direct Alignment, appendix A.4).

    No padding: the tokens after the last full row are dropped. A document cut by a row's end goes on as the first
    segment of the next row.

    Args:
      encoded: the documents, in their order.
      counts: gets `documents`, `tokens` and `dropped_tokens`; where `rows` ends it, of what is in rows alone.
      segments: each document of a row is a segment of its own; else a row is one segment.
      rows: at most so many; little more of `encoded` is read.
    Yields:
      blocks of R rows, R as it comes: `tokens` int32[R, L], `segment_ids` int32[R, L] (1..), `loss_mask` uint8[R, L]
      (0 only at a segment's first token).
    """
    counts = Counter() if counts is None else counts
    tokens, owners = np.empty(0, np.int32), np.empty(0, np.int32)  # not in a row yet; owners: which document's
    documents = read = made = 0
    for parts in _blocks(encoded):
        lengths = np.concatenate([part.lengths for part in parts])
        numbers = np.arange(documents, documents + len(lengths), dtype=np.int32)
        tokens = np.concatenate([tokens, *(part.tokens for part in parts)])
        owners = np.concatenate([owners, np.repeat(numbers, lengths)])
        documents, read = documents + len(lengths), read + int(lengths.sum())
        count = len(tokens) // length if rows is None else min(len(tokens) // length, rows - made)
        if count:
            kept, made = count * length, made + count
            yield _rows(tokens[:kept].reshape(count, length), owners[:kept].reshape(count, length), segments)
            if made == rows:
                documents, read = int(owners[kept - 1]) + 1, made * length
                break
            tokens, owners = tokens[kept:], owners[kept:]
    counts["documents"] += documents
    counts["tokens"] += read
    counts["dropped_tokens"] += read - made * length


def _blocks(encoded: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    parts: list[Encoded] = []
    size = 0
    for part in encoded:
        parts.append(part)
        size += len(part.tokens)
        if size >= _BLOCK_TOKENS:
            yield parts
            parts, size = [], 0
    if parts:
        yield parts


def _rows(tokens_RL: np.ndarray, owners_RL: np.ndarray, segments: bool) -> Row:
    segments_RL = owners_RL - owners_RL[:, :1] + 1 if segments else np.ones_like(owners_RL)
    mask_RL = np.zeros(tokens_RL.shape, np.uint8)
    mask_RL[:, 1:] = segments_RL[:, 1:] == segments_RL[:, :-1]
    return {"tokens": tokens_RL, "segment_ids": segments_RL, "loss_mask": mask_RL}


Example = Mapping[str, Sequence[int] | np.ndarray]
"""A text of T tokens to be packed whole: its `tokens` and `loss_mask`, and other columns of rows, each `[T, …]`."""


def pack_whole(examples: Iterable[Example], length: int, counts: Counter[str] | None = None) -> Iterator[Row]:
    """First-fit packing of whole examples, padded with token 0 and segment 0.

    Args:
      examples: all of the same columns; one longer than `length` is first cut into pieces.
      counts: gets `examples`, `cut_examples`, `tokens` and `padding`.
    Yields:
      rows of `tokens`, `segment_ids` and `loss_mask`, each [L], as in `pack_concatenate`'s blocks; `loss_mask` is the
      examples' own with 0 at each segment's first token. Other columns `[L, …]` with zeros for padding.
    Raises:
      ConfigError: an example's columns differ in length.
    """
    counts = Counter() if counts is None else counts
    examples = iter(examples)
    first = next(examples, None)
    if first is None:
        return

    def elements() -> Iterator[Row]:
        for example in itertools.chain([first], examples):
            size = len(example["tokens"])
            if lengths := {name: len(values) for name, values in example.items() if len(values) != size}:
                raise ConfigError(f"an example has {size} tokens, but of other columns {lengths}")
            counts["examples"] += 1
            counts["cut_examples"] += size > length
            counts["tokens"] += size
            arrays = {name: np.asarray(values, _EXAMPLE_TYPES.get(name)) for name, values in example.items()}
            for start in range(0, size, length):
                yield {name: values[start : start + length] for name, values in arrays.items()}

    packed = grain.experimental.FirstFitPackIterDataset(
        _Elements(elements()),
        length_struct=dict.fromkeys(first, length),
        num_packing_bins=_PACKING_BINS,
        shuffle_bins=False,
    )
    for row in packed:
        segment_ids = row["tokens_segment_ids"]
        counts["padding"] += int(np.count_nonzero(segment_ids == 0))
        yield {
            **{name: row[name] for name in first},
            "segment_ids": segment_ids,
            "loss_mask": row["loss_mask"] * (segment_positions(segment_ids) > 0),
        }


def segment_positions(segment_ids: np.ndarray) -> np.ndarray:
    """Position of each token within its segment (runs of equal ids along the last axis), int32."""
    index = np.arange(segment_ids.shape[-1], dtype=np.int32)
    starts = np.zeros(segment_ids.shape, np.int32)
    starts[..., 1:] = np.where(segment_ids[..., 1:] != segment_ids[..., :-1], index[1:], 0)
    return index - np.maximum.accumulate(starts, axis=-1)


def sample(count: int, size: int, seed: int, name: str) -> np.ndarray:
    """`size` of `count` rows, int64, ascending: the first of a permutation that `seed` and `name` choose.

    For one seed and name a smaller sample is a part of a larger one.
    """
    order = grain.MapDataset.range(count).seed(_source_seed(seed, f"{name}/sample")).shuffle()
    return np.sort(np.fromiter((order[i] for i in range(size)), np.int64, size))


class RowSource(Protocol):
    """What `Batches` reads from; `jaxdraft.data.records.PackedRows` is one."""

    @property
    def length(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


class Batches:
    """`batches[step]`: the global batch of a step, a pure function of (seed, step). Any part can be read alone.

    Every batch holds exactly `weights[name] * batch_size` rows of each source. Each source is shuffled anew every
    epoch, in an order that depends on the seed and its name alone.

    Args:
      sources: rows by name, all of one length.
      weights: share of each source, summing to 1; may be left out for a single source.
      batch_size: rows of the global batch.
      stored: give the target's stored distribution too.
    Raises:
      ConfigError: shares that are not whole rows, lengths that differ, or sources that do not all store as many of the
        target's tokens.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource],
        weights: Mapping[str, float] | None = None,
        *,
        batch_size: int,
        seed: int,
        stored: bool = False,
    ):
        self._sources = dict(sources)
        self._counts = rows_per_batch(list(sources), weights, batch_size)
        lengths = {name: rows.length for name, rows in sources.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"sources differ in row length: {lengths}; prepare them with one length")
        if empty := [name for name, rows in sources.items() if not len(rows)]:
            raise ConfigError(f"source {empty[0]!r} has no rows")
        if stored:
            _check_stored(sources)
        self._stored = stored
        self.length = next(iter(lengths.values()))
        self._orders = {
            name: grain.MapDataset.range(len(rows)).seed(_source_seed(seed, name)).shuffle().repeat()
            for name, rows in sources.items()
        }
        self._places = [(name, i) for name, count in self._counts.items() for i in range(count)]

    def __len__(self) -> int:
        """Rows of a batch."""
        return len(self._places)

    def rows(self, step: int) -> list[tuple[str, int]]:
        """Which rows make up the batch at `step` (0, 1, ...): (source name, row index), in order."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        return [(name, int(self._orders[name][step * self._counts[name] + i])) for name, i in self._places]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """All rows of a batch, as `part` gives them."""
        return self.part(step, slice(None))

    def part(self, step: int, part: slice) -> dict[str, np.ndarray]:
        """`tokens`, `segment_ids`, `positions` int32[B, L] and `loss_mask` float32[B, L] of some of the batch's rows.

        With `stored` also `target_ids` int32[B, L, k] and `target_log_probs` float16[B, L, k + 2], which
        `jaxdraft.data.records` defines.
        """
        rows = [self._sources[name][index] for name, index in self.rows(step)[part]]
        columns = ("tokens", "segment_ids", "loss_mask", *(("target_ids", "target_log_probs") if self._stored else ()))
        stacked = {key: np.stack([row[key] for row in rows]) for key in columns}
        batch = {
            "tokens": stacked["tokens"].astype(np.int32),
            "segment_ids": stacked["segment_ids"].astype(np.int32),
            "positions": segment_positions(stacked["segment_ids"]),
            "loss_mask": stacked["loss_mask"].astype(np.float32),
        }
        if self._stored:
            batch["target_ids"] = stacked["target_ids"].astype(np.int32)
            batch["target_log_probs"] = stacked["target_log_probs"]
        return batch


def _check_stored(sources: Mapping[str, RowSource]) -> None:
    first = {name: rows[0] for name, rows in sources.items()}
    if without := [name for name, row in first.items() if "target_ids" not in row]:
        raise ConfigError(f"source {without[0]!r} stores nothing of the target")
    widths = {name: row["target_ids"].shape[-1] for name, row in first.items()}
    if len(set(widths.values())) > 1:
        raise ConfigError(f"sources differ in how many of the target's tokens they store: {widths}; use one k")


def _source_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def rows_per_batch(names: list[str], weights: Mapping[str, float] | None, batch_size: int) -> dict[str, int]:
    """How many rows of each source make up a batch.

    Raises:
      ConfigError: shares that do not sum to 1, or are not whole rows.
    """
    if not names:
        raise ConfigError("a batch needs at least one source of rows")
    if weights is None:
        weights = dict.fromkeys(names[:1], 1.0)
    if set(weights) != set(names):
        raise ConfigError(f"weights {sorted(weights)} do not name the sources {sorted(names)}")
    shares = {name: Fraction(weights[name]).limit_denominator(_MAX_DENOMINATOR) for name in names}
    if sum(shares.values()) != 1 or min(shares.values()) <= 0:
        raise ConfigError(f"weights must be positive and sum to 1, got {dict(weights)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    unit = math.lcm(*(share.denominator for share in shares.values()))
    if batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        sizes = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"batch_size={batch_size} cannot hold the mix {dict(weights)} in whole rows; "
            f"use a multiple of {unit} (nearest: {sizes})"
        )
    return {name: int(share * batch_size) for name, share in shares.items()}
