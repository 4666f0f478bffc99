"""How a draft speculates: which of its tokens stand, and what follows them.

Shapes: B batch, G block size (draft tokens of a block), K = G + 1, V vocabulary.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxdraft.errors import ConfigError

Verification = Literal["token", "block"]
Drafting = Literal["sampled", "greedy"]


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a draft proposes and how the target verifies. None of it changes the law of the text.

    Attributes:
      block_size: draft tokens proposed per run of the target, γ.
      verification: token by token (``verify``).
      drafting: the draft's tokens are drawn from its distribution.
      stop_below: a row stops proposing after a draft token whose probability, in the distribution that it was drawn
        from, is below this; 0 always proposes ``block_size``.

    Raises:
      ConfigError: a value is out of range.
    """

    block_size: int
    verification: Verification = "token"
    drafting: Drafting = "sampled"
    stop_below: float = 0.0

    def __post_init__(self):
        if self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size}: the draft must propose at least 1 token")
        for name, known in (("verification", Verification), ("drafting", Drafting)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(get_args(known))}")
        if not 0 <= self.stop_below < 1:
            raise ConfigError(f"stop_below is {self.stop_below}: it must lie in [0, 1), 0 never stops")
        if (self.verification, self.drafting, self.stop_below) != ("token", "sampled", 0.0):
            raise ConfigError(f"{self}: only block_size can be chosen yet")


def verify(
    drafts_BG: jax.Array, draft_probs_BGV: jax.Array, target_probs_BKV: jax.Array, uniforms_BG: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The acceptance rule: how many drafts stand, and the law of the token that follows them.

    Draft x is accepted iff u·p(x) < q(x), strictly: with ``<=`` a token impossible under q would pass at u = 0. After
    the first rejection the next token follows (q - p)₊, after G acceptances q itself, the bonus token (Leviathan et
    al., algorithm 1). The residual is empty only where p = q up to rounding; q takes its place there.

    Args:
      drafts_BG: proposed tokens.
      draft_probs_BGV: p, the very arrays they were drawn from.
      target_probs_BKV: q at the G drafts and after the last of them.
      uniforms_BG: u, independent draws from [0, 1).

    Returns:
      accepted_B: drafts before the first rejection.
      next_probs_BV: weights of the next token, not normalised.
    """
    G = drafts_BG.shape[1]
    p_BG = jnp.take_along_axis(draft_probs_BGV, drafts_BG[..., None], axis=2)[..., 0]
    q_BG = jnp.take_along_axis(target_probs_BKV[:, :G], drafts_BG[..., None], axis=2)[..., 0]
    accepted_B = _leading(uniforms_BG * p_BG < q_BG)
    rows_B = jnp.arange(drafts_BG.shape[0])
    q_BV = target_probs_BKV[rows_B, accepted_B]
    p_BV = jnp.where(accepted_B[:, None] < G, draft_probs_BGV[rows_B, jnp.minimum(accepted_B, G - 1)], 0.0)
    residual_BV = jnp.maximum(q_BV - p_BV, 0.0)
    return accepted_B, jnp.where(jnp.any(residual_BV > 0, axis=-1, keepdims=True), residual_BV, q_BV)


def verify_equal(drafts_BG: jax.Array, own_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drafts stand while they are the target's own choice at their place, and its choice follows them.

    The choice is the argmax, which is ``verify`` at temperature 0; or the token that plain sampling draws there, which
    makes the text the very one that the target writes alone, whatever the draft is: drafter-invariant decoding
    (Daliri, Musco & Suresh 2024, arXiv 2408.07978). The draft proposes by the same Gumbel noise, so that the two agree
    with a probability of at least (1 - TVD) / (1 + TVD) of their laws, where ``verify`` accepts with 1 - TVD.

    Args:
      drafts_BG: proposed tokens.
      own_BK: the target's choice at the G drafts and after the last of them.

    Returns:
      accepted_B: drafts before the first that differs.
      next_B: the target's choice there.
    """
    accepted_B = _leading(drafts_BG == own_BK[:, :-1])
    return accepted_B, own_BK[jnp.arange(drafts_BG.shape[0]), accepted_B]


def _leading(passed_BG: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cumprod(passed_BG.astype(jnp.int32), axis=1), axis=1)
