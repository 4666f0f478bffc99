"""How much each position counts: weights that follow what the draft knows, and the weighted form of a loss.

Shapes: B batch, T positions of a row, N = B × T, D hidden size, R draft vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdraft.errors import ConfigError
from jaxdraft.losses.base import Loss, Weights
from jaxdraft.losses.engine import LossOutput, Positions, Shared, per_position


@dataclasses.dataclass(frozen=True)
class DPACE(Weights):
    """A position counts as much as the accepted length of its block depends on it.

    With c_i = (1 − α) p(x_i) + α the draft's smoothed confidence in the text's own tokens, position j of a block of γ
    has the weight w_j = Σ_{m≥j} Π_{i≤m} c_i: large while everything before it, and after it, would be accepted. Source:
    D-PACE (arXiv 2605.18810, eqs. 7 and 8), for drafts that propose a block at once. Here any position may come
    anywhere in a block, so w_j is the mean over the γ blocks that it lies in, cut where labels that count end.

    Attributes:
      block_size: γ, draft tokens per block.
      alpha: smoothing, in [0, 1]; 1 is no adaption, and the paper's choice is ½.
    """

    block_size: int = 5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 0 <= self.alpha <= 1:
            raise ConfigError(f"DPACE: block_size {self.block_size} ≥ 1 and alpha {self.alpha} in [0, 1] must hold")

    def __call__(self, values: Mapping[str, jax.Array], weights_BT: jax.Array) -> jax.Array:
        counts_BT = (weights_BT != 0).astype(weights_BT.dtype)
        confident_BT = counts_BT * ((1 - self.alpha) * jnp.exp(values["log_prob"]) + self.alpha)
        earlier = lambda x_BT, by: jnp.pad(x_BT, ((0, 0), (by, 0)))[:, : x_BT.shape[1]]
        reach, blocks = self._reach(confident_BT), self._reach(counts_BT)
        value_BT, count_BT = jnp.zeros_like(weights_BT), jnp.zeros_like(weights_BT)
        for k in range(self.block_size):  # the position is the k-th of a block that starts k before it
            value_BT += earlier(sum(reach[k:]), k)
            count_BT += earlier(blocks[k], k)
        return weights_BT * value_BT / jnp.maximum(count_BT, 1)

    def _reach(self, c_BT: jax.Array) -> list[jax.Array]:
        """Π_{i≤k} c_{s+i} for each k and each start s, ``[B, T]``."""
        reach = [c_BT]
        for k in range(1, self.block_size):
            reach.append(reach[-1] * jnp.pad(c_BT, ((0, 0), (0, k)))[:, k:])
        return reach


@dataclasses.dataclass(frozen=True)
class AdaSPEC(Weights):
    """Only the positions count where the draft has most to learn from what a reference draft has learned.

    Of each row the share ``keep`` of labels with the largest difference between the draft's loss and the reference's;
    ties with the last one kept are kept. What neither can learn, being too small, is left out. Source: AdaSPEC (arXiv
    2510.19779), with the loss that is trained in place of forward KL, and the selection made within a row, so that it
    does not depend on the batch or the devices. The reference is a draft of the same shape that was distilled without
    selection: ``Train(reference=…)``.

    Attributes:
      keep: share of the labels, in (0, 1].
    """

    keep: float = 0.4
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"AdaSPEC: keep must lie in (0, 1], got {self.keep}")

    def __call__(self, values: Mapping[str, jax.Array], weights_BT: jax.Array) -> jax.Array:
        counts_BT = weights_BT != 0
        gap_BT = jnp.where(counts_BT, values["loss"] - values["reference_loss"], -jnp.inf)
        kept_B1 = jnp.ceil(self.keep * jnp.sum(counts_BT, axis=-1, keepdims=True)).astype(jnp.int32)
        ranked_BT = -jnp.sort(-gap_BT, axis=-1)
        last_B1 = jnp.take_along_axis(ranked_BT, jnp.maximum(kept_B1 - 1, 0), axis=-1)
        return jnp.where(counts_BT & (gap_BT >= last_B1), weights_BT, 0)


def weighted(
    loss: Loss,
    draft_hidden_ND: jax.Array,
    draft_head_DR: jax.Array,
    positions: Positions,
    shared: Shared,
    length: int,
    reference: tuple[jax.Array, jax.Array] | None = None,
) -> LossOutput:
    """The sum of a loss with ``loss.weights``, over rows of ``length`` positions that are not split between devices.

    Args:
      loss: with weights.
      draft_hidden_ND: the draft's hidden states.
      draft_head_DR: the draft's output head.
      positions: as in ``per_position``.
      shared: as in ``per_position``.
      length: T.
      reference: hidden states and head of the reference model, of the draft's vocabulary.

    Returns:
      ``sum`` and ``weight`` of the new weights; ``metrics`` still of ``positions.weights_N``, so that they compare.
    """
    assert loss.weights is not None
    loss_N, logged = per_position(loss, draft_hidden_ND, draft_head_DR, positions, shared)
    values = {**logged, "loss": jax.lax.stop_gradient(loss_N)}
    if reference is not None:
        values["reference_loss"] = per_position(loss, *jax.lax.stop_gradient(reference), positions, shared)[0]
    rows = lambda x_N: x_N.reshape(-1, length)
    weights_BT = loss.weights(jax.tree.map(rows, values), rows(positions.weights_N))
    weights_N = jax.lax.stop_gradient(weights_BT).reshape(-1)
    metrics = {name: jnp.sum(x_N * positions.weights_N) for name, x_N in logged.items() if name != "log_prob"}
    return LossOutput(jnp.sum(loss_N * weights_N), jnp.sum(weights_N), metrics)
