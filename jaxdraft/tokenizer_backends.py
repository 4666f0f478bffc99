"""The two kinds of tokenizer in Hugging Face folders: `tokenizer.json`, and SentencePiece's `tokenizer.model`.

Both are read by libraries that take any file for a good one until it is not: what they raise is a ConfigError here.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from jaxdraft.errors import ConfigError
from jaxdraft.untrusted import CONFIG_BYTES, MAX_TOKENS, read_json


class Backend(Protocol):
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def pieces(self) -> list[str]: ...
    def adds_bos(self, bos_id: int | None) -> bool: ...


class FastBackend:
    """`tokenizer.json`, through the `tokenizers` library."""

    def __init__(self, path: Path):
        self._path = path
        with library_errors(f"{path}: not a readable tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._begin = self._tokenizer.encode("a").ids[:1]
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        highest = max(vocab.values(), default=-1)
        if not 0 <= highest < MAX_TOKENS:
            raise ConfigError(f"{path}: the highest id is {highest}, where a tokenizer has up to {MAX_TOKENS:,} ids")
        self._pieces = [""] * (highest + 1)
        for piece, index in vocab.items():
            self._pieces[index] = piece

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(f"{self._path}: a text cannot be encoded"):
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        with library_errors(f"{self._path}: ids cannot be decoded"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def pieces(self) -> list[str]:
        return self._pieces

    def adds_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None and self._begin == [bos_id]


@contextlib.contextmanager
def library_errors(told: str) -> Iterator[None]:
    """Turns what a library raises over what somebody else's file asks of it into a ConfigError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's, which is no Exception
            raise ConfigError(f"{told} ({error})") from error
        raise


def read_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A ``tokenizer.model``.

    Raises:
      ConfigError: it is none.
    """
    with library_errors(f"{path}: not a readable SentencePiece model"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for i in range(model.get_piece_size()):
            model.id_to_piece(i)  # of which each has to be Unicode
    return model


class SentencePieceBackend:
    """`tokenizer.model`, through `sentencepiece`; control and added tokens spelled out in a text map to their ids."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self._model = read_sentencepiece(path)
        self._add_bos = config.get("add_bos_token", True)
        self._size = self._model.get_piece_size()
        self._anchor = self._model.encode("a")
        own = [i for i in range(self._size) if self._model.is_control(i) or self._model.is_unknown(i)]
        tokens: dict[int, dict[str, Any]] = {i: {"content": self._model.id_to_piece(i), "special": True} for i in own}
        tokens |= _added_tokens(path.parent, config)
        self._contents = {i: token["content"] for i, token in tokens.items()}
        named = _special_names(config) | _special_names(read_if_there(path.with_name("special_tokens_map.json")))
        self._special = {i for i, token in tokens.items() if token.get("special") or token["content"] in named}
        self._longest_first = sorted(self._contents, key=lambda i: len(self._contents[i]), reverse=True)
        self._splitter = re.compile("|".join(_spelled(tokens[i]) for i in self._longest_first) or r"(?!)")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        """Text after an added token gets SentencePiece's leading space again, as in published `tokenizer.json`s."""
        ids: list[int] = []
        if not any(content in text for content in self._contents.values()):  # far quicker than the search below
            ids = self._model.encode(text)
            return ids
        start = 0
        for match in self._splitter.finditer(text):
            assert match.lastindex
            ids += [*self._model.encode(text[start : match.start()]), self._longest_first[match.lastindex - 1]]
            start = match.end()
        return ids + self._model.encode(text[start:])

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token not in self._contents:
                run += [token] if token < self._size else []
            elif token not in self._special or not skip_special:
                parts += [self._decode_run(run, first=not parts), self._contents[token]]
                run = []
        return "".join([*parts, self._decode_run(run, first=not parts)])

    def _decode_run(self, run: list[int], first: bool) -> str:
        """The text of ordinary pieces; only where a text begins does SentencePiece's leading space go."""
        if first or not run:
            return str(self._model.decode(run))
        return str(self._model.decode([*self._anchor, *run]))[len(self._model.decode(self._anchor)) :]

    def pieces(self) -> list[str]:
        pieces = [self._model.id_to_piece(i) for i in range(self._size)]
        pieces += [""] * (max(self._contents, default=-1) + 1 - self._size)
        for i, content in self._contents.items():
            pieces[i] = content
        return pieces

    def adds_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None and self._add_bos

    def special(self, name: str) -> int | None:
        token: int = self._model.bos_id() if name == "bos" else self._model.eos_id()
        return token if token >= 0 else None


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """By id, what `added_tokens.json` and, before it, `tokenizer_config.json` say of tokens outside the model."""
    try:
        tokens: dict[int, dict[str, Any]] = {
            int(i): {"content": content} for content, i in read_if_there(folder / "added_tokens.json").items()
        }
        tokens |= {int(i): dict(token) for i, token in config.get("added_tokens_decoder", {}).items()}
        wrong = [i for i, token in tokens.items() if not 0 <= i < MAX_TOKENS or not isinstance(token["content"], str)]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        where = "added_tokens.json or added_tokens_decoder in tokenizer_config.json"
        raise ConfigError(f"{folder}: {where} is not understood ({error!r})") from error
    if wrong:
        raise ConfigError(f"{folder}: added token {wrong[0]} needs an id in [0, 2^24) and its content as text")
    return {i: token for i, token in tokens.items() if token["content"]}


def _special_names(named: dict[str, Any]) -> set[str]:
    """Contents of the tokens that a config names: "bos_token" and the like, "additional_special_tokens"."""
    tokens = [token for key, token in named.items() if key.endswith("_token")]
    others = named.get("additional_special_tokens")
    tokens += others if isinstance(others, list) else []
    contents = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return {content for content in contents if isinstance(content, str)}


def _spelled(token: dict[str, Any]) -> str:
    """A pattern with one group, the content; an added token may take the white space on a side with it."""
    before, after = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
    return f"{before}({re.escape(token['content'])}){after}"


def read_if_there(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is no file."""
    return read_json(path, limit=CONFIG_BYTES) if path.is_file() else {}
