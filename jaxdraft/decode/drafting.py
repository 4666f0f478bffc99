"""The draft's side of a block: its tokens, one after another, until the block is full or the draft is unsure.

Shapes: B batch, T tokens of a step, G block size (draft tokens of a block), V vocabulary, R draft vocabulary, S tokens
of prompt and answer.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdraft.decode.driver import all_finite
from jaxdraft.decode.rules import Speculation
from jaxdraft.models.cache import KVCache, slots
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.decoder import widen

Read = Callable[[jax.Array, jax.Array, KVCache], tuple[jax.Array, KVCache]]
"""Of ``tokens_BT``, their slots and the cache: logits ``[B, R]`` after the last token, and the cache that holds all."""
Choose = Callable[[jax.Array, jax.Array | int], tuple[jax.Array, jax.Array | None]]
"""Of logits ``[B, R]`` and the place in the block: ``token_B`` and ``probs_BV`` that it was drawn from, or ``None``."""


class Drafts(NamedTuple):
    """What a draft proposed.

    Attributes:
      tokens_BG: int32; those past a row's ``count_B`` mean nothing.
      probs_BGV: the distributions that they were drawn from, or ``None``.
      count_B: int32, tokens proposed: G unless the row stopped before.
      cache: of the draft, which has not read the last token.
      finite_B: whether all logits of the row were finite, those before included.
    """

    tokens_BG: jax.Array
    probs_BGV: jax.Array | None
    count_B: jax.Array
    cache: KVCache
    finite_B: jax.Array


def propose(
    draft: ModelConfig,
    speculation: Speculation,
    read: Read,
    choose: Choose,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    live_B: jax.Array,
    cache: KVCache,
    finite_B: jax.Array,
) -> Drafts:
    """Inside ``jit``, up to G tokens after each live row's text.

    Args:
      draft: its vocabulary.
      speculation: how many tokens.
      read: runs the draft.
      choose: takes a token.
      tokens_BS: the texts.
      length_B: tokens of each of them.
      live_B: rows that are not done; nothing is read for others.
      cache: of the draft; lacks the last two tokens of a text at most.
      finite_B: as in ``Drafts``.
    """
    G, nowhere = speculation.block_size, slots(cache)

    def step(cache, finite_B, tokens_BT, positions_BT, going_B, i):
        logits_BR, cache = read(tokens_BT, jnp.where(going_B[:, None], positions_BT, nowhere), cache)
        finite_B &= ~going_B | all_finite(logits_BR)
        token_B, probs_BV = choose(logits_BR, i)
        if speculation.stop_below:
            own_BV = widen(draft, jax.nn.softmax(logits_BR, axis=-1))
            own_B = jnp.take_along_axis(own_BV, token_B[:, None], axis=1)[:, 0]
            going_B &= own_B >= speculation.stop_below
        return cache, finite_B, going_B, (token_B, probs_BV)

    def next_step(cache, finite_B, last_B, going_B, i):
        return step(cache, finite_B, last_B[:, None], (length_B + i - 1)[:, None], going_B, i)

    # The first step reads the last two tokens: after a block accepted in full the cache lacks the first of them.
    positions_B2 = jnp.stack([jnp.maximum(length_B - 2, 0), length_B - 1], axis=1)
    last_B2 = jnp.take_along_axis(tokens_BS, positions_B2, axis=1)
    cache, finite_B, going_B, first = step(cache, finite_B, last_B2, positions_B2, live_B, 0)

    if not speculation.stop_below:

        def full(carry, i):
            cache, finite_B, last_B = carry
            cache, finite_B, _, drawn = next_step(cache, finite_B, last_B, live_B, i)
            return (cache, finite_B, drawn[0]), drawn

        (cache, finite_B, _), others = jax.lax.scan(full, (cache, finite_B, first[0]), jnp.arange(1, G))
        drawn = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, others)
        count_B = jnp.full_like(length_B, G)
    else:

        def while_sure(carry):
            i, cache, finite_B, going_B, count_B, drawn = carry
            count_B += going_B
            cache, finite_B, going_B, new = next_step(cache, finite_B, drawn[0][i - 1], going_B, i)
            return i + 1, cache, finite_B, going_B, count_B, jax.tree.map(lambda xs, x: xs.at[i].set(x), drawn, new)

        room = jax.tree.map(lambda x: jnp.zeros((G, *x.shape), x.dtype).at[0].set(x), first)
        carry = jnp.int32(1), cache, finite_B, going_B, jnp.ones_like(length_B), room
        go_on = lambda carry: (carry[0] < G) & jnp.any(carry[3])
        _, cache, finite_B, _, count_B, drawn = jax.lax.while_loop(go_on, while_sure, carry)

    tokens_BG, probs_BGV = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drawn)
    return Drafts(tokens_BG, probs_BGV, count_B, cache, finite_B)
