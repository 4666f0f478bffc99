"""Losses made of the acceptance rate itself, and weighted sums of losses.

Symbols as in ``jaxdraft.losses.divergences``; α = Σ_v min(p_v, q_v) = 1 − TVD is the acceptance rate.

Shapes: C positions, V vocabulary.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdraft.errors import ConfigError
from jaxdraft.losses.base import Loss, Rows
from jaxdraft.losses.divergences import KL, TVD
from jaxdraft.losses.targets import Target, log_probs, log_sum_exp


@dataclass(frozen=True)
class LogAcceptance(Loss):
    """−log α, the negative log-likelihood of a proposal's acceptance.

    Gradient: −p (r − A)/α, that of ``TVD`` over α. Source: LK losses (arXiv 2602.23881), L^α. Computed as a
    log-sum-exp of min(log p, log q), so that it is finite, and has a gradient, where α is far below the smallest
    float. Cost: as ``TVD``, and one more log-sum-exp.

    Use it where TVD would stand still: its gradient does not vanish with the overlap. A single position of hardly any
    overlap then weighs as much as many good ones.
    """

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> jax.Array:
        log_p_CV, log_q_CV = log_probs(draft_logits_CV, self.temperature), target.log_probs(self.temperature)
        return -log_sum_exp(jnp.where(log_p_CV < log_q_CV, log_p_CV, log_q_CV))


@dataclass(frozen=True)
class LKHybrid(Loss):
    """λ KL(q‖p) + (1 − λ) TVD with λ = exp(−η α), α held constant.

    Gradient: λ (p − q) − (1 − λ) p (r − A). Source: LK losses (arXiv 2602.23881), L^λ. Both parts are logged, as ``KL``
    and ``TVD``. Cost: as ``TVD``.

    Use it from scratch: it is KL where draft and target hardly overlap, and goes over to TVD as they do.

    Attributes:
      eta: η; at α = 0 the loss is KL, whatever it is.
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta >= 0:
            raise ConfigError(f"LKHybrid: eta must not be negative, got {self.eta}")

    def rows(self, draft_logits_CV: jax.Array, target: Target, labels_C: jax.Array) -> Rows:
        terms = draft_logits_CV, target, labels_C
        kl_C, tvd_C = KL(self.temperature).rows(*terms), TVD(self.temperature).rows(*terms)
        share_C = jax.lax.stop_gradient(jnp.exp(-self.eta * (1 - tvd_C)))
        return share_C * kl_C + (1 - share_C) * tvd_C, {"KL": kl_C, "TVD": tvd_C}


@dataclass(frozen=True)
class Mixture(Loss):
    """Σ_i w_i L_i, a weighted sum of losses, each term logged by its own name and without its weight.

    Gradient: the weighted sum. Source: FastDraft (arXiv 2411.11055, §4.2, strategies 3 and 4): 0.5 CE + 0.5 KL or TVD.
    Each term has its own temperature; ``temperature`` here, one of them, is that of the logged acceptance. Cost: the
    terms'.

    Use ``Mixture(terms=((1.0, TVD()), (0.1, KL())))`` to train with TVD from scratch: the KL moves the draft where the
    TVD's gradient has vanished.

    Attributes:
      terms: pairs of weight and loss.
    """

    terms: tuple[tuple[float, Loss], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms:
            raise ConfigError("Mixture: give terms, such as ((0.5, CrossEntropy()), (0.5, KL()))")
        own = {loss.temperature for _, loss in self.terms}
        if self.temperature not in own:
            raise ConfigError(
                f"Mixture: temperature is {self.temperature:g}, which only the logged acceptance would have: its terms "
                f"have {', '.join(f'{t:g}' for t in sorted(own))}; give the mixture one of these, or change the terms'"
            )
        if weighted := [loss for _, loss in self.terms if loss.weights is not None]:
            raise ConfigError(f"Mixture: {type(weighted[0]).__name__} has weights of its own; give them to the mixture")

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        return any(loss.needs_target for _, loss in self.terms)

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return any(loss.draws for _, loss in self.terms)

    @property
    def has_statistics(self) -> bool:
        return any(loss.has_statistics for _, loss in self.terms)

    def statistics(
        self, draft_logits_CV: jax.Array, target: Any, labels_C: jax.Array, *, keys_C: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for name, (_, loss) in self._named():
            own = loss.batch_statistics(draft_logits_CV, target, labels_C, keys_C)
            found |= {f"{name}.{key}": value_C for key, value_C in own.items()}
        return found

    def rows(
        self,
        draft_logits_CV: jax.Array,
        target: Any,
        labels_C: jax.Array,
        *,
        keys_C: jax.Array | None = None,
        means: Mapping[str, jax.Array] | None = None,
    ) -> Rows:
        total_C, logged = jnp.zeros_like(draft_logits_CV[:, 0]), dict[str, jax.Array]()
        for name, (weight, loss) in self._named():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): mean for key, mean in (means or {}).items() if key.startswith(prefix)}
            loss_C, inner = loss.logged_rows(draft_logits_CV, target, labels_C, keys_C, own)
            total_C += weight * loss_C
            logged |= {name: loss_C, **{f"{prefix}{key}": value_C for key, value_C in inner.items()}}
        return total_C, logged

    def _named(self) -> list[tuple[str, tuple[float, Loss]]]:
        kinds = Counter(type(loss).__name__ for _, loss in self.terms)
        seen: Counter[str] = Counter()
        named = []
        for weight, loss in self.terms:
            kind = type(loss).__name__
            seen[kind] += 1
            named.append((kind if kinds[kind] == 1 else f"{kind}_{seen[kind]}", (weight, loss)))
        return named


def parts(loss: Loss) -> tuple[Loss, ...]:
    """The terms of a mixture, and of mixtures in it; of any other loss itself."""
    if not isinstance(loss, Mixture):
        return (loss,)
    return tuple(part for _, term in loss.terms for part in parts(term))
