"""The key/value cache: an explicit pytree that goes into the decoder and comes out of it.

Shapes: B batch, S slots, N query heads, K key/value heads, G = N / K, H head size, T new tokens.
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
      k: per layer ``[B, K, S, H]``, keys after the rotary embedding.
      v: per layer ``[B, K, S, H]``.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def init_cache(config: ModelConfig, batch: int, size: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache of ``size`` slots for ``batch`` rows."""
    shape = (batch, config.num_kv_heads, size, config.head_size)
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
    )


def slots(cache: KVCache) -> int:
    """S, how many positions the cache can hold."""
    return cache.k[0].shape[2]


def write(cache_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Puts token t of row b into slot ``positions_BT[b, t]``; a position outside the cache writes nothing."""
    rows_B1 = jnp.arange(cache_BKSH.shape[0])[:, None]
    return cache_BKSH.at[rows_B1, :, positions_BT].set(new_BTKH.astype(cache_BKSH.dtype), mode="drop")


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
