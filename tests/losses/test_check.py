"""A mistake in a user's loss is told apart and in words, before a run begins."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import DPACE, KL, AdaSPEC, CrossEntropy, LKHybrid, Loss, Weights, check_loss, log_probs
from tests.losses.test_losses import every_loss


@every_loss
def test_ours_pass(loss):
    check_loss(loss, stored=True)


@pytest.mark.parametrize("weights", [DPACE(), AdaSPEC()], ids=lambda weights: type(weights).__name__)
def test_our_weights_pass(weights):
    check_loss(KL(weights=weights))


@dataclass(frozen=True)
class Averaged(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.mean(draft_logits_CV)


@dataclass(frozen=True)
class Misshapen(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sum(draft_logits_CV, -1), {"extra": draft_logits_CV}


@dataclass(frozen=True)
class Misspelt(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sum(target.log_prob(self.temperature), axis=-1)


@dataclass(frozen=True)
class Mismatched(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sum(draft_logits_CV + jnp.ones(7), axis=-1)


@dataclass(frozen=True)
class Wordless(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        raise ValueError


@dataclass(frozen=True)
class Renamed(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sum(draft_logits_CV, axis=-1), {"step": draft_logits_CV[:, 0]}


@dataclass(frozen=True)
class Underflowing(Loss):
    """0 · log 0 where a probability is smaller than the smallest float."""

    def rows(self, draft_logits_CV, target, labels_C):
        p_CV = jnp.exp(log_probs(draft_logits_CV, self.temperature))
        q_CV = jnp.exp(target.log_probs(self.temperature))
        return jnp.sum(q_CV * jnp.log(q_CV / p_CV), axis=-1)


@dataclass(frozen=True)
class Infinite(Loss):
    needs_target: ClassVar[bool] = False

    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sum(draft_logits_CV, axis=-1) / 0.0


@dataclass(frozen=True)
class Singular(Loss):
    """Finite everywhere, with an infinite slope where the models agree."""

    def rows(self, draft_logits_CV, target, labels_C):
        p_CV = jnp.exp(log_probs(draft_logits_CV, self.temperature))
        q_CV = jnp.exp(target.log_probs(self.temperature))
        return jnp.sqrt(jnp.sum((p_CV - q_CV) ** 2, axis=-1))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Averaged(), r"loss Averaged\.rows: one number per position, \(12,\); got \(\)"),
        (Misshapen(), r"loss Misshapen\.extra: one number per position, \(12,\); got \(12, 11\)"),
        (Misspelt(), r"loss Misspelt: rows failed .* AttributeError: .*'log_prob'"),
        (Mismatched(), r"loss Mismatched: rows failed .* with (Value|Type)Error: .*\(12, 11\)"),
        (Wordless(), r"loss Wordless: rows failed .* with ValueError$"),
        (Renamed(), r"loss Renamed: 'step' is logged of every loss"),
        (Underflowing(), r"loss Underflowing: its .* is not finite where draft and target hardly overlap"),
        (Infinite(), r"loss Infinite: its value is not finite on random logits"),
        (
            Singular(),
            r"loss Singular: its gradient is not finite where draft and target are equal, though its value is",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Loss) else "",
)
def test_each_mistake_by_its_name(loss, message):
    with pytest.raises(ConfigError, match=message):
        check_loss(loss)


@dataclass(frozen=True)
class Mixed(Loss):
    """The gradient of logaddexp(−∞, −∞) is no number."""

    def rows(self, draft_logits_CV, target, labels_C):
        log_p_CV, log_q_CV = log_probs(draft_logits_CV, self.temperature), target.log_probs(self.temperature)
        return jnp.sum(jnp.exp(log_q_CV) * (log_q_CV - jnp.logaddexp(log_p_CV, log_q_CV)), axis=-1)


def test_a_loss_that_stored_targets_would_break():
    check_loss(Mixed())
    with pytest.raises(ConfigError, match=r"Mixed: its value is not finite where neither .* stored targets"):
        check_loss(Mixed(), stored=True)


@dataclass(frozen=True)
class Listed(Loss):
    shares: list = field(default_factory=list)


def test_a_loss_has_to_be_hashable():
    with pytest.raises(
        ConfigError, match=r"loss Listed: unhashable type: 'list': a loss is a @dataclass\(frozen=True\)"
    ):
        check_loss(Listed())


@dataclass(frozen=True)
class Negative(Weights):
    def __call__(self, values, weights_BT):
        return weights_BT - 0.5


@dataclass(frozen=True)
class Pooled(Weights):
    def __call__(self, values, weights_BT):
        return jnp.sum(weights_BT, axis=-1)


@dataclass(frozen=True)
class Unknown(Weights):
    def __call__(self, values, weights_BT):
        return values["entropy"]


@dataclass(frozen=True)
class Observant(Weights):
    def __call__(self, values, weights_BT):
        return weights_BT * values["TVD"] * (1 - values["agreement"])


@dataclass(frozen=True)
class Undeclared(Weights):
    def __call__(self, values, weights_BT):
        return weights_BT * values["reference_loss"]


def test_weights_see_all_that_is_logged():
    check_loss(LKHybrid(weights=Observant()))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (Negative(), r"KL\.weights \(Negative\): weights are finite, not negative, and 0 where a position does not"),
        (Pooled(), r"KL\.weights \(Pooled\): one weight per position, \(2, 11\); got \(2,\)"),
        (Undeclared(), r"KL\.weights \(Undeclared\) failed on .* KeyError: 'reference_loss'"),
        (Unknown(), r"KL\.weights \(Unknown\) failed on .*'log_prob'.* KeyError: 'entropy'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Weights) else "",
)
def test_mistakes_in_weights(weights, message):
    with pytest.raises(ConfigError, match=message):
        check_loss(KL(weights=weights))


@dataclass(frozen=True)
class Bracketed(Weights):
    def __call__(self, values, weights_BT):
        return weights_BT * values["acceptance_low"]


def test_weights_see_the_bracket_where_targets_are_stored():
    check_loss(CrossEntropy(weights=Bracketed()), stored=True)
    with pytest.raises(ConfigError, match="KeyError: 'acceptance_low'"):
        check_loss(KL(weights=Bracketed()))
