"""Losses that pull the draft towards the text, or towards the target's distribution.

p = softmax(z/T) is the draft with logits z, q the target (constant), T the temperature. Every gradient below is with
respect to z/T, so that with respect to z is 1/T of it. A cost is what a chunk's ``[C, V]`` logits take beside the
products with the output heads.

Shapes: C positions, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdraft.errors import ConfigError
from jaxdraft.losses.base import Loss
from jaxdraft.losses.targets import Target, log_probs


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """−log p_y at the label y.

    Gradient: p − e_y. Source: language modelling; on text written by the target it is sequence-level distillation
    (Kim & Rush, arXiv 1606.07947; FastDraft, arXiv 2411.11055, §4.2, strategy 1). A label outside the draft
    vocabulary counts 0 and pulls nowhere. Cost: one softmax, and no target model.

    Use it to pretrain a draft, and to distil when the target is too large to run beside the draft.
    """

    needs_target: ClassVar[bool] = False

    def rows(self, draft_logits_CV: jax.Array, target: Target | None, labels_C: jax.Array) -> jax.Array:
        return -label_log_prob(log_probs(draft_logits_CV, self.temperature), labels_C)


@dataclass(frozen=True)
class KL(Loss):
    """Forward Kullback-Leibler divergence, KL(q‖p) = Σ_v q_v (log q_v − log p_v).

    Gradient: p − q. Source: Hinton et al., arXiv 1503.02531; "KLD" in Direct Alignment (arXiv 2403.00858, §3), L_KL in
    FastDraft (arXiv 2411.11055, §4.2, strategy 2). Cost: two softmaxes and the target model.

    Use it from scratch or early: its gradient does not fade where draft and target hardly overlap. It covers all of q,
    which a small draft cannot, and ends at a lower acceptance than the total variation losses. Infinite where the
    draft's probability is exactly 0 and the target's is not; over a draft vocabulary the sum is over that alone, q not
    renormalised: it can be negative, and its gradient is Q p − q, with Q the target's mass there.
    """

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> jax.Array:
        log_p_CV = log_probs(draft_logits_CV, self.temperature)
        return _kl(target.log_probs(self.temperature), log_p_CV)


@dataclass(frozen=True)
class ReverseKL(Loss):
    """Reverse Kullback-Leibler divergence, KL(p‖q) = Σ_v p_v (log p_v − log q_v).

    Gradient: p (log(p/q) − KL(p‖q)). Source: MiniLLM (arXiv 2306.08543), GKD (arXiv 2306.13649). Cost: as ``KL``.

    Use it where the draft shall say only what the target would: it seeks modes of q and leaves the others out.
    Infinite where the target's probability is exactly 0 and the draft's is not.
    """

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> jax.Array:
        log_p_CV = log_probs(draft_logits_CV, self.temperature)
        return _kl(log_p_CV, target.log_probs(self.temperature))


@dataclass(frozen=True)
class JSD(Loss):
    """Generalised Jensen-Shannon divergence, β KL(q‖m) + (1 − β) KL(p‖m) with m = β q + (1 − β) p.

    Gradient: (1 − β) p (log(p/m) − KL(p‖m)). Source: GKD (arXiv 2306.13649, §2), DistillSpec (arXiv 2310.08461). Cost:
    two softmaxes, one more exponential and logarithm than ``KL``, and the target model.

    Use it between the two KLs: bounded by log 2 at β = ½, towards KL(q‖p) (times β) as β falls, towards KL(p‖q) (times
    1 − β) as β rises. What the target says outside a draft vocabulary adds a constant.

    Attributes:
      beta: in (0, 1).
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ConfigError(f"JSD: beta must lie between 0 and 1, got {self.beta}; at the ends it is no divergence")

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> jax.Array:
        log_p_CV = log_probs(draft_logits_CV, self.temperature)
        log_q_CV = target.log_probs(self.temperature)
        there_CV = jnp.maximum(log_p_CV, log_q_CV) > -jnp.inf  # a column of padding has no gradient in logaddexp
        scaled = lambda log_CV, share: jnp.where(there_CV, log_CV + math.log(share), 0)
        log_m_CV = jnp.logaddexp(scaled(log_q_CV, self.beta), scaled(log_p_CV, 1 - self.beta))
        jsd_C = self.beta * _kl(log_q_CV, log_m_CV) + (1 - self.beta) * _kl(log_p_CV, log_m_CV)
        return jsd_C - self.beta * math.log(self.beta) * _outside(log_q_CV, target)


@dataclass(frozen=True)
class TVD(Loss):
    """Total variation distance, ½ Σ_v |p_v − q_v| = Σ_v max(q_v − p_v, 0) = 1 − acceptance.

    Gradient: −p (r − A), with r_v = 1[q_v > p_v] and A = Σ_v p_v r_v. Source: Lemma 1 of Direct Alignment (arXiv
    2403.00858), ∇TVD = E_{x~p}[∇ log p(x) · (−r(x))]; DistillSpec (arXiv 2310.08461). Cost: as ``KL``.

    Use it on a pretrained draft: it is what speculative sampling loses, but its gradient has L1 norm 2A(1 − A) and
    vanishes where the overlap is low.
    """

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> jax.Array:
        return tvd(log_probs(draft_logits_CV, self.temperature), target.log_probs(self.temperature), target)


def tvd(log_p_CV: jax.Array, log_q_CV: jax.Array, target: Target) -> jax.Array:
    """Σ_v max(q_v − p_v, 0), ``[C]``. What the target alone can say, outside a draft vocabulary, is all distance.

    Which of the two is larger is asked of float32 log-probabilities: rounded to bfloat16, 6 % of the answers flip.
    """
    short_CV = jnp.where(log_q_CV > log_p_CV, jnp.exp(log_q_CV) - jnp.exp(log_p_CV), 0)
    return jnp.sum(short_CV, axis=-1) + _outside(log_q_CV, target)


def label_log_prob(log_p_CV: jax.Array, labels_C: jax.Array) -> jax.Array:
    """log p at the label, ``[C]``; 0 for a label that is not among the columns."""
    is_label_CV = jnp.arange(log_p_CV.shape[-1]) == labels_C[:, None]
    return jnp.sum(jnp.where(is_label_CV, log_p_CV, 0), axis=-1)


def _kl(log_a_CV: jax.Array, log_b_CV: jax.Array) -> jax.Array:
    """KL(a‖b), ``[C]``; 0 log 0 = 0."""
    a_CV = jnp.exp(log_a_CV)
    ratio_CV = jnp.where(a_CV > 0, log_a_CV, 0) - jnp.where(a_CV > 0, log_b_CV, 0)
    return jnp.sum(a_CV * ratio_CV, axis=-1)


def _outside(log_q_CV: jax.Array, target: Target) -> jax.Array | float:
    """The target's mass outside the draft vocabulary, ``[C]``."""
    return 1 - jnp.sum(jnp.exp(log_q_CV), axis=-1) if target.is_partial else 0.0
