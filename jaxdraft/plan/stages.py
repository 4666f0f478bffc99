"""What each stage of a recipe takes: tokens, storage, floating-point operations and hours, counted from its settings.

A stage's work is a list of phases, each a number of equal steps. A step takes as long as its products or its bytes,
whichever is longer: training is bound by products, decoding by reading the weights and the cache for every token.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxdraft.data.records import columns
from jaxdraft.models import ModelConfig
from jaxdraft.plan import flops
from jaxdraft.plan.hardware import Hardware
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.work import WEIGHT, Decoding, Phase, decode_layout, expected_block, prompts_of
from jaxdraft.recipe import (
    TARGET,
    DraftVocabulary,
    Evaluate,
    Export,
    Generate,
    Prepare,
    Recipe,
    Score,
    Stage,
    Subset,
    TopK,
    Train,
)

_JSON = 12  # bytes of a token in the responses' JSONL: its id, its text, and the commas
_STATE = 12  # bytes of a parameter in a checkpoint: float32, with two moments


@dataclasses.dataclass
class StagePlan:
    """What a stage takes. ``None`` is what only a run can say.

    Attributes:
      name: the stage's.
      kind: its type.
      parameters: of the model that it trains, or of the target where it runs it.
      tokens: that it reads or writes.
      steps: updates of a Train stage.
      storage: bytes it leaves on the disk, by what they are.
      phases: its work; empty where the accelerators rest.
      notes: what one should know of it.
    """

    name: str
    kind: str
    parameters: int | None = None
    tokens: float | None = None
    steps: int | None = None
    storage: dict[str, float] = dataclasses.field(default_factory=dict)
    phases: list[Phase] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(phase.steps * phase.flops for phase in self.phases)

    def hours(self, hardware: Hardware) -> float:
        return sum(phase.steps * max(phase.seconds(hardware)) for phase in self.phases) / 3600

    def bound(self, hardware: Hardware) -> str:
        """What most of the time goes into."""
        by = {"compute": 0.0, "memory": 0.0}
        for phase in self.phases:
            compute, memory = phase.seconds(hardware)
            by["compute" if compute > memory else "memory"] += phase.steps * max(compute, memory)
        return max(by, key=lambda name: by[name])


def plan_stages(context: PlannedContext, hardware: Hardware) -> list[StagePlan]:
    """Every stage of the recipe, in its order."""
    return [_Planner(context, hardware).stage(stage) for stage in context.recipe.stages]


def row_bytes(vocabulary: int, keep: TopK | None) -> int:
    """A token of packed rows, with what is stored of the target beside it."""
    stored = None if keep is None else {"k": keep.k, "vocabulary": vocabulary}
    return sum(column.bytes for column in columns(vocabulary, stored).values())


def row_length(context: PlannedContext, name: str) -> int:
    """Tokens of the rows that a stage makes."""
    stage = context.recipe.origin(name)
    assert isinstance(stage, Prepare | Generate)
    return stage.length


def train_flops(draft: ModelConfig, target: ModelConfig | None, stage: Train, length: int) -> float:
    """One update: the draft forward and backward, with remat what is computed again; the frozen models forward."""
    context = lambda config: flops.block_flops(config, flops.mean_context(length, config.sliding_window))
    passes = flops.FORWARD + flops.BACKWARD
    again_in_blocks = {"none": 0.0, "dots": context(draft) - flops.block_flops(draft, 0), "full": context(draft)}
    # The engine's products with the heads: weighted losses compute the logits again for their gradient.
    again = int(stage.loss.weights is not None)
    total = passes * context(draft) + again_in_blocks[stage.remat] + (3 + again) * flops.head_flops(draft)
    if target is not None:
        total += context(target) + (1 + again) * flops.head_flops(target)
    if stage.reference is not None:
        total += context(draft) + flops.head_flops(draft)
    if stage.loss.has_statistics:  # one more pass for the batch's means; in a single micro-batch of the heads alone
        blocks = 0.0 if stage.accumulate == 1 else context(draft) + (context(target) if target else 0.0)
        total += blocks + flops.head_flops(draft) + (flops.head_flops(target) if target else 0.0)
    return stage.batch_size * length * total


def kept_checkpoints(stage: Train) -> int:
    """How many checkpoints lie in a Train stage's folder when it is done."""
    every = stage.keep_every or stage.steps
    saved = sorted({*range(stage.save_every, stage.steps, stage.save_every), *range(every, stage.steps, every)})
    saved.append(stage.steps)
    return len({*saved[-2:], *(step for step in saved if stage.keep_every and step % stage.keep_every == 0)})


