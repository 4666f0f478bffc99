"""Where a run directory is kept: on a disk of this machine, or in a bucket while the run works in a copy here.

A run in a bucket (``--workdir gs://bucket/run``) works in a folder of this machine as any other does. What has to
outlive the machine is copied to its home there, a stage's record last: what a record says is done has all its files
there. The home is right about everything: what is here and not there, or differs, is made as it is there before it is
used. Checkpoints never lie here; orbax writes and reads them there.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from jaxdraft.errors import ConfigError
from jaxdraft.lease import is_held, lease
from jaxdraft.remote import Bucket, Stamp, cache_folder, is_url
from jaxdraft.untrusted import read_json

CHECKPOINTS, RECORD, REPORT, SUPERSEDED = "checkpoints", "stage.json", "report", "superseded"
LOCK = ".lock"  # held, with flock, by the run that works in the folder
RUN_FILES = ("recipe.json", "run.json")
BEGUN = (f"{CHECKPOINTS}/[0-9]*", "responses-*.json")


class Home:
    """A run directory on a disk of this machine: it is its own home, so there is little to do.

    Attributes:
      folder: where the run works.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other machines' runs out, as the lock in ``folder`` does with this machine's."""
        return contextlib.nullcontext()

    def is_held(self) -> bool:
        """Whether a run is at work in it."""
        lock = self.folder / LOCK
        if not lock.is_file():
            return False
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def fetch_records(self) -> None:
        """Brings ``recipe.json``, ``run.json``, the report and every ``stage.json`` up to date."""

    def fetch(self, stage: str, patterns: Sequence[str] = ()) -> None:
        """Makes a stage's folder what it is at home; with patterns, only its files that match one."""

    def keep(self, *files: Path) -> None:
        """Copies files home that are not there yet as they are now. Only the lead process does."""

    def keep_own(self, *files: Path) -> None:
        """The same of files that no other process writes. Every process does."""

    def keep_report(self) -> None:
        """Makes the report at home the one that is here."""

    def lost(self, stage: str, files: Sequence[str]) -> list[str]:
        """Those of a stage's files that are gone from home."""
        return [name for name in files if not (self.folder / stage / name).exists()]

    def checkpoints(self, stage: str) -> Path | str:
        """The folder of a stage's checkpoints."""
        return self.folder / stage / CHECKPOINTS

    def has_begun(self, stage: str) -> bool:
        """Whether an unfinished stage has something to go on from: a checkpoint, or a shard of answers."""
        return any(any((self.folder / stage).glob(pattern)) for pattern in BEGUN)

    def set_aside(self, stage: str) -> str:
        """Moves what a stage had made to ``superseded/`` and says where it is now."""
        superseded = self.folder / SUPERSEDED
        superseded.mkdir(exist_ok=True)
        kept = superseded / _next(stage, [path.name for path in superseded.iterdir()])
        shutil.move(self.folder / stage, kept)
        return str(kept)

    def aside(self, stage: str) -> list[Path]:
        """Folders here with what a stage had made before it was set aside, the newest first."""
        numbered = lambda path: int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0
        return sorted((self.folder / SUPERSEDED).glob(f"{stage}.*"), key=numbered, reverse=True)


