"""What the stages that make a tokenizer and rows are told; the base of all stages."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from jaxdraft.decode import TopK
from jaxdraft.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a recipe. What it makes lies in the folder of its name in the run directory."""

    name: str
    uses_target: ClassVar[bool] = False
    uses_tokenizer: ClassVar[bool] = True
    keeps_parts: ClassVar[bool] = False
    """Whether it knows by their content which parts of its own are still right: what it had made when it was stopped is
    then left where it is, even if settings or inputs have changed since."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages whose output this one reads, beside target and tokenizer."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer(Stage):
    """Text -> a SentencePiece tokenizer, for a target that is trained from nothing.

    Attributes:
      sources: whose ``documents()`` are learned from.
      vocab_size: pieces, byte fallback and special tokens included.
    """

    sources: tuple[Any, ...]
    vocab_size: int
    uses_tokenizer: ClassVar[bool] = False


# What a Prepare stage reads of its sources, by its labels.
_READ = {None: "documents", "assistant": "conversations", "all": "conversations", "references": "prompts"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Text -> packed rows of fixed length: tokenise, append EOS, concatenate, cut (Direct Alignment, A.4).

    With ``labels`` conversations, or prompts with known answers, become rows instead.

    All processes of a run take part, each on a part of the text; the rows depend on neither their number nor that of
    ``workers``.

    Attributes:
      sources: whose ``documents()`` are packed, one after another.
      length: tokens per row.
      tokens: how many the rows hold, ``5e9`` for FastDraft's 5 BT: ``tokens // length`` rows of the first documents.
        ``None`` takes all text.
      labels: ``None`` packs documents. ``"assistant"`` and ``"all"`` pack the sources' ``conversations()``, in the
        words of the target's chat template and each whole in a row, with the assistant's turns or every token as
        labels: FastDraft's arm of original answers, and ordinary fine-tuning. ``"references"`` is that arm without a
        chat template: the sources' ``prompts()``, each in a row with its reference and EOS behind it, the labels.
      segments: documents of a row are kept apart: attention does not see the one before, positions begin anew, and no
        document's first token is a label, as it is when the draft will be used. ``False`` is plain concatenation: a row
        is one text, whose positions run over the document ends in it, and a document is predicted from what happens to
        stand before it. Direct Alignment (A.4) concatenates with EOS between; neither it nor FastDraft says that
        documents are kept apart.
      workers: threads that tokenise; ``None`` is one for each core. Only the time depends on it.
    """

    sources: tuple[Any, ...]
    length: int
    tokens: float | None = None
    segments: bool = True
    labels: Literal["assistant", "all", "references"] | None = None
    workers: int | None = dataclasses.field(default=None, compare=False)
    keeps_parts: ClassVar[bool] = True

    def __post_init__(self):
        if self.length < 2:
            raise ConfigError(f"{self.name}: length is {self.length}: a row needs at least 2 tokens")
        if self.labels not in list(_READ):
            raise ConfigError(
                f"{self.name}: labels is {self.labels!r}: it must be one of {', '.join(map(repr, _READ))}"
            )
        if self.labels is not None and not self.segments:
            raise ConfigError(f"{self.name}: segments is False: with labels={self.labels!r} examples are kept apart")
        for source in self.sources:
            fitting = [labels for labels, method in _READ.items() if callable(getattr(source, method, None))]
            if self.labels not in fitting:
                remedies = ["leave labels out" if labels is None else f"labels={labels!r}" for labels in fitting]
                raise ConfigError(
                    f"{self.name}: {type(source).__name__} has no {_READ[self.labels]}(): "
                    f"{' or '.join([*remedies, 'another source'])}"
                )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{self.name}: workers is {self.workers}: it must be at least 1")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _token_count(self.name, self.tokens, self.length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subset(Stage):
    """Rows -> a uniform sample of them, without replacement.

    Of one seed, samples of the same ``data`` nest: all rows of a smaller one are in a larger one, as in FastDraft's
    figure of drafts by the amount of text (arXiv 2411.11055, section 5.2).

    Attributes:
      data: the stage whose rows are sampled; what is stored of the target beside them goes along.
      tokens: ``tokens // length`` rows are taken.
    """

    data: str
    tokens: float
    uses_target: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "tokens", _token_count(self.name, self.tokens, 1))

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.data,)


def _token_count(name: str, tokens: float, length: int) -> int:
    """``5e9`` as a whole number: one setting however it is spelled."""
    if not math.isfinite(tokens) or tokens != int(tokens) or tokens < length:
        raise ConfigError(f"{name}: tokens is {tokens:g}: give a whole number, at least {length}")
    return int(tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """Rows -> the same rows with the target's distribution stored beside them, from one pass of the target.

    Training with ``target_logits="stored"`` then needs no target in memory, and each further loss or epoch no pass.

    Attributes:
      data: the Prepare or Generate stage whose rows are read.
      keep_logits: how much is stored.
    """

    data: str
    keep_logits: TopK
    uses_target: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.data,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftVocabulary(Stage):
    """Rows -> the tokens a draft may propose: the most frequent of the target's own text, and its end tokens.

    Direct Alignment (arXiv 2403.00858, section 1) lets a draft share "the same or a subset of" the vocabulary; EAGLE-3
    (arXiv 2503.01840) and FR-Spec (arXiv 2502.14856) do so. With a large vocabulary the head is most of a draft's work.
    Choose it for a draft pretrained on all tokens: a full export proposes the others too, as they were learned then.
    What the target writes does not change: a token that the draft cannot propose is one that it does not get accepted.

    Of a target of 1.4M parameters, 512 of 1024 tokens are 98.3 % of what it wrote; distilled with TVD++ and them, block
    efficiency at γ 5 is 4.85 on code and 2.50 on summaries, with all tokens 4.90 and 2.54. On two CPU cores a step of
    ``presets.fastdraft_llama31_150m`` took 18 ms, with 16,384 of its 128,256 tokens 9 ms.

    Attributes:
      data: the stage whose labels are counted: of a Generate stage what the target wrote.
      size: tokens, multiples of 128 suit every device.
    """

    data: str
    size: int
    uses_target: ClassVar[bool] = True

    def __post_init__(self):
        if self.size < 1:
            raise ConfigError(f"{self.name}: size is {self.size}: it must be positive")

    def check_size(self, vocabulary: int) -> None:
        """Raises ConfigError where there are fewer tokens in the target's vocabulary."""
        if self.size > vocabulary:
            raise ConfigError(f"{self.name}: size is {self.size}, the target's vocabulary {vocabulary}")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.data,)
