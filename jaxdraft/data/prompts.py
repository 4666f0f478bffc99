"""Prompts, one JSON object per line: `{"id", "prompt" | "messages" | "tokens", "reference"?, ...}`."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxdraft.data.sources import files_fingerprint, read_jsonl
from jaxdraft.errors import ConfigError
from jaxdraft.remote import local_copy
from jaxdraft.tokenizers import Tokenizer

_log = logging.getLogger(__name__)
_FORMS = ("prompt", "messages", "tokens")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue.

    Attributes:
      id: names the example; its random numbers depend on it.
      tokens: ids to start from, BOS included where the tokenizer adds it.
      text: the prompt as text.
      reference: a known answer, or None.
      extra: every other field of the line, and "messages" or "tokens" where the prompt was given so.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    reference: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def example_id(name: str) -> int:
    """A number in [0, 2³²) for an id: what is sampled for a prompt depends on its id, not on its place in a list."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class PromptSource(Protocol):
    """What `Generate` and `Evaluate` read."""

    def prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        """The prompts, in the same order every time."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the content `prompts` is made from."""
        ...


@dataclass(frozen=True)
class PromptFile:
    """Prompts from a JSONL file, plain or `.gz`. A line without an id is given its number.

    Attributes:
      limit: at most this many prompts, the first ones that fit.
      max_tokens: a longer prompt is left out, and the log says how many were.
    Raises (when read):
      ConfigError: names file and line.
    """

    path: str
    limit: int | None = None
    max_tokens: int | None = None

    def fingerprint(self) -> str:
        return files_fingerprint([self._file()])

    def prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        prompts: dict[str, Prompt] = {}
        skipped = 0
        for number, row in self._rows():
            if self.limit is not None and len(prompts) == self.limit:
                break
            prompt = _prompt(row, number, tokenizer, f"{self.path}: line {number}")
            if prompt.id in prompts:
                raise ConfigError(f"{self.path}: line {number}: id {prompt.id!r} was used before; ids must be unique")
            if self.max_tokens is not None and len(prompt.tokens) > self.max_tokens:
                skipped += 1
            else:
                prompts[prompt.id] = prompt
        if skipped:
            _log.warning("%s: left out %d prompts of more than %d tokens", self.path, skipped, self.max_tokens)
        if not prompts:
            raise ConfigError(f"{self.path}: no prompts" + (f" of at most {self.max_tokens} tokens" if skipped else ""))
        return list(prompts.values())

    def _file(self) -> Path:
        path = Path(local_copy(self.path))
        if not path.is_file():
            raise ConfigError(f"{path}: no such file of prompts")
        return path

    def _rows(self) -> Iterable[tuple[int, Any]]:
        try:
            yield from read_jsonl(self._file())
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise ConfigError(f"{self.path}: cannot be read ({error})") from error


def _prompt(row: Any, number: int, tokenizer: Tokenizer, where: str) -> Prompt:
    given = [form for form in _FORMS if isinstance(row, dict) and form in row]
    if len(given) != 1:
        raise ConfigError(f"{where}: needs exactly one of {', '.join(_FORMS)}, has {' and '.join(given) or 'none'}")
    form = given[0]
    if form == "prompt":
        text = _expect(row, "prompt", str, where)
        tokens = tokenizer.encode(text)
    elif form == "messages":
        text = tokenizer.render(_messages(_expect(row, "messages", list, where), where))
        tokens = tokenizer.encode(text, bos=False)
    else:
        tokens = _expect(row, "tokens", list, where)
        if bad := [t for t in tokens if type(t) is not int or not 0 <= t < tokenizer.vocab_size]:
            raise ConfigError(f"{where}: token {bad[0]!r} is not among the tokenizer's {tokenizer.vocab_size} ids")
        text = tokenizer.decode(tokens)
    if not tokens:
        raise ConfigError(f"{where}: the prompt is empty")
    reference = None if row.get("reference") is None else _expect(row, "reference", str, where)
    known = {"id", "prompt", "reference"}
    extra = {key: value for key, value in row.items() if key not in known}
    return Prompt(str(row.get("id", number)), tuple(tokens), text, reference, extra)


def _messages(messages: list[Any], where: str) -> list[dict[str, str]]:
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise ConfigError(f'{where}: each of "messages" needs "role" and "content" as text')
    return messages


def _expect(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if not isinstance(row[key], kind):
        wanted = "text" if kind is str else "a list"
        raise ConfigError(f"{where}: {key!r} is {type(row[key]).__name__}, not {wanted}")
    return row[key]
