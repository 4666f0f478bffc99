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
      verification: "token" by token (``verify``), or the "block" at once (``verify_block``).
      drafting: the draft's tokens are "sampled" from its distribution, or "greedy", always the most likely ones.
      stop_below: a row stops proposing after a draft token that the draft's softmax, of temperature 1 whatever the text
        is sampled with, gives less than this; 0 always proposes ``block_size``.

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


def verify(
    drafts_BG: jax.Array,
    draft_probs_BGV: jax.Array,
    target_probs_BKV: jax.Array,
    uniforms_BG: jax.Array,
    drafted_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The acceptance rule: how many drafts stand, and the law of the token that follows them.

    Draft x is accepted iff u·p(x) < q(x), strictly: with ``<=`` a token impossible under q would pass at u = 0. After
    the first rejection the next token follows (q - p)₊, after the last draft q itself, the bonus token (Leviathan et
    al., algorithm 1). The residual is empty only where p = q up to rounding; q takes its place there.

    Args:
      drafts_BG: proposed tokens.
      draft_probs_BGV: p, the very arrays they were drawn from.
      target_probs_BKV: q at the G drafts and after the last of them.
      uniforms_BG: u, independent draws from [0, 1).
      drafted_B: how many of the G were proposed; that may depend on p and on the drafts before, and on nothing else.

    Returns:
      accepted_B: drafts before the first rejection.
      next_probs_BV: weights of the next token, not normalised.
    """
    p_BG, q_BG = _at(draft_probs_BGV, drafts_BG), _at(target_probs_BKV[:, :-1], drafts_BG)
    accepted_B = _leading((uniforms_BG * p_BG < q_BG) & _among(drafted_B, drafts_BG))
    return accepted_B, _following(accepted_B, drafted_B, draft_probs_BGV, target_probs_BKV)


def verify_block(
    drafts_BG: jax.Array,
    draft_probs_BGV: jax.Array,
    target_probs_BKV: jax.Array,
    uniforms_BG: jax.Array,
    drafted_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2): the same law, in fewer blocks.

    P₀ = 1 and Pᵢ = min(Pᵢ₋₁ q(xᵢ)/p(xᵢ), 1); Sᵢ = Σ (Pᵢ q - p)₊ over the tokens that may follow the i-th draft. The
    first i drafts pass iff u < hᵢ, hᵢ = Sᵢ / (Sᵢ + 1 - Pᵢ), for the last draft h = P. The longest that pass stand,
    whatever those before did, and (Pᵢ q - p)₊ follows them, or q after the last draft.

    All of a block's draws have their say in how many stand: none of them may be used again after it.

    Arguments and results are those of ``verify``.
    """
    p_BG, q_BG = _at(draft_probs_BGV, drafts_BG), _at(target_probs_BKV[:, :-1], drafts_BG)

    def extend(P_B, laws):
        p_B, wanted_B = laws[0], P_B * laws[1]
        P_B = jnp.where(wanted_B < p_B, wanted_B / p_B, 1.0)
        return P_B, P_B

    one_B = jnp.ones_like(p_BG[:, 0])
    P_BG = jax.lax.scan(extend, one_B, (p_BG.T, q_BG.T))[1].T
    missing_BGV = P_BG[:, :-1, None] * target_probs_BKV[:, 1:-1] - draft_probs_BGV[:, 1:]
    S_BG = jnp.pad(jnp.sum(jnp.maximum(missing_BGV, 0.0), axis=-1), ((0, 0), (0, 1)))
    h_BG = jnp.where(P_BG < 1, S_BG / (S_BG + 1 - P_BG), 1.0)
    h_BG = jnp.where(_among(drafted_B - 1, drafts_BG), h_BG, P_BG)
    passed_BG = (uniforms_BG < h_BG) & _among(drafted_B, drafts_BG)
    accepted_B = _until_last(passed_BG)
    P_B = jnp.concatenate([one_B[:, None], P_BG], axis=1)[jnp.arange(len(one_B)), accepted_B]
    return accepted_B, _following(accepted_B, drafted_B, draft_probs_BGV, target_probs_BKV, P_B[:, None])


def verify_equal(drafts_BG: jax.Array, own_BK: jax.Array, drafted_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drafts stand while they are the target's own choice at their place, and its choice follows them.

    The choice is the argmax, which is ``verify`` at temperature 0; or the token that plain sampling draws there, which
    makes the text the very one that the target writes alone, whatever the draft is: drafter-invariant decoding
    (Daliri, Musco & Suresh 2024, arXiv 2408.07978). The draft proposes by the same Gumbel noise, so that the two agree
    with a probability of at least (1 - TVD) / (1 + TVD) of their laws, where ``verify`` accepts with 1 - TVD.

    Args:
      drafts_BG: proposed tokens.
      own_BK: the target's choice at the G drafts and after the last of them.
      drafted_B: how many of the G were proposed.

    Returns:
      accepted_B: drafts before the first that differs.
      next_B: the target's choice there.
    """
    accepted_B = _leading((drafts_BG == own_BK[:, :-1]) & _among(drafted_B, drafts_BG))
    return accepted_B, own_BK[jnp.arange(drafts_BG.shape[0]), accepted_B]


def _following(accepted_B, drafted_B, draft_probs_BGV, target_probs_BKV, share_B1=1.0):
    """(share · q - p)₊ after the accepted drafts; q where that is empty, and after the last draft."""
    rows_B, last = jnp.arange(len(accepted_B)), draft_probs_BGV.shape[1] - 1
    q_BV = target_probs_BKV[rows_B, accepted_B]
    p_BV = draft_probs_BGV[rows_B, jnp.minimum(accepted_B, last)]
    p_BV = jnp.where((accepted_B < drafted_B)[:, None], p_BV, 0.0)
    residual_BV = jnp.maximum(share_B1 * q_BV - p_BV, 0.0)
    return jnp.where(jnp.any(residual_BV > 0, axis=-1, keepdims=True), residual_BV, q_BV)


def _at(probs_BGV: jax.Array, tokens_BG: jax.Array) -> jax.Array:
    return jnp.take_along_axis(probs_BGV, tokens_BG[..., None], axis=2)[..., 0]


def _among(count_B: jax.Array, like_BG: jax.Array) -> jax.Array:
    """Whether each place is one of a row's first ``count_B``."""
    return jnp.arange(like_BG.shape[1]) < count_B[:, None]


def _until_last(passed_BG: jax.Array) -> jax.Array:
    return jnp.max(passed_BG * jnp.arange(1, passed_BG.shape[1] + 1), axis=1)


def _leading(passed_BG: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cumprod(passed_BG.astype(jnp.int32), axis=1), axis=1)
