"""What a loss is: a function of rows, the draft's logits, the target's distribution and the label at some positions in,
one number per position out.

A draft's head may propose a part of the vocabulary only, in ascending order of token ids: the draft vocabulary. The
rows of a loss are then as wide as it, for both models.

Shapes: B batch, T positions of a row, C positions of a chunk, V columns of the draft's logits.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxdraft.errors import ConfigError
from jaxdraft.user_code import user_module

Rows = jax.Array | tuple[jax.Array, dict[str, jax.Array]]


class ShapeError(ValueError):
    """A loss that does not return one number per position."""


class Weights:
    """A function of what every position of a batch looks like that says how much each of them counts.

    Subclasses are frozen dataclasses. Nothing is differentiated through the weights. A row is packed with several
    texts, and the first label of each has weight 0.

    Attributes:
      needs_reference: whether ``values`` must hold the loss of a reference model.
    """

    needs_reference: ClassVar[bool] = False

    def __call__(self, values: Mapping[str, jax.Array], weights_BT: jax.Array) -> jax.Array:
        """New weights ``[B, T]``, of which the loss is the weighted mean.

        Args:
          values: ``[B, T]`` each: ``loss``, ``log_prob`` (of the label, the draft's), whatever else is logged, and
            with a reference model its ``reference_loss``.
          weights_BT: 0 where a position does not count.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Loss:
    """One number per position. Subclasses are frozen dataclasses that define ``rows``::

        @dataclass(frozen=True)
        class SkewKL(Loss):
            skew: float = 0.1

            def rows(self, draft_logits_CV, target, labels_C):
                both = log_probs(draft_logits_CV, self.temperature), target.log_probs(self.temperature)
                log_p_CV, log_q_CV = (jnp.maximum(x_CV, -1e9) for x_CV in both)  # −inf is what neither can say
                log_mixed_CV = jnp.logaddexp(math.log(self.skew) + log_q_CV, math.log1p(-self.skew) + log_p_CV)
                return jnp.sum(jnp.exp(log_q_CV) * (log_q_CV - log_mixed_CV), axis=-1)

    An instance is hashable and holds no array: it is a static argument of ``jax.jit``.

    Attributes:
      temperature: of both distributions. Train the losses that bound acceptance at the temperature decoded at; no
        T² factor is applied.
      weights: how much each position counts; ``None`` counts all labels alike.
      needs_target: whether ``rows`` reads the target.
      draws: whether ``rows`` is random and takes ``keys_C``, a key for each position.
    """

    temperature: float = 1.0
    weights: Weights | None = None
    needs_target: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"{type(self).__name__}: temperature must be positive, got {self.temperature}")

    def rows(self, draft_logits_CV: jax.Array, target: Any, labels_C: jax.Array) -> Rows:
        """The loss at each position, ``[C]``; differentiated by JAX with respect to ``draft_logits_CV``.

        A loss that draws takes ``keys_C`` too, one with ``statistics`` takes ``means``, both by name.

        Args:
          draft_logits_CV: float32. Where the target's top K are all that was stored, V is K + 2: those, the label, and
            the sum of everything else.
          target: a ``Target``; ``None`` where the engine was given no target. Constant.
          labels_C: the token that follows in the text, as an index into the draft's logits; -1 if it is not there.

        Returns:
          The loss, or a pair of it and a dict of further numbers per position to be logged.
        """
        raise NotImplementedError

    def statistics(self, draft_logits_CV: jax.Array, target: Any, labels_C: jax.Array) -> dict[str, jax.Array]:
        """Numbers per position, ``[C]``, whose weighted means over the whole global batch ``rows`` needs as ``means``.

        They cost a pass of their own over the batch, without gradients.
        """
        return {}

    @property
    def has_statistics(self) -> bool:
        """Whether ``statistics`` is defined."""
        return type(self).statistics is not Loss.statistics

    def logged_rows(
        self,
        draft_logits_CV: jax.Array,
        target: Any,
        labels_C: jax.Array,
        keys_C: jax.Array | None = None,
        means: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """``rows``, given what this loss takes, as a pair of the loss and what it logs.

        Raises:
          ShapeError: it does not return one number per position.
        """
        extras: dict[str, Any] = {"keys_C": keys_C} if self.draws else {}
        if self.has_statistics:
            extras["means"] = means
        result = self.rows(draft_logits_CV, target, labels_C, **extras)
        loss_C, logged = result if isinstance(result, tuple) else (result, {})
        for name, value_C in {"rows": loss_C, **logged}.items():
            if jnp.shape(value_C) != labels_C.shape:
                what = f"{type(self).__name__}.{name}"
                raise ShapeError(f"{what}: one number per position, {labels_C.shape}; got {jnp.shape(value_C)}")
        return loss_C, logged

    def batch_statistics(
        self, draft_logits_CV: jax.Array, target: Any, labels_C: jax.Array, keys_C: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """``statistics``, given what this loss takes."""
        return self.statistics(draft_logits_CV, target, labels_C, **({"keys_C": keys_C} if self.draws else {}))


def resolve(name: str, kind: type = Loss) -> type:
    """The class behind ``"TVDPlusPlus"``, or ``"my_package.module:MyLoss"`` for one of the user's own.

    Args:
      name: of a loss, or of weights.
      kind: ``Loss`` or ``Weights``.

    Raises:
      ConfigError: no such module or no such class in it; the message lists what there is.
    """
    what = kind.__name__.lower()
    module_name, _, attribute = name.rpartition(":")
    module_name = module_name or "jaxdraft.losses"
    module = user_module(what, name, module_name)
    found = {key: value for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, kind)}
    found.pop(kind.__name__, None)
    if attribute not in found:
        close = difflib.get_close_matches(attribute, found, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"no {what} {attribute!r} in {module_name!r}; {hint}There: {known}. "
            f"Your own: 'my_package.module:My{kind.__name__}'"
        )
    return found[attribute]
