"""Losses that pull the draft towards the text, or towards the target's distribution.

p = softmax(z/T) is the draft with logits z, q the target (constant), T the temperature. Every gradient below is with
respect to z/T, so that with respect to z is 1/T of it. A cost is what a chunk's ``[C, V]`` logits take beside the
products with the output heads.

Shapes: C positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdraft.losses.base import DenseTarget, Loss, log_probs


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """−log p_y at the label y.

    Gradient: p − e_y. Source: language modelling; on text written by the target it is sequence-level distillation
    (Kim & Rush, arXiv 1606.07947; FastDraft, arXiv 2411.11055, §4.2, strategy 1). A label outside the draft
    vocabulary counts 0 and pulls nowhere. Cost: one softmax, and no target model.

    Use it to pretrain a draft, and to distil when the target is too large to run beside the draft.
    """

    needs_target: ClassVar[bool] = False

    def rows(self, draft_logits_CV: jax.Array, target: DenseTarget | None, labels_C: jax.Array) -> jax.Array:
        log_p_CV = log_probs(draft_logits_CV, self.temperature)
        is_label_CV = jnp.arange(log_p_CV.shape[-1]) == labels_C[:, None]
        return -jnp.sum(jnp.where(is_label_CV, log_p_CV, 0), axis=-1)


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

    def rows(self, draft_logits_CV: jax.Array, target: DenseTarget, labels_C: jax.Array) -> jax.Array:
        log_p_CV = log_probs(draft_logits_CV, self.temperature)
        log_q_CV = target.log_probs(self.temperature)
        q_CV = jnp.exp(log_q_CV)
        return jnp.sum(jnp.where(q_CV > 0, q_CV * (log_q_CV - log_p_CV), 0), axis=-1)


@dataclass(frozen=True)
class TVD(Loss):
    """Total variation distance, ½ Σ_v |p_v − q_v| = Σ_v max(q_v − p_v, 0) = 1 − acceptance.

    Gradient: −p (r − A), with r_v = 1[q_v > p_v] and A = Σ_v p_v r_v. Source: Lemma 1 of Direct Alignment (arXiv
    2403.00858), ∇TVD = E_{x~p}[∇ log p(x) · (−r(x))]; DistillSpec (arXiv 2310.08461). Cost: as ``KL``.

    Use it on a pretrained draft: it is what speculative sampling loses, but its gradient has L1 norm 2A(1 − A) and
    vanishes where the overlap is low.
    """

    def rows(self, draft_logits_CV: jax.Array, target: DenseTarget, labels_C: jax.Array) -> jax.Array:
        tvd_C, _ = tvd_and_reward(draft_logits_CV, target, self.temperature)
        return tvd_C


def tvd_and_reward(draft_logits_CV: jax.Array, target: DenseTarget, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(TVD, A), both ``[C]``: the distance and the draft's mass A = Σ_v p_v r_v on r_v = 1[q_v > p_v].

    Of what the target alone can say, outside a draft vocabulary, all mass is distance. r compares float32
    log-probabilities: rounded to bfloat16, 6 % of its entries flip.
    """
    log_p_CV = log_probs(draft_logits_CV, temperature)
    log_q_CV = target.log_probs(temperature)
    p_CV, under_CV = jnp.exp(log_p_CV), log_q_CV > log_p_CV
    tvd_C = jnp.sum(jnp.where(under_CV, jnp.exp(log_q_CV) - p_CV, 0), axis=-1)
    if target.draft_ids_V is not None:
        tvd_C += 1 - jnp.sum(jnp.exp(log_q_CV), axis=-1)
    return tvd_C, jnp.sum(jnp.where(under_CV, p_CV, 0), axis=-1)
