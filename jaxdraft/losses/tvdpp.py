"""Total Variation Distance++ (Goel et al., "Direct Alignment", arXiv 2403.00858, §2), in its four readings.

Lemma 1 writes the gradient of TVD as a policy gradient with reward r(x) = 1[q(x) > p(x)],

    ∇TVD = E_{x~p}[∇ log p(x) · (−r(x))],

and eq. (1) replaces r by the advantage (r − μ)/σ. As printed, eq. (1) lost the minus sign of Lemma 1: descended as it
stands, it would lower acceptance. The sign of Lemma 1 is used here, in every reading.

The equation leaves open over what the expectation, μ and σ are taken. r is 0 or 1, so σ² = μ(1 − μ) always, and σ is
held above 10⁻³: at p = q it would be 0. With p = softmax(z/T), A = Σ_v p_v r_v and m the mean of r_v over the V tokens:

    reading                        gradient with respect to z/T
    TVDPlusPlus                    −p (r − A) / σ, σ of each position: μ = A
    TVDPlusPlusGlobal              −p (r − A) / σ, one σ for the batch: μ = the mean of A
    TVDPlusPlusLiteral             −[(r − μ) − p V (m − μ)] / (V σ), μ = the mean of m
    TVDPlusPlusSampled             −(r_x − μ) (e_x − p) / σ, one x ~ p at each position, μ = the mean of r_x

Eq. (1) defines only a gradient; following it lowers the total variation distance, and that is the value of all four.
So the gradient is not that of the value. Means are over the whole global batch: all devices, all micro-batches.

Shapes: C positions, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdraft.losses.base import Loss
from jaxdraft.losses.divergences import label_log_prob, tvd
from jaxdraft.losses.targets import Target, log_probs

SIGMA_FLOOR = 1e-3


@dataclass(frozen=True)
class TVDPlusPlus(Loss):
    """TVD++ in expectation over the vocabulary, the advantage normalised at each position.

    Gradient: −p (r − A) / max(√(A(1 − A)), 10⁻³). It is the gradient of ``TVD`` over σ taken as a constant; above the
    floor it is also that of −2 arcsin √A with r held. Its L1 norm is 2√(A(1 − A)) ≤ 1, more than TVD's 2A(1 − A). That
    of −log α is larger still where the acceptance rate α is below √(A(1 − A)), so never above ½. The floor keeps it
    finite, and 0, at p = q. Source: eq. (1) of arXiv 2403.00858 with the sign of its Lemma 1, μ and σ taken over the
    vocabulary at each position. Cost: as ``TVD``.

    Use it to distil a pretrained draft for speculative sampling: it still moves where TVD's gradient has faded.
    """

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> jax.Array:
        log_p_CV, log_q_CV = _both(self, draft_logits_CV, target)
        tvd_C = tvd(log_p_CV, log_q_CV, target)
        return _with_gradient_of(tvd_C, tvd_C / _sigma(_reward(log_p_CV, log_q_CV)))


@dataclass(frozen=True)
class TVDPlusPlusGlobal(Loss):
    """TVD++ in expectation over the vocabulary, the advantage normalised over the whole batch.

    Gradient: −p (r − A) / max(√(μ(1 − μ)), 10⁻³), μ the mean of A over the batch; μ in the numerator has dropped out,
    because Σ_v p_v ∇ log p_v = 0. That is ``TVD`` with a step size that follows the batch: under Adam, which divides
    by the gradient's size, nearly TVD. Source: eq. (1) of arXiv 2403.00858 with the sign of its Lemma 1, μ and σ as its
    text has them, over B and T. Cost: as ``TVD``, and a pass over the batch before it for μ.

    Use it to see that the paper's variance reduction does nothing where nothing is sampled.
    """

    def statistics(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> dict[str, jax.Array]:
        return {"reward": _reward(*_both(self, draft_logits_CV, target))}

    def rows(  # type: ignore[override]
        self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array, *, means: Mapping[str, jax.Array]
    ) -> jax.Array:
        tvd_C = tvd(*_both(self, draft_logits_CV, target), target)
        return _with_gradient_of(tvd_C, tvd_C / _sigma(means["reward"]))


@dataclass(frozen=True)
class TVDPlusPlusLiteral(Loss):
    """TVD++ as eq. (1) is printed: a sum over the vocabulary that is not weighted by the draft's probabilities.

    Gradient: −[(r − μ) − p V (m − μ)] / (V max(√(μ(1 − μ)), 10⁻³)), m = mean_v r_v and μ its mean over the batch: that
    of −(1/V) Σ_v log p_v (r_v − μ)/σ with r held. Source: eq. (1) of arXiv 2403.00858, with the sign of its Lemma 1.
    Cost: as ``TVD``, and a pass over the batch before it for μ. On stored targets V is the number of stored columns.

    Do not use it: the tail of the vocabulary, where r is noise, outweighs all that the draft would ever say, and the
    gradient does not vanish at p = q. It is here because the equation is in print.
    """

    def statistics(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> dict[str, jax.Array]:
        log_p_CV, log_q_CV = _both(self, draft_logits_CV, target)
        return {"reward": _mean((log_q_CV > log_p_CV).astype(log_p_CV.dtype), log_p_CV)}

    def rows(  # type: ignore[override]
        self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array, *, means: Mapping[str, jax.Array]
    ) -> jax.Array:
        log_p_CV, log_q_CV = _both(self, draft_logits_CV, target)
        advantage_CV = ((log_q_CV > log_p_CV) - means["reward"]) / _sigma(means["reward"])
        return _with_gradient_of(tvd(log_p_CV, log_q_CV, target), -_mean(advantage_CV * _finite(log_p_CV), log_p_CV))


@dataclass(frozen=True)
class TVDPlusPlusSampled(Loss):
    """TVD++ as a policy gradient: one token x ~ p is drawn at each position, its advantage normalised over the batch.

    Gradient: −(r_x − μ)/max(√(μ(1 − μ)), 10⁻³) · (e_x − p), μ the mean of r_x over the n positions of the batch. Its
    mean over draws is (1 − 1/n) ∇TVD/σ up to the variance of σ: μ contains the draw itself. Source: eq. (1) of arXiv
    2403.00858 with the sign of its Lemma 1, the expectation of the lemma estimated by sampling (REINFORCE). Cost: as
    ``TVD``, a Gumbel variable for every logit, and a pass over the batch before it for μ.

    Use it to study variance reduction, the only reading where it has something to reduce. Over a vocabulary the
    expectation is there for the taking: ``TVDPlusPlus`` has no variance at all.
    """

    draws: ClassVar[bool] = True

    def statistics(  # type: ignore[override]
        self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array, *, keys_C: jax.Array
    ) -> dict[str, jax.Array]:
        log_p_CV, log_q_CV = _both(self, draft_logits_CV, target)
        return {"reward": _reward_of(_drawn(keys_C, log_p_CV), log_p_CV, log_q_CV)}

    def rows(  # type: ignore[override]
        self,
        draft_logits_CV: jax.Array,
        target: Target,
        labels_C: jax.Array,
        *,
        keys_C: jax.Array,
        means: Mapping[str, jax.Array],
    ) -> jax.Array:
        log_p_CV, log_q_CV = _both(self, draft_logits_CV, target)
        token_C = _drawn(keys_C, log_p_CV)
        advantage_C = (_reward_of(token_C, log_p_CV, log_q_CV) - means["reward"]) / _sigma(means["reward"])
        return _with_gradient_of(tvd(log_p_CV, log_q_CV, target), -advantage_C * label_log_prob(log_p_CV, token_C))


def _both(loss: Loss, draft_logits_CV: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    return log_probs(draft_logits_CV, loss.temperature), target.log_probs(loss.temperature)


def _reward(log_p_CV: jax.Array, log_q_CV: jax.Array) -> jax.Array:
    """A = Σ_v p_v r_v, ``[C]``."""
    return jnp.sum(jnp.where(log_q_CV > log_p_CV, jnp.exp(log_p_CV), 0), axis=-1)


def _reward_of(token_C: jax.Array, log_p_CV: jax.Array, log_q_CV: jax.Array) -> jax.Array:
    """r at one token per position, ``[C]``."""
    at = lambda x_CV: jnp.take_along_axis(x_CV, token_C[:, None], axis=-1)[:, 0]
    return (at(log_q_CV) > at(log_p_CV)).astype(log_p_CV.dtype)


def _drawn(keys_C: jax.Array, log_p_CV: jax.Array) -> jax.Array:
    """One token of each row, ``[C]``, by Gumbel-argmax."""
    noise_CV = jax.vmap(lambda key: jax.random.gumbel(key, log_p_CV.shape[1:], log_p_CV.dtype))(keys_C)
    return jnp.argmax(log_p_CV + noise_CV, axis=-1)


def _sigma(mean: jax.Array) -> jax.Array:
    """Standard deviation of a variable that is 0 or 1, constant, at least 10⁻³."""
    return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(mean * (1 - mean), SIGMA_FLOOR**2)))


def _mean(x_CV: jax.Array, log_p_CV: jax.Array) -> jax.Array:
    """Mean over the tokens that the draft can say, ``[C]``: columns of padding are −inf."""
    there_CV = log_p_CV > -jnp.inf
    return jnp.sum(jnp.where(there_CV, x_CV, 0), axis=-1) / jnp.sum(there_CV, axis=-1)


def _finite(log_p_CV: jax.Array) -> jax.Array:
    return jnp.where(log_p_CV > -jnp.inf, log_p_CV, 0)


def _with_gradient_of(value_C: jax.Array, surrogate_C: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(value_C) + (surrogate_C - jax.lax.stop_gradient(surrogate_C))
