"""Recipes: a frozen dataclass that lists stages, checked as a whole when it is made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdraft.data.pipeline import rows_per_batch
from jaxdraft.errors import ConfigError, unknown_name
from jaxdraft.evaluate.papers import Reproduction
from jaxdraft.losses import parts
from jaxdraft.models import ModelConfig
from jaxdraft.recipe_data import DraftVocabulary, Prepare, Score, Stage, Subset, TopK, TrainTokenizer
from jaxdraft.recipe_stages import FROM_TARGET, INITS, TARGET, Evaluate, Export, Generate, Train, Written
from jaxdraft.sharding import MeshShape

__all__ = [
    "FROM_TARGET",
    "INITS",
    "TARGET",
    "DraftVocabulary",
    "Evaluate",
    "Export",
    "Generate",
    "HFModel",
    "Prepare",
    "Recipe",
    "Reproduction",
    "Score",
    "Stage",
    "Subset",
    "TopK",
    "Train",
    "TrainTokenizer",
    "Written",
]

RESERVED = ("report", "superseded")


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A Hugging Face model: a folder, or ``owner/name`` on the hub, pinned by ``revision`` where runs shall repeat.

    ``licence`` is its SPDX name; ``None`` is what its card says, or its name tells (``jaxdraft.licences``).
    """

    path: str
    revision: str | None = None
    licence: str | None = None


