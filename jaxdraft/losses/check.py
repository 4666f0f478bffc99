"""Tries a loss on a tiny batch, so that a mistake in it is told in words before a run begins.

Shapes: C positions, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.errors import ConfigError
from jaxdraft.losses.base import Loss, ShapeError
from jaxdraft.losses.targets import DenseTarget

# What lines of metrics, and the values that weights see, hold already.
TAKEN = {"step", "loss", "grad_norm", "learning_rate", "tokens", "weight", "log_prob", "reference_loss"}
TAKEN |= {"acceptance", "acceptance_low", "acceptance_high", "agreement"}
_ROWS, _TOKENS = 4, 11
_CASES = (
    ("on random logits", ""),
    ("where draft and target are equal", "; keep square roots and quotients away from 0"),
    (
        "where draft and target hardly overlap",
        "; probabilities underflow: stay with log_probs, or guard 0 · log 0",
    ),
    (
        "where neither draft nor target can say a token (log-probabilities of −inf), as it is with stored targets",
        "; bound them from below: jnp.maximum(log_q_CV, -1e9)",
    ),
)


def check_loss(loss: Loss, stored: bool = False) -> None:
    """Computes value and gradient where draft and target differ, are equal, and hardly overlap.

    Args:
      loss: the loss.
      stored: whether it is to be computed from stored targets, where columns may be −inf for both.

    Raises:
      ConfigError: the loss is not hashable, ``rows`` fails, gives other than one number per position, or a value or
        gradient that is not finite; the message says which, and where.
    """
    try:
        hash(loss)
    except TypeError as error:
        raise ConfigError(
            f"loss {type(loss).__name__}: {error}: a loss is a @dataclass(frozen=True), with tuples in place of lists"
        ) from None
    _try(loss, stored)


@functools.cache
def _try(loss: Loss, stored: bool) -> None:
    name = type(loss).__name__
    draft_CV, target_CV = _logits()
    cases = _CASES if stored else _CASES[:-1]
    draft_CV, target_CV = (x[: len(cases) * _ROWS] for x in (draft_CV, target_CV))
    labels_C = jnp.arange(len(draft_CV)) % _TOKENS
    keys_C = jax.random.split(jax.random.key(0), len(draft_CV)) if loss.draws else None

    logs: set[str] = set()

    @jax.jit
    def value_and_gradient(draft_CV: jax.Array, target_CV: jax.Array) -> tuple[jax.Array, jax.Array]:
        target = DenseTarget(target_CV) if loss.needs_target else None
        found = loss.batch_statistics(draft_CV, target, labels_C, keys_C)
        means = jax.tree.map(lambda x_C: jax.lax.stop_gradient(jnp.mean(x_C)), found)
        rows = lambda x: loss.logged_rows(x, target, labels_C, keys_C, means)
        loss_C, pullback, logged = jax.vjp(rows, draft_CV, has_aux=True)
        logs.update(logged)
        return loss_C, pullback(jnp.ones_like(loss_C))[0]

    try:
        loss_C, grad_CV = map(np.asarray, value_and_gradient(draft_CV, target_CV))
    except ShapeError as error:
        raise ConfigError(f"loss {error}") from error
    except Exception as error:
        what = _said(error)
        raise ConfigError(f"loss {name}: rows failed on a batch of {draft_CV.shape} logits with {what}") from error
    if taken := sorted(logs & TAKEN):
        raise ConfigError(f"loss {name}: {taken[0]!r} is logged of every loss: log yours under another name")
    for i, (where, remedy) in enumerate(cases):
        case = slice(i * _ROWS, (i + 1) * _ROWS)
        if not np.isfinite(loss_C[case]).all():
            raise ConfigError(f"loss {name}: its value is not finite {where}: {loss_C[case]}{remedy}")
        if not np.isfinite(grad_CV[case]).all():
            raise ConfigError(f"loss {name}: its gradient is not finite {where}, though its value is{remedy}")
    if loss.weights is not None:
        _check_weights(loss, logs, stored)


def _check_weights(loss: Loss, logs: set[str], stored: bool) -> None:
    name = f"{type(loss).__name__}.weights ({type(loss.weights).__name__})"
    counts_BT = jnp.asarray(np.arange(2 * _TOKENS).reshape(2, _TOKENS) % 5 > 0, jnp.float32)
    assert loss.weights is not None
    with_target: tuple[str, ...] = ("acceptance", "agreement") if loss.needs_target else ()
    if stored:
        with_target = ("acceptance_low", "acceptance_high", "agreement")
    with_reference = ("reference_loss",) if loss.weights.needs_reference else ()
    keys = ("loss", "log_prob", *with_target, *sorted(logs), *with_reference)
    values = {key: (-counts_BT if key == "log_prob" else counts_BT / (2 + i)) for i, key in enumerate(keys)}
    try:
        weights_BT = np.asarray(loss.weights(values, counts_BT))
    except Exception as error:
        what = _said(error)
        raise ConfigError(f"loss {name} failed on {sorted(values)} of shape {counts_BT.shape} with {what}") from error
    if weights_BT.shape != counts_BT.shape:
        raise ConfigError(f"loss {name}: one weight per position, {counts_BT.shape}; got {weights_BT.shape}")
    if not (np.isfinite(weights_BT).all() and (weights_BT >= 0).all()) or weights_BT[np.asarray(counts_BT) == 0].any():
        raise ConfigError(f"loss {name}: weights are finite, not negative, and 0 where a position does not count")


def _said(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _logits() -> tuple[np.ndarray, np.ndarray]:
    """Draft and target logits ``[C, V]``, float32, a few rows of each case."""
    rng = np.random.default_rng(0)
    draft, target = rng.standard_normal((2, _ROWS, _TOKENS), dtype=np.float32)
    side = np.where(np.arange(_TOKENS) % 2, 100, -100).astype(np.float32)
    absent = np.where(np.arange(_TOKENS) < _TOKENS - 2, 0, -np.inf).astype(np.float32)
    return (
        np.concatenate([draft, draft, draft + side, draft + absent]),
        np.concatenate([target, draft, target - side, target + absent]),
    )
