"""One small interface over the tokenizers of Hugging Face folders.

A folder is read through `tokenizer.json` (the `tokenizers` library) where there is one, else through `tokenizer.model`
(`sentencepiece`). Nothing here needs transformers, except `Tokenizer.render`, which imports it when called.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdraft.errors import ConfigError
from jaxdraft.tokenizer_backends import Backend, FastBackend, SentencePieceBackend, library_errors, read_if_there
from jaxdraft.untrusted import MAX_TOKENS, TOKENIZER_BYTES, check_file, damaged

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PARALLEL = "TOKENIZERS_PARALLELISM"  # read by the library at every call
_SHOWN = 3  # differing pieces that are named


class ChatTemplateError(ConfigError):
    """A chat template does not take a conversation; the text says why, in the same words for each one it is true of."""


class Tokenizer:
    """Text to ids and back, as the folder's model was trained to see it.

    Attributes:
      bos_id, eos_id: the ids that begin and end a document; None where the folder names none.
      adds_bos: whether the tokenizer puts BOS in front of a prompt when serving.
      vocab_size: number of ids the tokenizer can produce (a model may have more rows).
    """

    def __init__(self, folder: Path, backend: Backend, bos_id: int | None, eos_id: int | None):
        self.folder = folder
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = backend.adds_bos(bos_id)
        self._backend = backend
        self._pieces = backend.pieces()
        self.vocab_size = len(self._pieces)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of `text`; special tokens spelled out in it become their ids. `bos=None`: as in serving."""
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool | None = None) -> list[list[int]]:
        """`encode` of many texts, in parallel where the library can."""
        batch = self._backend.encode_batch(texts)
        if self.adds_bos if bos is None else bos:
            if self.bos_id is None:
                raise ConfigError(f"{self.folder}: BOS was asked for, but the tokenizer names no bos_token")
            for ids in batch:
                ids.insert(0, self.bos_id)
        return batch

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(ids, skip_special)

    def continuation(self, prompt: Sequence[int], ids: Sequence[int], skip_special: bool = True) -> str:
        """The text that `ids` add after `prompt`; decoded alone, a first piece would lose its space."""
        return self.decode([*prompt, *ids], skip_special)[len(self.decode(prompt, skip_special)) :]

    def pieces(self) -> list[str]:
        """The piece of every id, in the tokenizer's own spelling; "" for an id without one."""
        return list(self._pieces)

    def fragments(self, ids: Sequence[int]) -> list[str]:
        """The text each id adds when decoded in sequence: `"".join(fragments(ids)) == decode(ids)`.

        A character spread over several byte pieces appears at the piece that completes it.
        """
        text = self.decode(ids)
        settled = (common_prefix(self.decode(ids[:n]), text) for n in range(1, len(ids) + 1))
        ends = list(itertools.accumulate(settled, max))
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    @functools.cached_property
    def _chat(self) -> Any:
        in_file = (self.folder / "chat_template.jinja").is_file()
        if not in_file and "chat_template" not in read_if_there(self.folder / "tokenizer_config.json"):
            raise ConfigError(
                f"{self.folder}: no chat template (looked for chat_template.jinja and for chat_template in "
                'tokenizer_config.json); give prompts as "prompt" text instead of "messages"'
            )
        for file in (*self.folder.glob("*.json"), *self.folder.glob("additional_chat_templates/*")):
            if file.name not in _FILES:  # which were looked at when the tokenizer was loaded
                check_file(file, TOKENIZER_BYTES)  # Mistral's tekken.json has 19 MB
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
        import transformers

        with library_errors(f"{self.folder}: transformers cannot read the tokenizer"):
            tokenizer = transformers.AutoTokenizer
            return tokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    def render(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> str:
        """The text of `[{"role", "content"}, ...]` by the folder's chat template, with `reply` opened for the answer.

        The template writes BOS itself where it wants one: encode the result with `bos=False`.
        Raises:
          ChatTemplateError: the template refuses these messages: a system prompt, or an order of roles.
          ConfigError: the folder has no chat template.
        """
        if not messages:
            raise ChatTemplateError("the conversation has no messages")
        if not all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
            raise ChatTemplateError('a message lacks "role" or "content", or has something else than text there')
        chat = self._chat
        try:
            text = chat.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # a template's own errors, and what it makes Python do
            raise ChatTemplateError(f"the chat template does not take the conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def template_fingerprint(self) -> str | None:
        """sha256 of the folder's chat template; None where it has none."""
        file = self.folder / "chat_template.jinja"
        with damaged(file):
            template = (
                file.read_text("utf-8")
                if file.is_file()
                else read_if_there(self.folder / "tokenizer_config.json").get("chat_template")
            )
        return None if template is None else hashlib.sha256(json.dumps(template).encode()).hexdigest()

    @functools.cached_property
    def _fingerprint(self) -> str:
        content = json.dumps([self._pieces, self.bos_id, self.eos_id, self.adds_bos])
        return hashlib.sha256(content.encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 over pieces in order of their ids, BOS, EOS and whether BOS is added."""
        return self._fingerprint


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Meanwhile `encode_batch` stays in the thread that calls it, for callers who have threads of their own.

    Those cost a tenth less than the threads of the `tokenizers` library, which wait for each batch's longest text.
    """
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        del os.environ[_PARALLEL]
        if before is not None:
            os.environ[_PARALLEL] = before


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder; ConfigError names what was looked for."""
    folder = Path(folder)
    tokenizer_files(folder)
    config = read_if_there(folder / "tokenizer_config.json")
    backend: FastBackend | SentencePieceBackend
    if (folder / "tokenizer.json").is_file():
        backend = FastBackend(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        backend = SentencePieceBackend(folder / "tokenizer.model", config)
    else:
        raise ConfigError(f"{folder}: no tokenizer here (looked for tokenizer.json and tokenizer.model)")
    ids = {piece: i for i, piece in enumerate(backend.pieces())}
    bos_id, eos_id = (_special_id(folder, config, backend, ids, name) for name in ("bos", "eos"))
    return Tokenizer(folder, backend, bos_id, eos_id)


def differences(target: Tokenizer, draft: Tokenizer) -> list[str]:
    """In what two tokenizers differ, a sentence each: pieces one by one, BOS, EOS and whether BOS is added.

    Empty means that the draft's ids mean what the target's do. The sentence on pieces, where there is one, is first.
    """
    found = []
    pairs = list(itertools.zip_longest(target.pieces(), draft.pieces()))
    if apart := [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]:
        shown = ", ".join(
            f"id {i} is {_quoted(pairs[i][0])} in the target and {_quoted(pairs[i][1])} in the draft"
            for i in apart[:_SHOWN]
        )
        sizes = f" (the target has {target.vocab_size}, the draft {draft.vocab_size})"
        found.append(
            f"{shown}; {len(apart)} of {len(pairs)} pieces differ"
            + (sizes if target.vocab_size != draft.vocab_size else "")
        )
    for name, ours, theirs in (("BOS", target.bos_id, draft.bos_id), ("EOS", target.eos_id, draft.eos_id)):
        if ours != theirs:
            spelled = f"{_piece(target, ours)} and {_piece(draft, theirs)}"
            found.append(f"{name} is {ours} in the target and {theirs} in the draft ({spelled})")
    if target.adds_bos != draft.adds_bos:
        found.append(f"add_bos is {target.adds_bos} in the target and {draft.adds_bos} in the draft")
    return found


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many characters, or ids, two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in `folder`: what an export copies byte for byte.

    Raises:
      ConfigError: one is too large, or a link to what is not the folder's.
    """
    files = [path for name in _FILES if (path := Path(folder) / name).is_file()]
    for file in files:
        check_file(file, TOKENIZER_BYTES)
    return files


def _special_id(
    folder: Path, config: dict[str, Any], backend: FastBackend | SentencePieceBackend, ids: dict[str, int], name: str
) -> int | None:
    for named in (config, read_if_there(folder / "special_tokens_map.json")):
        token = named.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            return ids[token]
    for numbered in (read_if_there(folder / "generation_config.json"), read_if_there(folder / "config.json")):
        token = numbered.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if type(token) is int and 0 <= token < MAX_TOKENS:
            return token
    return backend.special(name) if isinstance(backend, SentencePieceBackend) else None


def _piece(tokenizer: Tokenizer, index: int | None) -> str:
    return _quoted(None if index is None else next(iter(tokenizer.pieces()[index : index + 1]), None))


def _quoted(piece: str | None) -> str:
    return "missing" if piece is None else repr(piece)
