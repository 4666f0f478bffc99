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
the source's rows that were rejected by reason, what is stored of which target, and for each shard rows, tokens, bytes
and sha256.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from jaxdraft.errors import ConfigError
from jaxdraft.files import commit, sha256, write_json
from jaxdraft.untrusted import check_fields, check_file, damaged, is_plain_name, read_json

MANIFEST = "manifest.json"
FORMAT = 1
_REMEDY = "prepare the data again"
_FIELDS = {"format": int, "length": int, "rows": int, "tokens": int, "labels": int, "columns": dict, "vocab_size": int}
_FIELDS |= {"tokenizer": str, "source": dict, "counts": dict, "shards": list}
_SHARD_FIELDS = {"file": str, "rows": int, "tokens": int, "labels": int, "bytes": int, "sha256": str}
_END = 1 << 31  # of lengths and widths
_WRITER_OPTIONS = "group_size:1,uncompressed"  # one record per chunk: random access reads nothing else

Block = Mapping[str, np.ndarray]
"""Some rows: each column's values, [R, length] or [R, length, width]."""


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


@dataclasses.dataclass(frozen=True)
class Format:
    """What rows are like.

    Attributes:
      length: tokens of a row.
      vocab_size: of the tokens.
      target_logits: where the target's distribution is stored: `k`, `temperature`, `target` (hash of its folder) and
        `vocabulary` (its size).
    """

    length: int
    vocab_size: int
    target_logits: Mapping[str, Any] | None = None

    @functools.cached_property
    def columns(self) -> dict[str, Column]:
        return columns(self.vocab_size, self.target_logits)

    @property
    def record_bytes(self) -> int:
        return self.length * sum(column.bytes for column in self.columns.values())

    def records(self, rows: Block, where: str) -> np.ndarray:
        """A block's rows as they are stored: uint8[R, bytes of a row].

        Raises:
          ConfigError: a row that does not fit; the message says that it is in `where`.
        """
        limits = {"tokens": self.vocab_size}
        if self.target_logits is not None:
            limits["target_ids"] = self.target_logits["vocabulary"]
        count = len(rows["tokens"])
        for name, column in self.columns.items():
            if rows[name].shape != (count, *column.shape(self.length)):
                raise ConfigError(f"{where}: {name} has shape {rows[name].shape[1:]}, not {column.shape(self.length)}")
        for name, limit in limits.items():
            low, high = int(rows[name].min()), int(rows[name].max())
            if low < 0 or high >= limit:
                raise ConfigError(f"{where}: token {low if low < 0 else high} is outside the vocabulary of {limit}")
        stored = (rows[name].astype(column.dtype, order="C") for name, column in self.columns.items())
        return np.concatenate([values.reshape(count, -1).view(np.uint8) for values in stored], axis=1)


def write_rows(
    folder: str | Path,
    rows: Iterator[Mapping[str, np.ndarray]],
    *,
    length: int,
    vocab_size: int,
    tokenizer_fingerprint: str,
    source: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    quarantined: Mapping[str, int] | None = None,
    target_logits: Mapping[str, Any] | None = None,
    shard_rows: int = 8192,
) -> dict[str, Any]:
    """Writes `rows` as shards of `shard_rows` and returns the manifest. Replaces what `folder` held before.

    Every file appears under its name only when complete (temporary name, fsync, rename), the manifest last.

    Args:
      rows: one by one, dicts of `tokens`, `segment_ids` and `loss_mask`, each `[length]`; with `target_logits` also of
        `target_ids` and `target_log_probs`.
      length, vocab_size, target_logits: as of `Format`.
      source, counts, quarantined: as of `write_manifest`; read after `rows` is exhausted.
    Raises:
      ConfigError: no rows at all, or a row that does not fit `length` or `vocab_size`.
    """
    folder, format = Path(folder), Format(length, vocab_size, target_logits)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / MANIFEST, *folder.glob("rows-*")]:
        stale.unlink(missing_ok=True)
    blocks = ({name: values[None] for name, values in row.items()} for row in rows)
    shards: list[dict[str, Any]] = []
    for first in blocks:
        shard = itertools.chain([first], itertools.islice(blocks, shard_rows - 1))
        shards.append(write_shard(folder / shard_name(len(shards)), shard, format))
    return write_manifest(
        folder,
        shards,
        format,
        tokenizer_fingerprint=tokenizer_fingerprint,
        source=source,
        counts=counts,
        quarantined=quarantined,
    )


def shard_name(number: int) -> str:
    return f"rows-{number:05d}.array_record"


def write_shard(path: Path, blocks: Iterable[Block], format: Format) -> dict[str, Any]:
    """Writes blocks of rows as one shard; its manifest entry: `file`, `rows`, `tokens`, `labels`, `bytes`, `sha256`.

    Raises:
      ConfigError: a row that does not fit `format`.
    """
    totals = {"rows": 0, "tokens": 0, "labels": 0}
    with new_records(path) as write:
        for rows in blocks:
            for record in format.records(rows, f"row {totals['rows']} of {path.name}"):
                write(record.tobytes())
            totals["rows"] += len(rows["tokens"])
            totals["tokens"] += int(np.count_nonzero(rows["segment_ids"]))
            totals["labels"] += int(np.count_nonzero(rows["loss_mask"]))
    return {"file": path.name, **totals, "bytes": path.stat().st_size, "sha256": sha256(path)}


