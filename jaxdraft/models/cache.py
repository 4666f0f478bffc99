"""The key/value cache: an explicit pytree that goes into the decoder and comes out of it.

Shapes: B batch, S slots, K key/value heads, H head size, T new tokens.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxdraft.models.config import ModelConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of every position seen so far, one array per layer.

    A slot is a position. A query attends to the slots up to its own position, so rolling back means using smaller
    positions next time: what lies beyond is masked, and overwritten before it is reached again.

    Attributes:
      k: per layer ``[B, S, K, H]``, keys after the rotary embedding.
      v: per layer ``[B, S, K, H]``.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def init_cache(config: ModelConfig, batch: int, size: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache of ``size`` slots for ``batch`` rows."""
    shape = (batch, size, config.num_kv_heads, config.head_size)
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
    )


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Puts token t of row b into slot ``positions_BT[b, t]``; a position outside the cache writes nothing."""
    rows_B1 = jnp.arange(cache_BSKH.shape[0])[:, None]
    return cache_BSKH.at[rows_B1, positions_BT].set(new_BTKH.astype(cache_BSKH.dtype), mode="drop")
