"""Any text, cut into passages that are trained on, asked about, or held out, or into prompts and their continuations.

A passage is a run of whole lines. Which split it belongs to depends on its own words alone, so that text added to a
corpus moves nothing from one split to another.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Rejected, first
from jaxdraft.data.sources import Source
from jaxdraft.errors import ConfigError
from jaxdraft.tokenizers import Tokenizer

Split = Literal["train", "seed", "eval", "all"]
_OF_SIXTEEN: dict[str, range] = {"eval": range(1), "seed": range(1, 5), "train": range(5, 16), "all": range(16)}


@dataclass(frozen=True)
class Passages:
    """The passages of a split: "train" (11/16), "seed" (4/16, for `Generate`), "eval" (1/16, for `Evaluate`) or "all".

    Attributes:
      text: where the text is from.
      characters: a passage ends with the line that brings it to this many.
    """

    text: Source
    split: Split = "train"
    characters: int = 1000

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ConfigError(f"split={self.split!r}: must be one of {', '.join(get_args(Split))}")
        if self.characters < 1:
            raise ConfigError(f"characters is {self.characters}: it must be positive")

    def documents(self) -> Iterator[str | Rejected]:
        for document in self.text.documents():
            if isinstance(document, Rejected):
                yield document
                continue
            for passage in _passages(document, self.characters):
                if hashlib.sha256(passage.encode()).digest()[0] % 16 in _OF_SIXTEEN[self.split]:
                    yield passage

    def fingerprint(self) -> str:
        return self.text.fingerprint()


@dataclass(frozen=True)
class Beginnings:
    """The first tokens of each passage as a prompt, its rest as the reference.

    Attributes:
      passages: whose beginnings are taken.
      tokens: of each prompt, BOS included; shorter passages are rejected.
      limit: at most this many prompts.
    """

    passages: Passages
    tokens: int = 16
    limit: int | None = None

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        """Raises ConfigError where no passage of the split is long enough."""

        def each() -> Iterator[Prompt | Rejected]:
            number = 0
            for passage in self.passages.documents():
                if isinstance(passage, Rejected):
                    yield passage
                    continue
                name = f"{self.passages.split}:{number}"
                number += 1
                ids = tokenizer.encode(passage)
                if len(ids) > self.tokens:
                    yield _cut(name, ids, self.tokens, tokenizer)
                else:
                    yield Rejected(name, f"no more than {self.tokens} tokens")

        found = False
        for item in first(each(), self.limit):
            found = found or isinstance(item, Prompt)
            yield item
        if not found:
            raise ConfigError(
                f"{self.passages.text}: no {self.passages.split} passage of more than {self.tokens} tokens; "
                "give a longer text"
            )

    def fingerprint(self) -> str:
        return self.passages.fingerprint()


@dataclass(frozen=True)
class Continuations:
    """Each document up to a token that its own words draw as a prompt, its rest as the reference.

    As FastDraft measures on TinyStories: "starting from a random position within each sample".

    Attributes:
      text: where the documents are from.
      limit: at most this many prompts.
      max_tokens: a longer prompt is rejected.
    """

    text: Source
    limit: int | None = None
    max_tokens: int | None = None

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        def each() -> Iterator[Prompt | Rejected]:
            seen: set[str] = set()
            for document in self.text.documents():
                if isinstance(document, Rejected):
                    yield document
                    continue
                digest = hashlib.sha256(document.encode()).hexdigest()
                name, ids = digest[:16], tokenizer.encode(document)
                shortest = 1 + tokenizer.adds_bos
                if name in seen:
                    yield Rejected(name, "duplicate")
                elif len(ids) <= shortest:
                    yield Rejected(name, "a single token")
                else:
                    tokens = shortest + int(digest, 16) % (len(ids) - shortest)
                    too_long = self.max_tokens is not None and tokens > self.max_tokens
                    reason = f"more than {self.max_tokens} tokens"
                    yield Rejected(name, reason) if too_long else _cut(name, ids, tokens, tokenizer)
                seen.add(name)

        return first(each(), self.limit)

    def fingerprint(self) -> str:
        return self.text.fingerprint()


def _cut(name: str, ids: list[int], tokens: int, tokenizer: Tokenizer) -> Prompt:
    beginning, rest = ids[:tokens], ids[tokens:]
    return Prompt(name, tuple(beginning), tokenizer.decode(beginning), tokenizer.continuation(beginning, rest))


def _passages(document: str, characters: int) -> Iterator[str]:
    passage = ""
    for line in document.splitlines(keepends=True):
        passage += line
        if len(passage) >= characters:
            yield passage.strip()
            passage = ""
    if passage.strip():
        yield passage.strip()
