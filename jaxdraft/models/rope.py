"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints."""

import jax
import jax.numpy as jnp


def rope_angles(positions_BT: jax.Array, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each ``[B, T, 1, head_size / 2]`` in float32, of every position's rotation angles."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_size / 2) of every head by the angles of its position."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
