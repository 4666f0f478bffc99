"""What a loss sees of the target: its distribution at some positions, from all logits or from the few that were stored.

Stored are the log-probabilities of the K most likely tokens, of the label, and of everything else: the tail. A loss
then runs on S = K + 2 columns instead of the vocabulary, for draft and target alike: ``bucketed`` merges the draft's
logits into the same columns, so that their softmax is the draft's distribution over them, exactly. Nothing is
renormalised over the K tokens, which would hide from the draft all that it says elsewhere.

Shapes: C positions, V vocabulary, R draft vocabulary, K stored tokens, S = K + 2 columns.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Target(Protocol):
    """The target's distribution over the columns of the draft's logits."""

    def log_probs(self, temperature: float = 1.0) -> jax.Array:
        """``[C, V]``; a column of −inf is one that the target cannot say."""
        ...

    @property
    def is_partial(self) -> bool:
        """Whether the target knows tokens that the draft cannot propose: its probabilities then sum to less than 1."""
        ...


class DenseTarget(NamedTuple):
    """The target's distribution at some positions, from all of its logits.

    Attributes:
      logits_CV: of all tokens.
      draft_ids_R: which tokens the draft can propose; ``None`` is all of them.
    """

    logits_CV: jax.Array
    draft_ids_R: jax.Array | None = None

    def log_probs(self, temperature: float = 1.0) -> jax.Array:
        """``[C, V]``, at the given temperature, of the tokens that the draft can propose.

        Of a draft vocabulary these do not sum to 1: the rest is the mass of tokens that the target alone knows.
        """
        log_q_CV = log_probs(self.logits_CV, temperature)
        return log_q_CV if self.draft_ids_R is None else log_q_CV[:, self.draft_ids_R]

    @property
    def is_partial(self) -> bool:
        return self.draft_ids_R is not None


class StoredTarget(NamedTuple):
    """The target's distribution over the columns of ``bucketed`` logits, at the temperature it was stored at.

    Attributes:
      log_q_CS: of the K stored tokens, the label, and the rest; −inf where the draft cannot propose the token, and for
        a label that is one of the K.
      agrees_C: whether the draft, over its whole vocabulary, ranks the target's most likely token first.
      partial: whether the draft has a vocabulary of its own.
    """

    log_q_CS: jax.Array
    agrees_C: jax.Array
    partial: bool = False

    def log_probs(self, temperature: float = 1.0) -> jax.Array:
        """``[C, S]``, whatever the temperature: a recipe refuses a loss at another one than was stored."""
        return self.log_q_CS

    @property
    def is_partial(self) -> bool:
        return self.partial


def log_probs(logits_CV: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature), ``[C, V]``, in float32 or better; a −inf logit stays −inf."""
    return jax.nn.log_softmax(logits_CV.astype(wide(logits_CV.dtype)) / temperature, axis=-1)


def bucketed(
    logits_CR: jax.Array,
    labels_C: jax.Array,
    ids_CK: jax.Array,
    log_q_CS: jax.Array,
    temperature: float,
    draft_ids_R: jax.Array | None = None,
) -> tuple[jax.Array, StoredTarget, jax.Array]:
    """Draft logits, target and labels over S columns: the K stored tokens, the label, everything else.

    The draft's logit of "everything else" is temperature × log Σ exp(z / temperature) over the tokens there, summed
    and not subtracted from the whole: what is left of a confident draft would cancel.

    Args:
      logits_CR: the draft's, over its own vocabulary.
      labels_C: token ids.
      ids_CK: token ids of the K stored log-probabilities.
      log_q_CS: stored log-probabilities of the K tokens, the label (again, if it is one of the K) and everything else.
      temperature: that they were stored at, and that the loss compares at.
      draft_ids_R: the draft vocabulary.

    Returns:
      logits ``[C, S]``, target, and labels as indices into the S columns, -1 where the draft cannot propose them.
    """
    K, R = ids_CK.shape[1], logits_CR.shape[1]
    own_CL = jnp.concatenate([ids_CK, labels_C[:, None]], axis=-1)
    is_label_CK = ids_CK == labels_C[:, None]
    twice_CL = jnp.pad(jnp.any(is_label_CK, axis=-1, keepdims=True), ((0, 0), (K, 0)))
    places_CL = jnp.where(twice_CL, -1, places(own_CL, jnp.arange(R) if draft_ids_R is None else draft_ids_R))
    known_CL = places_CL >= 0

    z_CR = logits_CR.astype(wide(logits_CR.dtype)) / temperature
    rows_C1 = jnp.arange(len(labels_C))[:, None]
    known_z_CL = jnp.where(known_CL, z_CR[rows_C1, jnp.maximum(places_CL, 0)], -jnp.inf)
    rest_z_CR = z_CR.at[rows_C1, jnp.where(known_CL, places_CL, R)].set(-jnp.inf, mode="drop")
    draft_CS = temperature * jnp.concatenate([known_z_CL, log_sum_exp(rest_z_CR)[:, None]], axis=-1)

    # Rounded to float16 the columns no longer sum to 1 exactly.
    no_tail_C1 = jnp.zeros((len(labels_C), 1), bool)
    log_q_CS = jnp.where(jnp.concatenate([twice_CL, no_tail_C1], -1), -jnp.inf, log_q_CS.astype(z_CR.dtype))
    log_q_CS = jax.nn.log_softmax(log_q_CS, axis=-1)
    log_q_CS = jnp.where(jnp.concatenate([known_CL, ~no_tail_C1], -1), log_q_CS, -jnp.inf)
    column_C = jnp.where(twice_CL[:, K], jnp.argmax(is_label_CK, axis=-1), K)
    column_C = jnp.where(jnp.take_along_axis(known_CL, column_C[:, None], axis=-1)[:, 0], column_C, -1)
    agrees_C = draft_CS[:, 0] >= temperature * jnp.max(z_CR, axis=-1)
    return draft_CS, StoredTarget(log_q_CS, agrees_C, draft_ids_R is not None), column_C


def places(ids: jax.Array, draft_ids_R: jax.Array) -> jax.Array:
    """Index of every token in an ascending draft vocabulary; -1 of one that is not in it."""
    found = jnp.minimum(jnp.searchsorted(draft_ids_R, ids), len(draft_ids_R) - 1)
    return jnp.where(draft_ids_R[found] == ids, found, -1)


def log_sum_exp(x_CV: jax.Array) -> jax.Array:
    """log Σ exp over the last axis; −inf, with gradient 0, where every entry is."""
    some_C1 = jnp.max(x_CV, axis=-1, keepdims=True) != -jnp.inf  # a NaN is some, and stays one
    sum_C = jax.nn.logsumexp(jnp.where(some_C1, x_CV, 0), axis=-1)
    return jnp.where(some_C1[..., 0], sum_C, -jnp.inf)


def wide(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """float32, or float64 where that is used."""
    return jnp.promote_types(dtype, jnp.float32)
