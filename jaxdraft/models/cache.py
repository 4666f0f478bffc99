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
