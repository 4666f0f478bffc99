"""Perplexity over a text: how well a model predicts what was not written for it, as a pretrained draft is judged.

FastDraft (arXiv 2411.11055, tables 1 and 7) gives that of pretrained drafts on WikiText-2, 147 to 1,595, and says
neither of which split, nor over which windows, nor whether it is per token or per word. Here:

- A document is tokenised as a prompt is: BOS before it where the tokenizer adds one, no EOS after it.
- Its tokens are predicted ``stride`` at a time, from as many before them as make a window of ``length``. Each is
  predicted once, but for a document's first, which nothing comes before: BOS, where there is one. Evaluations take
  windows of 2,048 tokens, or of as many as both draft and target take, and predict half of each.
- ``perplexity`` is exp(Σ −ln p / tokens) over the tokens of all documents, at temperature 1.
- ``word_perplexity``, of EleutherAI's evaluation harness, divides the same sum by the words between white space, and
  ``bits_per_byte``, in bits, by the bytes of the text in UTF-8, but for a first token that is not predicted. Both
  compare models of different tokenizers.

The usual recipe, of transformers' documentation, joins the lines of the whole split into one text, with one BOS, and
slides the same windows over it: with one document and a ``stride`` that divides ``length`` the result is the same. Its
articles see the end of the one before. Where its windows do not overlap, as for quantised models, the first token of
each window is not predicted, and the next ones from little.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxdraft.backend import platform
from jaxdraft.data.catalogue import CORPORA
from jaxdraft.data.named import Corpus
from jaxdraft.data.quarantine import Quarantine
from jaxdraft.data.sources import Source, Text
from jaxdraft.decode import token_log_probs
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate import metrics
from jaxdraft.evaluate.measure import Model
from jaxdraft.models import Decoder
from jaxdraft.models.decoder import Params
from jaxdraft.stopping import poll
from jaxdraft.tokenizers import Tokenizer
from jaxdraft.tracking import progress_bar

logger = logging.getLogger(__name__)

LONGEST = 2048
"""Tokens of a window, where the models take as many: those of the rows that Direct Alignment trains on."""


class Document(NamedTuple):
    """A text to be predicted.

    Attributes:
      tokens: its ids, BOS included where the tokenizer adds it; at least two.
      words: between white space.
      size: bytes of UTF-8 that the tokens after the first stand for.
    """

    tokens: list[int]
    words: int
    size: int


@dataclass(frozen=True, eq=False)
class Documents:
    """What perplexity is measured on.

    Attributes:
      name: for results.
      each: the documents.
    """

    name: str
    each: Sequence[Document]

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(json.dumps([document.tokens for document in self.each]).encode()).hexdigest()[:16]


def source_named(name: str) -> Source:
    """The text behind ``wikitext-2`` or another corpus of the catalogue, its last split; else a file's.

    Args:
      name: with ``=PATH``, the corpus is read from there instead of the hub.
    """
    corpus, _, path = name.partition("=")
    return Corpus(corpus, path or None, split=list(CORPORA[corpus].files)[-1]) if corpus in CORPORA else Text(name)


def read_documents(source: Source, tokenizer: Tokenizer) -> Documents:
    """All documents of a source but those of a single token; what it rejects goes into the log.

    Raises:
      ConfigError: it has none.
    """
    quarantine = Quarantine()
    found = []
    for text in quarantine.accepted(source.documents()):
        tokens = tokenizer.encode(text)
        if len(tokens) > 1:
            first = "" if tokenizer.adds_bos else tokenizer.decode(tokens[:1])
            found.append(Document(tokens, len(text.split()), len(text.encode()) - len(first.encode())))
    named = (getattr(source, field, None) for field in ("name", "path"))
    name = "/".join(filter(None, (next(filter(None, named), type(source).__name__), getattr(source, "split", None))))
    if not found:
        raise ConfigError(f"{name}: no text")
    for reason, count in quarantine.counts.items():
        logger.warning("%s: left out %d documents: %s", name, count, reason)
    return Documents(name, found)


def measure_perplexity(model: Model, documents: Documents, length: int) -> dict[str, Any]:
    """``perplexity`` with windows that half overlap, and what it was measured on, as ``results.json`` has it."""
    each, stride = documents.each, length // 2
    rows = 1 if platform() == "cpu" else 8  # attention scores of one window fit a CPU's caches: twice as fast
    count = sum(1 for document in each for _ in windows(len(document.tokens), length, stride))
    with progress_bar(count, f"perplexity on {documents.name}", "window") as bar:

        def advance(windows: int) -> None:
            bar.update(windows)
            poll()

        how: dict[str, Any] = {"length": length, "stride": stride, "batch_size": rows, "advance": advance}
        found = perplexity(model.decoder, model.params, each, **how)
    return {
        **found,
        "text": documents.name,
        "documents": len(each),
        "tokens": sum(len(document.tokens) - 1 for document in each),
        "words": sum(document.words for document in each),
        "bytes": sum(document.size for document in each),
        "length": length,
        "stride": stride,
    }


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where each window of a document of ``count`` tokens begins, the first token predicted in it, and its end."""
    for begin in range(0, count, stride):
        first, end = max(begin, 1), min(begin + stride, count)
        if first < end:
            yield max(begin + stride - length, 0), first, end


def perplexity(
    decoder: Decoder,
    params: Params,
    documents: Sequence[Document],
    *,
    length: int,
    stride: int,
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """A model's perplexity per token, per word, and its bits per byte, with intervals over documents.

    Args:
      decoder: of either kind.
      params: its parameters.
      documents: of ``read_documents``.
      length: tokens of a window, at least two.
      stride: tokens predicted in each window, fewer than ``length``.
      batch_size: windows at once.
      advance: called with a number of windows whenever they are done.

    Returns:
      ``perplexity``, ``word_perplexity``, ``bits_per_byte``, and of each ``…_ci95``; null for what is infinite: a model
      with a draft vocabulary cannot say every token.

    Raises:
      ConfigError: ``length`` or ``stride`` is out of range.
      FloatingPointError: the model gave logits that are not finite.
    """
    if not 0 < stride < length:
        raise ConfigError(f"length is {length} and stride {stride}: stride must be positive, and length larger")
    cut = [(i, *window) for i, each in enumerate(documents) for window in windows(len(each.tokens), length, stride)]
    contexts = [documents[i].tokens[begin:first] for i, begin, first, _ in cut]
    texts = [documents[i].tokens[first:end] for i, _, first, end in cut]
    log_probs = token_log_probs(decoder, params, contexts, texts, batch_size=batch_size, advance=advance)
    nats = np.zeros(len(documents))
    np.add.at(nats, [i for i, *_ in cut], [-log_p_N.sum() for log_p_N in log_probs])
    tokens, words, sizes = zip(*((len(each.tokens) - 1, each.words, each.size) for each in documents), strict=True)
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            **metrics.with_interval("perplexity", np.exp(metrics.ratio_of_sums(nats, tokens))),
            **metrics.with_interval("word_perplexity", np.exp(metrics.ratio_of_sums(nats, words))),
            **metrics.with_interval("bits_per_byte", metrics.ratio_of_sums(nats, sizes) / np.log(2)),
        }
