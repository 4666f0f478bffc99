"""Where text comes from: a source is a frozen dataclass with `documents()` and `fingerprint()`.

`Text` reads files by suffix. A source of one's own needs only the two methods of `Source`.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from jaxdraft.errors import ConfigError
from jaxdraft.remote import local_copy

_CHUNK = 1 << 20  # characters or rows' bytes read at once
_NAME = re.compile(r"\.(txt|jsonl|json|parquet|array_record)(?:-\d+-of-\d+)?(\.gz)?$")
_KNOWN = ".txt .jsonl .json (each also .gz) .parquet .array_record (also .array_record-00000-of-00008)"


class Source(Protocol):
    """What `Prepare` reads."""

    def documents(self) -> Iterator[str]:
        """The documents, in the same order every time."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the content `documents` is made from."""
        ...


@dataclass(frozen=True)
class Text:
    """Documents from files.

    `.txt` is one document, or several with `separator`; `.jsonl`, `.json` (a list of objects), `.parquet` and
    `.array_record` (tf.Example, or raw UTF-8 records) give one document per row. Blank documents are left out.

    Attributes:
      path: a file, a folder (its files of known suffix, sorted, with those below it) or a glob, also in a bucket
        (`gs://`, `s3://`), from where they are copied first.
      field: the column that holds the text.
      separator: splits plain text into documents, e.g. "<|endoftext|>".
      limit: at most this many documents.
      licence, revision: kept next to the data made from it.
    Raises (when read):
      ConfigError: nothing there, an unknown suffix, or a row without `field`; the message names file and row.
    """

    path: str
    field: str = "text"
    separator: str | None = None
    limit: int | None = None
    licence: str | None = None
    revision: str | None = None

    def files(self) -> list[Path]:
        """The files read, in order."""
        path = Path(local_copy(self.path))
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.is_file() and _NAME.search(f.name))
        elif path.exists():
            files = [path]
        else:
            root = Path(path.anchor)
            files = sorted(f for f in root.glob(str(path.relative_to(root))) if f.is_file())
        if not files:
            raise ConfigError(f"{self.path}: no such file, or a folder or glob without files of known kind: {_KNOWN}")
        for file in files:
            if not _NAME.search(file.name):
                raise ConfigError(f"{file}: unknown suffix; known are {_KNOWN}")
        return files

    def documents(self) -> Iterator[str]:
        texts = (text for file in self.files() for text in self._read(file) if not text.isspace() and text)
        return itertools.islice(texts, self.limit)

    def fingerprint(self) -> str:
        return files_fingerprint(self.files())

    def _read(self, file: Path) -> Iterator[str]:
        match = _NAME.search(file.name)
        assert match is not None
        readers: dict[str, Callable[[Path], Iterator[str]]] = {
            "txt": self._read_text,
            "jsonl": self._read_jsonl,
            "json": self._read_json,
            "parquet": self._read_parquet,
            "array_record": self._read_array_record,
        }
        with _naming(file):
            yield from readers[match[1]](file)

    def _read_text(self, file: Path) -> Iterator[str]:
        with open_text(file) as stream:
            if self.separator is None:
                yield stream.read()
                return
            rest = ""
            while chunk := stream.read(_CHUNK):
                *complete, rest = (rest + chunk).split(self.separator)
                yield from (part.strip("\n") for part in complete)
            yield rest.strip("\n")

    def _read_jsonl(self, file: Path) -> Iterator[str]:
        for number, row in read_jsonl(file):
            yield self._field(row, f"{file}: line {number}")

    def _read_json(self, file: Path) -> Iterator[str]:
        with open_text(file) as stream:
            rows = json.load(stream)
        if not isinstance(rows, list):
            raise ConfigError(f"{file}: not a JSON list of objects (one object per line is .jsonl)")
        for number, row in enumerate(rows):
            yield self._field(row, f"{file}: row {number}")

    def _read_parquet(self, file: Path) -> Iterator[str]:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(file)
        if self.field not in table.schema_arrow.names:
            raise ConfigError(f"{file}: row 0 has no field {self.field!r}; the columns are {table.schema_arrow.names}")
        values = (v for batch in table.iter_batches(1024, columns=[self.field]) for v in batch.column(0).to_pylist())
        for number, value in enumerate(values):
            yield self._field({self.field: value}, f"{file}: row {number}")

    def _read_array_record(self, file: Path) -> Iterator[str]:
        from array_record.python import array_record_module

        reader = array_record_module.ArrayRecordReader(str(file), f"readahead_buffer_size:{_CHUNK}")
        if not reader.ok():
            raise ConfigError(f"{file}: cannot be read (not an ArrayRecord file, or one that is cut off)")
        for number in range(reader.num_records()):
            record = reader.read()
            features = tf_example(record)
            if features is None:
                yield record.decode()
            else:
                text = features.get(self.field)
                row = {**features, self.field: text.decode()} if text is not None else features
                yield self._field(row, f"{file}: row {number}")

    def _field(self, row: Any, where: str) -> str:
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is not an object with a field {self.field!r}")
        if self.field not in row:
            raise ConfigError(f"{where} has no field {self.field!r}; it has {sorted(row)}")
        if not isinstance(row[self.field], str):
            raise ConfigError(f"{where}: field {self.field!r} is {type(row[self.field]).__name__}, not text")
        text: str = row[self.field]
        return text


def files_fingerprint(files: list[Path]) -> str:
    """sha256 over the names and contents of files, in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def open_text(file: Path) -> IO[str]:
    """A UTF-8 file, gzipped or not, with its line ends as they are."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="\n")
    return file.open(encoding="utf-8", newline="\n")


def read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not blank; ConfigError names file and line."""
    with open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"{file}: line {number} is not JSON ({error})") from error
                yield number, value


def tf_example(record: bytes) -> dict[str, bytes | None] | None:
    """The first bytes value of each feature of a serialised tf.Example (None for numbers); None for anything else.

    Example { Features features = 1 { map<string, Feature> feature = 1 } }, Feature { BytesList bytes_list = 1 }, so
    every level is a run of length-delimited fields and no TensorFlow is needed to read it.
    """
    try:
        features: dict[str, bytes | None] = {}
        for _, message in _fields(record, {1}):
            for _, entry in _fields(message, {1}):
                pair = dict(_fields(entry, {1, 2}))
                values = [v for kind, lists in _fields(pair[2], {1, 2, 3}) if kind == 1 for _, v in _fields(lists, {1})]
                features[pair[1].decode()] = values[0] if values else None
    except (IndexError, KeyError, ValueError):
        return None
    return features or None


def _fields(message: bytes, known: set[int]) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protobuf message; ValueError for any other content."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        size, position = _varint(message, position)
        if tag & 7 != 2 or tag >> 3 not in known or position + size > len(message):
            raise ValueError("not the expected message")
        yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns what the readers raise for a damaged or foreign file into a ConfigError with its name."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError, EOFError, RuntimeError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
