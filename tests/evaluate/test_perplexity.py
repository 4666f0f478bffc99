"""Perplexity equals that of a model run on every context by itself."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxdraft.data.named import Corpus
from jaxdraft.data.quarantine import Rejected
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.perplexity import Document, perplexity, read_documents, source_named, windows
from jaxdraft.models import Decoder, ModelConfig, for_decoding, head_weight, init_params, logits

CONFIG = ModelConfig(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=24, max_positions=16
)
LENGTH, STRIDE = 12, 5


@pytest.fixture(scope="module")
def params():
    # Larger weights than a fresh model's, to which all tokens are alike.
    return jax.tree.map(lambda x: 3 * x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [Document(rng.integers(0, 24, count).tolist(), count // 2, 3 * count) for count in (2, 5, 12, 40, 3)]


def by_hand(params, documents):
    """ln p of each token, from one pass per token over what it sees."""
    forward = jax.jit(lambda tokens: Decoder(CONFIG).apply({"params": params}, tokens, np.arange(LENGTH)[None]))
    found = []
    for tokens in (document.tokens for document in documents):
        sums = 0.0
        for t in range(1, len(tokens)):
            seen = tokens[max(0, t // STRIDE * STRIDE + STRIDE - LENGTH) : t]
            hidden = forward(np.asarray([seen + [0] * (LENGTH - len(seen))]))
            row = np.asarray(logits(hidden, head_weight(CONFIG, params))[0, len(seen) - 1], np.float64)
            sums += row[tokens[t]] - np.log(np.exp(row - row.max()).sum()) - row.max()
        found.append(sums)
    return found


def test_it_is_that_of_every_context_by_itself(params, documents):
    decoder, unstacked = Decoder(CONFIG, scan=False), for_decoding(CONFIG, params)
    done = []
    found = perplexity(
        decoder, unstacked, documents, length=LENGTH, stride=STRIDE, batch_size=4, advance=lambda n: done.append(n)
    )
    sums = by_hand(params, documents)
    assert found["perplexity"] == pytest.approx(math.exp(-sum(sums) / (62 - 5)), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(-sum(sums) / (1 + 2 + 6 + 20 + 1)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(-sum(sums) / math.log(2) / (3 * 62), rel=1e-5)
    low, high = found["perplexity_ci95"]
    assert low < found["perplexity"] < high
    assert sum(done) == 1 + 1 + 3 + 8 + 1  # windows


def test_what_a_head_cannot_say_is_infinitely_unlikely(params, documents):
    config = dataclasses.replace(CONFIG, tie_embeddings=False, head_ids=tuple(range(0, 24, 2)))
    half = for_decoding(config, init_params(config, jax.random.key(0)))
    even = [document._replace(tokens=[2 * (t // 2) for t in document.tokens]) for document in documents]
    found, never = (
        perplexity(Decoder(config, scan=False), half, each, length=LENGTH, stride=STRIDE, batch_size=4)
        for each in (even, documents)
    )
    assert found["perplexity"] == pytest.approx(12, rel=0.2)  # a fresh model knows nothing
    assert [never[name] for name in ("perplexity", "word_perplexity", "bits_per_byte")] == [None] * 3


@pytest.mark.parametrize("count, length, stride", [(1, 4, 2), (2, 4, 2), (9, 4, 2), (10, 7, 3), (30, 8, 7)])
def test_windows_predict_every_token_once_from_what_fits(count, length, stride):
    found = list(windows(count, length, stride))
    assert [t for _, first, end in found for t in range(first, end)] == list(range(1, count))
    for begin, first, end in found:
        assert end - begin <= length
        assert first - begin >= min(first, length - stride)
    if length == 2 * stride:  # as the recipe of transformers' documentation has them
        at, theirs = 0, {}
        while at < count:
            theirs |= dict.fromkeys(range(max(at + length - stride if at else 1, 1), min(at + length, count)), at)
            at += stride
        assert theirs == {t: begin for begin, first, end in found for t in range(first, end)}


def test_a_stride_leaves_something_to_see():
    with pytest.raises(ConfigError, match="length is 4 and stride 4"):
        perplexity(None, None, [], length=4, stride=4)


def test_texts_by_name(tmp_path, made_run):
    assert source_named("wikitext-2") == Corpus("wikitext-2", split="test")
    assert source_named("wikitext-2=a.txt") == Corpus("wikitext-2", "a.txt", split="test")
    assert source_named("tinystories") == Corpus("tinystories", split="validation")
    assert source_named("a.txt") == Text("a.txt")
    (tmp_path / "a.txt").write_text(" \n = Title = \n \n Text . \n")
    names = [
        read_documents(source_named(f"{name}{tmp_path}/a.txt"), made_run.tokenizer).name for name in ("wikitext-2=", "")
    ]
    assert names == ["wikitext-2/test", f"{tmp_path}/a.txt"]


@dataclasses.dataclass(frozen=True)
class Documents:
    texts: tuple

    def documents(self):
        yield from self.texts


def test_documents_are_counted(made_run, caplog):
    tokenizer = made_run.tokenizer
    source = Documents(("Wrap the text,\n please. ", Rejected("x", "blank"), "Größe"))
    documents = read_documents(source, tokenizer)
    first, second = documents.each
    assert first.tokens == tokenizer.encode(source.texts[0])
    assert (first.words, first.size, second.words, second.size) == (4, 24, 1, 7)
    assert "left out 1 documents: blank" in caplog.text
    tokenizer.adds_bos = False
    piece = tokenizer.decode(tokenizer.encode(source.texts[0])[:1])
    assert read_documents(source, tokenizer).each[0].size == 24 - len(piece) < 24
    assert read_documents(source, tokenizer).identity != documents.identity
    with pytest.raises(ConfigError, match="Documents: no text"):
        read_documents(Documents(()), tokenizer)
