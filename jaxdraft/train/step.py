"""The train step: next-token loss and distillation with the target in the loop are the same few lines.

Shapes: B batch rows, T tokens, D draft hidden, E target hidden, V vocabulary, R draft vocabulary, K stored tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxdraft.losses import Loss, Positions, Shared, batch_statistics, chunked, weighted
from jaxdraft.models import Decoder, head_weight
from jaxdraft.models.decoder import Params, following
from jaxdraft.sharding import BATCH_AXES, batch_sharding, position_axis, replicated
from jaxdraft.train.state import OptimizerSettings, TrainState, updates_made

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# Pinned: another number is another run.
LOSS_PURPOSE = 2


def build_step(
    draft: Decoder,
    frozen: Mapping[str, Decoder],
    loss: Loss,
    optimizer: OptimizerSettings,
    mesh: Mesh,
    shardings: TrainState,
    frozen_shardings: Mapping[str, Any],
    accumulate: int = 1,
    seed: int = 0,
) -> jax.stages.Wrapped:
    """The jitted step ``(state, frozen_params, batch) -> (state, metrics)``; the state is donated.

    Args:
      draft: the model that learns.
      frozen: models that do not: ``target``, for losses that need one and batches without stored log-probabilities,
        and ``reference``, for weights that need one. Their parameters are an argument of the step: closed over, they
        would be folded into the program as constants.
      loss: returns sums and weights; the sum over all micro-batches and devices is divided once by the global weight.
      optimizer: settings of AdamW.
      mesh: the devices.
      shardings: of the state.
      frozen_shardings: of the frozen models' parameters.
      accumulate: micro-batches per update; must divide the batch.
      seed: of what the loss draws.

    A batch holds ``tokens``, ``segment_ids``, ``positions`` and ``loss_mask``, ``[B, T]``, and with a stored target
    ``target_ids`` ``[B, T, K]`` and ``target_log_probs`` ``[B, T, K + 2]``.

    Metrics are float32 scalars: ``loss``, ``grad_norm`` (before clipping), ``learning_rate``, ``tokens`` (trained-on
    labels of this batch) and whatever the loss reports per label, such as ``acceptance``. ``skipped`` is 1 where one of
    them, or a parameter that the update would make, is not finite: parameters and optimizer then stay as they were.
    """
    tx, schedule = optimizer.build(), optimizer.schedule()

    def seen(params: Params, frozen_params: Mapping[str, Params], batch: Batch) -> Work:
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        hidden = {"draft": draft.apply({"params": params}, *inputs)}
        heads = {"draft": head_weight(draft.config, params)}
        for name, model in frozen.items():
            hidden[name] = jax.lax.stop_gradient(model.apply({"params": frozen_params[name]}, *inputs))
            heads[name] = head_weight(model.config, frozen_params[name])
        stored = (batch["target_ids"], batch["target_log_probs"]) if "target_ids" in batch else None
        return Work(hidden, heads, *next_tokens(batch), stored, batch.get("draw_ids"))

    def step(state: TrainState, frozen_params: Mapping[str, Params], batch: Batch) -> tuple[TrainState, Metrics]:
        key, means = None, None
        if loss.draws:
            key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), LOSS_PURPOSE)
            key = jax.random.fold_in(key, state.step)
            batch = {**batch, "draw_ids": jnp.arange(batch["tokens"].size).reshape(batch["tokens"].shape)}
        head_ids = draft.config.head_ids

        def statistics(rows: Batch) -> Metrics:
            return sharded_statistics(loss, mesh, seen(state.params, frozen_params, rows), head_ids, key)

        def gradient(rows: Batch) -> Any:
            def sums(params: Params) -> tuple[jax.Array, Metrics]:
                return sharded_loss(loss, mesh, seen(params, frozen_params, rows), head_ids, key, means)

            return jax.value_and_grad(sums, has_aux=True)(state.params)

        if loss.has_statistics:
            found = _accumulated(statistics, batch, accumulate)
            tokens = jnp.maximum(found.pop("tokens"), 1.0)
            means = {name: value / tokens for name, value in found.items()}
        (total, sums), grads = _accumulated(gradient, batch, accumulate)
        tokens, weight = sums.pop("tokens"), sums.pop("weight")
        weight = jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": total / weight,
            **{name: value / jnp.maximum(tokens, 1.0) for name, value in sums.items()},
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(updates_made(state)), jnp.float32),
            "tokens": tokens,
        }
        new = optax.apply_updates(state.params, updates), opt_state
        is_good = jnp.isfinite(jnp.stack([*metrics.values(), optax.tree.norm(new[0])])).all()
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old), new, (state.params, state.opt_state)
        )
        metrics["skipped"] = 1.0 - is_good
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, frozen_shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def next_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Labels ``[B, T]`` and their float32 weights: position t predicts token t + 1, the last position nothing."""
    return following(batch["tokens"], 0), following(batch["loss_mask"], 0.0)


