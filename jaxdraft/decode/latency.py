"""How long one cached step of a model takes, inside a compiled loop like the decoders' own.

Shapes: B batch, T tokens of a step, V vocabulary.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.decode.sampling import SAMPLE, Draws, Sampling, draw, most_likely, position_keys, probabilities, row_keys
from jaxdraft.distributed import on_lead
from jaxdraft.models.cache import init_cache
from jaxdraft.models.decoder import Decoder, Head, Params, compute_dtype, token_ids
from jaxdraft.sharding import mesh_of, place

_STEPS = 16
_SECONDS = 0.25  # that are timed at least


def step_latency(
    decoder: Decoder,
    params: Params,
    *,
    batch: int,
    width: int,
    slots: int,
    sampling: Sampling | None = None,
    last_only: bool = False,
    repeats: int = 5,
) -> float:
    """Seconds of one step that reads ``width`` tokens a row, in a cache that is half full, and chooses what follows.

    The best of at least ``repeats`` loops of 16 steps, and at least a quarter of a second of them: what else the
    machine does makes a loop longer, and never shorter.

    Args:
      decoder: with ``scan=False``.
      params: of ``for_decoding``.
      batch: rows.
      width: tokens read per row and step.
      slots: of the cache, more than ``width``; attention costs what it costs in a decoder's cache of this size.
      sampling: of each row: the distribution is made at every position, and a token drawn from one of them; ``None``
        takes the argmax of each.
      last_only: the head reads the last position alone, as a draft's that only catches up on what stands before it.
      repeats: loops timed at least.
    """
    mesh, context = mesh_of(params), (slots - width) // 2
    draws = None if sampling is None else Draws(np.int32(0), np.arange(batch, dtype=np.uint32))
    with jax.set_mesh(mesh):
        cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3))(
            decoder.config, batch, slots, decoder.dtype or compute_dtype()
        )
        carry = place(mesh, np.zeros((batch, width), np.int32), rows=True), cache
        loop = functools.partial(_steps, decoder, params, context, sampling, draws, last_only)
        carry, _ = _clock(loop, carry)  # compiles
        carry, first = _clock(loop, carry)
        seconds = [first]
        for _ in range(on_lead(lambda: max(repeats, math.ceil(_SECONDS / first)) - 1)):
            carry, taken = _clock(loop, carry)
            seconds.append(taken)
    return min(seconds) / _STEPS


def _clock(run: Callable[[Any], Any], carry: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    carry = jax.block_until_ready(run(carry))
    return carry, time.perf_counter() - began


@functools.partial(jax.jit, static_argnames=("decoder", "last_only"), donate_argnames=("carry",))
def _steps(decoder, params, context, sampling, draws, last_only, carry):
    head = Head.of(decoder, params)
    shape = carry[0].shape
    positions_BT = jnp.broadcast_to(context + jnp.arange(shape[1]), shape)

    def step(i, carry):
        tokens_BT, cache = carry
        hidden_BTD, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, cache=cache)
        logits_BTV = head(hidden_BTD[:, -1:] if last_only else hidden_BTD)
        if sampling is None:
            next_BT = most_likely(logits_BTV)
        else:
            keys_B = position_keys(row_keys(draws.seed, SAMPLE, draws.example_ids_B), positions_BT[:, -1] + i)
            probs_BTV = probabilities(logits_BTV, sampling)
            next_BT = draw(keys_B, probs_BTV[jnp.arange(len(keys_B)), i % probs_BTV.shape[1]])[:, None]
        return jnp.broadcast_to(token_ids(decoder.config, next_BT), shape), cache

    return jax.lax.fori_loop(0, _STEPS, step, carry)
