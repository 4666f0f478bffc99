"""The training of a SentencePiece tokenizer, written as a folder that `jaxdraft.tokenizers` and transformers read."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from jaxdraft.errors import ConfigError

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_SENTENCE_CHARS = 1000  # training text is cut at line ends into sentences of about this many characters


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
    Raises:
      ConfigError: the texts cannot fill a vocabulary of `vocab_size`.
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
