"""What a sweep has found so far: a file for each part, named by the hash of all that the part depends on.

A file is written when it is whole. So what is there is right, whenever a sweep was stopped and whatever it is asked for
next.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.distributed import is_lead, on_lead
from jaxdraft.files import commit
from jaxdraft.untrusted import read_json


class Parts:
    """What was found before, in a folder that is made when there is something to keep.

    Args:
      folder: of the parts.
      common: what every part depends on besides its own description.
      earlier: folders of the same kind that are looked into too; what is found there is copied.
      keep: called with each new file.
    """

    def __init__(
        self,
        folder: Path,
        common: Mapping[str, Any],
        earlier: Sequence[Path] = (),
        keep: Callable[[Path], Any] = lambda _: None,
    ):
        self._folder, self._common, self._earlier, self._keep = folder, common, earlier, keep

    def find(self, of: Mapping[str, Any]) -> Any:
        """What was found for this description, or ``None``; the same on all processes."""

        def on_disk() -> Any:
            path = self._path(of)
            if path.exists():
                return _read(path)["found"]
            for other in (folder / path.name for folder in self._earlier):
                if other.exists():
                    return self._write(path, _read(other))
            return None

        return on_lead(on_disk)

    def add(self, of: Mapping[str, Any], found: Any) -> Any:
        """Keeps what was found."""
        if is_lead():
            self._write(self._path(of), {"of": {**self._common, **of}, "found": found})
        return found

    def all(self, **of: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
        """Every description that has these fields among others, with what was found. Only the lead can ask."""
        wanted = {**self._common, **of}.items()
        for part in map(_read, sorted(self._folder.glob("*.json"))):
            if wanted <= part["of"].items():
                yield part["of"], part["found"]

    def _path(self, of: Mapping[str, Any]) -> Path:
        content = json.dumps({**self._common, **of}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"

    def _write(self, path: Path, part: Mapping[str, Any]) -> Any:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(part, ensure_ascii=False) + "\n", "utf-8")
        commit(temporary, path)
        self._keep(path)
        return part["found"]


def _read(path: Path) -> dict[str, Any]:
    fields = {"of": dict, "found": object}
    return read_json(path, fields=fields, remedy="delete it, and it is measured again")
