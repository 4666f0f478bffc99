"""The data sets of the papers by name, from the hub or from a folder of the same shape: see `jaxdraft.data.catalogue`.

    Corpus("fineweb")                              # the commit that the catalogue names
    Instructions("oasst1", path="oasst/*.jsonl")   # files of one's own

With a recipe's argument `fineweb: Corpus = Corpus("fineweb")`, `--set fineweb.path=FOLDER` reads from a folder, and
`--set fineweb.path=none` from the hub.
"""

import hashlib
import itertools
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from jaxdraft.data.catalogue import CORPORA, PROMPTS, RENDERED, DataSet, Example, PromptSet, prompt_as_text
from jaxdraft.data.contents import contents_of
from jaxdraft.data.conversations import Conversation
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Misfit, Rejected, first
from jaxdraft.data.readers import Files, Row, fingerprint_of, is_one_place, text_of
from jaxdraft.data.sources import documents_of
from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer

Form = Literal["chat", "plain", "auto"]

_BATCH = 256  # prompts tokenised at once
_TITLE = re.compile(r" = (?!= ).+ =\s*")  # " = = Section = = " is none


@dataclass(frozen=True)
class _Named:
    """An entry of the catalogue, and which of its rows."""

    name: str
    path: str | None = None
    revision: str | None = None
    split: str | None = None
    limit: int | None = None

    known: ClassVar[Mapping[str, DataSet]] = {}

    def __post_init__(self) -> None:
        if self.name not in self.known:
            raise ConfigError(unknown_name(f"data set for {type(self).__name__}", self.name, sorted(self.known)))
        if self.split is not None and self.split not in self._set.files:
            raise ConfigError(f"{self.name}: {unknown_name('split', self.split, list(self._set.files))}")

    @property
    def _set(self) -> DataSet:
        return self.known[self.name]

    @property
    def place(self) -> str:
        """Where the files are, as ``Files`` takes it."""
        pattern = self._set.files[self.split or next(iter(self._set.files))]
        if self.path is not None:
            return self.path if is_one_place(self.path) else f"{self.path.rstrip('/')}/{pattern}"
        revision = self.revision or self._set.revision
        at = f"@{urllib.parse.quote(revision, safe='')}" if revision else ""
        return f"hf://datasets/{self._set.repository}{at}/{pattern}"

    def files(self) -> Files:
        """The files read, in order.

        Raises:
          ConfigError: there are none, or the hub cannot be reached.
        """
        return Files(self.place)

    def fingerprint(self) -> str:
        return fingerprint_of(self.place)

    def provenance(self) -> dict[str, Any]:
        files = self.files()
        return {
            "repository": self._set.repository,
            "revision": files.commit or self.revision,
            "files": files.names,
            "licence": self._set.licence,
            **({"terms": self._set.terms} if self._set.terms else {}),
            "reference": self._set.reference,
        }


@dataclass(frozen=True)
class Corpus(_Named):
    """Documents of a data set: fineweb, stack-v2-smol, tinystories, wikitext-2 or c4.

    From the hub, files are downloaded as they are read.

    Attributes:
      name: of the data set.
      path: where it is read from instead of the hub: a folder with the files of its repository under their names
        there, or a file or a glob, here or in a bucket.
      revision: another commit on the hub than the catalogue's.
      split: of its splits, another than the first.
      limit: at most this many, the first that fit.
      contents: of The Stack v2, which names its files by id: the folder, here or in a bucket, that holds the gzipped
        contents under their ids. None is Software Heritage's bucket, which needs AWS credentials and an agreement with
        them. Rows that hold their contents need none.
    """

    contents: str | None = None

    known: ClassVar[Mapping[str, DataSet]] = CORPORA

    def documents(self) -> Iterator[str | Rejected]:
        found = CORPORA[self.name]
        rows = self.files().rows(found.columns, found.separator)
        if found.contents:
            return first(contents_of(rows, self.contents or found.contents), self.limit)
        return documents_of(_articles(rows) if found.lines else rows, lambda value: text_of(value, "text"), self.limit)


