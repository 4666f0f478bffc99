"""Mistakes that have been made with speculative decoding: what proves a loop or a rule right has to catch each of them.

A rule is a function like ``rules.verify``.
"""

from unittest import mock

import jax.numpy as jnp

from jaxdraft.decode import agreement, rules
from jaxdraft.decode.rules import verify, verify_block
from jaxdraft.models.decoder import widen


def inflated(drafts, p, q, u, drafted):
    return verify(drafts, p, q, u / 1.05, drafted)


def swapped(drafts, p, q, u, drafted):
    accepted, _ = verify(drafts, q[:, :-1], jnp.concatenate([p, q[:, -1:]], axis=1), u, drafted)
    stands = jnp.arange(drafts.shape[1]) < accepted[:, None]
    return accepted, verify(drafts, p, q, jnp.where(stands, -1.0, 2.0), drafted)[1]


def no_residual(drafts, p, q, u, drafted):
    accepted, _ = verify(drafts, p, q, u, drafted)
    return accepted, q[jnp.arange(len(drafts)), accepted]


def not_normalised(drafts, p, q, u, drafted):
    """What a search in the cumulative sum of the residual finds: the last token when it ends too soon."""
    accepted, following = verify(drafts, p, q, u, drafted)
    return accepted, following.at[:, -1].add(1 - following.sum(axis=1))


def bonus_from_draft(drafts, p, q, u, drafted):
    accepted, following = verify(drafts, p, q, u, drafted)
    return accepted, jnp.where(accepted[:, None] == drafts.shape[1], p[:, -1], following)


def first_failure_ends(*given):
    with mock.patch.object(rules, "_until_last", rules._leading):
        return verify_block(*given)


def residual_of_the_token_rule(drafts, p, q, u, drafted):
    accepted, _ = verify_block(drafts, p, q, u, drafted)
    return accepted, rules._following(accepted, drafted, p, q)


TOKEN_RULE = {
    "acceptance inflated by 5 %": inflated,
    "ratio swapped": swapped,
    "residual skipped": no_residual,
    "residual not normalised": not_normalised,
    "bonus from the draft": bonus_from_draft,
}
BLOCK_RULE = {
    "the first failure ends the block": first_failure_ends,
    "residual of the token rule": residual_of_the_token_rule,
}


sampled, probabilities = agreement.sampled, agreement.probabilities


def target_without(**everything):
    """The target's distribution as if nothing were cut off it; only the target's logits have three axes."""

    def uncut(logits, sampling):
        whole = {name: jnp.full_like(getattr(sampling, name), value) for name, value in everything.items()}
        return probabilities(logits, sampling._replace(**whole) if logits.ndim == 3 else sampling)

    return uncut


def law_of_sampled_drafts(draft, speculation, sampling, *given):
    """Greedy drafts are verified as if they had been drawn."""
    right = sampled(draft, speculation, sampling, *given)

    def choose(logits, i):
        return right.choose(logits, i)[0], widen(draft, probabilities(logits, sampling))

    return right._replace(choose=choose)


def unsure_token_dropped(*given):
    """The token that a row stopped at is not verified."""
    right = sampled(*given)

    def settle(drafts, logits):
        stopped = drafts.count_B < drafts.tokens_BG.shape[1]
        return right.settle(drafts._replace(count_B=drafts.count_B - stopped), logits)

    return right._replace(settle=settle)
