"""The sha256 of every file of a checkpoint, in a record beside its folder: what tells one that is whole.

``checkpoints/7.json`` is written before the folder ``checkpoints/7`` gets its name, and once more when the last two of
its files are there, which are orbax's own notes.
"""

import hashlib
import json
from pathlib import Path

from jaxdraft.files import sha256, write_json

_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_hashes(folder: Path, record: Path, *, complete: bool) -> None:
    """Writes ``{"files": {path below the folder: sha256}, "sha256": of that}`` as ``record``.

    Args:
      complete: nothing will be written there any more; of what is listed already only orbax's notes are then new.
    """
    files = _listed(record) if complete else {}
    files = files or {name: sha256(folder / name) for name in _names(folder) if name not in _WRITTEN_LAST}
    if complete:
        files |= {name: sha256(folder / name) for name in _WRITTEN_LAST if (folder / name).is_file()}
    write_json(record, {"files": files, "sha256": _digest(files)})


def is_complete(record: Path) -> bool:
    """Whether a record lists orbax's notes too."""
    return any(name in _WRITTEN_LAST for name in _listed(record))


def damage(folder: Path, record: Path) -> list[str]:
    """What is wrong with a folder, a sentence for each file that is gone, differs or was not there; empty if nothing.

    A record that is gone or cannot be read is a sentence too; hidden files that a file system or desktop adds are none.
    """
    if not record.is_file():
        return [f"{record} is gone"]
    if not (files := _listed(record)):
        return [f"{record} is damaged"]
    there = _names(folder)
    wrong = [f"{folder / name} is gone" for name in files if name not in there]
    for name in there:
        if name not in files and name not in _WRITTEN_LAST:
            if not Path(name).name.startswith("."):  # .nfs0123, .DS_Store
                wrong.append(f"{folder / name} was not there when it was saved")
        elif name in files and sha256(folder / name) != files[name]:
            wrong.append(f"{folder / name} is damaged")
    return wrong


def _listed(record: Path) -> dict[str, str]:
    """Empty where the record is gone or damaged."""
    try:
        found = json.loads(record.read_text("utf-8"))
        files: dict[str, str] = dict(found["files"])
        return files if found["sha256"] == _digest(files) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
