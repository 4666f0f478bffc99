"""Packed token rows on disk: ArrayRecord shards and a manifest that can be checked.

A row is one record: its columns' bytes one after another, all little-endian and `length` long.

    tokens       uint16 (uint32 where the vocabulary needs it)
    segment_ids  uint16, 0 = padding, 1.. = documents in order
    loss_mask    uint8, 1 = this token counts as a label (never the first token of a segment)

Where the target's distribution is stored beside them, it is that of the token after each position:

    target_ids        uint16 or uint32 [length, k], the k most likely tokens, most likely first
    target_log_probs  float16 [length, k + 2], log-probabilities in the target's full softmax: of these k tokens, of the
                      row's next token (-inf where its segment has none) and of all other tokens together

`manifest.json` is written last, so a folder without one is not a data set. It holds the row length, column types (of
several values per position also their number), vocabulary size, tokenizer fingerprint, source, what packing counted,
what is stored of which target, and for each shard rows, tokens, bytes and sha256.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from jaxdraft.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT = 1
_WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per chunk: random access reads nothing else


class Column(NamedTuple):
    """What a column holds per position: one number, or ``width`` of them."""

    dtype: np.dtype
    width: int | None = None

    def shape(self, length: int) -> tuple[int, ...]:
        return (length,) if self.width is None else (length, self.width)

    @property
    def bytes(self) -> int:
        """Per position."""
        return self.dtype.itemsize * (self.width or 1)


def columns(vocab_size: int, target_logits: Mapping[str, Any] | None = None) -> dict[str, Column]:
    """The columns of rows, in the order they lie in a record.

    Args:
      vocab_size: of the tokens.
      target_logits: as in the manifest, where the target's distribution is stored.
    """
    found = {
        "tokens": Column(_token_dtype(vocab_size)),
        "segment_ids": Column(np.dtype("<u2")),
        "loss_mask": Column(np.dtype("|u1")),
    }
    if target_logits is not None:
        k = target_logits["k"]
        found["target_ids"] = Column(_token_dtype(target_logits["vocabulary"]), k)
        found["target_log_probs"] = Column(np.dtype("<f2"), k + 2)
    return found


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _to_manifest(column: Column) -> Any:
    return column.dtype.str if column.width is None else [column.dtype.str, column.width]


def _from_manifest(column: Any) -> Column:
    dtype, width = (column, None) if isinstance(column, str) else column
    return Column(np.dtype(dtype), width)


def write_rows(
    folder: str | Path,
    rows: Iterator[Mapping[str, np.ndarray]],
    *,
    length: int,
    vocab_size: int,
    tokenizer_fingerprint: str,
    source: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    target_logits: Mapping[str, Any] | None = None,
    shard_rows: int = 8192,
) -> dict[str, Any]:
    """Writes `rows` as shards of `shard_rows` and returns the manifest. Replaces what `folder` held before.

    Every file appears under its name only when complete (temporary name, fsync, rename), the manifest last.

    Args:
      rows: dicts of `tokens`, `segment_ids` and `loss_mask`, each `[length]`; with `target_logits` also of `target_ids`
        and `target_log_probs`.
      source: where the text is from (settings, revision, licence), kept as given.
      counts: what packing counted; read after `rows` is exhausted.
      target_logits: `k`, `temperature`, `target` (hash of its folder) and `vocabulary` (its size) of what is stored of
        the target.
    Raises:
      ConfigError: no rows at all, or a row that does not fit `length` or `vocab_size`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / MANIFEST, *folder.glob("rows-*")]:
        stale.unlink(missing_ok=True)
    layout = columns(vocab_size, target_logits)
    limits = {"tokens": vocab_size, **({} if target_logits is None else {"target_ids": target_logits["vocabulary"]})}
    rows = iter(rows)
    shards: list[dict[str, Any]] = []
    for first in rows:
        name = f"rows-{len(shards):05d}.array_record"
        shard = itertools.chain([first], itertools.islice(rows, shard_rows - 1))
        shards.append({"file": name, **_write_shard(folder / name, shard, layout, length, limits)})
    if not shards:
        raise ConfigError(f"{folder}: no rows: the source holds fewer tokens than one row of length {length}")
    manifest = {
        "format": FORMAT,
        "length": length,
        "rows": sum(s["rows"] for s in shards),
        "tokens": sum(s["tokens"] for s in shards),
        "labels": sum(s["labels"] for s in shards),
        "columns": {name: _to_manifest(column) for name, column in layout.items()},
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint,
        "source": dict(source),
        "counts": dict(counts or {}),
        **({} if target_logits is None else {"target_logits": dict(target_logits)}),
        "shards": shards,
    }
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    _commit(temporary, folder / MANIFEST)
    return manifest


