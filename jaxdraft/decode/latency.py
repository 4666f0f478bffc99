"""How long one cached step of a model takes, inside a compiled loop like the decoders' own.

Shapes: B batch, T tokens of a step, V vocabulary.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.decode.sampling import SAMPLE, Draws, Sampling, draw, position_keys, probabilities, row_keys
from jaxdraft.models.cache import init_cache
from jaxdraft.models.decoder import Decoder, Params, compute_dtype, head_weight, logits, token_ids
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
    seconds: list[float] = []
    with jax.set_mesh(mesh):
        cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3))(
            decoder.config, batch, slots, decoder.dtype or compute_dtype()
        )
        tokens_BT = place(mesh, np.zeros((batch, width), np.int32), rows=True)
        while len(seconds) <= repeats or sum(seconds[1:]) * _STEPS < _SECONDS:
            began = time.perf_counter()
            tokens_BT, cache = jax.block_until_ready(
                _steps(decoder, params, tokens_BT, cache, context, sampling, draws, last_only)
            )
            seconds.append((time.perf_counter() - began) / _STEPS)
    return min(seconds[1:])


@functools.partial(jax.jit, static_argnames=("decoder", "last_only"), donate_argnames=("tokens_BT", "cache"))
def _steps(decoder, params, tokens_BT, cache, context, sampling, draws, last_only):
    head_DV = head_weight(decoder.config, params)
    positions_BT = jnp.broadcast_to(context + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def step(i, carry):
        tokens_BT, cache = carry
        hidden_BTD, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, cache=cache)
        logits_BTV = logits(hidden_BTD[:, -1:] if last_only else hidden_BTD, head_DV)
        if sampling is None:
            next_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        else:
            keys_B = position_keys(row_keys(draws.seed, SAMPLE, draws.example_ids_B), positions_BT[:, -1] + i)
            probs_BTV = probabilities(logits_BTV, sampling)
            next_BT = draw(keys_B, probs_BTV[jnp.arange(len(keys_B)), i % probs_BTV.shape[1]])[:, None]
        next_BT = jnp.broadcast_to(token_ids(decoder.config, next_BT), tokens_BT.shape)
        return next_BT, cache

    return jax.lax.fori_loop(0, _STEPS, step, (tokens_BT, cache))
