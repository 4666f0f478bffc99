"""What a loss is, and the engine that computes any of them without holding every position's logits.

A loss is a function of rows: the draft's logits, the target's distribution and the label at some positions in, one
number per position out. ``chunked`` multiplies hidden states with the output heads a few positions at a time, asks
the loss for its values there, differentiates them on the spot and keeps only sums, so that neither model's
``[N, V]`` logits ever exist.

A draft's head may propose a part of the vocabulary only, in ascending order of token ids: the draft vocabulary. The
rows of a loss are then as wide as it, for both models.

Shapes: N positions of a batch, C positions of a chunk, K chunks, V vocabulary (in ``rows``: the draft's), R draft
vocabulary, D and E hidden size of draft and target.
"""

import difflib
import functools
import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxdraft.errors import ConfigError
from jaxdraft.losses.acceptance import agreement, overlap


def log_probs(logits_CV: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature), ``[C, V]``, in float32 or better; a −inf logit stays −inf."""
    return jax.nn.log_softmax(logits_CV.astype(_wide(logits_CV.dtype)) / temperature, axis=-1)


class DenseTarget(NamedTuple):
    """The target's distribution at some positions, from all of its logits.

    Attributes:
      logits_CV: of all tokens.
      draft_ids_V: which tokens the draft can propose; ``None`` is all of them.
    """

    logits_CV: jax.Array
    draft_ids_V: jax.Array | None = None

    def log_probs(self, temperature: float = 1.0) -> jax.Array:
        """``[C, V]``, at the given temperature, of the tokens that the draft can propose.

        Of a draft vocabulary these do not sum to 1: the rest is the mass of tokens that the target alone knows.
        """
        log_q_CV = log_probs(self.logits_CV, temperature)
        return log_q_CV if self.draft_ids_V is None else log_q_CV[:, self.draft_ids_V]


@dataclass(frozen=True)
class Loss:
    """One number per position. Subclasses are frozen dataclasses that define ``rows``::

        @dataclass(frozen=True)
        class ReverseKL(Loss):
            def rows(self, draft_logits_CV, target, labels_C):
                log_p_CV = log_probs(draft_logits_CV, self.temperature)
                log_q_CV = target.log_probs(self.temperature)
                return jnp.sum(jnp.exp(log_p_CV) * (log_p_CV - log_q_CV), axis=-1)

    An instance is hashable and holds no array: it is a static argument of ``jax.jit``.

    Attributes:
      temperature: of both distributions. Train the losses that bound acceptance at the temperature decoded at; no
        T² factor is applied.
      needs_target: whether ``rows`` reads the target.
    """

    temperature: float = 1.0
    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"{type(self).__name__}: temperature must be positive, got {self.temperature}")

    def rows(self, draft_logits_CV: jax.Array, target: Any, labels_C: jax.Array) -> jax.Array:
        """The loss at each position, ``[C]``; differentiated by JAX with respect to ``draft_logits_CV``.

        Args:
          draft_logits_CV: float32.
          target: a ``DenseTarget``; ``None`` where the engine was given no target. Constant.
          labels_C: the token that follows in the text, as an index into the draft's logits; -1 if it is not in the
            draft vocabulary.
        """
        raise NotImplementedError


class LossOutput(NamedTuple):
    """Sums over positions, each position times its weight: divide once, by the weight of the whole global batch.

    Attributes:
      sum: of the loss; the only part with a gradient.
      weight: of the weights.
      metrics: with a target, ``acceptance`` (Σ min(p, q) at the loss's temperature) and ``agreement`` (same top token).
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def chunked(
    loss: Loss,
    draft_hidden_ND: jax.Array,
    draft_head_DR: jax.Array,
    labels_N: jax.Array,
    weights_N: jax.Array,
    target_hidden_NE: jax.Array | None = None,
    target_head_EV: jax.Array | None = None,
    draft_ids_R: jax.Array | None = None,
    chunk: int | None = None,
) -> LossOutput:
    """The weighted sum of a loss over positions, from hidden states.

    Differentiable in reverse mode, once, with respect to ``draft_hidden_ND`` and ``draft_head_DR``; everything else
    is constant. Gradients are computed in the forward pass (as in Liger Kernel, arXiv 2410.10989): per chunk three
    products of the draft head's size and one of the target's, the head's gradient accumulated in float32. Without
    differentiation only the values are computed. A head is cast to the dtype of its hidden states; logits are float32.

    Rows of weight 0 contribute nothing, whatever labels and finite hidden states they hold. Over several devices, call
    it inside ``jax.shard_map`` with the positions split, and ``psum`` the result. Left to the partitioner the result is
    the same, but every device computes every chunk.

    Args:
      loss: what to compute at each position.
      draft_hidden_ND: the draft's hidden states.
      draft_head_DR: the draft's output head; for tied weights, the transposed embedding.
      labels_N: token ids, read by losses on labels.
      weights_N: of each position, 0 where it does not count.
      target_hidden_NE: the target's hidden states at the same positions. A loss that needs no target still reports
        ``acceptance`` and ``agreement`` when it is given one.
      target_head_EV: the target's output head.
      draft_ids_R: the draft vocabulary, ascending; ``None`` where the draft's head is as wide as the vocabulary.
      chunk: positions whose logits are held at once; ``None`` takes ``default_chunk(V)``.

    Raises:
      ConfigError: the loss needs a target and none was given.
      ValueError: shapes that do not fit each other, or a loss that does not return one number per position.
    """
    N, R = draft_hidden_ND.shape[0], draft_head_DR.shape[1]
    if draft_ids_R is not None and draft_ids_R.shape != (R,):
        raise ValueError(f"draft_ids_R has shape {draft_ids_R.shape}, the draft's head {R} columns")
    V = R
    if labels_N.shape != (N,) or weights_N.shape != (N,) or not N:
        raise ValueError(f"{N} rows of hidden states, labels {labels_N.shape}, weights {weights_N.shape}")
    if (target_hidden_NE is None) != (target_head_EV is None):
        raise ValueError("target_hidden_NE and target_head_EV go together")
    if target_hidden_NE is None or target_head_EV is None:
        if loss.needs_target:
            raise ConfigError(f"{type(loss).__name__} compares the draft with a target, and no target was given")
    else:
        V = target_head_EV.shape[1]
        if target_hidden_NE.shape[0] != N or (draft_ids_R is None and V != R):
            target = target_hidden_NE.shape[0], V
            raise ValueError(f"draft and target differ in (rows, vocabulary): {N, R} and {target}")
        target_head_EV = target_head_EV.astype(target_hidden_NE.dtype)
    size = _chunk_size(N, chunk or default_chunk(V))
    if draft_ids_R is not None:
        labels_N = _places(labels_N, draft_ids_R)
    constants = labels_N, weights_N, target_hidden_NE, target_head_EV, draft_ids_R
    head_DR = draft_head_DR + _zero_like_rows(labels_N, draft_head_DR.dtype)
    total, metrics = _sums(loss, size, draft_hidden_ND, head_DR, constants)
    return LossOutput(total, jnp.sum(weights_N), metrics)


def default_chunk(vocabulary: int) -> int:
    """Positions per chunk: 2 MiB of float32 logits on a CPU, whose caches hold that, 128 MiB elsewhere; at least 128.

    Every chunk reads the head twice and its gradient once and writes it once, about 2/C bytes for each floating-point
    operation: accelerators need some 500 positions before the products dominate.
    """
    budget = (2 if jax.default_backend() == "cpu" else 128) * 2**20
    return max(128, budget // (4 * vocabulary))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(loss, chunk, hidden_ND, head_DV, constants):
    sums, _ = _scan(loss, chunk, hidden_ND, head_DV, constants, differentiate=False)
    return sums


def _sums_forward(loss, chunk, hidden_ND, head_DV, constants):
    return _scan(loss, chunk, hidden_ND, head_DV, constants, differentiate=True)


def _sums_backward(loss, chunk, grads, cotangents):
    g, _ = cotangents
    return *(((g * grad).astype(grad.dtype)) for grad in grads), None


_sums.defvjp(_sums_forward, _sums_backward)


def _scan(loss, chunk, hidden_ND, head_DV, constants, differentiate):
    """((sum, metrics), (hidden gradient, head gradient) or None), one chunk of rows after another."""
    labels_N, weights_N, target_hidden_NE, target_head_EV, draft_ids_R = constants
    compute_head_DV = head_DV.astype(hidden_ND.dtype)

    def step(head_grad_DV, rows):
        hidden_CD, labels_C, weights_C, target_hidden_CE = rows
        counts_C = weights_C != 0
        target = None
        if target_hidden_CE is not None:
            target = DenseTarget(_matmul(target_hidden_CE, target_head_EV), draft_ids_R)

        def weighted(logits_CV):
            loss_C = loss.rows(logits_CV, target, labels_C)
            if loss_C.shape != labels_C.shape:
                raise ValueError(
                    f"{type(loss).__name__}.rows: one loss per position, {labels_C.shape}; got {loss_C.shape}"
                )
            return jnp.where(counts_C, loss_C, 0) * weights_C

        logits_CV = _matmul(hidden_CD, compute_head_DV)
        if differentiate:
            loss_C, pullback = jax.vjp(weighted, logits_CV)
            (grad_CV,) = pullback(jnp.ones_like(loss_C))
            grad_CV = jnp.where(counts_C[:, None], grad_CV, 0).astype(hidden_CD.dtype)
            hidden_grad_CD = _matmul(grad_CV, compute_head_DV.T).astype(hidden_CD.dtype)
            head_grad_DV += _matmul(hidden_CD.T, grad_CV)
        else:
            loss_C, hidden_grad_CD = weighted(logits_CV), None
        metrics = {} if target is None else _metrics(loss, logits_CV, target)
        metrics = {name: jnp.where(counts_C, value_C, 0) * weights_C for name, value_C in metrics.items()}
        return head_grad_DV, (loss_C, metrics, hidden_grad_CD)

    rows = jax.tree.map(lambda x: _split(x, chunk), (hidden_ND, labels_N, weights_N, target_hidden_NE))
    start: Any = None
    if differentiate:
        start = jnp.zeros(head_DV.shape, _wide(head_DV.dtype)) + _zero_like_rows(labels_N, _wide(head_DV.dtype))
    head_grad_DV, (loss_KC, metrics_KC, hidden_grad_KCD) = jax.lax.scan(step, start, rows)
    sums = jnp.sum(loss_KC), jax.tree.map(jnp.sum, metrics_KC)
    if not differentiate:
        return sums, None
    hidden_grad_ND = hidden_grad_KCD.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return sums, (hidden_grad_ND, head_grad_DV.astype(head_DV.dtype))


def _metrics(loss, logits_CV, target):
    log_p_CV, log_q_CV = log_probs(logits_CV, loss.temperature), target.log_probs(loss.temperature)
    return {"acceptance": overlap(log_p_CV, log_q_CV), "agreement": agreement(logits_CV, *target)}


def _places(labels_N, draft_ids_R):
    """Index of every label in the draft vocabulary; -1 of one that is not in it."""
    places_N = jnp.minimum(jnp.searchsorted(draft_ids_R, labels_N), len(draft_ids_R) - 1)
    return jnp.where(draft_ids_R[places_N] == labels_N, places_N, -1)


def _zero_like_rows(labels_N, dtype):
    """0, which under ``shard_map`` differs between devices as the rows do: what it is added to then has the type of a
    per-device value, and its gradient is summed over them. Compiles to nothing."""
    return (labels_N[0] * 0).astype(dtype)


def _chunk_size(n: int, largest: int) -> int:
    """Rows of the fewest equal chunks of at most ``largest`` rows, rounded up to a multiple of 8."""
    count = -(-n // largest)
    return -(-n // count // 8) * 8


def _split(x_N, chunk):
    padding = -x_N.shape[0] % chunk
    x_N = jnp.pad(x_N, ((0, padding),) + ((0, 0),) * (x_N.ndim - 1)) if padding else x_N
    return x_N.reshape(-1, chunk, *x_N.shape[1:])


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=_wide(a.dtype))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def resolve_loss(name: str) -> type[Loss]:
    """The class behind ``"TVDPlusPlus"``, or ``"my_package.module:MyLoss"`` for one of the user's own.

    Raises:
      ConfigError: no such module or no such loss in it; the message lists what there is.
    """
    module_name, _, attribute = name.rpartition(":")
    module_name = module_name or "jaxdraft.losses"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"loss {name!r}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?"
        ) from error
    losses = {key: value for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Loss)}
    losses.pop("Loss", None)
    if attribute not in losses:
        close = difflib.get_close_matches(attribute, losses, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(sorted(losses)) or "none"
        raise ConfigError(
            f"no loss {attribute!r} in {module_name!r}; {hint}There: {known}. Your own: 'my_package.module:MyLoss'"
        )
    return losses[attribute]
