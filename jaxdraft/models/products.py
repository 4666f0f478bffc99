"""Products of activations and weights, in the forms that compilers turn into fast ones.

Shapes: B batch, T tokens, D hidden.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdraft.backend import platform

_WIDE = 768  # inputs from which on a weight that lies by rows is read faster
_INPUT_AXES = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1, "head": 1}


def lies_by_rows(inputs: tuple[int, ...]) -> bool:
    """Whether a weight over these axes is turned for decoding: on CPUs, and if it is wide enough to gain by it."""
    return platform() == "cpu" and math.prod(inputs) >= _WIDE


def by_rows(x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """x · wᵀ, ``[B, T, outputs…]``, of x ``[B, T, inputs…]`` and w ``[outputs…, inputs…]``.

    With the weight as the left factor and a multiple of four rows in the right one, XLA's CPU compiler reads it where
    it lies. As the right factor it is packed first, at every step: 1.2 to 3 times the time for 2 to 48 rows of 768 or
    more inputs, 0.7 to 1.1 for one (jax 0.10.2, Zen 4, one thread).
    """
    B, T = x.shape[:2]
    if B * T > 1:
        x = jnp.pad(x, [(0, 0), (0, -T % (4 // math.gcd(B, 4))), *[(0, 0)] * (x.ndim - 2)])
    inputs = x.ndim - 2
    contracted = tuple(range(w.ndim - inputs, w.ndim)), tuple(range(2, x.ndim))
    out = jax.lax.dot_general(w, x, (contracted, ((), ())), preferred_element_type=dtype)
    return jnp.moveaxis(out, (-2, -1), (0, 1))[:, :T]


def merge(x: jax.Array, w: jax.Array) -> jax.Array:
    """x · w, ``[B, T, D]``, of x ``[B, T, …]`` and weights ``[…, D]``."""
    return jnp.tensordot(x, w, x.ndim - 2)


@jax.custom_vjp
def project(x_BTD: jax.Array, w: jax.Array) -> jax.Array:
    """x · w, ``[B, T, …]``, of weights ``[D, …]``.

    The weight's gradient is written as xᵀ · g. JAX's own rule writes (gᵀ · x)ᵀ, for which XLA's CPU compiler turns g
    over, the wider of the two, and once for each weight of the same x: a tenth of a small model's step.
    """
    return jnp.tensordot(x_BTD, w, 1)


def _project_forward(x_BTD, w):
    return project(x_BTD, w), (x_BTD, w)


def _project_backward(saved, g):
    x_BTD, w = saved
    of_x = jnp.tensordot(g, w, (tuple(range(2, g.ndim)), tuple(range(1, w.ndim))))
    return of_x, jnp.tensordot(x_BTD, g, ((0, 1), (0, 1)))


project.defvjp(_project_forward, _project_backward)


def turned(weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer's weights, or those outside the layers, with the outputs first of those that decoding reads by rows."""

    def turn(x: jax.Array, inputs: int) -> jax.Array:
        order = (*range(inputs, x.ndim), *range(inputs))
        return jnp.transpose(x, order) if inputs and lies_by_rows(x.shape[:inputs]) else x

    return {name: turn(x, _INPUT_AXES.get(name, 0)) for name, x in weights.items()}
