"""Files in a bucket (``gs://``, ``s3://``) and their copies on this machine, through fsspec's file systems.

ArrayRecord, safetensors and sentencepiece read local files, so what lies in a bucket is copied into a cache first
(``JAXDRAFT_CACHE``, default ``~/.cache/jaxdraft``). A copy keeps the size and the time of its object: where both are
the object's still, it is not copied again.
"""

import contextlib
import datetime
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdraft.errors import ConfigError
from jaxdraft.tracking import say

# scheme -> the package with its file system, and the extra of ours that installs it
_SYSTEMS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_MAGIC = "*?["
_PARTIAL = ".tmp"
_TOLD = 100 << 20  # bytes: copies of more are told to the person who waits


class Stamp(NamedTuple):
    """What tells a file from another version of it: its size and the time it was written, in milliseconds."""

    size: int
    time: int

    @classmethod
    def of(cls, file: Path) -> "Stamp | None":
        """Of a file here; ``None`` if there is none."""
        if not file.is_file():
            return None
        stat = file.stat()
        return cls(stat.st_size, stat.st_mtime_ns // 10**6)


def is_url(place: str | Path) -> bool:
    """Whether a place is written as a URL, and not as a path on this machine."""
    return "://" in str(place)


def cache_folder() -> Path:
    """Where copies are kept."""
    return Path(os.environ.get("JAXDRAFT_CACHE") or "~/.cache/jaxdraft").expanduser().absolute()


def local_copy(place: str, patterns: Sequence[str] = ()) -> str:
    """The path on this machine of a file, folder or glob; what lies in a bucket is brought up to date first.

    Args:
      place: a path, which is returned as it is, or the URL of an object, a folder or a glob.
      patterns: of a folder, take only the files right in it whose names match one of these.

    Raises:
      ConfigError: an unknown scheme, a file system that is not installed, or nothing there.
      OSError: the bucket cannot be read.
    """
    if not is_url(place):
        return place
    scheme, _, path = place.partition("://")
    name, _, below = path.strip("/").partition("/")
    bucket, is_glob = Bucket(f"{scheme}://{name}"), any(sign in below for sign in _MAGIC)
    there = bucket.glob(below) if is_glob else bucket.files(below)
    root = cache_folder() / "inputs" / scheme / name
    before = root.glob(below) if is_glob else (root / below).rglob("*")
    for file in [file for file in before if file.is_file() and file.suffix != _PARTIAL]:
        if str(file.relative_to(root)) not in there:
            file.unlink()  # what is gone there is not found here
    if patterns:
        names = [Path(below) / pattern for pattern in patterns]
        there = {name: stamp for name, stamp in there.items() if any(map(Path(name).match, map(str, names)))}
        there = {name: stamp for name, stamp in there.items() if Path(name).parent == Path(below)}
    if not there:
        raise ConfigError(f"{place}: nothing is there")
    bucket.copy_here(there, root)
    return str(root / below)


class Bucket:
    """A place in a bucket: names are relative to it.

    Args:
      url: ``gs://bucket/path`` or ``s3://bucket/path``.

    Raises:
      ConfigError: another scheme, no bucket in it, or its file system is not installed.
    """

    def __init__(self, url: str):
        self.scheme, _, path = url.partition("://")
        self.path = path.strip("/")
        self.url = f"{self.scheme}://{self.path}"
        if self.scheme not in _SYSTEMS or not self.path:
            known = " or ".join(f"{scheme}://BUCKET/PATH" for scheme in _SYSTEMS)
            raise ConfigError(f"{url}: write a path on this machine, or {known}")
        package, extra = _SYSTEMS[self.scheme]
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"{url}: {self.scheme}:// needs {package} ({error}): EXTRAS={extra} bash launch/setup.sh in the "
                f"checkout, or install {package} beside jaxdraft"
            ) from error
        import fsspec

        # Listings are not cached: other processes write there.
        self.system = fsspec.filesystem(self.scheme, use_listings_cache=False)

    def key(self, name: str) -> str:
        """The full path of a name."""
        return f"{self.path}/{name}" if name else self.path

    def files(self, below: str = "") -> dict[str, Stamp]:
        """Every object below a name, or the one of that name."""
        with self.telling():
            return self._stamps(self.system.find(self.key(below), detail=True))

    def glob(self, pattern: str) -> dict[str, Stamp]:
        """Every object whose name matches."""
        with self.telling():
            found = self.system.glob(self.key(pattern), detail=True)
            return self._stamps({path: info for path, info in found.items() if info["type"] == "file"})

    def copy_here(self, there: Mapping[str, Stamp], folder: Path) -> list[Path]:
        """Makes ``folder / name`` the object of each name; returns those that had to be copied.

        Raises:
          OSError: an object cannot be read, or changed while it was.
        """
        files = {name: folder / name for name in there}
        stale = [name for name in there if Stamp.of(files[name]) != there[name]]
        if not stale:
            return []
        size = sum(there[name].size for name in stale)
        if size > _TOLD:
            say(f"    copying {len(stale)} files ({size / 1e9:.1f} GB) from {self.url}")
        # Under names of this process's own until they are whole: another one on this machine may be at the same.
        partial = {name: files[name].with_name(f"{files[name].name}.{os.getpid()}{_PARTIAL}") for name in stale}
        for file in partial.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        with self.telling():
            self.system.get([self.key(name) for name in stale], [str(partial[name]) for name in stale])
        for name, file in partial.items():
            if (length := file.stat().st_size) != there[name].size:
                raise OSError(f"{self.url}/{name}: {there[name].size} bytes there, {length} came: run it again")
            stamp_file(file, there[name])
            file.replace(files[name])
        return [files[name] for name in stale]

    def copy_there(self, files: Mapping[str, Path]) -> None:
        """Makes the object of each name what its file is, and gives the file the object's time.

        Raises:
          OSError: it cannot be written, or is not there with the file's size.
        """
        if not files:
            return
        with self.telling():
            self.system.put([str(file) for file in files.values()], [self.key(name) for name in files])
            stamps = {name: _stamp(self.system.info(self.key(name))) for name in files}
        for name, file in files.items():
            if (length := file.stat().st_size) != stamps[name].size:
                raise OSError(f"{self.url}/{name}: {length} bytes were written, {stamps[name].size} are there")
            stamp_file(file, stamps[name])

    def read(self, name: str) -> bytes | None:
        """An object's content; ``None`` if there is none."""
        with self.telling():
            try:
                return self.system.cat_file(self.key(name))
            except FileNotFoundError:
                return None

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one of that name; says whether it did. No two callers both did."""
        with self.telling():
            try:
                self.system.pipe_file(self.key(name), content, mode="create")
            except FileExistsError:
                return False
            return True

    def write(self, name: str, content: bytes) -> None:
        with self.telling():
            self.system.pipe_file(self.key(name), content)

    def move(self, names: Mapping[str, str]) -> None:
        """Gives objects other names. They go in their order, when all are there under the new ones."""
        with self.telling():
            self.system.copy([self.key(name) for name in names], [self.key(name) for name in names.values()])
        for name in names:
            self.remove(name)

    def remove(self, name: str) -> None:
        with self.telling(), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self.key(name))

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Says in one line what the file system's own errors mean.

        Raises:
          ConfigError: there is no such bucket.
          OSError: anything else.
        """
        try:
            yield
        except ConfigError:
            raise
        except FileNotFoundError as error:
            bucket = self.path.partition("/")[0]
            raise ConfigError(
                f"{self.url}: not found ({_first_line(error)}): is {bucket!r} the bucket's name, and does it exist?"
            ) from error
        except Exception as error:  # each of gcsfs, s3fs, aiohttp, botocore and google-auth has a family of its own
            raise OSError(f"{self.url}: {_first_line(error)}{_remedy(error)}") from error

    def _stamps(self, found: Mapping[str, Any]) -> dict[str, Stamp]:
        stamps = {}
        for path, info in found.items():
            name = path.removeprefix(f"{self.path}/")
            if path.endswith("/"):
                continue  # a console's placeholder for a folder
            if ".." in name.split("/") or name.startswith("/"):
                raise ConfigError(f"{self.url}: the object {path!r} has a name that would lie outside of its folder")
            stamps[name] = _stamp(info)
        return stamps


def stamp_file(file: Path, stamp: Stamp) -> None:
    """Gives a file the time of its object."""
    os.utime(file, ns=(stamp.time * 10**6, stamp.time * 10**6))


def _stamp(info: Mapping[str, Any]) -> Stamp:
    time = info.get("mtime") or info.get("LastModified")  # gcsfs, s3fs
    assert isinstance(time, datetime.datetime), info
    return Stamp(info["size"], round(time.timestamp() * 1000))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _remedy(error: Exception) -> str:
    code = getattr(error, "code", None)
    if code in (401, 403) or "Forbidden" in str(error) or isinstance(error, PermissionError):
        return "; log in (gcloud auth application-default login), or give this machine's account access to the bucket"
    return ""