@contextlib.contextmanager
def new_records(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Gives what appends a record to a new file, which has its name when all of it is complete and durable.

    Raises:
      OSError: it cannot be written.
    """

    def told(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError as error:  # array_record's, of a full disk for one
            raise OSError(f"{path}: {error}") from error

    temporary = path.with_name(path.name + ".tmp")
    writer = told(lambda: array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS))
    try:
        yield lambda record: told(lambda: writer.write(record))
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    told(writer.close)
    commit(temporary, path)


def write_manifest(
    folder: Path,
    shards: Sequence[Mapping[str, Any]],
    format: Format,
    *,
    tokenizer_fingerprint: str,
    source: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
    quarantined: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Makes shards that lie in `folder` a data set; returns its manifest.

    Args:
      shards: their entries, of `write_shard`, in the order of their rows.
      source: where the text is from (settings, revision, licence), kept as given.
      counts: what packing counted.
      quarantined: rows of the source that gave no text, by reason.
    Raises:
      ConfigError: no rows at all.
    """
    if not any(shard["rows"] for shard in shards):
        raise ConfigError(f"{folder}: no rows: the source holds fewer tokens than one row of length {format.length}")
    stored = format.target_logits
    manifest = {
        "format": FORMAT,
        "length": format.length,
        **{total: sum(shard[total] for shard in shards) for total in ("rows", "tokens", "labels")},
        "columns": {name: _to_manifest(column) for name, column in format.columns.items()},
        "vocab_size": format.vocab_size,
        "tokenizer": tokenizer_fingerprint,
        "source": dict(source),
        "counts": dict(counts or {}),
        **({"quarantined": dict(quarantined)} if quarantined else {}),
        **({} if stored is None else {"target_logits": dict(stored)}),
        "shards": list(shards),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def random_access(path: Path) -> Any:
    """A reader of an ArrayRecord file's records, in any order: it reads nothing ahead, and starts no threads."""
    return array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


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
        self.manifest = read_manifest(self.folder)
        self.length: int = self.manifest["length"]
        format = _format_of(self.manifest)
        shards = self.manifest["shards"]
        for shard in shards:
            _check_shard(self.folder, shard, format, verify)
        self._starts = np.cumsum([0, *(shard["rows"] for shard in shards)])
        layout, self._record_bytes = format.columns, format.record_bytes
        offsets = itertools.accumulate((self.length * column.bytes for column in layout.values()), initial=0)
        self._layout = [(name, column, offset) for (name, column), offset in zip(layout.items(), offsets, strict=False)]
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            record = self._reader(shard).read([index - int(self._starts[shard])])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(f"{self._path(shard)}: row {index} is damaged ({error}); {_REMEDY}") from error
        if len(record) != self._record_bytes:
            of = f"{len(record)} bytes, the manifest says {self._record_bytes}"
            raise ConfigError(f"{self._path(shard)}: row {index} is damaged ({of}); {_REMEDY}")
        found = {}
        for name, column, offset in self._layout:
            shape = column.shape(self.length)
            found[name] = np.frombuffer(record, column.dtype, math.prod(shape), offset).reshape(shape)
        return found

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            self._readers[shard] = random_access(self._path(shard))
        return self._readers[shard]

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest["shards"][shard]["file"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, which may have been written by anyone: all that is used of it is as it should be.

    Raises:
      ConfigError: there is none, or it is damaged; the message names the file and the key.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{path}: missing, so {folder} holds no complete packed data; prepare it again")
    manifest = read_json(path, fields={"format": object}, remedy=_REMEDY)
    if manifest["format"] != FORMAT:
        raise ConfigError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; {_REMEDY}")
    with damaged(path, f": {_REMEDY}"):
        check_fields(manifest, _FIELDS)
        for key in ("length", "vocab_size"):
            if not 0 < manifest[key] < _END:
                raise ValueError(f"{key!r} is {manifest[key]}")
        if (stored := manifest.get("target_logits")) is not None:
            check_fields(stored, {"k": int, "vocabulary": int, "temperature": object})
            if not (0 < stored["k"] <= stored["vocabulary"] < _END):
                raise ValueError(f"'target_logits' has k {stored['k']} of a vocabulary of {stored['vocabulary']}")
        columns = {name: _to_manifest(column) for name, column in _format_of(manifest).columns.items()}
        if manifest["columns"] != columns:
            raise ValueError(f"'columns' are {manifest['columns']!r:.200}, where rows have {columns}")
        for shard in manifest["shards"]:
            check_fields(shard, _SHARD_FIELDS)
        if manifest["rows"] != sum(shard["rows"] for shard in manifest["shards"]):
            raise ValueError(f"'rows' is {manifest['rows']}, which is not the sum of the shards'")
    return manifest


def _format_of(manifest: Mapping[str, Any]) -> Format:
    return Format(manifest["length"], manifest["vocab_size"], manifest.get("target_logits"))


def _check_shard(folder: Path, shard: Mapping[str, Any], format: Format, verify: bool) -> None:
    path = folder / shard["file"]
    if not is_plain_name(shard["file"]):
        raise ConfigError(f"{folder / MANIFEST}: shard {shard['file']!r}: its name must be a plain file name")
    if not path.is_file():
        raise ConfigError(f"{path}: missing; prepare the data again")
    check_file(path)
    if path.stat().st_size != shard["bytes"]:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes, the manifest says {shard['bytes']}; prepare it again")
    if not 0 <= shard["rows"] * format.record_bytes <= shard["bytes"]:
        rows = f"{shard['rows']:,} rows of {format.record_bytes:,} bytes"
        raise ConfigError(f"{path}: {shard['bytes']:,} bytes do not hold the {rows} that the manifest says; {_REMEDY}")
    if verify and sha256(path) != shard["sha256"]:
        raise ConfigError(f"{path}: its sha256 differs from the manifest's, the file is damaged; prepare it again")