class BucketHome(Home):
    """A run directory in a bucket.

    Args:
      url: ``gs://bucket/run``.
      process: index of this process; the first one leads. ``None`` only looks.

    Raises:
      ConfigError: checkpoints cannot be written there, or there is nothing to log in with.
    """

    def __init__(self, url: str, process: int | None):
        if not url.startswith("gs://"):
            raise ConfigError(f"{url}: a run directory is a path on this machine or gs://BUCKET/PATH")
        self._bucket = Bucket(url)
        _check_credentials(self._bucket.url)
        self._leads = process == 0
        name = hashlib.sha256(self._bucket.url.encode()).hexdigest()[:16]
        super().__init__(cache_folder() / "runs" / name / ("view" if process is None else str(process)))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._kept: dict[Path, Stamp | None] = {}

    def __str__(self) -> str:
        return self._bucket.url

    def held(self) -> contextlib.AbstractContextManager[None]:
        return lease(self._bucket) if self._leads else contextlib.nullcontext()

    def is_held(self) -> bool:
        return is_held(self._bucket)

    def fetch_records(self) -> None:
        there = self._bucket.files()
        stages = {name.split("/")[0] for name in there if name.count("/") == 1 and name.endswith(f"/{RECORD}")}
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in (*stages, REPORT):
                shutil.rmtree(path)
        records = [*RUN_FILES, *(f"{stage}/{RECORD}" for stage in stages)]
        self._update({name: stamp for name, stamp in there.items() if name in records or name.startswith(f"{REPORT}/")})
        for name in RUN_FILES:
            if name not in there:
                (self.folder / name).unlink(missing_ok=True)
        self._forget(REPORT, there)

    def fetch(self, stage: str, patterns: Sequence[str] = ()) -> None:
        there = {
            name: stamp
            for name, stamp in self._bucket.files(stage).items()
            if not name.startswith(f"{stage}/{CHECKPOINTS}/")
            and (not patterns or any(fnmatch(name.split("/")[-1], pattern) for pattern in patterns))
        }
        if not patterns:
            self._forget(stage, there)
        copied, record = self._update(there), self.folder / stage / RECORD
        outputs = read_json(record).get("outputs", {}) if record.exists() else {}
        for file in copied:
            name = str(file.relative_to(self.folder / stage))
            with file.open("rb") as content:
                if name in outputs and hashlib.file_digest(content, "sha256").hexdigest() != outputs[name]:
                    raise OSError(f"{self}/{stage}/{name} is damaged: it does not match its hash in {RECORD}")

    def keep(self, *files: Path) -> None:
        if self._leads:
            self.keep_own(*files)

    def keep_own(self, *files: Path) -> None:
        new = [file for file in files if Stamp.of(file) != self._kept.get(file)]
        self._bucket.copy_there({str(file.relative_to(self.folder)): file for file in new})
        self._kept.update({file: Stamp.of(file) for file in new})

    def keep_report(self) -> None:
        files = [file for file in (self.folder / REPORT).rglob("*") if file.is_file()]
        self.keep(*files)
        if self._leads:
            for name in self._bucket.files(REPORT).keys() - {str(file.relative_to(self.folder)) for file in files}:
                self._bucket.remove(name)

    def lost(self, stage: str, files: Sequence[str]) -> list[str]:
        there = self._bucket.files(stage)
        return [name for name in files if f"{stage}/{name}" not in there]

    def checkpoints(self, stage: str) -> Path | str:
        return f"{self._bucket.url}/{stage}/{CHECKPOINTS}"

    def has_begun(self, stage: str) -> bool:
        names = [name.removeprefix(f"{stage}/") for name in self._bucket.files(stage)]
        return any(fnmatch(name, pattern) for name in names for pattern in BEGUN)

    def set_aside(self, stage: str) -> str:
        names = [name.split("/")[1] for name in self._bucket.files(SUPERSEDED)]
        kept = f"{SUPERSEDED}/{_next(stage, names)}"
        if self._leads:
            record = f"{stage}/{RECORD}"  # the last to go: a move that was cut short is begun again
            there = sorted(self._bucket.files(stage), key=lambda name: (name == record, name))
            self._bucket.move({name: f"{kept}/{name.removeprefix(f'{stage}/')}" for name in there})
        shutil.rmtree(self.folder / stage, ignore_errors=True)
        return f"{self}/{kept}"

    def _update(self, there: dict[str, Stamp]) -> list[Path]:
        copied = self._bucket.copy_here(there, self.folder)
        self._kept.update({self.folder / name: stamp for name, stamp in there.items()})
        return copied

    def _forget(self, below: str, there: dict[str, Stamp]) -> None:
        for file in (self.folder / below).rglob("*"):
            if file.is_file() and str(file.relative_to(self.folder)) not in there:
                file.unlink()


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a stage's folder, ascending; whether they are whole is not looked at."""
    there = (folder / CHECKPOINTS).glob("*")
    return sorted(int(path.name) for path in there if path.name.isdigit() and path.is_dir())


def open_home(place: Path | str, process: int | None = 0) -> Home:
    """The home of a run directory given as a path, or as the URL of a folder in a bucket."""
    if is_url(place):
        return BucketHome(str(place), process)
    if Path(place).exists() and not Path(place).is_dir():
        raise ConfigError(f"{place} is a file: a run directory is a folder, made where there is none")
    return Home(Path(place))


def _next(stage: str, names: Sequence[str]) -> str:
    """``stage.N`` with the first number that is free."""
    numbers = [name.removeprefix(f"{stage}.") for name in names if name.startswith(f"{stage}.")]
    return f"{stage}.{max([int(number) for number in numbers if number.isdigit()], default=0) + 1}"


def _check_credentials(url: str) -> None:
    """Without any, gcsfs asks as nobody and is refused for half a minute."""
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return
    import google.auth

    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise ConfigError(
            f"{url}: no Google credentials: gcloud auth application-default login, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to a key file"
        ) from error
