"""Throw-away stand-in for the founder's module of this name."""

import json
from pathlib import Path

from jaxdraft.data.records import sha256, write_json


def write_hashes(folder: Path, record: Path) -> None:
    files = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_json(record, {"files": files})


def damage(folder: Path, record: Path) -> list[str]:
    try:
        expected = dict(json.loads(record.read_text())["files"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [f"{record}: unreadable ({error})"]
    found = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    return [
        f"{folder / name} has changed since it was saved"
        if name in found and name in expected
        else f"{folder / name} is gone"
        if name in expected
        else f"{folder / name} is not of this checkpoint"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
