"""Source files that a data set names by the id of their content, as The Stack v2 does.

A row is a repository with its `files`, each with `blob_id`, `path`, `src_encoding`, `is_vendor`, `is_generated`, or one
such file. The content is gzipped in Software Heritage's bucket under its id, or in the row itself (`content`).
"""

import concurrent.futures
import functools
import gzip
import io
import itertools
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxdraft.data.quarantine import Misfit, Rejected
from jaxdraft.data.readers import Row, text_of
from jaxdraft.errors import ConfigError
from jaxdraft.remote import Bucket, cache_folder, is_url
from jaxdraft.untrusted import LINE_BYTES

_ID = re.compile(r"\w+")
_AT_ONCE = 32  # contents under way from a bucket
_WINDOW = 256  # contents that are waited for together


def contents_of(rows: Iterable[Row | Rejected], place: str) -> Iterator[str | Rejected]:
    """The content of every file that the rows name, in their order.

    Args:
      place: the folder that holds the contents, here or in a bucket; what came from a bucket is kept in the cache.

    Raises:
      ConfigError: there is no such bucket, or the package for it is missing.
      OSError: it cannot be read.
    """
    fetch = functools.cache(lambda: _fetcher(place))  # rows that hold their contents need no bucket

    def content(item: Row | Rejected) -> str | Rejected:
        if isinstance(item, Rejected):
            return item
        try:
            text = _content(item.value, fetch)
            return text if text.strip() else Rejected(item.where, "blank")
        except Misfit as misfit:
            return misfit.at(item.where)

    items = _files(rows)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        while window := list(itertools.islice(items, _WINDOW)):
            yield from pool.map(content, window)


def _files(rows: Iterable[Row | Rejected]) -> Iterator[Row | Rejected]:
    for row in rows:
        if isinstance(row, Rejected) or not isinstance(row.value, dict) or "files" not in row.value:
            yield row
            continue
        files = row.value["files"]
        if not isinstance(files, list):
            yield Rejected(row.where, f"field 'files' is {type(files).__name__}, not a list")
            continue
        for number, file in enumerate(files):
            name = file.get("path") if isinstance(file, dict) else None
            yield row._replace(where=f"{row.where}: {name or f'file {number}'}", value=file)


def _content(file: Any, fetch: Callable[[], Callable[[str], bytes | None]]) -> str:
    if not isinstance(file, dict):
        raise Misfit("not an object", type(file).__name__)
    if file.get("is_vendor"):
        raise Misfit("vendored")
    if file.get("is_generated"):
        raise Misfit("generated")
    if file.get("content") is not None:
        return text_of(file, "content")
    name = text_of(file, "blob_id")
    if not _ID.fullmatch(name):  # it becomes part of a path
        raise Misfit("field 'blob_id' is no id", name)
    packed = fetch()(name)
    if packed is None:
        raise Misfit("content not found")
    encoding = file.get("src_encoding") or "UTF-8"
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Misfit("content is not gzip", str(error)) from None
    if len(content) > LINE_BYTES:
        raise Misfit(f"content has more than {LINE_BYTES:,} bytes")
    try:
        return content.decode(encoding)
    except (LookupError, TypeError, ValueError) as error:
        raise Misfit("content is not in its encoding", str(error)) from None


def _fetcher(place: str) -> Callable[[str], bytes | None]:
    """What gives the bytes under a name, or None where there are none."""
    if is_url(place):
        return functools.partial(_kept, Bucket(place), cache_folder() / "contents")
    if not Path(place).is_dir():
        raise ConfigError(f"{place}: no such folder of contents")
    return lambda name: _read(Path(place) / name)


def _kept(bucket: Bucket, folder: Path, name: str) -> bytes | None:
    """An object's bytes, from the cache if they are there: an id never means others."""
    file = folder / name[:2] / name
    content = _read(file)
    if content is None and (content := bucket.read(name)) is not None:
        partial = file.with_name(f"{name}.{os.getpid()}-{threading.get_ident()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    return content


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
