"""Total Variation Distance++ (Goel et al., "Direct Alignment", arXiv 2403.00858, §2).

Lemma 1 writes the gradient of TVD as a policy gradient with reward r(x) = 1[q(x) > p(x)],

    ∇TVD = E_{x~p}[∇ log p(x) · (−r(x))],

and eq. (1) replaces r by the advantage (r − μ)/σ. As printed, eq. (1) lost the minus sign of Lemma 1: descended as it
stands, it would lower acceptance. The sign of Lemma 1 is used here.

The equation leaves open over what μ and σ are taken. Over the whole batch and in expectation, μ drops out exactly
(Σ_v p_v ∇ log p_v = 0) and σ is one scalar: TVD with another learning rate. Taken over the vocabulary at each position,
which is what ``TVDPlusPlus`` does, μ = A and σ² = A(1 − A) because r is 0 or 1, and the loss is one of its own.

Shapes: C positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxdraft.losses.base import DenseTarget, Loss
from jaxdraft.losses.divergences import tvd_and_reward


@dataclass(frozen=True)
class TVDPlusPlus(Loss):
    """TVD++ in expectation over the vocabulary, the advantage normalised at each position.

    Gradient with respect to z/T: −p (r − A) / max(√(A(1 − A)), 10⁻³), with p = softmax(z/T), r_v = 1[q_v > p_v] and
    A = Σ_v p_v r_v. It is the gradient of ``TVD`` over σ taken as a constant; above the floor it is also that of
    −2 arcsin √A with r held. Its L1 norm is 2√(A(1 − A)) ≤ 1: between TVD's and that of −log acceptance. The floor
    keeps it finite, and 0, at p = q. Source: eq. (1) of arXiv 2403.00858 with the sign of its Lemma 1. Cost: as
    ``TVD``.

    The value is the total variation distance itself. Eq. (1) defines only a gradient; following it lowers this
    distance, which lies between 0 and 1 and compares with ``TVD``. So the gradient is not that of the value: it is
    that of the value at each position, over σ there.

    Use it to distil a pretrained draft for speculative sampling: it still moves where TVD's gradient has faded.
    """

    sigma_floor: ClassVar[float] = 1e-3

    def rows(self, draft_logits_CV: jax.Array, target: DenseTarget, labels_C: jax.Array) -> jax.Array:
        tvd_C, reward_C = tvd_and_reward(draft_logits_CV, target, self.temperature)
        variance_C = reward_C * (1 - reward_C)
        sigma_C = jnp.sqrt(jnp.maximum(variance_C, self.sigma_floor**2))
        normalised_C = tvd_C / jax.lax.stop_gradient(sigma_C)
        return jax.lax.stop_gradient(tvd_C) + (normalised_C - jax.lax.stop_gradient(normalised_C))