@dataclass(frozen=True)
class Instructions(_Named):
    """Prompts of a data set: oig-small-chip2, oasst1, alpaca, evol-instruct, dolly, xsum, cnn-dailymail, humaneval or
    wmt18-de-en.

    A prompt's id is the data set's own, or "alpaca:17" for row 17 ("wmt18-de-en/train:17" where a split is named). What
    was asked before is rejected. Rows that hold a `prompt` as text, perhaps a `reference` too, are taken as they are.

    Attributes:
      name, path, revision, split, limit: as those of `Corpus`.
      max_tokens: a longer prompt is rejected.
      form: "chat" is the tokenizer's chat template, and "plain" a template in text for models without one: Stanford
        Alpaca's for instructions, those of T0 for summaries, HumanEval's own prompt. "auto" is "chat" where the
        tokenizer has a chat template, and "plain" where it has none.
    """

    max_tokens: int | None = None
    form: Form = "chat"

    known: ClassVar[Mapping[str, DataSet]] = PROMPTS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in get_args(Form):
            raise ConfigError(f"form={self.form!r}: must be one of {', '.join(get_args(Form))}")

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        form: Form = "plain" if tokenizer.template_fingerprint() is None else "chat"
        chosen = replace(self, form=form) if self.form == "auto" else self
        return first(chosen._prompts(tokenizer), self.limit)

    def conversations(self) -> Iterator[Conversation | Rejected]:
        """Each conversation with the data set's own answers; of a tree, the one along its best replies."""

        def each() -> Iterator[Conversation | Rejected]:
            for item in self._asked():
                if isinstance(item, Rejected):
                    yield item
                elif item.example.is_whole:
                    answer = item.example.answer
                    messages = (*item.example.messages, {"role": "assistant", "content": answer or ""})
                    yield Conversation(item.id, messages) if answer else Rejected(item.where, "no answer")

        return first(each(), self.limit)

    def _prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        items = self._asked()
        while batch := list(itertools.islice(items, _BATCH)):
            rendered = [self._rendered(item, tokenizer) for item in batch]
            texts = [each[1] for each in rendered if not isinstance(each, Rejected)]
            encoded = iter(tokenizer.encode_batch(texts, bos=False if self.form == "chat" else None))
            for each in rendered:
                yield each if isinstance(each, Rejected) else self._prompt(*each, next(encoded))

    def _rendered(self, item: "_Asked | Rejected", tokenizer: Tokenizer) -> "tuple[_Asked, str] | Rejected":
        if isinstance(item, Rejected):
            return item
        try:
            return item, item.example.text if self.form == "plain" else tokenizer.render(item.example.messages)
        except ChatTemplateError as error:
            return Rejected(item.where, str(error))
        except ConfigError as error:
            raise ConfigError(f'{error}; for {self.name}, form="plain"') from error

    def _prompt(self, item: "_Asked", text: str, tokens: list[int]) -> Prompt | Rejected:
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            return Rejected(item.where, f"more than {self.max_tokens} tokens")
        messages = item.example.messages if self.form == "chat" else None
        return Prompt(item.id, tuple(tokens), text, item.example.answer, messages)

    def _asked(self) -> Iterator["_Asked | Rejected"]:
        """Every example once: a second one of the same words, or with the same id, is rejected."""
        found = PROMPTS[self.name]
        name = self.name if self.split is None else f"{self.name}/{self.split}"
        seen: set[bytes | str] = set()
        for number, row in enumerate(self.files().rows((*found.columns, *RENDERED))):
            if isinstance(row, Rejected):
                yield row
                continue
            for item in _examples(found, row):
                if isinstance(item, Rejected):
                    yield item
                    continue
                words = hashlib.sha256(repr(item.messages).encode()).digest()[:16]
                id = f"{name}:{number}" if item.id is None else str(item.id)
                if words in seen or id in seen:
                    yield Rejected(row.where, "duplicate")
                    continue
                seen |= {words, id}
                yield _Asked(id, row.where, item)


class _Asked(NamedTuple):
    id: str
    where: str
    example: Example


def _examples(found: PromptSet, row: Row) -> Iterator[Example | Rejected]:
    try:
        if not isinstance(row.value, dict):
            raise Misfit("not an object", type(row.value).__name__)
        make = prompt_as_text if "prompt" in row.value and "prompt" not in found.columns else found.examples
        for item in make(row.value):
            yield item.at(row.where) if isinstance(item, Misfit) else item
    except Misfit as misfit:
        yield misfit.at(row.where)


def _articles(rows: Iterable[Row | Rejected]) -> Iterator[Row | Rejected]:
    """Rows that are lines, or hold several, as articles; an article begins with a title that follows a blank line."""
    start: Row | None = None
    lines: list[str] = []
    after_blank = True
    for row in rows:
        if isinstance(row, Rejected):
            yield row
            continue
        try:
            text = text_of(row.value, "text")
        except Misfit as misfit:
            yield misfit.at(row.where)
            continue
        for line in text.removesuffix("\n").split("\n"):
            if after_blank and _TITLE.fullmatch(line):
                yield from _article(start, lines)
                start, lines = row, []
            start = start or row
            after_blank = not line.strip()
            lines.append("" if after_blank else line)
    yield from _article(start, lines)


def _article(start: Row | None, lines: list[str]) -> Iterator[Row]:
    if start and any(lines):
        yield start._replace(value="\n".join(lines) + "\n")