def _check(
    row: Mapping[str, np.ndarray], layout: Mapping[str, Column], length: int, limits: Mapping[str, int], where: str
) -> None:
    for name, column in layout.items():
        if row[name].shape != column.shape(length):
            raise ConfigError(f"{where}: {name} has shape {row[name].shape}, not {column.shape(length)}")
    for name, limit in limits.items():
        low, high = int(row[name].min()), int(row[name].max())
        if low < 0 or high >= limit:
            raise ConfigError(f"{where}: token {low if low < 0 else high} is outside the vocabulary of {limit}")


def _write_shard(
    path: Path,
    rows: Iterable[Mapping[str, np.ndarray]],
    layout: Mapping[str, Column],
    length: int,
    limits: Mapping[str, int],
) -> dict[str, Any]:
    temporary = path.with_name(path.name + ".tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    totals = {"rows": 0, "tokens": 0, "labels": 0}
    try:
        for row in rows:
            _check(row, layout, length, limits, f"row {totals['rows']} of {path.name}")
            writer.write(b"".join(row[name].astype(column.dtype).tobytes() for name, column in layout.items()))
            totals["rows"] += 1
            totals["tokens"] += int(np.count_nonzero(row["segment_ids"]))
            totals["labels"] += int(np.count_nonzero(row["loss_mask"]))
    finally:
        writer.close()
    result = {**totals, "bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
    _commit(temporary, path)
    return result


def _commit(temporary: Path, path: Path) -> None:
    """Makes `temporary` durable, then visible under its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PackedRows:
    """Random access into a folder written by `write_rows`: `rows[i] -> {column: [length] or [length, width]}`.

    Types are as stored.

    Args:
      verify: hash every shard now, so that a damaged file is named here and not trained on.
    Raises:
      ConfigError: no manifest, or a shard that is missing or differs from it; the message names the file.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder / MANIFEST)
        self.length: int = self.manifest["length"]
        shards = self.manifest["shards"]
        for shard in shards:
            _check_shard(self.folder / shard["file"], shard, verify)
        self._starts = np.cumsum([0, *(shard["rows"] for shard in shards)])
        layout = {name: _from_manifest(column) for name, column in self.manifest["columns"].items()}
        offsets = itertools.accumulate((self.length * column.bytes for column in layout.values()), initial=0)
        self._layout = [(name, column, offset) for (name, column), offset in zip(layout.items(), offsets, strict=False)]
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = self._reader(shard).read([index - int(self._starts[shard])])[0]
        found = {}
        for name, column, offset in self._layout:
            shape = column.shape(self.length)
            found[name] = np.frombuffer(record, column.dtype, math.prod(shape), offset).reshape(shape)
        return found

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            path = self.folder / self.manifest["shards"][shard]["file"]
            self._readers[shard] = array_record_module.ArrayRecordReader(
                str(path), "readahead_buffer_size:0,max_parallelism:0"
            )
        return self._readers[shard]


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: missing, so {path.parent} holds no complete packed data; prepare it again")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        known = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}); prepare the data again") from error
    if known != FORMAT:
        raise ConfigError(f"{path}: format {known}, this version reads {FORMAT}; prepare the data again")
    return manifest


def _check_shard(path: Path, shard: Mapping[str, Any], verify: bool) -> None:
    if path.parent / path.name != path or path.name != shard["file"]:
        raise ConfigError(f"{shard['file']}: a shard's name in a manifest must be a plain file name")
    if not path.is_file():
        raise ConfigError(f"{path}: missing; prepare the data again")
    if path.stat().st_size != shard["bytes"]:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes, the manifest says {shard['bytes']}; prepare it again")
    if verify and _sha256(path) != shard["sha256"]:
        raise ConfigError(f"{path}: its sha256 differs from the manifest's, the file is damaged; prepare it again")
