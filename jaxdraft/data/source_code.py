"""A folder of source code as documents, one per file."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdraft.data.quarantine import Misfit, Rejected
from jaxdraft.data.readers import Row, files_fingerprint, is_there
from jaxdraft.data.sources import documents_of
from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.remote import local_copy

LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "c": (".c", ".h"),
    "c++": (".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx"),
    "c#": (".cs",),
    "css": (".css",),
    "go": (".go",),
    "html": (".html",),
    "java": (".java",),
    "javascript": (".cjs", ".js", ".jsx", ".mjs"),
    "json": (".json",),
    "kotlin": (".kt", ".kts"),
    "lua": (".lua",),
    "markdown": (".md",),
    "php": (".php",),
    "python": (".py", ".pyi"),
    "r": (".r", ".R"),
    "restructuredtext": (".rst",),
    "ruby": (".rb",),
    "rust": (".rs",),
    "shell": (".bash", ".sh"),
    "sql": (".sql",),
    "swift": (".swift",),
    "toml": (".toml",),
    "typescript": (".ts", ".tsx"),
    "yaml": (".yaml", ".yml"),
}
"""Language -> the suffixes of its files: the languages of The Stack v2 smol that have suffixes of their own."""

_VENDORED = {"node_modules", "site-packages", "third_party", "thirdparty", "vendor", "vendored"}
_LOCK_FILE = re.compile(r"(^|[-.])lock\.(json|ya?ml|toml)$|^npm-shrinkwrap\.json$|\.min\.(js|css)$")
_GENERATED = re.compile(r"@generated|DO NOT EDIT|automatically generated|auto-generated", re.IGNORECASE)
_HEAD = 1000  # characters in which a generated file says that it is one


@dataclass(frozen=True)
class SourceCode:
    """The files of a folder whose suffix is that of a language, in the order of their paths, vendored ones last.

    Hidden folders are not looked into. Rejected are files in folders of vendored code, generated ones (lock files,
    minified ones, those that say so in their first lines), those above `max_bytes`, binary ones and what is not UTF-8.

    Attributes:
      path: the folder, here or in a bucket.
      languages: of `LANGUAGES`; empty means all.
      max_bytes: of a file.
      limit: at most this many documents.
      licence, revision: kept next to the data made from it.
    """

    path: str
    languages: tuple[str, ...] = ()
    max_bytes: int = 1_000_000
    limit: int | None = None
    licence: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for language in self.languages:
            if language not in LANGUAGES:
                raise ConfigError(unknown_name("language", language, list(LANGUAGES)))

    def documents(self) -> Iterator[str | Rejected]:
        root = self._root()
        rows = (Row(str(file), i, file.relative_to(root)) for i, file in enumerate(self._files()))
        return documents_of(rows, lambda name: self._text(root, name), self.limit)

    def fingerprint(self) -> str:
        return files_fingerprint(self._files())

    def provenance(self) -> dict[str, Any]:
        return {"files": len(self._files()), "revision": self.revision, "licence": self.licence}

    def _root(self) -> Path:
        root = Path(local_copy(self.path))
        if not root.is_dir():
            raise ConfigError(f"{self.path}: no such folder of source code")
        return root

    def _files(self) -> list[Path]:
        languages = self.languages or tuple(LANGUAGES)
        suffixes = {suffix for language in languages for suffix in LANGUAGES[language]}
        found = []
        root = self._root()
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if not name.startswith(".")]
            found += [Path(folder, name) for name in names if Path(name).suffix in suffixes]
        # A project may have ten thousand vendored files before its first own one.
        vendored = lambda file: bool(_VENDORED & set(file.relative_to(root).parts[:-1]))
        files = sorted((file for file in found if is_there(file)), key=lambda file: (vendored(file), file))
        if not files:
            raise ConfigError(f"{self.path}: no files of {', '.join(self.languages) or 'any known language'} there")
        return files

    def _text(self, root: Path, name: Path) -> str:
        if _VENDORED & set(name.parts[:-1]):
            raise Misfit("vendored")
        if _LOCK_FILE.search(name.name):
            raise Misfit("generated")
        if (root / name).stat().st_size > self.max_bytes:
            raise Misfit(f"more than {self.max_bytes:,} bytes")
        content = (root / name).read_bytes()
        if b"\0" in content:
            raise Misfit("binary")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise Misfit("not UTF-8") from None
        if _GENERATED.search(text, 0, _HEAD):
            raise Misfit("generated")
        return text
