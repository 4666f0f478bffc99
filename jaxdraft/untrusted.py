"""What comes from outside is read here first: plain files of a bounded size, in their own folder, and JSON of them.

Model folders, tokenizers, manifests and records may have been written by anyone. Nothing of theirs is run, and nothing
is taken into memory before its size is known to be within the limits below. SECURITY.md says what that leaves open.
"""

import contextlib
import gzip
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxdraft.errors import ConfigError

CONFIG_BYTES = 16 << 20
"""A model's JSON files but the tokenizer's. The largest index of shards known to us has 9 MB."""
RECORD_BYTES = 64 << 20
"""A JSON file of a run: a manifest, a record, an account of answers, results."""
TOKENIZER_BYTES = 256 << 20
"""A tokenizer's own file. The largest known to us has 33 MB."""
LINE_BYTES = 64 << 20
"""A line of JSONL, uncompressed."""
DOCUMENT_BYTES = 1 << 30
"""A document of a text file, or a JSON file of many rows, uncompressed."""
MAX_TOKENS = 1 << 24
"""Ids of a tokenizer, the unused ones between them included. The largest vocabulary known to us has 2^18."""

_LONGEST_NAME = 255  # bytes, of every file system in use
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format, no character; separators of lines


def check_file(path: Path, limit: int | None = None) -> None:
    """Looks at a file before it is opened.

    Args:
      path: which may be a link to a file of the same folder. The Hugging Face cache's links from ``snapshots/COMMIT/``
        to its own ``blobs/`` are as good.
      limit: bytes that it may have.

    Raises:
      ConfigError: it is no plain file (a pipe or device would be waited for), it is larger, or it is a link to what
        lies elsewhere: a folder that came from outside would make a private file of this machine part of a model.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist, or is no plain file")
    folder, file = path.parent.resolve(), path.resolve()
    commits = (place for place in (folder, *folder.parents) if place.parent.name == "snapshots")
    cached = any(file.parent == commit.parents[1] / "blobs" for commit in commits)
    if not (file.is_relative_to(folder) or cached):
        raise ConfigError(f"{path} is a link to a file outside of its folder: if you trust it, put a copy in its place")
    if limit is not None and (size := file.stat().st_size) > limit:
        raise ConfigError(f"{path} has {size:,} bytes, more than the {limit:,} that such a file may have")


def is_plain_name(name: Any) -> bool:
    """Whether a name that a file gives is one of a file beside it, and no path."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name or Path(name).name != name:
        return False
    try:
        return len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def is_below(name: Any) -> bool:
    """Whether a name that a file gives is that of a file beside it or in a folder beside it."""
    return isinstance(name, str) and all(map(is_plain_name, name.split("/")))


def read_json(
    path: Path, *, limit: int = RECORD_BYTES, fields: Mapping[str, type] | None = None, remedy: str = ""
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      path: of the file.
      limit: bytes that it may have.
      fields: keys that it must have, and the type of each one's value.
      remedy: what to do where it is damaged.

    Raises:
      ConfigError: as ``check_file``; or it is not JSON, nested too deeply, no object, or lacks a field.
    """
    told = f": {remedy}" if remedy else ""
    try:
        check_file(path, limit)
    except ConfigError as error:
        raise ConfigError(f"{error}{told}") from None
    with damaged(path, told):
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
        check_fields(value, fields or {})
    return value


def check_fields(value: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Looks at the types of an object's values; ``object`` is any.

    Raises:
      ValueError: one is missing, or of another type.
    """
    for key, kind in fields.items():
        if key not in value:
            raise ValueError(f"no {key!r}")
        if kind is not object and type(value[key]) is not kind:
            raise ValueError(f"{key!r} is {json.dumps(value[key]):.80}, not of type {kind.__name__}")


@contextlib.contextmanager
def damaged(path: Path, told: str = "") -> Iterator[None]:
    """Turns what is raised over a file's contents into a ConfigError that names the file.

    Args:
      path: of the file.
      told: ends the message.

    Raises:
      ConfigError: in place of what Python raises where a value is not what it is taken for.
    """
    try:
        yield
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path} is damaged (nested too deeply){told}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = repr(error) if isinstance(error, LookupError | AttributeError) else str(error)
        raise ConfigError(f"{path} is damaged ({what}){told}") from error


def bounded_lines(stream: IO[bytes] | gzip.GzipFile, where: Path) -> Iterator[bytes]:
    """The lines of a file, read in pieces.

    Raises:
      ConfigError: one is longer than ``LINE_BYTES``.
    """
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise ConfigError(f"{where}: line {number} has more than {LINE_BYTES:,} bytes")
        yield line


def printable(text: str, keep: str = "") -> str:
    """Text that a terminal takes for nothing but text: what controls it, or cannot be seen, is written as an escape.

    Args:
      text: from anywhere.
      keep: control characters to leave as they are.
    """
    hidden = lambda c: unicodedata.category(c) in _HIDDEN and c not in keep
    return "".join(c.encode("unicode_escape").decode() if hidden(c) else c for c in text)