class Work(NamedTuple):
    """What a loss is computed from.

    Attributes:
      hidden: hidden states ``[B, T, ·]`` of ``draft`` and, where there is one, ``target`` and ``reference``.
      heads: their output heads: ``[D, R]``, ``[E, V]``, ``[·, R]``.
      labels_BT: next tokens.
      weights_BT: their weights.
      stored: what was stored of the target, ``[B, T, K]`` ids and ``[B, T, K + 2]`` log-probabilities.
      draw_ids_BT: integers that name each position's randomness, for a loss that draws.
    """

    hidden: dict[str, jax.Array]
    heads: dict[str, jax.Array]
    labels_BT: jax.Array
    weights_BT: jax.Array
    stored: tuple[jax.Array, jax.Array] | None = None
    draw_ids_BT: jax.Array | None = None


def sharded_loss(
    loss: Loss,
    mesh: Mesh,
    work: Work,
    draft_ids: tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    means: Metrics | None = None,
) -> tuple[jax.Array, Metrics]:
    """Loss sum and metric sums over all devices, the head chunked on each device over its own positions.

    Chunking outside ``shard_map`` would make the compiler gather every row to every device.

    Args:
      loss: the loss.
      mesh: the devices.
      work: what it is computed from.
      draft_ids: the draft vocabulary.
      key: of what the loss draws.
      means: of its statistics over the global batch.

    Returns:
      The sum, and sums of the metrics with ``tokens``, the labels that count, and ``weight``, which divides the loss.
    """

    def local(work: Work, positions: Positions, shared: Shared) -> tuple[jax.Array, Metrics]:
        hidden, heads = {name: _flat(x) for name, x in work.hidden.items()}, work.heads
        if loss.weights is None:
            out = chunked(loss, hidden["draft"], heads["draft"], positions, shared)
        else:
            reference = (hidden["reference"], heads["reference"]) if "reference" in hidden else None
            length = work.labels_BT.shape[1]
            out = weighted(loss, hidden["draft"], heads["draft"], positions, shared, length, reference)
        return out.sum, {**out.metrics, "tokens": jnp.sum(positions.weights_N), "weight": out.weight}

    return _over_devices(loss, local, mesh, work, draft_ids, key, means)


def sharded_statistics(
    loss: Loss, mesh: Mesh, work: Work, draft_ids: tuple[int, ...] | None, key: jax.Array | None
) -> Metrics:
    """Sums of a loss's statistics over all devices, and of ``tokens``."""

    def local(work: Work, positions: Positions, shared: Shared) -> Metrics:
        sums = batch_statistics(loss, _flat(work.hidden["draft"]), work.heads["draft"], positions, shared)
        return {**sums, "tokens": jnp.sum(positions.weights_N)}

    return _over_devices(loss, local, mesh, work, draft_ids, key, None)


def _over_devices(loss: Loss, local: Callable[..., Any], mesh: Mesh, work: Work, draft_ids, key, means) -> Any:
    """The sum over all devices of a function of each one's positions.

    Devices along ``tensor`` hold the same rows. A loss that treats every position alike lets each take its part of
    their positions; weights that follow from a position's row need the whole row.
    """
    axis = position_axis(mesh, work.labels_BT.shape[1]) if loss.weights is None else None
    places = PartitionSpec(BATCH_AXES, axis)

    def summed(work: Work, key: jax.Array | None, means: Metrics | None) -> Any:
        target_hidden_NE = _flat(work.hidden["target"]) if "target" in work.hidden else None
        _, _, *others = jax.tree.map(_flat, work._replace(hidden={}, heads={}))
        labels_N, weights_N, stored, draw_ids_N = others
        positions = Positions(labels_N, weights_N, target_hidden_NE, stored, draw_ids_N)
        ids_R = None if draft_ids is None else jnp.asarray(draft_ids)
        shared = Shared(work.heads.get("target"), ids_R, key, means)
        return jax.lax.psum(local(work, positions, shared), (*BATCH_AXES, axis) if axis else BATCH_AXES)

    whole = PartitionSpec()
    specs = Work(places, whole, places, places, places, places)  # type: ignore[arg-type]
    return jax.shard_map(summed, mesh=mesh, in_specs=(specs, whole, whole), out_specs=whole, check_vma=False)(
        work, key, means
    )


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _accumulated(run: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
    """The sum of what ``run`` gives over ``count`` micro-batches, each of every ``count``-th row: none has to move."""
    if count == 1:
        return run(batch)
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, run(rows)), None

    first = run(jax.tree.map(lambda x: x[0], micro))
    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], micro))[0]
