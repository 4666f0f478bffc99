"""What tells one set of arrays from another, and whether it holds numbers, computed where they lie."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.distributed import fetch


@jax.jit
def _leaf_sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sum(_words(leaf), dtype=jnp.uint32) for leaf in leaves])


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def all_finite(tree: Any) -> bool:
    """Whether no number in any leaf is infinite or none."""
    return bool(fetch(_finite(jax.tree.leaves(tree))))


def fingerprint(tree: Any) -> np.ndarray:
    """One modular uint32 sum of position-weighted words per leaf: the same under every sharding, changed by any bit."""
    return fetch(_leaf_sums(jax.tree.leaves(tree)))


def _words(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    flat = bits.reshape(-1).astype(jnp.uint32)
    # An odd weight per position: a swap of two words shows as well as a flipped bit.
    return flat * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1)
