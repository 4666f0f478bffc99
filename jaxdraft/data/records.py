"""Packed token rows on disk: ArrayRecord shards and a manifest that can be checked.

A row is one record: its columns' bytes one after another, all little-endian and `length` long.

    tokens       uint16 (uint32 where the vocabulary needs it)
    segment_ids  uint16, 0 = padding, 1.. = documents in order
    loss_mask    uint8, 1 = this token counts as a label (never the first token of a segment)

`manifest.json` is written last, so a folder without one is not a data set. It holds the row length, column types,
vocabulary size, tokenizer fingerprint, source, what packing counted, and for each shard rows, tokens, bytes and sha256.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from jaxdraft.errors import ConfigError

MANIFEST = "manifest.json"
FORMAT = 1
_WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per chunk: random access reads nothing else


def _columns(vocab_size: int) -> dict[str, str]:
    return {"tokens": "<u2" if vocab_size <= 1 << 16 else "<u4", "segment_ids": "<u2", "loss_mask": "|u1"}


def write_rows(
    folder: str | Path,
    rows: Iterator[Mapping[str, np.ndarray]],
    *,
    length: int,
    vocab_size: int,
    tokenizer_fingerprint: str,
    source: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    shard_rows: int = 8192,
) -> dict[str, Any]:
    """Writes `rows` as shards of `shard_rows` and returns the manifest. Replaces what `folder` held before.

    Every file appears under its name only when complete (temporary name, fsync, rename), the manifest last.

    Args:
      rows: dicts of `tokens`, `segment_ids` and `loss_mask`, each `[length]`.
      source: where the text is from (settings, revision, licence), kept as given.
      counts: what packing counted; read after `rows` is exhausted.
    Raises:
      ConfigError: no rows at all, or a row that does not fit `length` or `vocab_size`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / MANIFEST, *folder.glob("rows-*")]:
        stale.unlink(missing_ok=True)
    columns = _columns(vocab_size)
    rows = iter(rows)
    shards: list[dict[str, Any]] = []
    for first in rows:
        name = f"rows-{len(shards):05d}.array_record"
        shard = itertools.chain([first], itertools.islice(rows, shard_rows - 1))
        shards.append({"file": name, **_write_shard(folder / name, shard, columns, length, vocab_size)})
    if not shards:
        raise ConfigError(f"{folder}: no rows: the source holds fewer tokens than one row of length {length}")
    manifest = {
        "format": FORMAT,
        "length": length,
        "rows": sum(s["rows"] for s in shards),
        "tokens": sum(s["tokens"] for s in shards),
        "labels": sum(s["labels"] for s in shards),
        "columns": columns,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer_fingerprint,
        "source": dict(source),
        "counts": dict(counts or {}),
        "shards": shards,
    }
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    _commit(temporary, folder / MANIFEST)
    return manifest


def _check(row: Mapping[str, np.ndarray], columns: Mapping[str, str], length: int, vocab_size: int, where: str) -> None:
    for name in columns:
        if row[name].shape != (length,):
            raise ConfigError(f"{where}: {name} has shape {row[name].shape}, not ({length},)")
    low, high = int(row["tokens"].min()), int(row["tokens"].max())
    if low < 0 or high >= vocab_size:
        raise ConfigError(f"{where}: token {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def _write_shard(
    path: Path, rows: Iterable[Mapping[str, np.ndarray]], columns: Mapping[str, str], length: int, vocab_size: int
) -> dict[str, Any]:
    temporary = path.with_name(path.name + ".tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    totals = {"rows": 0, "tokens": 0, "labels": 0}
    try:
        for row in rows:
            _check(row, columns, length, vocab_size, f"row {totals['rows']} of {path.name}")
            writer.write(b"".join(row[name].astype(dtype).tobytes() for name, dtype in columns.items()))
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
    """Random access into a folder written by `write_rows`: `rows[i] -> {column: [length]}`, types as stored.

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
        dtypes = {name: np.dtype(dtype) for name, dtype in self.manifest["columns"].items()}
        offsets = itertools.accumulate((self.length * dtype.itemsize for dtype in dtypes.values()), initial=0)
        self._layout = [(name, dtype, offset) for (name, dtype), offset in zip(dtypes.items(), offsets, strict=False)]
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = self._reader(shard).read([index - int(self._starts[shard])])[0]
        return {name: np.frombuffer(record, dtype, self.length, offset) for name, dtype, offset in self._layout}

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
