"""Files that are whole or not there, and what tells one from another."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jaxdraft.errors import naming


def write_json(path: Path, value: Any) -> None:
    """A JSON file that appears under its name only when it is complete and durable."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    commit(temporary, path)


def commit(temporary: Path, path: Path) -> None:
    """Makes `temporary` durable, then visible under its name."""
    with naming(path), temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path there; without those that a run takes away meanwhile."""
    found = {}
    for place, _, names in os.walk(folder):  # which, unlike rglob, goes on where a folder went away
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[str(path.relative_to(folder))] = path.stat().st_size
    return found


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
