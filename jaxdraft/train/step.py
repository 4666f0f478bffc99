"""The train step: next-token loss and distillation with the target in the loop are the same few lines.

Shapes: B batch rows, T tokens, D draft hidden, E target hidden, V vocabulary, R
draft vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from jaxdraft.losses import Loss, chunked
from jaxdraft.models import Decoder, head_weight
from jaxdraft.models.decoder import Params
from jaxdraft.sharding import BATCH_AXES, RULES, batch_sharding, replicated
from jaxdraft.train.state import OptimizerSettings, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def build_step(
    draft: Decoder,
    target: Decoder | None,
    loss: Loss,
    optimizer: OptimizerSettings,
    mesh: Mesh,
    shardings: TrainState,
    target_shardings: Any,
    accumulate: int = 1,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, Metrics]]:
    """The jitted step ``(state, target_params, batch) -> (state, metrics)``; the state is donated.

    Args:
      draft: the model that learns.
      target: the model it learns from; ``None`` for losses that need none.
      loss: returns sums and weights; the sum over all micro-batches and devices is divided once by the global weight.
      optimizer: settings of AdamW.
      mesh: the devices.
      shardings: of the state.
      target_shardings: of the target's parameters, ``None`` without a target.
      accumulate: micro-batches per update; must divide the batch.

    Metrics are float32 scalars: ``loss``, ``grad_norm`` (before clipping), ``learning_rate``, ``tokens`` (trained-on
    labels of this batch) and whatever the loss reports per label, such as ``acceptance``.
    """
    tx, schedule = optimizer.build(), optimizer.schedule()

    def loss_sums(params: Params, target_params: Params | None, batch: Batch) -> tuple[jax.Array, Metrics]:
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        hidden_BTD = draft.apply({"params": params}, *inputs)
        heads = [head_weight(draft.config, params)]
        hidden = [hidden_BTD]
        if target is not None and target_params is not None:
            hidden.append(jax.lax.stop_gradient(target.apply({"params": target_params}, *inputs)))
            heads.append(head_weight(target.config, target_params))
        labels_BT, weights_BT = next_tokens(batch)
        return sharded_loss(loss, mesh, hidden, heads, labels_BT, weights_BT, draft.config.head_ids)

    def step(state: TrainState, target_params: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        with nn.logical_axis_rules(RULES):
            grad = jax.value_and_grad(loss_sums, has_aux=True)
            if accumulate == 1:
                (total, sums), grads = grad(state.params, target_params, batch)
            else:
                (total, sums), grads = _accumulated(grad, state.params, target_params, batch, accumulate)
        weight = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": total / weight,
            **{name: value / weight for name, value in sums.items() if name != "tokens"},
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": sums["tokens"],
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(
        step,
        in_shardings=(shardings, target_shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def next_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Labels ``[B, T]`` and their float32 weights: position t predicts token t + 1, the last position nothing."""
    labels_BT = jnp.roll(batch["tokens"], -1, axis=1)
    weights_BT = jnp.roll(batch["loss_mask"], -1, axis=1).at[:, -1].set(0.0)
    return labels_BT, weights_BT


def sharded_loss(
    loss: Loss,
    mesh: Mesh,
    hidden: list[jax.Array],
    heads: list[jax.Array],
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    draft_ids: tuple[int, ...] | None = None,
) -> tuple[jax.Array, Metrics]:
    """Loss sum and metric sums over all devices, the head chunked on each device over its own rows.

    Chunking outside ``shard_map`` would make the compiler gather every row to every device.

    Args:
      loss: the loss.
      mesh: the devices.
      hidden: draft's ``[B, T, D]`` and, for distillation, target's ``[B, T, E]``.
      heads: draft's ``[D, V]``, ``[D, R]`` of a draft vocabulary, and target's ``[E, V]``.
      labels_BT: next tokens.
      weights_BT: their weights.
      draft_ids: the draft vocabulary.
    """

    def local(hidden, heads, labels_BT, weights_BT):
        rows = [h.reshape(-1, h.shape[-1]) for h in hidden]
        target = {"target_hidden_NE": rows[1], "target_head_EV": heads[1]} if len(rows) > 1 else {}
        ids_R = None if draft_ids is None else jnp.asarray(draft_ids)
        labels_N, weights_N = labels_BT.reshape(-1), weights_BT.reshape(-1)
        out = chunked(loss, rows[0], heads[0], labels_N, weights_N, draft_ids_R=ids_R, **target)
        return jax.lax.psum((out.sum, {**out.metrics, "tokens": out.weight}), BATCH_AXES)

    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(rows, PartitionSpec(), rows, rows), out_specs=PartitionSpec(), check_vma=False
    )(hidden, heads, labels_BT, weights_BT)


def _accumulated(grad, params, target_params, batch, count):
    micro = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    first = grad(params, target_params, jax.tree.map(lambda x: x[0], micro))

    def add(total, rows):
        return jax.tree.map(jnp.add, total, grad(params, target_params, rows)), None

    return jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], micro))[0]
