"""What the stages that use models are told: frozen dataclasses, checked when they are made."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from jaxdraft.data.magpie import Magpie
from jaxdraft.data.sources import Source
from jaxdraft.decode import Speculation
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.tasks import Task
from jaxdraft.losses import Loss
from jaxdraft.models import ModelConfig
from jaxdraft.recipe_data import Stage, TopK
from jaxdraft.server import Server
from jaxdraft.train.state import OptimizerSettings

FROM_TARGET = ("subclone", "target-embedding")
"""Starts of a draft that are taken from the target's weights: ``jaxdraft.models.subclone``."""
INITS = ("random", *FROM_TARGET)
TARGET = "target"
"""As a writer of answers: the recipe's target, whatever the stage that makes it is called."""


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
      probe_decode: of these prompts of each temperature, so many are answered anew at every measurement, with the draft
        as it is: block efficiency as decoding has it, beside the exact. The target stays in memory for it, and during
        the measurement a second time.
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
    probe_decode: int = 0

    def __post_init__(self):
        try:
            super().__post_init__()
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
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
        if not 0 <= self.probe_decode <= self.probe_limit:
            raise ConfigError(
                f"{self.name}: probe_decode is {self.probe_decode}: of the probe_limit={self.probe_limit} prompts of "
                "each temperature so many are decoded, 0 for none"
            )

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