class _Planner:
    def __init__(self, context: PlannedContext, hardware: Hardware):
        self.context, self.recipe, self.hardware = context, context.recipe, hardware
        self.target, self.vocabulary = context.target_shape, context.target_shape.vocabulary

    def stage(self, stage: Stage) -> StagePlan:
        plan = StagePlan(stage.name, type(stage).__name__)
        fill: dict[type[Stage], Callable[[Any, StagePlan], None]] = {
            Train: self._train,
            Generate: self._generate,
            Score: self._score,
            Evaluate: self._evaluate,
        }
        if isinstance(stage, Prepare):
            plan.tokens = self._drawn(stage.name) if stage.tokens is None else stage.tokens
            plan.storage = {"rows": plan.tokens * row_bytes(self.vocabulary, None)}
            if stage.tokens is None:
                plan.notes.append("as much text as is trained on, once: with less it is read again")
        elif isinstance(stage, Subset):
            plan.tokens = stage.tokens
            keep = getattr(self.recipe.stage(stage.data), "keep_logits", None)
            plan.storage = {"rows": plan.tokens * row_bytes(self.vocabulary, keep)}
        elif isinstance(stage, Export):
            trained = self.recipe.stage(stage.draft)
            assert isinstance(trained, Train)
            config = self.context.model(trained)
            whole = dataclasses.replace(config, head_ids=None) if stage.vocabulary == "full" else config
            plan.parameters = whole.num_parameters
            plan.storage = {"model": whole.num_parameters * (4 if stage.dtype == "float32" else 2)}
        elif isinstance(stage, DraftVocabulary):
            plan.tokens = self._rows(stage.data)
        elif type(stage) in fill:
            fill[type(stage)](stage, plan)
        return plan

    def _drawn(self, name: str) -> float:
        """Tokens that training takes of a stage's rows."""
        reads = 0.0
        for stage in self.recipe.stages:
            if isinstance(stage, Train) and name in stage.shares:
                share = stage.shares[name]
                reads = max(reads, stage.steps * stage.batch_size * share * row_length(self.context, name))
            elif isinstance(stage, Score | Subset) and stage.data == name:
                reads = max(reads, self._drawn(stage.name) if isinstance(stage, Score) else stage.tokens)
        return reads

    def _rows(self, name: str) -> float | None:
        """Tokens of the rows that a stage leaves; of answers at most."""
        stage = self.recipe.stage(name)
        if isinstance(stage, Score):
            return self._rows(stage.data)
        if isinstance(stage, Prepare | Subset) and stage.tokens is not None:
            return stage.tokens
        if isinstance(stage, Generate):
            amount = _answers(stage, self.recipe)
            return None if amount is None else sum(n * (tokens + stage.max_new_tokens) for n, tokens in amount)
        return self._drawn(name)

    def _train(self, stage: Train, plan: StagePlan) -> None:
        config, length = self.context.model(stage), row_length(self.context, next(iter(stage.shares)))
        whole = dataclasses.replace(config, head_ids=None)
        live = stage.loss.needs_target and stage.target_logits == "live"
        plan.parameters, plan.steps = config.num_parameters, stage.steps
        plan.tokens = stage.steps * stage.batch_size * length
        kept = kept_checkpoints(stage)
        plan.storage = {
            f"{kept} checkpoint{'s' * (kept > 1)}": kept * _STATE * whole.num_parameters,
            "model": 4 * config.num_parameters,
        }
        work = train_flops(config, self.target if live else None, stage, length)
        plan.phases = [Phase("updates", stage.steps, work, self._train_bytes(stage, config, live, length))]
        for name, share in stage.shares.items():
            rows = self._rows(name)
            if rows and getattr(self.recipe.stage(name), "tokens", True) is not None:
                plan.notes.append(f"reads {name} {plan.tokens * share / rows:.2g} times")

    def _train_bytes(self, stage: Train, config: ModelConfig, live: bool, length: int) -> float:
        """Weights once per micro-batch and pass, the state once, logits of every chunk written and read per product."""
        passes = flops.FORWARD + flops.BACKWARD + (stage.remat == "full")
        weights = stage.accumulate * WEIGHT * (passes * config.num_parameters + live * self.target.num_parameters)
        state = 2 * _STATE * config.num_parameters / self.hardware.chips
        columns = 3 * len(config.head_ids or range(self.vocabulary)) + live * self.vocabulary
        return weights + state + stage.batch_size * length * 2 * 4 * columns / self.hardware.chips

    def _generate(self, stage: Generate, plan: StagePlan) -> None:
        plan.parameters = self.target.num_parameters if stage.uses_target else None
        plan.notes += [note for source in stage.prompts for note in prompts_of(source, self.recipe).notes]
        amount = _answers(stage, self.recipe)
        if amount is None:
            return
        plan.tokens = self._rows(stage.name)
        assert plan.tokens is not None
        stored = stage.keep_logits
        plan.storage = {"rows": plan.tokens * row_bytes(self.vocabulary, None), "responses": plan.tokens * _JSON}
        if stored:
            width = row_bytes(self.vocabulary, stored) - row_bytes(self.vocabulary, None)
            plan.storage["stored logits"] = plan.tokens * width
            if stage.keeps_as_written:
                answers = sum(n for n, _ in amount) * stage.max_new_tokens
                plan.storage["stored logits, beside the answers"] = answers * width
        if stage.server is not None:
            plan.notes.append("a server writes: its hours are not here")
        for writer, share in stage.writers.items() if stage.server is None else ():
            config = self.target if writer == TARGET else self._draft(writer)
            for answers, tokens in amount:
                batches = math.ceil(answers * share / stage.batch_size)
                batch = self._batch(stage.batch_size, tokens, stage.max_new_tokens)
                plan.phases.append(batch.prefill(config, batches, writer))
                plan.notes += self._too_large(batch, config)
                plan.phases.append(Phase(f"{writer} writes", batches * stage.max_new_tokens, *batch.step(config)))
        if stored and not stage.keeps_as_written:
            plan.phases.append(self._forward("scores", plan.tokens, stage.length))

    def _score(self, stage: Score, plan: StagePlan) -> None:
        plan.parameters, plan.tokens = self.target.num_parameters, self._rows(stage.data)
        if plan.tokens is None:
            return
        length = row_length(self.context, stage.data)
        width, plain = row_bytes(self.vocabulary, stage.keep_logits), row_bytes(self.vocabulary, None)
        plan.storage = {"rows": plan.tokens * plain, "stored logits": plan.tokens * (width - plain)}
        plan.notes.append(f"{width} bytes a token, {width - plain} of them of the target")
        plan.phases = [self._forward("scores", plan.tokens, length)]

    def _evaluate(self, stage: Evaluate, plan: StagePlan) -> None:
        plan.parameters, plan.tokens = self.target.num_parameters, 0.0
        for task, rows in itertools.product(stage.tasks, stage.batch_sizes):
            count, tokens, notes = prompts_of(task.prompts, self.recipe)
            if rows == stage.batch_sizes[0]:
                plan.notes += [f"{task.name}: {note}" for note in notes]
            if count is None:
                continue
            count *= max(1, len(stage.temperatures))
            repeats = math.ceil(count / rows) * stage.repeats
            batch = self._batch(rows, tokens, task.max_new_tokens)
            steps = repeats * task.max_new_tokens
            plan.phases.append(batch.prefill(self.target, repeats, "target"))
            plan.phases.append(Phase("target alone", steps, *batch.step(self.target)))
            plan.tokens += count * task.max_new_tokens
            for draft in map(self._draft, stage.drafts):
                plan.notes += self._too_large(batch, self.target, draft)
                length = tokens + task.max_new_tokens
                plan.phases.append(self._forward("both read the answers", count * length, length, draft))
                for size in stage.block_sizes:
                    blocks = steps / expected_block(size)
                    plan.phases.append(batch.prefill(self.target, repeats, "target"))
                    plan.phases.append(batch.prefill(draft, repeats, "draft"))
                    plan.phases.append(Phase("target checks blocks", blocks, *batch.step(self.target, size + 1)))
                    plan.phases.append(Phase("draft proposes", blocks * size, *batch.step(draft)))
                    plan.tokens += count * task.max_new_tokens
        for rows in stage.batch_sizes:
            groups = self._batch(rows, 1, 1).groups
            if groups > 1 and rows % groups:
                plan.notes.append(
                    f"a batch of {rows} does not divide over {groups} groups of chips, which all do the same: "
                    "mesh.decode_tensor would spread a row over more of them"
                )

    def _forward(self, name: str, tokens: float, length: int, draft: ModelConfig | None = None) -> Phase:
        """The target over texts, and a draft beside it; weights are read once per 8192 tokens of a chip."""
        work = flops.forward_flops(self.target, length) / length * tokens
        if draft is not None:
            work += flops.forward_flops(draft, length) / length * tokens
        passes = math.ceil(tokens / (8192 * self.hardware.chips))
        return Phase(name, passes, work / passes, WEIGHT * self.target.num_parameters)

    def _too_large(self, batch: Decoding, *configs: ModelConfig) -> Iterator[str]:
        needed, memory = batch.resident(*configs), self.hardware.rates.memory
        if needed > memory:
            yield (
                f"weights and caches of a batch are {needed / 2**30:.0f} GiB a chip of {memory / 2**30:.0f}: lower "
                "batch_size or max_new_tokens"
            )

    def _batch(self, rows: int, prompt: int, new: int) -> Decoding:
        return Decoding(rows, prompt, new, *decode_layout(self.context, self.hardware))

    def _draft(self, name: str) -> ModelConfig:
        stage = self.recipe.stage(name)
        assert isinstance(stage, Train)
        return self.context.model(stage)


def _answers(stage: Generate, recipe: Recipe) -> list[tuple[int, int]] | None:
    """(answers, tokens of their prompts) of each source; ``None`` where a source does not say how many it has."""
    found = [prompts_of(source, recipe) for source in stage.prompts]
    if any(prompts.total is None for prompts in found):
        return None
    return [((prompts.total or 0) * len(stage.temperatures), prompts.tokens) for prompts in found]


def phase_lines(plan: StagePlan, hardware: Hardware) -> Iterator[tuple[Phase, float, str]]:
    """Each phase with its hours and what bounds it."""
    for phase in plan.phases:
        compute, memory = phase.seconds(hardware)
        yield phase, phase.steps * max(compute, memory) / 3600, "compute" if compute > memory else "memory"