NO_STAGES = {"init": INITS, "writer": (TARGET,)}  # what else these fields may say
ROWS = (Prepare, Generate, Score, Subset)
READS: dict[type[Stage], dict[str, tuple[type[Stage], ...]]] = {
    Train: {
        "data": ROWS,
        "init": (Train,),
        "draft_vocabulary": (DraftVocabulary,),
        "reference": (Train,),
        "probe": (Generate,),
    },
    Generate: {"writer": (Train,), "draft": (Train,), "instructions": (Generate,)},
    Score: {"data": (Prepare, Generate, Subset)},
    Subset: {"data": (Prepare, Generate, Score)},
    DraftVocabulary: {"data": ROWS},
    Evaluate: {"drafts": (Train,)},
    Export: {"draft": (Train,), "evaluation": (Evaluate,)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is made, in which order.

    Attributes:
      title: heads the report.
      target: the model to be accelerated: a folder, or the Train stage that makes it.
      draft: the shape of the drafts; without a ``vocab_size`` it takes the target's, and its BOS and EOS.
      stages: run in this order.
      tokenizer: of a target that is trained: the TrainTokenizer stage, or the folder (or hub repository) that has it;
        ``None`` takes the target folder's.
      description: one paragraph for the report.
      seed: of all randomness.
      mesh: how devices are laid out.
      reproduces: tables and figures of the papers that the report shows beside what these stages give.

    Raises:
      ConfigError: two stages of one name, a stage that reads what no earlier stage makes, or a table of a paper that
        names a stage or a task which is not here.
    """

    title: str
    target: HFModel | str
    draft: ModelConfig
    stages: tuple[Stage, ...]
    tokenizer: str | HFModel | None = None
    description: str = ""
    seed: int = 0
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    reproduces: tuple[Reproduction, ...] = ()

    def __post_init__(self):
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed is {self.seed}: it must lie in 0..2³¹-1")
        earlier: dict[str, Stage] = {}
        for stage in self.stages:
            if not stage.name.replace("-", "_").isidentifier() or stage.name in (*RESERVED, *INITS):
                taken = ", ".join((*RESERVED, *INITS))
                raise ConfigError(f"stage name {stage.name!r}: use letters, digits, - and _, and none of {taken}")
            if stage.name in earlier:
                raise ConfigError(f"two stages are called {stage.name!r}")
            self._check_reads(stage, earlier)
            if isinstance(stage, Train):
                self._check_mix(stage, earlier)
                self._check_stored(stage, earlier)
            if isinstance(stage, Subset):
                self._check_sample(stage, earlier)
            earlier[stage.name] = stage
        if isinstance(self.target, str):
            self._check_reference("target", self.target, earlier, (Train,))
            if self.tokenizer is None:
                raise ConfigError("a target that is trained needs tokenizer= the TrainTokenizer stage, or a folder")
        if isinstance(self.tokenizer, str):
            self._check_reference("tokenizer", self.tokenizer, earlier, (TrainTokenizer,))
        trained = [stage.name for stage in self.stages if isinstance(stage, Train)]
        evaluations = [stage for stage in self.stages if isinstance(stage, Evaluate)]
        for i, reproduction in enumerate(self.reproduces):
            reproduction.check(trained, evaluations)
            if any(other.published is reproduction.published for other in self.reproduces[:i]):
                raise ConfigError(f"reproduces names {reproduction.paper}, {reproduction.exhibit} twice")

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
          ConfigError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(unknown_name("stage", name, [stage.name for stage in self.stages]))

    def probe(self, stage: Train) -> Generate | None:
        """The stage on whose answers block efficiency is measured while ``stage`` learns."""
        if not stage.probe_block_sizes:
            return None
        named = map(self.stage, stage.shares if stage.probe is None else (stage.probe,))
        made = (self.origin(other.name) for other in named)
        return next((other for other in made if isinstance(other, Generate)), None)

    def origin(self, name: str) -> Stage:
        """The stage that packed the rows which the stage of that name makes, or takes from others."""
        return _origin(name, {stage.name: stage for stage in self.stages})

    def uses_target(self, stage: Stage) -> bool:
        """Whether a stage reads the target's weights: also one that only has its block efficiency measured."""
        return stage.uses_target or (isinstance(stage, Train) and self.probe(stage) is not None)

    @property
    def learns_from_target(self) -> str | None:
        """The first stage in which something is learnt from what the target says, or will be."""
        for stage in self.stages:
            answers = isinstance(stage, Generate) and TARGET in stage.writers
            if answers or isinstance(stage, Score) or (isinstance(stage, Train) and stage.loss.needs_target):
                return stage.name
        return None

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """Names of all stages whose output a stage reads, target and tokenizer included."""
        names = list(stage.needs)
        if self.uses_target(stage) and isinstance(self.target, str):
            names.append(self.target)
        if stage.uses_tokenizer and isinstance(self.tokenizer, str):
            names.append(self.tokenizer)
        return tuple(dict.fromkeys(names))

    def _check_reads(self, stage: Stage, earlier: Mapping[str, Stage]) -> None:
        for field, kinds in READS.get(type(stage), {}).items():
            value = getattr(stage, field)
            for name in (value,) if isinstance(value, str) else tuple(value or ()):
                self._check_reference(f"{stage.name}.{field}", name, earlier, kinds, NO_STAGES.get(field, ()))
        for name in self.needs(stage):
            if name not in earlier:
                raise ConfigError(f"stage {stage.name!r} reads {name!r}, which no earlier stage makes")

    @staticmethod
    def _check_mix(stage: Train, earlier: Mapping[str, Stage]) -> None:
        """What training would refuse an hour later."""
        try:
            rows_per_batch(list(stage.shares), stage.shares, stage.batch_size)
        except ConfigError as error:
            raise ConfigError(f"{stage.name}: {error}") from None
        lengths = {name: getattr(_origin(name, earlier), "length", 0) for name in stage.shares}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"{stage.name}: rows of different lengths cannot be mixed: {lengths}")

    @staticmethod
    def _check_sample(stage: Subset, earlier: Mapping[str, Stage]) -> None:
        """What only the rows would tell else."""
        least = getattr(_origin(stage.data, earlier), "length", 0)
        most = getattr(earlier[stage.data], "tokens", None)
        if stage.tokens < least or (most is not None and stage.tokens > most):
            limits = f"at least a row, {least:,}" + ("" if most is None else f", and at most {most:,}")
            raise ConfigError(f"{stage.name}: tokens is {stage.tokens:,}: of {stage.data!r} take {limits}")

    @staticmethod
    def _check_stored(stage: Train, earlier: Mapping[str, Stage]) -> None:
        """Whether every row that a stage reads has the target's distribution that its loss wants."""
        if stage.target_logits != "stored":
            return
        others = {loss.temperature for loss in parts(stage.loss)} - {stage.loss.temperature}
        if others:
            raise ConfigError(
                f"{stage.name}: stored probabilities have one temperature, and so must all terms of the loss: "
                f"{min(others):g} is not {stage.loss.temperature:g}"
            )
        kept: dict[str, TopK] = {}
        for name in stage.shares:
            made = _origin(name, earlier, Subset)
            keep = getattr(made, "keep_logits", None)
            if keep is None:
                top = "keep_logits=TopK(32)"
                remedy = (
                    f"give {name} {top}" if isinstance(made, Generate) else f"train on Score(…, data={name!r}, {top})"
                )
                raise ConfigError(f"{stage.name}: target_logits is 'stored', but {name!r} stores none: {remedy}")
            if keep.temperature != stage.loss.temperature:
                raise ConfigError(
                    f"{stage.name}: {name!r} stores the target at temperature {keep.temperature:g}, but the loss's is "
                    f"{stage.loss.temperature:g}: set {name}.keep_logits.temperature={stage.loss.temperature:g}"
                )
            kept[name] = keep
        if len({keep.k for keep in kept.values()}) > 1:
            stored = {name: keep.k for name, keep in kept.items()}
            raise ConfigError(f"{stage.name}: rows that store different numbers of tokens cannot be mixed: {stored}")

    @staticmethod
    def _check_reference(
        what: str,
        name: str,
        stages: Mapping[str, Stage],
        kinds: tuple[type[Stage], ...],
        others: tuple[str, ...] = (),
    ) -> None:
        fitting = list(dict.fromkeys([*others, *(n for n, stage in stages.items() if isinstance(stage, kinds))]))
        if name not in fitting:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"{what}: " + unknown_name(f"earlier {wanted} stage", name, fitting))


def _origin(name: str, stages: Mapping[str, Stage], through: Any = Score | Subset) -> Stage:
    stage = stages[name]
    while isinstance(stage, through):
        stage = stages[stage.data]
    return stage
