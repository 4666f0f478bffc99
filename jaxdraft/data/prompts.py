"""Prompts, one JSON object per line: `{"id", "prompt" | "messages" | "tokens", "reference"?, ...}`."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxdraft.data.quarantine import Quarantine, Rejected, first
from jaxdraft.data.readers import Row, files_fingerprint, local_file, read_jsonl
from jaxdraft.errors import ConfigError
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer

_log = logging.getLogger(__name__)
_FORMS = ("prompt", "messages", "tokens")
_SETTINGS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (float, lambda value: 0 <= value < math.inf, "0 or a positive number"),
    "top_p": (float, lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "max_new_tokens": (int, lambda value: value >= 1, "a whole number of at least 1"),
}

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue.

    Attributes:
      id: names the example; its random numbers depend on it.
      tokens: ids to start from, BOS included where the tokenizer adds it.
      text: the prompt as text.
      reference: a known answer, or None.
      messages: of a conversation, what ``text`` is the rendering of; None for other prompts.
      temperature, top_p, max_new_tokens: where this prompt is to be answered otherwise than the stage says.
      extra: every other field of the line.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    reference: str | None = None
    messages: tuple[Message, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def example_id(name: str) -> int:
    """A number in [0, 2³²) for an id: what is sampled for a prompt depends on its id, not on its place in a list."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class PromptSource(Protocol):
    """What `Generate` and `Evaluate` read."""

    def prompts(self, tokenizer: Tokenizer) -> Iterable[Prompt | Rejected]:
        """The prompts, in the same order every time, with a ``Rejected`` in the place of each that cannot be had."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the content `prompts` is made from."""
        ...


def read_prompts(
    source: PromptSource,
    tokenizer: Tokenizer,
    unfit: Callable[[Prompt], str | None] = lambda _: None,
    limit: int | None = None,
    name: str | None = None,
) -> list[Prompt]:
    """The prompts of a source; how many are left out, and why, goes into the log.

    Args:
      source: whose prompts.
      tokenizer: the target's.
      unfit: why a prompt cannot be asked, None where it can.
      limit: at most this many, the first that can.
      name: of the source, for the log.

    Raises:
      ConfigError: it has none that fits.
    """
    each = (
        Rejected(f"prompt {item.id}", reason) if isinstance(item, Prompt) and (reason := unfit(item)) else item
        for item in source.prompts(tokenizer)
    )
    quarantine = Quarantine()
    prompts = list(quarantine.accepted(first(each, limit)))
    if not prompts:
        raise ConfigError(f"{source}: no prompts")
    for reason, count in quarantine.counts.items():
        _log.warning("%s: left out %d prompts: %s", name or source, count, reason)
    return prompts


@dataclass(frozen=True)
class PromptFile:
    """Prompts from a JSONL file, plain or `.gz`. A line without an id is given its number.

    Attributes:
      limit: at most this many prompts, the first ones that fit.
      max_tokens: a longer prompt is rejected.
    Raises (when read):
      ConfigError: names file and line.
    """

    path: str
    limit: int | None = None
    max_tokens: int | None = None

    def fingerprint(self) -> str:
        return files_fingerprint([local_file(self.path, "prompts")])

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        return first(self._prompts(tokenizer), self.limit)

    def _prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        rows = read_jsonl(local_file(self.path, "prompts"))
        for where, prompt in _prompts_of(rows, tokenizer):
            is_long = self.max_tokens is not None and len(prompt.tokens) > self.max_tokens
            yield Rejected(where, f"more than {self.max_tokens} tokens") if is_long else prompt


@dataclass(frozen=True)
class PromptList:
    """Prompts given in Python, each as a line of a `PromptFile` holds it. One without an id is given its number.

    Raises (when read):
      ConfigError: names the prompt.
    """

    rows: Sequence[Mapping[str, Any]]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(list(self.rows)).encode()).hexdigest()

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        rows = (Row(f"prompt {number}", number, row) for number, row in enumerate(self.rows, start=1))
        return (prompt for _, prompt in _prompts_of(rows, tokenizer))


def _prompts_of(rows: Iterable[Row | Rejected], tokenizer: Tokenizer) -> Iterator[tuple[str, Prompt]]:
    """Where each prompt stands, and the prompt."""
    ids: set[str] = set()
    for row in rows:
        if isinstance(row, Rejected):
            raise ConfigError(f"{row.where}: {row.reason}")
        prompt = read_prompt(row.value, row.number, tokenizer, row.where)
        if prompt.id in ids:
            raise ConfigError(f"{row.where}: id {prompt.id!r} was used before; ids must be unique")
        ids.add(prompt.id)
        yield row.where, prompt


def read_prompt(row: Any, number: int, tokenizer: Tokenizer, where: str) -> Prompt:
    """The prompt that a JSON object gives; `number` is the id of one that has none.

    Raises:
      ConfigError: it gives none; the message begins with `where`.
    """
    given = [form for form in _FORMS if isinstance(row, dict) and form in row]
    if len(given) != 1:
        raise ConfigError(f"{where}: needs exactly one of {', '.join(_FORMS)}, has {' and '.join(given) or 'none'}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ConfigError(f"{where}: not Unicode text") from None
    form, messages = given[0], None
    if form == "prompt":
        text = _expect(row, "prompt", str, where)
        tokens = tokenizer.encode(text)
    elif form == "messages":
        messages = tuple(_messages(_expect(row, "messages", list, where), where))
        try:
            text = tokenizer.render(messages)
        except ChatTemplateError as error:
            raise ConfigError(f"{where}: {error}") from None
        tokens = tokenizer.encode(text, bos=False)
    else:
        tokens = _expect(row, "tokens", list, where)
        if bad := [t for t in tokens if type(t) is not int or not 0 <= t < tokenizer.vocab_size]:
            raise ConfigError(f"{where}: token {bad[0]!r} is not among the tokenizer's {tokenizer.vocab_size} ids")
        text = tokenizer.decode(tokens)
    if not tokens:
        raise ConfigError(f"{where}: the prompt is empty")
    reference = None if row.get("reference") is None else _expect(row, "reference", str, where)
    settings = {key: _setting(row, key, where) for key in _SETTINGS if row.get(key) is not None}
    extra = {key: value for key, value in row.items() if key not in {"id", "reference", *_FORMS, *_SETTINGS}}
    return Prompt(str(row.get("id", number)), tuple(tokens), text, reference, messages, **settings, extra=extra)


def is_message(value: Any) -> bool:
    """Whether a value of JSON is a ``Message``."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _messages(messages: list[Any], where: str) -> list[dict[str, str]]:
    for message in messages:
        if not is_message(message):
            raise ConfigError(f'{where}: each of "messages" needs "role" and "content" as text')
    return messages


def _setting(row: dict[str, Any], key: str, where: str) -> Any:
    kind, is_valid, rule = _SETTINGS[key]
    value = row[key]
    if type(value) not in (int, kind) or not is_valid(value):
        raise ConfigError(f"{where}: {key!r} is {value!r}: it must be {rule}")
    return kind(value)


def _expect(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if not isinstance(row[key], kind):
        wanted = "text" if kind is str else "a list"
        raise ConfigError(f"{where}: {key!r} is {type(row[key]).__name__}, not {wanted}")
    return row[key]
