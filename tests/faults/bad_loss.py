"""A loss that some rows break, as a user's own may be: ``tests.faults.bad_loss:BadLabel``."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxdraft.losses import CrossEntropy


@dataclasses.dataclass(frozen=True)
class BadLabel(CrossEntropy):
    """Cross entropy with a token that it cannot bear.

    Attributes:
      token: where it is the label, the loss is not a number.
      in_gradient: the loss is right there, and its gradient alone is not a number.
    """

    token: int = -1
    in_gradient: bool = False

    def rows(self, draft_logits_CV: jax.Array, target: None, labels_C: jax.Array) -> jax.Array:
        loss_C, is_bad_C = super().rows(draft_logits_CV, target, labels_C), labels_C == self.token
        if not self.in_gradient:
            return jnp.where(is_bad_C, jnp.nan, loss_C)
        # The square root of what is always 0 is 0; its slope is infinite, times that of what is in it, which is 0.
        return loss_C + jnp.sqrt(jnp.where(is_bad_C, 0 * draft_logits_CV[:, 0], 1.0)) - jnp.where(is_bad_C, 0.0, 1.0)
