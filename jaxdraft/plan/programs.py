"""The programs that a recipe's stages run, with abstract arguments: they are lowered and compiled without any weights.

Shapes: B rows, T tokens of a row, L tokens of a prompt's bucket, S tokens of prompt and answer, N blocks.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdraft.decode.blocks import WrittenInBlocks, write_in_blocks
from jaxdraft.decode.generate import Written, prefill, write
from jaxdraft.decode.rules import Speculation
from jaxdraft.decode.sampling import Draws, Sampling
from jaxdraft.decode.score import score_rows
from jaxdraft.models import Decoder, ModelConfig, compute_dtype, for_decoding, init_params
from jaxdraft.models.decoder import model_shardings
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.stages import StagePlan, row_length
from jaxdraft.plan.work import Decoding, Phase, expected_block, prompts_of
from jaxdraft.recipe import TARGET, Evaluate, Generate, Score, Stage, TopK, Train
from jaxdraft.sharding import CACHE, batch_sharding, replicated, row_groups, spec
from jaxdraft.stored_targets import TOKENS_PER_PASS
from jaxdraft.train.state import abstract_state, state_shardings
from jaxdraft.train.step import build_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a stage.

    Attributes:
      stage: the stage's name.
      name: what it does.
      rows: of its batch.
      multiple: rows may be any multiple of it; ``None`` where they are as another program's, which takes more.
      step: what one step takes: an update, a pass, or a round of a loop that writes tokens.
      tokens: of one step.
      mesh: the devices.
      params: its parameters, whose layout is told.
      lower: makes the program for so many rows.
      micro_batches: of an update.
      remedies: what to change where it does not fit.
    """

    stage: str
    name: str
    rows: int
    multiple: int | None
    step: Phase
    tokens: float
    mesh: Mesh
    params: dict[str, Any]
    lower: Callable[[int], jax.stages.Lowered]
    remedies: tuple[str, ...]
    micro_batches: int = 1


def programs(context: PlannedContext, stage: Stage, plan: StagePlan, devices: Sequence[Any]) -> Iterator[Program]:
    """The programs of a stage on the devices, the one that takes most memory last; none of a stage of the host."""
    if isinstance(stage, Train):
        yield _updates(context, stage, plan, context.mesh_on(devices))
    elif isinstance(stage, Score):
        yield _scores(context, stage.name, stage.keep_logits, row_length(context, stage.data), context.mesh_on(devices))
    elif isinstance(stage, Generate):
        mesh = context.decode_mesh_on(context.mesh_on(devices))
        prompt = max(prompts_of(source, context.recipe).tokens for source in stage.prompts)
        for writer in stage.writers if stage.server is None else ():
            config = context.target_shape if writer == TARGET else _draft(context, writer)
            batch = Decoding(stage.batch_size, prompt, stage.max_new_tokens, mesh.shape["data"], mesh.shape["tensor"])
            yield _prefill(stage.name, f"{writer} reads prompts", config, batch, mesh)
            yield _writes(stage.name, f"{writer} writes", config, batch, mesh, any(stage.temperatures))
        if stage.keep_logits and not stage.keeps_as_written:
            yield _scores(context, stage.name, stage.keep_logits, stage.length, context.mesh_on(devices))
    elif isinstance(stage, Evaluate):
        mesh = context.decode_mesh_on(context.mesh_on(devices))
        drafts = {name: _draft(context, name) for name in stage.drafts}
        name, draft = max(drafts.items(), key=lambda item: item[1].num_parameters)
        asked = [prompts_of(t.prompts, context.recipe, t.limit, t.max_prompt_tokens) for t in stage.tasks]
        prompt = max(prompts.tokens for prompts in asked)
        new = max(task.max_new_tokens for task in stage.tasks)
        sampled = any(stage.temperatures or [task.temperature for task in stage.tasks])
        batch = Decoding(max(stage.batch_sizes), prompt, new, mesh.shape["data"], mesh.shape["tensor"])
        yield _prefill(stage.name, "the target reads prompts", context.target_shape, batch, mesh)
        alone = _writes(stage.name, "the target alone", context.target_shape, batch, mesh, sampled)
        yield dataclasses.replace(alone, multiple=None)
        size = max(stage.block_sizes)
        yield _blocks(
            stage.name, f"blocks of {size} with {name}", context.target_shape, draft, batch, size, mesh, sampled
        )


