"""The key/value cache: an explicit pytree that goes into the decoder and comes out of it.

Shapes: B batch, S slots, N query heads, K key/value heads, G = N / K, H head size, T new tokens.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxdraft.models.config import ModelConfig
from jaxdraft.models.rope import LongRope
from jaxdraft.sharding import CACHE, constrain


class KVCache(struct.PyTreeNode):
    """Keys and values of every position seen so far, one array per layer.

    A slot is a position. A query attends to the slots up to its own position, so rolling back means using smaller
    positions next time: what lies beyond is masked, and overwritten before it is reached again.

    Attributes:
      k: per layer ``[B, K, S, H]``, keys after the rotary embedding.
      v: per layer ``[B, K, S, H]``.
      long_B: rows whose keys LongRoPE turns by its long factors; ``None`` for models without it.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    long_B: jax.Array | None = None


def init_cache(config: ModelConfig, batch: int, size: int, dtype: jnp.dtype, end_B: jax.Array | None = None) -> KVCache:
    """An empty cache of ``size`` slots for ``batch`` rows.

    Args:
      config: the model's shape.
      batch: rows.
      size: slots, at least as many as a row can have tokens.
      dtype: of keys and values.
      end_B: how many tokens each row can grow to, which LongRoPE has to know from the first; ``None`` is ``size``.
    """
    shape = (batch, config.num_kv_heads, size, config.head_size)
    return KVCache(
        long_B=long_rows(config, jnp.full(batch, size) if end_B is None else end_B),
        k=tuple(constrain(jnp.zeros(shape, dtype), CACHE) for _ in range(config.num_layers)),
        v=tuple(constrain(jnp.zeros(shape, dtype), CACHE) for _ in range(config.num_layers)),
    )


def long_rows(config: ModelConfig, end_B: jax.Array) -> jax.Array | None:
    """Rows that can grow past LongRoPE's original context; ``None`` for models without it."""
    if not isinstance(config.rope_scaling, LongRope):
        return None
    return jnp.asarray(end_B) > config.rope_scaling.original_max_positions


def slots(cache: KVCache) -> int:
    """S, how many positions the cache can hold."""
    return cache.k[0].shape[2]


def write(cache_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Puts token t of row b into slot ``positions_BT[b, t]``; a position outside the cache writes nothing."""

    # Row by row, so that a mesh that cuts the rows has nothing to send.
    def row(cache_KSH, new_TKH, positions_T):
        return cache_KSH.at[:, positions_T].set(new_TKH.swapaxes(0, 1).astype(cache_KSH.dtype), mode="drop")

    return constrain(jax.vmap(row)(cache_BKSH, new_BTKH, positions_BT), CACHE)


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention over the cache as it lies, ``[B, T, N, H]``: no step copies or transposes the cache.

    Scores and softmax are float32. Every query needs at least one slot that its mask allows.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    # One matrix per key/value head, M = N / K · T rows: XLA's CPU compiler turns only this form into fast products.
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores_BKMS = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKMS.reshape(B, K, -1, T, S), -jnp.inf)
    probs_BKMS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype).reshape(B, K, -1, S)
    out_BKMH = jnp.einsum("bkms,bksh->bkmh", probs_BKMS, v_BKSH)
    return out_BKMH.reshape(B, K, -1, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
