"""What each stage of a recipe is told: frozen dataclasses, checked when they are made."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import Loss
from jaxdraft.models import ModelConfig
from jaxdraft.train.state import OptimizerSettings

FROM_TARGET = ("subclone", "target-embedding")
"""Starts of a draft that are taken from the target's weights: ``jaxdraft.models.subclone``."""
INITS = ("random", *FROM_TARGET)
TARGET = "target"
"""As a writer of answers: the recipe's target, whatever the stage that makes it is called."""


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


@dataclasses.dataclass(frozen=True)
class TopK:
    """How much of the target's distribution is stored beside every position of packed rows.

    The log-probabilities of the k most likely tokens, of the next token and of all the rest together; FastDraft (arXiv
    2411.11055) stores the most significant logits alone. For k = 32 that is 132 bytes a token, 196 where the vocabulary
    has more than 65,536.

    Attributes:
      k: tokens kept.
      temperature: of the softmax; losses that read it must have the same.
    """

    k: int
    temperature: float = 1.0

    def __post_init__(self):
        if self.k < 1:
            raise ConfigError(f"TopK: k is {self.k}: it must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"TopK: temperature is {self.temperature}: it must be positive")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Text -> packed rows of fixed length: tokenise, append EOS, concatenate, cut (Direct Alignment, A.4).

    All processes of a run take part, each on a part of the text; the rows depend on neither their number nor that of
    ``workers``.

    Attributes:
      sources: whose ``documents()`` are packed, one after another.
      length: tokens per row.
      tokens: how many the rows hold, ``5e9`` for FastDraft's 5 BT: ``tokens // length`` rows of the first documents.
        ``None`` takes all text.
      segments: documents of a row are kept apart: attention does not see the one before, positions begin anew, and no
        document's first token is a label, as it is when the draft will be used. ``False`` is plain concatenation: a row
        is one text, whose positions run over the document ends in it, and a document is predicted from what happens to
        stand before it. Direct Alignment (A.4) concatenates with EOS between; neither it nor FastDraft says that
        documents are kept apart.
      workers: chunks of text that are tokenised at once; ``None`` is one for each core. Only the time depends on it.
    """

    sources: tuple[Any, ...]
    length: int
    tokens: float | None = None
    segments: bool = True
    workers: int | None = dataclasses.field(default=None, compare=False)
    keeps_parts: ClassVar[bool] = True

    def __post_init__(self):
        if self.length < 2:
            raise ConfigError(f"{self.name}: length is {self.length}: a row needs at least 2 tokens")
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
class Train(OptimizerSettings, Stage):
    """Rows -> a model. Pretraining, continued pretraining and distillation differ in data, loss and start only.

    Attributes:
      data: a stage with rows, or shares of several: ``{"responses": .9, "text": .1}`` holds in every batch.
      loss: what is minimised; one that needs a target gets the recipe's.
      target_logits: whence the loss takes the target's distribution: ``"live"``, the target runs in every step, or
        ``"stored"``, it is read with the rows, which a stage with ``keep_logits`` made.
      batch_size: rows per update.
      init: ``"random"``; ``"subclone"``, weights cut out of the target's, or ``"target-embedding"``, only its tables
        (``jaxdraft.models.subclone``); or the Train stage whose model is the start.
      model: the shape; ``None`` is the recipe's draft.
      draft_vocabulary: the DraftVocabulary stage whose tokens alone the head proposes; ``None`` keeps those of
        ``init``'s model, or all.
      reference: the Train stage whose draft is compared with, for a loss whose ``weights`` need one (``AdaSPEC``).
      seed: of the order of the rows, of a random start and of what the loss draws; ``None`` is the recipe's.
      accumulate: micro-batches per update.
      remat: what the backward pass computes again to save memory: ``"none"``; ``"dots"``, all but the products with
        weights; ``"full"``, each block from its input, a third more work.
      save_every: steps between checkpoints to resume from.
      keep_every: steps between checkpoints that are kept, for block efficiency over training.
      probe: the Generate stage on whose answers block efficiency is measured while this one learns, exact and without
        decoding: held-out prompts at the temperatures that will be evaluated. ``None`` takes the first Generate stage
        in ``data``, which is training text, and measures nothing where there is none. Only what the target wrote
        counts. The target reads it once, also where its logits are stored.
      probe_every: steps between these measurements, one before the first step and one after the last apart; ``None``
        is a tenth of ``steps``.
      probe_limit: answers of each temperature that are measured, the first ones.
      probe_block_sizes: γ; none of them measures nothing.
    """

    data: str | dict[str, float]
    loss: Loss
    batch_size: int
    init: str = "random"
    model: ModelConfig | None = None
    target_logits: Literal["live", "stored"] = "live"
    draft_vocabulary: str | None = None
    reference: str | None = None
    seed: int | None = None
    accumulate: int = 1
    remat: Literal["none", "dots", "full"] = "none"
    save_every: int = 1000
    keep_every: int | None = None
    probe: str | None = None
    probe_every: int | None = None
    probe_limit: int = 32
    probe_block_sizes: tuple[int, ...] = (3, 5)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ConfigError(
                f"{self.name}: batch_size is {self.batch_size} and accumulate {self.accumulate}: "
                "both are positive, and accumulate divides batch_size"
            )
        needed = self.loss.weights is not None and self.loss.weights.needs_reference
        if needed != (self.reference is not None):
            what = "loss.weights need one: name a distilled draft" if needed else "loss.weights need none"
            raise ConfigError(f"{self.name}: reference is {self.reference!r}, but {what}")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ConfigError(f"{self.name}: seed is {self.seed}: it must lie in 0..2³¹-1")
        if self.save_every < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ConfigError(f"{self.name}: save_every and keep_every must be at least 1")
        if min(1 if self.probe_every is None else self.probe_every, self.probe_limit, *self.probe_block_sizes) < 1:
            raise ConfigError(f"{self.name}: probe_every, probe_limit and probe_block_sizes must be positive")

    @property
    def shares(self) -> dict[str, float]:
        """``data`` as shares."""
        return {self.data: 1.0} if isinstance(self.data, str) else dict(self.data)

    @property
    def uses_target(self) -> bool:  # type: ignore[override]
        return (self.loss.needs_target and self.target_logits == "live") or self.init in FROM_TARGET

    @property
    def needs(self) -> tuple[str, ...]:
        start = None if self.init in INITS else self.init
        return (*self.shares, *filter(None, (start, self.draft_vocabulary, self.reference, self.probe)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Stage):
    """Prompts -> what the target answers, as JSONL and as packed rows: the distillation set.

    Every prompt is answered once per temperature; Direct Alignment (section 3) uses 0, .3, .7 and 1 with top-p .95.

    A draft may write instead, so that it learns from the target where its own text leads: on-policy data, all of it or
    a share, as DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) do. Distil on it; its tokens are no target's.

    Attributes:
      prompts: whose ``prompts(tokenizer)`` are answered.
      temperatures: 0 is greedy.
      top_p: of every temperature.
      max_new_tokens: per answer.
      length: tokens per packed row.
      batch_size: prompts decoded at once. The rounding of bfloat16 depends on it.
      shard_size: answers per file, the unit of work that an interruption may cost.
      train_on_prompts: let prompt tokens count as labels too.
      keep_logits: store the target's distribution beside the rows. It is that of generation, except in answers that do
        not fit into a row and are cut. To change it without answering anew, leave it out and add a Score stage.
      writer: who answers: ``"target"``, a Train stage, or shares such as ``{"target": .5, "pretrain": .5}``. Of
        several, an answer's id and the seed choose its writer.
    """

    prompts: tuple[Any, ...]
    length: int
    temperatures: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)
    top_p: float = 0.95
    max_new_tokens: int = 128
    batch_size: int = 32
    shard_size: int = 512
    train_on_prompts: bool = False
    keep_logits: TopK | None = None
    writer: str | dict[str, float] = TARGET

    def __post_init__(self):
        shares = self.writers.values()
        if not shares or min(shares) <= 0 or not math.isclose(sum(shares), 1):
            raise ConfigError(f"{self.name}: writer is {self.writer}: shares must be positive and sum to 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError(f"{self.name}: temperatures is {self.temperatures}: give at least one, none negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"{self.name}: top_p is {self.top_p}: it must lie in (0, 1]")
        if min(self.max_new_tokens, self.batch_size, self.shard_size, self.length - 1) < 1:
            raise ConfigError(f"{self.name}: max_new_tokens, batch_size, shard_size and length must be positive")

    @property
    def writers(self) -> dict[str, float]:
        """``writer`` as shares."""
        return {self.writer: 1.0} if isinstance(self.writer, str) else dict(self.writer)

    @property
    def uses_target(self) -> bool:  # type: ignore[override]
        return TARGET in self.writers or self.keep_logits is not None

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for name in self.writers if name != TARGET)


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

    In the quickstart, 512 of 1024 tokens are 98.3 % of what the target wrote; distilled with TVD++ and them, block
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

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.data,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Drafts -> block efficiency, MBSU, speed: ``results.json`` and ``samples.jsonl`` in a folder per draft.

    Attributes:
      drafts: Train stages.
      tasks: prompts with their decoding settings.
      block_sizes: γ, draft tokens proposed per run of the target.
      batch_size: prompts decoded at once; 1 is how speed-ups are quoted.
      repeats: each batch is timed so often, and the best counts.
      over_checkpoints: also give block efficiency of every checkpoint the drafts' stages kept.
    """

    drafts: tuple[str, ...]
    tasks: tuple[Task, ...]
    block_sizes: tuple[int, ...] = (3, 5)
    batch_size: int = 1
    repeats: int = 2
    over_checkpoints: bool = False
    uses_target: ClassVar[bool] = True

    def __post_init__(self):
        if not self.drafts or not self.tasks or not self.block_sizes:
            raise ConfigError(f"{self.name}: drafts, tasks and block_sizes must name at least one each")
        if min(self.block_sizes) < 1 or self.batch_size < 1 or self.repeats < 1:
            raise ConfigError(f"{self.name}: block_sizes, batch_size and repeats must be positive")
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise ConfigError(f"{self.name}: two tasks have the same name")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.drafts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Stage):
    """A draft -> a Hugging Face folder with the target's tokenizer, for transformers and the engines.

    Attributes:
      draft: a Train stage.
      dtype: of the stored weights.
      block_size: draft length that transformers' assisted generation is told to use.
      evaluation: an Evaluate stage whose figures go into the model card.
      vocabulary: of a draft with a draft vocabulary: ``"full"`` is plain weights over the target's vocabulary, which
        every engine loads; ``"draft"`` its own head and the map ``d2t``.
    """

    draft: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    block_size: int = 5
    evaluation: str | None = None
    vocabulary: Literal["full", "draft"] = "full"
    uses_target: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.draft, *(() if self.evaluation is None else (self.evaluation,)))