def _updates(context: PlannedContext, stage: Train, plan: StagePlan, mesh: Mesh) -> Program:
    config, length = context.model(stage), row_length(context, next(iter(stage.shares)))
    shardings = state_shardings(config, stage, mesh)
    state = abstract_state(stage, config, shardings)
    frozen = {}
    if stage.loss.needs_target and stage.target_logits == "live":
        frozen["target"] = context.target_shape
    if stage.reference is not None:
        frozen["reference"] = config
    frozen_params = {name: _stacked(config, mesh) for name, config in frozen.items()}
    step_fn = build_step(
        Decoder(config, remat=stage.remat),
        {name: Decoder(config) for name, config in frozen.items()},
        stage.loss,
        stage,
        mesh,
        shardings,
        {name: model_shardings(config, mesh) for name, config in frozen.items()},
        stage.accumulate,
    )
    columns = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "loss_mask": jnp.float32}
    kept = _kept(context, stage)

    def lower(rows: int) -> jax.stages.Lowered:
        on_rows = batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct((rows, length), t, sharding=on_rows) for name, t in columns.items()}
        if kept is not None:
            shapes = {"target_ids": (kept.k, jnp.int32), "target_log_probs": (kept.k + 2, jnp.float16)}
            for name, (width, dtype) in shapes.items():
                batch[name] = jax.ShapeDtypeStruct((rows, length, width), dtype, sharding=on_rows)
        return step_fn.lower(state, frozen_params, batch)

    micro = f"in {stage.accumulate} micro-batches " if stage.accumulate > 1 else ""
    remedies = [
        f"{stage.name}.remat=full" if stage.remat != "full" else "",
        f"a larger {stage.name}.accumulate" if stage.batch_size // stage.accumulate > row_groups(mesh) else "",
        "mesh.fsdp, which cuts the weights"
        if mesh.shape["fsdp"] == 1
        else "mesh.tensor, which cuts heads and vocabulary",
        f"a smaller {stage.name}.batch_size, or more chips",
    ]
    multiple = stage.accumulate * row_groups(mesh)
    return Program(
        stage.name,
        f"an update {micro}of {length} tokens a row",
        -(-stage.batch_size // multiple) * multiple,  # filled up, as the training loop does
        multiple,
        plan.phases[0]._replace(name="an update"),
        stage.batch_size * length,
        mesh,
        {"draft": state.params, **frozen_params},
        lower,
        tuple(filter(None, remedies)),
        stage.accumulate,
    )


def _scores(context: PlannedContext, stage: str, keep: TopK, length: int, mesh: Mesh) -> Program:
    config, on_rows = context.target_shape, batch_sharding(mesh)
    params, decoder = _stacked(config, mesh), Decoder(config)

    def lower(rows: int) -> jax.stages.Lowered:
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=on_rows)
        return score_rows.lower(decoder, params, tokens, tokens, tokens, keep.k, keep.temperature, mesh)

    rows = max(1, TOKENS_PER_PASS // length) * row_groups(mesh)
    batch = Decoding(rows, length, 0, 1, 1)
    work = batch.prefill(config, 1, "")
    step = Phase("a pass", 1, work.flops + rows * length * 2 * config.hidden_size * config.vocabulary, 0.0)
    step = step._replace(bytes=2 * config.num_parameters / mesh.shape["tensor"])
    name = f"a pass over {rows} rows of {length} tokens"
    remedies = ("mesh.tensor, which cuts heads and vocabulary", "more chips")
    return Program(stage, name, rows, None, step, rows * length, mesh, {"target": params}, lower, remedies)


def _prefill(stage: str, name: str, config: ModelConfig, batch: Decoding, mesh: Mesh) -> Program:
    params, decoder = _unstacked(config, mesh), Decoder(config, scan=False)
    bucket = batch.slots - batch.new

    def lower(rows: int) -> jax.stages.Lowered:
        # From the host, as the drivers pass them.
        tokens, length = jax.ShapeDtypeStruct((rows, bucket), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
        return prefill.lower(decoder, params, tokens, length, length, size=batch.slots)

    chunks = math.ceil(max(1, batch.prompt - 1) / 128)
    whole = batch.prefill(config, 1, "")
    step = Phase("a chunk of 128 tokens", chunks, whole.flops / chunks, whole.bytes / chunks)
    tokens = batch.rows * batch.prompt / chunks
    return Program(stage, name, batch.rows, None, step, tokens, mesh, {"model": params}, lower, _decode_remedies(stage))


def _writes(stage: str, name: str, config: ModelConfig, batch: Decoding, mesh: Mesh, sampled: bool) -> Program:
    params, decoder = _unstacked(config, mesh), Decoder(config, scan=False)

    def lower(rows: int) -> jax.stages.Lowered:
        sampling, draws = _sampled(rows) if sampled else (None, None)
        count = _rows(mesh, (rows,), jnp.int32)
        state = Written(
            tokens_BS=_rows(mesh, (rows, batch.slots), jnp.int32),
            length_B=count,
            end_B=count,
            cache=_cache(decoder, params, rows, batch.slots, mesh),
            finite_B=_rows(mesh, (rows,), bool),
            steps_B=count,
        )
        eos_E = np.asarray(config.eos_ids, np.int32)
        return write.lower(decoder, params, state, eos_E=eos_E, sampling=sampling, draws=draws)

    step = Phase("a token of each row", batch.new, *batch.step(config))
    return Program(
        stage, name, batch.rows, batch.groups, step, batch.rows, mesh, {"model": params}, lower, _decode_remedies(stage)
    )


def _blocks(
    stage: str,
    name: str,
    target: ModelConfig,
    draft: ModelConfig,
    batch: Decoding,
    block_size: int,
    mesh: Mesh,
    sampled: bool,
) -> Program:
    decoders = Decoder(target, scan=False), Decoder(draft, scan=False)
    params = _unstacked(target, mesh), _unstacked(draft, mesh)
    slots = batch.slots + block_size + 1

    def lower(rows: int) -> jax.stages.Lowered:
        sampling, draws = _sampled(rows) if sampled else (None, None)
        count, flag = _rows(mesh, (rows,), jnp.int32), _rows(mesh, (rows,), bool)
        per_block = _rows(mesh, (rows, batch.new), jnp.int32)
        caches = [_cache(*model, rows, slots, mesh) for model in zip(decoders, params, strict=True)]
        state = WrittenInBlocks(
            tokens_BS=_rows(mesh, (rows, batch.slots), jnp.int32),
            length_B=count,
            end_B=count,
            target_cache=caches[0],
            draft_cache=caches[1],
            drafted_BN=per_block,
            accepted_BN=per_block,
            rejected_BN=per_block,
            blocks_B=count,
            cut_B=flag,
            target_finite_B=flag,
            draft_finite_B=flag,
        )
        return write_in_blocks.lower(
            decoders[0],
            params[0],
            decoders[1],
            params[1],
            state,
            speculation=Speculation(block_size),
            eos_E=np.asarray(target.eos_ids, np.int32),
            sampling=sampling,
            draws=draws,
        )

    (checks, checked), (proposes, proposed) = batch.step(target, block_size + 1), batch.step(draft)
    tokens = expected_block(block_size)
    work = Phase(
        "a block of each row", batch.new / tokens, checks + block_size * proposes, checked + block_size * proposed
    )
    models = dict(zip(("target", "draft"), params, strict=True))
    return Program(
        stage, name, batch.rows, batch.groups, work, batch.rows * tokens, mesh, models, lower, _decode_remedies(stage)
    )


def _decode_remedies(stage: str) -> tuple[str, ...]:
    return (f"smaller batches or max_new_tokens of {stage}", "a larger mesh.decode_tensor", "more chips")


def _draft(context: PlannedContext, name: str) -> ModelConfig:
    stage = context.recipe.stage(name)
    assert isinstance(stage, Train)
    return context.model(stage)


def _kept(context: PlannedContext, stage: Train) -> TopK | None:
    made = context.recipe.stage(next(iter(stage.shares)))
    return getattr(made, "keep_logits", None) if stage.target_logits == "stored" else None


def _stacked(config: ModelConfig, mesh: Mesh) -> Any:
    made = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, compute_dtype(), sharding=s)
    return jax.tree.map(place, made, model_shardings(config, mesh))


def _unstacked(config: ModelConfig, mesh: Mesh) -> Any:
    made = jax.eval_shape(lambda: for_decoding(config, init_params(config, jax.random.key(0))))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, made, model_shardings(config, mesh, scan=False))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    """As ``sharding.place`` lays rows out."""
    cut = shape[0] % row_groups(mesh) == 0
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh) if cut else replicated(mesh))


