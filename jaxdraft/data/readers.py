"""Files of rows: what a path names, and the rows of a file by its suffix.

A file that is damaged is a ConfigError; a row that cannot be read is ``Rejected``. ArrayRecord and gzip hold checksums
of their contents. Parquet holds them only where it was written with ``write_page_checksum``: without, a flipped bit
may go unseen, unless the file is the hub's, whose sha256 is known; the fingerprint of a source tells it too.
"""

import codecs
import fnmatch
import gzip
import hashlib
import json
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxdraft.data.quarantine import Misfit, Rejected
from jaxdraft.errors import ConfigError
from jaxdraft.huggingface import dataset_file, is_commit, list_dataset
from jaxdraft.remote import local_copy
from jaxdraft.untrusted import DOCUMENT_BYTES, bounded_lines

KNOWN = ".txt .jsonl .json (each also .gz) .parquet .array_record (also .array_record-00000-of-00008)"
_CHUNK = 1 << 20  # characters or rows' bytes read at once
_ROWS = 256  # of Parquet, converted at once
_NAME = re.compile(r"\.(txt|jsonl|json|parquet|array_record)(?:-\d+-of-\d+)?(\.gz)?$")
_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_MAGIC = re.compile(r"[*?\[]")
_SPLIT = "give the separator that stands between its documents"


class Row(NamedTuple):
    """A row of a file.

    Attributes:
      where: the file, and its line (from 1) or row (from 0).
      number: that of the line or row.
      value: columns by name; a string for plain text, and bytes for a record that is no tf.Example.
    """

    where: str
    number: int
    value: Any


class Files:
    """The files that a place names, in order; each is a path on this machine when its turn comes.

    Args:
      place: a file, a folder (its files of known suffix, with those below it) or a glob: a path here, in a bucket
        (``gs://``, ``s3://``), or of a dataset on the Hugging Face hub
        (``hf://datasets/OWNER/NAME@REVISION/data/train-*.parquet``). From a bucket all are copied first, from the hub
        one by one.

    Attributes:
      commit: of a place on the hub, the commit that its revision was resolved to.

    Raises:
      ConfigError: nothing there, or an unknown suffix.
    """

    def __init__(self, place: str):
        self._place = place
        self.commit: str | None = None
        self._fetch: Callable[[str], Path] = Path
        if hub := _HUB.fullmatch(place):
            repository, revision, pattern = hub[1], hub[2] and urllib.parse.unquote(hub[2]), hub[3] or ""
            below = pattern if is_one_place(pattern) else f"{pattern.rstrip('/')}/*".lstrip("/")
            commit, names = list_dataset(repository, revision, below)
            self.commit, self._fetch = commit, lambda name: dataset_file(repository, commit, name)
            self.names = [name for name in names if _selects(pattern, name)]
        elif place.startswith("hf://"):
            raise ConfigError(f"{place}: write hf://datasets/OWNER/NAME@REVISION/FILES")
        else:
            self.names = [str(file) for file in _local_files(Path(local_copy(place)))]
        if not self.names:
            raise ConfigError(f"{place}: no such file, or a folder or glob without files of known kind: {KNOWN}")
        for name in self.names:
            if not _NAME.search(name):
                raise ConfigError(f"{name}: unknown suffix; known are {KNOWN}")

    def __iter__(self) -> Iterator[Path]:
        return map(self._fetch, self.names)

    def rows(self, columns: Sequence[str] | None = None, separator: str | None = None) -> Iterator[Row | Rejected]:
        """``read_rows`` of every file."""
        for file in self:
            yield from read_rows(file, columns, separator)

    def fingerprint(self) -> str:
        """sha256 over the names and contents of the files, or over the place at its commit, which fixes those."""
        return files_fingerprint(self) if self.commit is None else _at_commit(self._place, self.commit)


def fingerprint_of(place: str) -> str:
    """sha256 of what a place holds; of one on the hub at a commit, which fixes that, without asking for it."""
    hub = _HUB.fullmatch(place)
    if hub and hub[2] and is_commit(hub[2]):
        return _at_commit(place, hub[2])
    return Files(place).fingerprint()


def _at_commit(place: str, commit: str) -> str:
    hub = _HUB.fullmatch(place)
    assert hub is not None
    return hashlib.sha256(f"{hub[1]}@{commit}/{hub[3] or ''}".encode()).hexdigest()


def is_one_place(place: str) -> bool:
    """Whether a place is written as a file or a glob, and not as a folder."""
    return bool(_NAME.search(place) or _MAGIC.search(place))


def _local_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if is_there(f) and _NAME.search(f.name))
    if path.exists():
        return [path]
    root = Path(path.anchor)
    return sorted(f for f in root.glob(str(path.relative_to(root))) if is_there(f))


