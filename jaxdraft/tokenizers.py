"""One small interface over the tokenizers of Hugging Face folders, and the training of a SentencePiece one.

A folder is read through `tokenizer.json` (the `tokenizers` library) where there is one, else through `tokenizer.model`
(`sentencepiece`). Nothing here needs transformers, except `Tokenizer.render`, which imports it when called.
"""

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from jaxdraft.errors import ConfigError

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
_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_SENTENCE_CHARS = 1000  # training text is cut at line ends into sentences of about this many characters


class _Backend(Protocol):
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def pieces(self) -> list[str]: ...
    def adds_bos(self, bos_id: int | None) -> bool: ...


class _FastBackend:
    """`tokenizer.json`, through the `tokenizers` library."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a readable tokenizer.json ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def pieces(self) -> list[str]:
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(vocab.values()) + 1)
        for piece, index in vocab.items():
            pieces[index] = piece
        return pieces

    def adds_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None and self._tokenizer.encode("a").ids[:1] == [bos_id]


class _SentencePieceBackend:
    """`tokenizer.model`, through `sentencepiece`; control and added tokens spelled out in a text map to their ids."""

    def __init__(self, path: Path, config: dict[str, Any]):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{path}: not a readable SentencePiece model ({error})") from error
        self._add_bos = config.get("add_bos_token", True)
        size = self._model.get_piece_size()
        control = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        described = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
        added = _read_json(path.with_name("added_tokens.json")) | {t["content"]: i for i, t in described.items()}
        self._spelled = control | added
        self._contents = {i: content for content, i in self._spelled.items() if i >= size or content in control}
        self._special = {i for i in self._contents if i < size or described.get(i, {}).get("special", True)}
        # An added token may take the white space on a side with it.
        strips = lambda token, side: r"\s*" if described.get(self._spelled[token], {}).get(side) else ""
        patterns = [
            strips(token, "lstrip") + re.escape(token) + strips(token, "rstrip")
            for token in sorted(self._spelled, key=len, reverse=True)
        ]
        self._splitter = re.compile("(" + "|".join(patterns) + ")") if patterns else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._splitter.split(text) if self._splitter else [text]):
            ids.extend([self._spelled[part.strip()]] if i % 2 else self._model.encode(part))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token not in self._contents:
                run.append(token)
            elif token not in self._special or not skip_special:
                parts += [self._model.decode(run), self._contents[token]]
                run = []
        return "".join([*parts, self._model.decode(run)])

    def pieces(self) -> list[str]:
        size = self._model.get_piece_size()
        pieces = [self._model.id_to_piece(i) for i in range(size)]
        pieces += [""] * (max(self._contents, default=-1) + 1 - size)
        for i, content in self._contents.items():
            pieces[i] = content
        return pieces

    def adds_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None and self._add_bos

    def special(self, name: str) -> int | None:
        token: int = self._model.bos_id() if name == "bos" else self._model.eos_id()
        return token if token >= 0 else None


class Tokenizer:
    """Text to ids and back, as the folder's model was trained to see it.

    Attributes:
      bos_id, eos_id: the ids that begin and end a document; None where the folder names none.
      adds_bos: whether the tokenizer puts BOS in front of a prompt when serving.
      vocab_size: number of ids the tokenizer can produce (a model may have more rows).
    """

    def __init__(self, folder: Path, backend: _Backend, bos_id: int | None, eos_id: int | None):
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
        if self.adds_bos if bos is None else bos:
            if self.bos_id is None:
                raise ConfigError(f"{self.folder}: BOS was asked for, but the tokenizer names no bos_token")
            return [[self.bos_id, *ids] for ids in self._backend.encode_batch(texts)]
        return self._backend.encode_batch(texts)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(ids, skip_special)

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add after `prompt`; decoded alone, a first piece would lose its space."""
        return self.decode([*prompt, *ids])[len(self.decode(prompt)) :]

    def pieces(self) -> list[str]:
        """The piece of every id, in the tokenizer's own spelling; "" for an id without one."""
        return list(self._pieces)

    def fragments(self, ids: Sequence[int]) -> list[str]:
        """The text each id adds when decoded in sequence: `"".join(fragments(ids)) == decode(ids)`.

        A character spread over several byte pieces appears at the piece that completes it.
        """
        text = self.decode(ids)
        settled = (_common_prefix(self.decode(ids[:n]), text) for n in range(1, len(ids) + 1))
        ends = list(itertools.accumulate(settled, max))
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    @functools.cached_property
    def _chat(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt text for `[{"role", "content"}, ...]` by the folder's chat template, opened for the reply.

        The template writes BOS itself where it wants one: encode the result with `bos=False`.
        Raises ConfigError where the folder has no chat template.
        """
        in_file = any((self.folder / name).is_file() for name in _FILES if name.startswith("chat_template"))
        if not in_file and "chat_template" not in _read_json(self.folder / "tokenizer_config.json"):
            raise ConfigError(
                f"{self.folder}: no chat template (looked for chat_template.jinja and for chat_template in "
                'tokenizer_config.json); give prompts as "prompt" text instead of "messages"'
            )
        text = self._chat.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def fingerprint(self) -> str:
        """sha256 over pieces in order of their ids, BOS, EOS and whether BOS is added."""
        content = json.dumps([self._pieces, self.bos_id, self.eos_id, self.adds_bos])
        return hashlib.sha256(content.encode()).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder; ConfigError names what was looked for."""
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    backend: _FastBackend | _SentencePieceBackend
    if (folder / "tokenizer.json").is_file():
        backend = _FastBackend(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        backend = _SentencePieceBackend(folder / "tokenizer.model", config)
    else:
        raise ConfigError(f"{folder}: no tokenizer here (looked for tokenizer.json and tokenizer.model)")
    ids = {piece: i for i, piece in enumerate(backend.pieces())}
    bos_id, eos_id = (_special_id(folder, config, backend, ids, name) for name in ("bos", "eos"))
    return Tokenizer(folder, backend, bos_id, eos_id)


def differences(target: Tokenizer, draft: Tokenizer) -> list[str]:
    """In what two tokenizers differ, a sentence each: pieces one by one, BOS, EOS and whether BOS is added.

    Empty means that the draft's ids mean what the target's do.
    """
    found = []
    ours, theirs = (
        pieces + [None] * (max(target.vocab_size, draft.vocab_size) - len(pieces))
        for pieces in (target.pieces(), draft.pieces())
    )
    if apart := [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]:
        shown = ", ".join(f"id {i} is {ours[i]!r} in the target and {theirs[i]!r} in the draft" for i in apart[:2])
        found.append(f"{shown}; {len(apart)} of {len(ours)} pieces differ")
    for name, attribute in {"BOS": "bos_id", "EOS": "eos_id", "add_bos": "adds_bos"}.items():
        a, b = getattr(target, attribute), getattr(draft, attribute)
        if a != b:
            found.append(f"{name} is {a} in the target and {b} in the draft")
    return found


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in `folder`: what an export copies byte for byte."""
    return [path for name in _FILES if (path := Path(folder) / name).is_file()]


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    *,
    max_chars: int = 6_000_000,
) -> None:
    """Trains a BPE SentencePiece tokenizer with byte fallback and writes a folder transformers can load.

    Spaces, newlines and indentation survive encode and decode exactly (identity normalisation, no dummy prefix). Ids:
    unk 0, bos 1, eos 2, then bytes, merges and characters. The same texts give the same bytes. Writes tokenizer.model,
    tokenizer.json (the same merges, the same ids), tokenizer_config.json and special_tokens_map.json.

    Args:
      max_chars: of a longer corpus, sentences are taken at a fixed stride that brings it down to about this many.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [sentence for text in texts for sentence in _sentences(text)]
    stride = max(1, -(-sum(map(len, sentences)) // max_chars))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences[::stride]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            num_threads=1,  # the count is written into the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"cannot train a tokenizer of vocab_size={vocab_size}: {error}") from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    _as_fast(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, **special}
    _write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


def _as_fast(model: Any) -> tokenizers.Tokenizer:
    """The same BPE as a `tokenizers` object: a merge's rank is the rank of the piece it makes."""
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    learned = {p: i for p, i in vocab.items() if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))}
    ranked = sorted(learned, key=lambda piece: (-model.get_score(vocab[piece]), vocab[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in learned and piece[cut:] in learned
    ]
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = tokenizers.normalizers.Replace(" ", _SPACE)
    fast.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(_SPACE, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast.add_special_tokens(
        [tokenizers.AddedToken(p, special=True, normalized=False) for p in ("<unk>", "<s>", "</s>")]
    )
    return fast


def _sentences(text: str) -> Iterator[str]:
    sentence = ""
    for line in text.splitlines(keepends=True):
        if sentence and len(sentence) + len(line) > _SENTENCE_CHARS:
            yield sentence
            sentence = ""
        sentence += line
    if sentence:
        yield sentence


def _special_id(
    folder: Path, config: dict[str, Any], backend: _FastBackend | _SentencePieceBackend, ids: dict[str, int], name: str
) -> int | None:
    for named in (config, _read_json(folder / "special_tokens_map.json")):
        token = named.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            return ids[token]
    for numbered in (_read_json(folder / "generation_config.json"), _read_json(folder / "config.json")):
        token = numbered.get(f"{name}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            return token
    return backend.special(name) if isinstance(backend, _SentencePieceBackend) else None


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
