"""How often speculative decoding would accept the draft's proposal, position by position.

Shapes: C positions, V vocabulary, R tokens that the draft can propose.
"""

import jax
import jax.numpy as jnp


def overlap(log_p_CV: jax.Array, log_q_CV: jax.Array) -> jax.Array:
    """Σ_v min(p_v, q_v) = 1 − TVD(p, q), ``[C]``: the probability that a token drawn from p is accepted.

    Leviathan et al., arXiv 2211.17192, Corollary 3.6. (The minimum before the exponential: one of these for each token
    where the metrics of a chunk would take two.)

    Args:
      log_p_CV: log-probabilities of the draft.
      log_q_CV: log-probabilities of the target.
    """
    return jnp.sum(jnp.exp(jnp.minimum(log_p_CV, log_q_CV)), axis=-1)


def agreement(
    draft_logits_CR: jax.Array, target_logits_CV: jax.Array, draft_ids_R: jax.Array | None = None
) -> jax.Array:
    """1 where draft and target rank the same token first, else 0, ``[C]`` float32: greedy decoding's acceptance.

    A tie counts as agreement if one of the target's first tokens is one of the draft's. (Two maxima, because XLA's
    argmax costs more on a CPU than a loss and its gradient.)

    Args:
      draft_logits_CR: of the tokens the draft can propose.
      target_logits_CV: of all tokens.
      draft_ids_R: which tokens the draft's are; ``None`` where they are all.
    """
    first_CV = target_logits_CV == jnp.max(target_logits_CV, axis=-1, keepdims=True)
    first_CR = first_CV if draft_ids_R is None else first_CV[:, draft_ids_R]
    draft_there_C = jnp.max(jnp.where(first_CR, draft_logits_CR, -jnp.inf), axis=-1)
    return (draft_there_C == jnp.max(draft_logits_CR, axis=-1)).astype(jnp.float32)