@dataclasses.dataclass(frozen=True)
class Written:
    """As prompts: the instructions that an earlier Generate stage wrote from ``Magpie``.

    Those that did not end, are empty, were written before or hold tokens of the chat template are left out and counted.

    Attributes:
      stage: the Generate stage.
      limit: at most this many.
      max_tokens: a longer prompt is left out.
    """

    stage: str
    limit: int | None = None
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Stage):
    """Prompts -> what the target answers, as JSONL and as packed rows: the distillation set.

    Every prompt is answered once per temperature; Direct Alignment (section 3) uses 0, .3, .7 and 1 with top-p .95.

    A draft may write instead, so that it learns from the target where its own text leads: on-policy data, all of it or
    a share, as DistillSpec (arXiv 2310.08461) and GKD (arXiv 2306.13649) do. Distil on it; its tokens are no target's.

    Attributes:
      prompts: whose ``prompts(tokenizer)`` are answered.
      temperatures: 0 is greedy. Those, and what follows, a prompt of its own settings is not asked with.
      top_p: of every temperature.
      max_new_tokens: per answer.
      system_prompts: of several, an answer's id and the seed choose one; ``""`` is none. For prompts that are
        conversations.
      length: tokens per packed row.
      batch_size: rows decoded at once, each taken by the next prompt when its answer ends. The rounding of bfloat16
        depends on it.
      shard_size: answers per file, the unit of work that an interruption may cost.
      labels: which tokens count as labels: of ``"answers"``; also of the ``"assistant"``'s earlier turns in a prompt
        that is a conversation; or ``"all"``, whole prompts too.
      keep_logits: store the target's distribution beside the rows. It is what the target wrote from, kept while it
        writes, with all of a text in sight even where ``length`` cuts it; where others write too, or prompts are
        labels, a pass of the target over the rows, which sees each piece alone. Unlike the answers its last bits depend
        on the rows of a device. To change it without answering anew, leave it out and add a Score stage.
      writer: who answers: ``"target"``, a Train stage, or shares such as ``{"target": .5, "pretrain": .5}``. Of
        several, an answer's id and the seed choose its writer.
      draft: a Train stage's model that drafts for the writer: the same text, sooner.
      block_size: γ, tokens it proposes per run of the writer.
      server: an OpenAI-compatible server that runs the target, and answers in place of this machine.
    """

    prompts: tuple[Any, ...]
    length: int
    temperatures: tuple[float, ...] = (0.0, 0.3, 0.7, 1.0)
    top_p: float = 0.95
    max_new_tokens: int = 128
    batch_size: int = 32
    shard_size: int = 512
    system_prompts: tuple[str, ...] = ()
    labels: Literal["answers", "assistant", "all"] = "answers"
    keep_logits: TopK | None = None
    writer: str | dict[str, float] = TARGET
    draft: str | None = None
    block_size: int = 4
    server: Server | None = None

    def __post_init__(self):
        shares = self.writers.values()
        if not shares or min(shares) <= 0 or not math.isclose(sum(shares), 1):
            raise ConfigError(f"{self.name}: writer is {self.writer}: shares must be positive and sum to 1")
        if not self.temperatures or not all(0 <= temperature < math.inf for temperature in self.temperatures):
            raise ConfigError(f"{self.name}: temperatures is {self.temperatures}: give at least one, none negative")
        if len({f"{temperature:g}" for temperature in self.temperatures}) < len(self.temperatures):
            raise ConfigError(f"{self.name}: temperatures is {self.temperatures}: give none twice, to six digits")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"{self.name}: top_p is {self.top_p}: it must lie in (0, 1]")
        if min(self.max_new_tokens, self.batch_size, self.shard_size, self.block_size, self.length - 1) < 1:
            numbers = "max_new_tokens, batch_size, shard_size, block_size and length"
            raise ConfigError(f"{self.name}: {numbers} must be positive")
        if self.server is not None and (self.writer != TARGET or self.draft is not None):
            raise ConfigError(f"{self.name}: server answers as the target, alone: leave out writer and draft")
        if any(isinstance(source, Magpie) for source in self.prompts) and min(self.temperatures) == 0:
            raise ConfigError(f"{self.name}: temperatures is {self.temperatures}: at 0 Magpie writes one instruction")

    @property
    def writers(self) -> dict[str, float]:
        """``writer`` as shares."""
        return {self.writer: 1.0} if isinstance(self.writer, str) else dict(self.writer)

    @property
    def uses_target(self) -> bool:  # type: ignore[override]
        return (TARGET in self.writers and self.server is None) or self.keep_logits is not None

    @property
    def needs(self) -> tuple[str, ...]:
        drafted = () if self.draft is None else (self.draft,)
        return (*self.instructions, *(name for name in self.writers if name != TARGET), *drafted)

    @property
    def keeps_as_written(self) -> bool:
        """Whether the target's distributions are kept while it writes."""
        alone = set(self.writers) == {TARGET} and self.server is None
        return self.keep_logits is not None and alone and self.labels == "answers"

    @property
    def instructions(self) -> tuple[str, ...]:
        """The stages that wrote what is asked."""
        return tuple(source.stage for source in self.prompts if isinstance(source, Written))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Drafts -> block efficiency, MBSU, speed: ``results.json`` and ``samples.jsonl`` in a folder per draft.

    Every draft is measured on every task, at every temperature, batch size and block size. What was measured before,
    also with other settings than these, is not measured again: a stage that was stopped goes on with the setting it was
    at, and one that is asked for another block size does that alone.

    Attributes:
      drafts: Train stages.
      tasks: prompts with their decoding settings.
      block_sizes: γ, draft tokens proposed per run of the target.
      temperatures: instead of each task's own; none keeps those.
      batch_sizes: prompts decoded at once; 1 is how speed-ups are quoted.
      verification: see ``Speculation``; so are the next two.
      drafting: whether drafts propose what they draw, or what is most likely.
      stop_below: a draft token's probability below which a block ends.
      repeats: each batch is timed so often, and the best counts.
      predict_up_to: the largest block size whose speed-up is predicted from latencies, to name the best one.
      perplexity: the text on which that of target and drafts is measured, such as ``Corpus("wikitext-2",
        split="test")``; ``None`` measures none.
      over_checkpoints: also give the exact offline block efficiency of every checkpoint that the drafts' stages kept.
      decode_checkpoints: with it, decode with every checkpoint, and give all that is measured of drafts.
    """

    drafts: tuple[str, ...]
    tasks: tuple[Task, ...]
    block_sizes: tuple[int, ...] = (3, 5)
    temperatures: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    verification: Literal["token", "block"] = "token"
    drafting: Literal["sampled", "greedy"] = "sampled"
    stop_below: float = 0.0
    repeats: int = 2
    predict_up_to: int = 10
    perplexity: Source | None = None
    over_checkpoints: bool = False
    decode_checkpoints: bool = False
    uses_target: ClassVar[bool] = True

    def __post_init__(self):
        if not self.drafts or not self.tasks or not self.block_sizes or not self.batch_sizes:
            raise ConfigError(f"{self.name}: drafts, tasks, block_sizes and batch_sizes must name at least one each")
        if min(*self.block_sizes, *self.batch_sizes, self.repeats) < 1 or self.predict_up_to < 0:
            raise ConfigError(
                f"{self.name}: block_sizes, batch_sizes and repeats must be positive, predict_up_to not negative"
            )
        if any(not 0 <= temperature < math.inf for temperature in self.temperatures):
            raise ConfigError(f"{self.name}: temperatures is {self.temperatures}: none may be negative")
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise ConfigError(f"{self.name}: two tasks have the same name")
        if self.decode_checkpoints and not self.over_checkpoints:
            raise ConfigError(f"{self.name}: decode_checkpoints needs over_checkpoints")
        try:
            _ = self.speculations
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    @property
    def speculations(self) -> tuple[Speculation, ...]:
        """How drafts propose, one for each block size."""
        options = self.verification, self.drafting, self.stop_below
        return tuple(Speculation(block_size, *options) for block_size in self.block_sizes)

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

    def __post_init__(self):
        if self.block_size < 1:
            raise ConfigError(f"{self.name}: block_size is {self.block_size}: it must be at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.draft, *(() if self.evaluation is None else (self.evaluation,)))
