"""How draft and target come to agree on the tokens of a block: what the draft chooses, and what the target lets stand.

With p the draft's and q the target's distribution. Three ways: both take the most likely token; the draft draws and the
target verifies, which leaves the law of the text as it is; both draw with the same noise, which leaves the very text.

Shapes: B batch, G block size (draft tokens of a block), K = G + 1, V vocabulary, R draft vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdraft.decode.drafting import Choose, Drafts
from jaxdraft.decode.rules import Speculation, verify, verify_block, verify_equal
from jaxdraft.decode.sampling import (
    ACCEPT,
    PROPOSE,
    REPLACE,
    SAMPLE,
    Draws,
    Sampling,
    draw,
    gumbel_argmax,
    gumbels,
    most_likely,
    position_keys,
    probabilities,
    row_keys,
    uniforms,
)
from jaxdraft.models.config import ModelConfig
from jaxdraft.models.decoder import token_ids, widen


class Agreement(NamedTuple):
    """Both sides of a block.

    Attributes:
      choose: the draft's token at a place of the block, of its logits there.
      settle: of the drafts and the target's logits ``[B, K, V]``, how many drafts stand and the token that follows.
    """

    choose: Choose
    settle: Callable[[Drafts, jax.Array], tuple[jax.Array, jax.Array]]


class Keys(NamedTuple):
    """For each purpose, ``keys[B]``."""

    sample_B: jax.Array
    propose_B: jax.Array
    accept_B: jax.Array
    replace_B: jax.Array


def keys_of(draws: Draws) -> Keys:
    """All keys of a batch, still to be folded with positions."""
    return Keys(*(row_keys(draws.seed, purpose, draws.example_ids_B) for purpose in (SAMPLE, PROPOSE, ACCEPT, REPLACE)))


def greedy(draft: ModelConfig) -> Agreement:
    """Drafts stand while they are the target's most likely tokens."""

    def settle(drafts, logits_BKV):
        return verify_equal(drafts.tokens_BG, most_likely(logits_BKV), drafts.count_B)

    return Agreement(_greedily(draft), settle)


def sampled(
    draft: ModelConfig, speculation: Speculation, sampling: Sampling, keys: Keys, length_B: jax.Array
) -> Agreement:
    """Drafts stand by ``verify`` or ``verify_block``, for texts of these lengths."""
    propose_B, accept_B, rule = keys.propose_B, keys.accept_B, verify
    if speculation.verification == "block":
        # Draws for places that the block gives up have decided where it ends: the next block needs others there.
        propose_B, accept_B, rule = position_keys(propose_B, length_B), position_keys(accept_B, length_B), verify_block

    def choose(logits_BR, i):
        probs_BR = probabilities(logits_BR, sampling)
        drawn_B = draw(position_keys(propose_B, length_B + i), probs_BR)
        return token_ids(draft, drawn_B), widen(draft, probs_BR)

    def settle(drafts, logits_BKV):
        q_BKV, p_BGV = probabilities(logits_BKV, sampling), drafts.probs_BGV
        if p_BGV is None:
            p_BGV = jax.nn.one_hot(drafts.tokens_BG, q_BKV.shape[-1])
        u_BG = uniforms(accept_B, length_B[:, None] + jnp.arange(p_BGV.shape[1]))
        accepted_B, next_probs_BV = rule(drafts.tokens_BG, p_BGV, q_BKV, u_BG, drafts.count_B)
        return accepted_B, draw(position_keys(keys.replace_B, length_B + accepted_B), next_probs_BV)

    return Agreement(_greedily(draft) if speculation.drafting == "greedy" else choose, settle)


def drafter_invariant(
    draft: ModelConfig, speculation: Speculation, sampling: Sampling, keys: Keys, length_B: jax.Array, vocabulary: int
) -> Agreement:
    """Drafts stand while they equal what the target draws with the noise of ``generate.write``.

    The draft draws with the same noise, so that the two often agree.
    """
    noise = lambda i: gumbels(position_keys(keys.sample_B, length_B + i), vocabulary)
    noise_BKV = jax.vmap(noise, out_axes=1)(jnp.arange(speculation.block_size + 1))

    def choose(logits_BR, i):
        return gumbel_argmax(widen(draft, probabilities(logits_BR, sampling)), noise_BKV[:, i]), None

    def settle(drafts, logits_BKV):
        own_BK = gumbel_argmax(probabilities(logits_BKV, sampling), noise_BKV)
        return verify_equal(drafts.tokens_BG, own_BK, drafts.count_B)

    return Agreement(_greedily(draft) if speculation.drafting == "greedy" else choose, settle)


def _greedily(draft: ModelConfig) -> Choose:
    return lambda logits_BR, _: (token_ids(draft, most_likely(logits_BR)), None)
