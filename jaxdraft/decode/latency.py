"""How long one cached step of a model takes, inside a compiled loop like the decoders' own.

Shapes: B batch, T tokens of a step.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.decode.sampling import most_likely
from jaxdraft.models.cache import init_cache
from jaxdraft.models.decoder import Decoder, Head, Params, compute_dtype, token_ids
from jaxdraft.sharding import mesh_of, place

_STEPS = 16


def step_latency(decoder: Decoder, params: Params, batch: int, width: int, context: int, repeats: int = 5) -> float:
    """Seconds of one step that reads ``width`` tokens a row after ``context`` cached ones and takes their argmax.

    The median over ``repeats`` loops of 16 steps. FastDraft's (arXiv 2411.11055, equation 2) latencies are
    ``width=1`` of draft and target and ``width=block size + 1`` of the target.

    Args:
      decoder: with ``scan=False``.
      params: of ``for_decoding``.
      batch: rows.
      width: tokens read per row and step.
      context: tokens in the cache before the step.
      repeats: loops timed.
    """
    mesh, seconds = mesh_of(params), []
    with jax.set_mesh(mesh):
        cache = jax.jit(init_cache, static_argnums=(0, 1, 2, 3))(
            decoder.config, batch, context + width, decoder.dtype or compute_dtype()
        )
        tokens_BT = place(mesh, np.zeros((batch, width), np.int32), rows=True)
        for _ in range(repeats + 1):
            began = time.perf_counter()
            tokens_BT, cache = jax.block_until_ready(_steps(decoder, params, tokens_BT, cache, context))
            seconds.append((time.perf_counter() - began) / _STEPS)
    return statistics.median(seconds[1:])


@functools.partial(jax.jit, static_argnames=("decoder",), donate_argnames=("tokens_BT", "cache"))
def _steps(decoder, params, tokens_BT, cache, context):
    head = Head.of(decoder, params)
    positions_BT = jnp.broadcast_to(context + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def step(_, carry):
        tokens_BT, cache = carry
        hidden_BTD, cache = decoder.apply({"params": params}, tokens_BT, positions_BT, cache=cache)
        return token_ids(decoder.config, most_likely(head(hidden_BTD))), cache

    return jax.lax.fori_loop(0, _STEPS, step, (tokens_BT, cache))