def _cache(decoder: Decoder, params: Any, rows: int, size: int, mesh: Mesh) -> Any:
    one = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((rows, 128), jnp.int32)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    made = jax.eval_shape(lambda p, t, n: prefill(decoder, p, t, n, n, size), bare, tokens, one)

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.ndim != len(CACHE):
            return _rows(mesh, x.shape, x.dtype)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(mesh, CACHE, x.shape)))

    return jax.tree.map(place, made)


def _sampled(rows: int) -> tuple[Sampling, Draws]:
    """As the drivers pass them: from the host, whole on every device."""
    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    ids: Any = jax.ShapeDtypeStruct((rows,), jnp.uint32)
    count = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Sampling(number, number, count), Draws(np.int32(0), ids)  # type: ignore[arg-type]


class Placed(NamedTuple):
    """How a parameter lies on the chips; those of all layers together.

    Attributes:
      name: of the model and the parameter.
      dtype: of its numbers.
      shape: of all of it; of one layer where layers are apart.
      spec: which mesh axis cuts which of its axes.
      bytes: of one chip, all layers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes: int


def layout(program: Program, count: int = 4) -> list[Placed]:
    """The largest parameters, by what they take of a chip."""
    found: dict[str, Placed] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(program.params):
        name = re.sub(r"layers_\d+", "layers", jax.tree_util.keystr(path, simple=True, separator="."))
        size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        before = found[name].bytes if name in found else 0
        found[name] = Placed(name, str(x.dtype), x.shape, x.sharding.spec, before + size)
    return sorted(found.values(), key=lambda placed: -placed.bytes)[:count]