def is_there(path: Path) -> bool:
    """Whether it is a file, or a link to one that is gone: to read that is an error, and to leave it out is none."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _selects(pattern: str, name: str) -> bool:
    """Whether a glob, or the name of a folder or file, selects a file."""
    if not is_one_place(pattern):
        return bool(_NAME.search(name)) and name.startswith(pattern.rstrip("/") + "/" if pattern else "")
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def local_file(place: str, what: str) -> Path:
    """The one file that a place names, here or copied from a bucket.

    Raises:
      ConfigError: it is none; ``what`` it should hold is told.
    """
    path = Path(local_copy(place))
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of {what}")
    return path


def files_fingerprint(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def read_rows(
    file: Path, columns: Sequence[str] | None = None, separator: str | None = None
) -> Iterator[Row | Rejected]:
    """The rows of a file: lines of `.jsonl`, objects of a `.json` list, rows of `.parquet`, records of `.array_record`.

    Args:
      columns: all that is needed of a row; a column that a file lacks is missing in its rows.
      separator: splits `.txt` into rows; without, it is one.

    Raises:
      ConfigError: the file is damaged, or is not what its suffix says; the message names it, and how far it was read.
    """
    match = _NAME.search(file.name)
    assert match is not None
    readers: dict[str, Callable[[], Iterator[Row | Rejected]]] = {
        "txt": lambda: _read_text(file, separator),
        "jsonl": lambda: _read_jsonl(file),
        "json": lambda: _read_json(file),
        "parquet": lambda: _read_parquet(file, columns),
        "array_record": lambda: _read_array_record(file),
    }
    return _whole(file, readers[match[1]]())


def read_jsonl(file: Path) -> Iterator[Row | Rejected]:
    """The lines of a file that are not blank, whatever its suffix (but for `.gz`).

    Raises:
      ConfigError: the file is damaged.
    """
    return _whole(file, _read_jsonl(file))


def _whole(file: Path, rows: Iterable[Row | Rejected]) -> Iterator[Row | Rejected]:
    """Turns what the readers raise for a damaged or foreign file into a ConfigError with its name."""
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except ConfigError:
        raise
    except (ValueError, OSError, EOFError, RuntimeError, zlib.error) as error:  # RecursionError is a RuntimeError
        after = f" after {count:,} rows" if count else ""
        raise ConfigError(f"{file}: cannot be read{after} ({error})") from error


def _read_jsonl(file: Path) -> Iterator[Row | Rejected]:
    with _open(file) as stream:
        for number, line in enumerate(bounded_lines(stream, file), start=1):
            if line.strip():
                where = f"{file}: line {number}"
                try:
                    value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError:
                    yield Rejected(where, "not UTF-8")
                except RecursionError:
                    yield Rejected(where, "nested too deeply")
                except ValueError as error:
                    yield Rejected(f"{where} ({error})", "not JSON")
                else:
                    yield Row(where, number, value)


def _read_text(file: Path, separator: str | None) -> Iterator[Row]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8-sig", newline="\n") as stream:
        if separator is None:
            text = stream.read(DOCUMENT_BYTES)
            if stream.read(1):
                raise ConfigError(f"{file}: has more than {DOCUMENT_BYTES:,} characters: {_SPLIT}")
            yield Row(str(file), 0, text)
            return
        rest, number = "", 0
        while chunk := stream.read(_CHUNK):
            *complete, rest = (rest + chunk).split(separator)
            if len(rest) > DOCUMENT_BYTES:
                raise ConfigError(f"{file}: document {number} has more than {DOCUMENT_BYTES:,} characters: {_SPLIT}")
            for part in complete:
                yield Row(f"{file}: document {number}", number, part.strip("\n"))
                number += 1
        if rest.strip():  # what follows the last separator is mostly the end of the line
            yield Row(f"{file}: document {number}", number, rest.strip("\n"))


def _read_json(file: Path) -> Iterator[Row | Rejected]:
    """A list; or one object per line, as C4 and others have it under this suffix."""
    with _open(file) as stream:
        if stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"[":
            yield from _read_jsonl(file)
            return
    with _open(file) as stream:
        content = bytearray()
        while chunk := stream.read(_CHUNK):
            content += chunk
            if len(content) > DOCUMENT_BYTES:
                raise ConfigError(f"{file}: has more than {DOCUMENT_BYTES:,} bytes: make it JSONL, a row on each line")
        for number, value in enumerate(json.loads(content)):
            yield Row(f"{file}: row {number}", number, value)


def _read_parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Row | Rejected]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        wanted = names if columns is None else [name for name in columns if name in names]
        if not wanted:
            raise ConfigError(f"{file} has none of the columns {', '.join(columns or ())}; it has {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(_ROWS, columns=wanted):
            for value in _values(batch):
                where = f"{file}: row {number}"
                yield Rejected(where, "not UTF-8") if value is None else Row(where, number, value)
                number += 1


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None in the place of one with text that is not UTF-8, which Parquet does not look at."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
    return [value for row in range(len(batch)) for value in _values(batch.slice(row, 1))]


def _read_array_record(file: Path) -> Iterator[Row]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(file), f"readahead_buffer_size:{_CHUNK}")
    if not reader.ok():
        raise ConfigError(f"{file}: cannot be read (not an ArrayRecord file, or one that is cut off)")
    for number in range(reader.num_records()):
        record = reader.read()
        yield Row(f"{file}: row {number}", number, tf_example(record) or record)


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.suffix != ".gz":
        return file.open("rb")
    if not file.stat().st_size:  # gzip takes it for an empty file
        raise ConfigError(f"{file}: cannot be read (not gzip: it is empty)")
    return gzip.GzipFile(file)


def text_of(value: Any, field: str) -> str:
    """The text in a column of a row's value, or the value itself where it is plain text.

    Raises:
      Misfit: it has no such column, or something else than text there.
    """
    if not isinstance(value, str | bytes):
        if not isinstance(value, dict):
            raise Misfit("not an object", type(value).__name__)
        if field not in value:
            raise Misfit(f"no field {field!r}", f"it has {', '.join(map(str, value))}")
        value = value[field]
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # JSON can spell half of a surrogate pair
            return value
    except UnicodeError:
        raise Misfit(f"field {field!r} is not Unicode text") from None
    raise Misfit(f"field {field!r} is {type(value).__name__}, not text")


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
        if shift > 63:
            raise ValueError("not a varint")
