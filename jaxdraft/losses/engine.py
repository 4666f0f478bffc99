"""The engine: any loss, value and gradient, without holding every position's logits.

Hidden states are multiplied with the output heads a chunk of positions at a time, so that neither model's ``[N, V]``
logits ever exist. On a CPU the loss takes a chunk's logits in pieces of a few positions, so that what it computes from
them stays in the caches. There are two forms. ``chunked`` returns the sum of a loss: it asks for the gradient on the
spot and keeps only sums. ``per_position`` returns the loss at every position, for any reduction of them, and computes
the logits again in the backward pass.

Shapes: N positions of a batch, C positions of a chunk, V vocabulary, R draft vocabulary, K stored tokens, S = K + 2,
D and E hidden size of draft and target.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdraft.backend import default_chunk, platform
from jaxdraft.errors import ConfigError
from jaxdraft.losses.acceptance import agreement, overlap
from jaxdraft.losses.base import Loss
from jaxdraft.losses.divergences import label_log_prob
from jaxdraft.losses.targets import DenseTarget, StoredTarget, Target, bucketed, log_probs, places, wide


class Positions(NamedTuple):
    """What is known at N positions, all of it constant.

    Attributes:
      labels_N: token ids.
      weights_N: 0 where a position does not count.
      target_hidden_NE: the target's hidden states, for a target in the loop.
      stored: ``(ids_NK, log_probs_NS)``, what was stored of the target's distribution at the loss's temperature: its
        K most likely tokens, then log-probabilities of these, of the label, and of everything else.
      draw_ids_N: integers that name each position's randomness, for a loss that draws.
    """

    labels_N: jax.Array
    weights_N: jax.Array
    target_hidden_NE: jax.Array | None = None
    stored: tuple[jax.Array, jax.Array] | None = None
    draw_ids_N: jax.Array | None = None


class Shared(NamedTuple):
    """What all positions share, all of it constant.

    Attributes:
      target_head_EV: the target's output head, for a target in the loop.
      draft_ids_R: the draft vocabulary, ascending; ``None`` where the draft's head is as wide as the vocabulary.
      key: of all that is drawn, for a loss that draws.
      means: of the loss's statistics over the global batch, for a loss that has any.
    """

    target_head_EV: jax.Array | None = None
    draft_ids_R: jax.Array | None = None
    key: jax.Array | None = None
    means: Mapping[str, jax.Array] | None = None


class LossOutput(NamedTuple):
    """Sums over positions, each position times its weight: divide once, by the weight of the whole global batch.

    Attributes:
      sum: of the loss; the only part with a gradient.
      weight: of the weights.
      metrics: what the loss logs. With a target in the loop, ``acceptance`` (Σ min(p, q) at the loss's temperature);
        with stored log-probabilities, ``acceptance_low`` and ``acceptance_high``, between which it lies, without the
        tail's min(p, q) and with it; with either, ``agreement`` (same top token).
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def chunked(
    loss: Loss,
    draft_hidden_ND: jax.Array,
    draft_head_DR: jax.Array,
    positions: Positions,
    shared: Shared = Shared(),  # noqa: B008 (immutable)
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
      positions: labels, weights and target of each position. A loss that needs no target still reports ``acceptance``
        and ``agreement`` when it is given one.
      shared: what all positions share.
      chunk: positions that are multiplied with the heads at once; ``None`` takes ``default_chunk(V)``.

    Raises:
      ConfigError: the loss needs a target and none was given.
      ValueError: shapes that do not fit each other, or a loss that does not return one number per position.
    """
    size, shared = _checked(loss, draft_hidden_ND, draft_head_DR, positions, shared, chunk)
    _check_means(loss, shared)
    head_DR = draft_head_DR + _zero_like_rows(positions.labels_N, draft_head_DR.dtype)
    total, metrics = _sums(loss, size, draft_hidden_ND, head_DR, positions, shared)
    return LossOutput(total, jnp.sum(positions.weights_N), metrics)


def per_position(
    loss: Loss,
    draft_hidden_ND: jax.Array,
    draft_head_DR: jax.Array,
    positions: Positions,
    shared: Shared,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss at every position, ``[N]``, and what is logged there: for any reduction of them.

    Differentiable like any JAX function with respect to ``draft_hidden_ND`` and ``draft_head_DR``: each chunk's logits
    are computed again in the backward pass, four products of the draft head's size in all and two of the target's.
    Positions of weight 0 are 0, and have no gradient.

    Args:
      loss: what to compute at each position.
      draft_hidden_ND: the draft's hidden states.
      draft_head_DR: the draft's output head.
      positions: labels, weights (only whether they are 0 is read) and target of each position.
      shared: what all positions share.
      chunk: as in ``chunked``.

    Returns:
      The loss, and ``LossOutput``'s metrics at each position with ``log_prob``, the draft's of the label.

    Raises:
      ConfigError: the loss needs a target and none was given.
      ValueError: shapes that do not fit each other, or a loss that does not return one number per position.
    """
    size, shared = _checked(loss, draft_hidden_ND, draft_head_DR, positions, shared, chunk)
    _check_means(loss, shared)

    @jax.checkpoint
    def values(head_DR, hidden_CD, positions):
        head_DR = head_DR.astype(hidden_CD.dtype)
        return _in_pieces(rows_of, *_products(hidden_CD, head_DR, positions, shared))

    def rows_of(logits_CR, target_logits_CV, positions):
        counts_C = positions.weights_N != 0
        # Where the loss is not finite its gradient times 0 would be no number.
        logits_CR = jnp.where(counts_C[:, None], logits_CR, jax.lax.stop_gradient(logits_CR))
        logits_CR, target, labels_C, keys_C = _seen(loss, logits_CR, target_logits_CV, positions, shared)
        loss_C, logged = loss.logged_rows(logits_CR, target, labels_C, keys_C, shared.means)
        log_prob_C = label_log_prob(log_probs(logits_CR, loss.temperature), labels_C)
        logged = {**logged, **_metrics(loss, logits_CR, target), "log_prob": log_prob_C}
        counts = lambda x_C: jnp.where(counts_C, x_C, 0)
        return counts(loss_C), jax.tree.map(lambda x_C: counts(jax.lax.stop_gradient(x_C)), logged)

    head_DR = draft_head_DR + _zero_like_rows(positions.labels_N, draft_head_DR.dtype)
    rows = jax.tree.map(lambda x: _split(x, size), (draft_hidden_ND, positions))
    _, found = jax.lax.scan(lambda _, chunk: (None, values(head_DR, *chunk)), None, rows)
    return jax.tree.map(lambda x_KC: x_KC.reshape(-1)[: len(positions.labels_N)], found)


def batch_statistics(
    loss: Loss,
    draft_hidden_ND: jax.Array,
    draft_head_DR: jax.Array,
    positions: Positions,
    shared: Shared,
    chunk: int | None = None,
) -> dict[str, jax.Array]:
    """Weighted sums of a loss's statistics, without gradients: divided by the global weight they are its ``means``."""
    size, shared = _checked(loss, draft_hidden_ND, draft_head_DR, positions, shared, chunk)

    def values(logits_CR, target_logits_CV, positions):
        weights_C = positions.weights_N
        found = loss.batch_statistics(*_seen(loss, logits_CR, target_logits_CV, positions, shared))
        return {name: jnp.where(weights_C != 0, x_C, 0) * weights_C for name, x_C in found.items()}

    def add(_, rows):
        hidden_CD, positions = rows
        head_DR = draft_head_DR.astype(hidden_CD.dtype)
        return None, _in_pieces(values, *_products(hidden_CD, head_DR, positions, shared))

    rows = jax.tree.map(lambda x: _split(x, size), (jax.lax.stop_gradient(draft_hidden_ND), positions))
    return jax.tree.map(jnp.sum, jax.lax.scan(add, None, rows)[1])


def default_piece(vocabulary: int) -> int:
    """Positions whose logits a loss takes at once: 1 MiB of float32 logits and at least 8 on a CPU, elsewhere a whole
    default chunk's. A loss may hold ten times what it takes.
    """
    if platform() == "cpu":
        return max(8, 2**20 // (4 * vocabulary))
    return -(-default_chunk(vocabulary) // 8) * 8


def _checked(loss, hidden_ND, head_DR, positions, shared, chunk) -> tuple[int, Shared]:
    """Positions per chunk, and what they share with the target's head in the dtype of its hidden states."""
    N, R = hidden_ND.shape[0], head_DR.shape[1]
    labels_N, weights_N, target_hidden_NE, stored, draw_ids_N = positions
    target_head_EV, draft_ids_R = shared.target_head_EV, shared.draft_ids_R
    V = R
    if draft_ids_R is not None and draft_ids_R.shape != (R,):
        raise ValueError(f"draft_ids_R has shape {draft_ids_R.shape}, the draft's head {R} columns")
    if labels_N.shape != (N,) or weights_N.shape != (N,) or not N:
        raise ValueError(f"{N} rows of hidden states, labels {labels_N.shape}, weights {weights_N.shape}")
    if (target_hidden_NE is None) != (target_head_EV is None):
        raise ValueError("target_hidden_NE and target_head_EV go together")
    if loss.needs_target and target_hidden_NE is None and stored is None:
        raise ConfigError(f"{type(loss).__name__} compares the draft with a target, and no target was given")
    if loss.draws and (draw_ids_N is None or shared.key is None):
        raise ValueError(f"{type(loss).__name__} draws: give it a key, and an integer for each position")
    if stored is not None:
        ids_NK, log_probs_NS = stored
        if target_hidden_NE is not None:
            raise ValueError("give the target's hidden states or what was stored of it, not both")
        if ids_NK.shape[0] != N or log_probs_NS.shape != (N, ids_NK.shape[-1] + 2):
            raise ValueError(f"{N} rows of hidden states, stored {ids_NK.shape} ids, {log_probs_NS.shape} log_probs")
    if target_hidden_NE is not None:
        V = target_head_EV.shape[1]
        if target_hidden_NE.shape[0] != N or (draft_ids_R is None and V != R):
            target = target_hidden_NE.shape[0], V
            raise ValueError(f"draft and target differ in (rows, vocabulary): {N, R} and {target}")
        shared = shared._replace(target_head_EV=target_head_EV.astype(target_hidden_NE.dtype))
    return _chunk_size(N, chunk or default_chunk(V)), shared


def _check_means(loss, shared):
    if loss.has_statistics and shared.means is None:
        raise ValueError(f"{type(loss).__name__} needs means over the batch: those of batch_statistics / weight")


def _products(hidden_CD, head_DR, positions, shared):
    """(draft logits, target logits or None, positions without hidden states) of a chunk."""
    target_logits_CV = None
    if positions.target_hidden_NE is not None:
        target_logits_CV = _matmul(positions.target_hidden_NE, shared.target_head_EV)
    return _matmul(hidden_CD, head_DR), target_logits_CV, positions._replace(target_hidden_NE=None)


def _in_pieces(function, logits_CR, target_logits_CV, positions):
    """A function of rows of a chunk, a piece of them after another; differentiated, it is computed again."""
    rows = logits_CR, target_logits_CV, positions
    count, vocabulary = (logits_CR if target_logits_CV is None else target_logits_CV).shape
    largest = default_piece(vocabulary)
    if count <= largest:
        return function(*rows)
    pieces = jax.tree.map(lambda x: _split(x, _chunk_size(count, largest)), rows)
    found = jax.lax.map(lambda piece: jax.checkpoint(function)(*piece), pieces)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _seen(loss, logits_CR, target_logits_CV, positions, shared):
    """(draft logits, target, labels, keys) of rows, as a loss takes them."""
    labels_C, _, _, stored, draw_ids_C = positions
    draft_ids_R = shared.draft_ids_R
    target: Target | None = None
    if stored is not None:
        ids_CK, log_q_CS = stored
        logits_CR, target, labels_C = bucketed(logits_CR, labels_C, ids_CK, log_q_CS, loss.temperature, draft_ids_R)
    else:
        if target_logits_CV is not None:
            target = DenseTarget(target_logits_CV, draft_ids_R)
        if draft_ids_R is not None:
            labels_C = places(labels_C, draft_ids_R)
    keys_C = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(shared.key, draw_ids_C) if loss.draws else None
    return logits_CR, target, labels_C, keys_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(loss, chunk, hidden_ND, head_DR, positions, shared):
    return _scan(loss, chunk, hidden_ND, head_DR, positions, shared, differentiate=False)[0]


def _sums_forward(loss, chunk, hidden_ND, head_DR, positions, shared):
    return _scan(loss, chunk, hidden_ND, head_DR, positions, shared, differentiate=True)


def _sums_backward(loss, chunk, grads, cotangents):
    g, _ = cotangents
    return *(((g * grad).astype(grad.dtype)) for grad in grads), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _scan(loss, chunk, hidden_ND, head_DR, positions, shared, differentiate):
    """((sum, metrics), (hidden gradient, head gradient) or None), one chunk of rows after another."""
    compute_head_DR = head_DR.astype(hidden_ND.dtype)

    def values(logits_CR, target_logits_CV, positions):
        weights_C = positions.weights_N
        counts_C = weights_C != 0

        def weighted(logits_CR):
            seen_CV, target, labels_C, keys_C = _seen(loss, logits_CR, target_logits_CV, positions, shared)
            loss_C, logged = loss.logged_rows(seen_CV, target, labels_C, keys_C, shared.means)
            logged = {**logged, **_metrics(loss, seen_CV, target)}
            return jnp.where(counts_C, loss_C, 0) * weights_C, logged

        grad_CR = None
        if differentiate:
            loss_C, pullback, logged = jax.vjp(weighted, logits_CR, has_aux=True)
            (grad_CR,) = pullback(jnp.ones_like(loss_C))
            grad_CR = jnp.where(counts_C[:, None], grad_CR, 0).astype(hidden_ND.dtype)
        else:
            loss_C, logged = weighted(logits_CR)
        logged = {name: jnp.where(counts_C, value_C, 0) * weights_C for name, value_C in logged.items()}
        return loss_C, logged, grad_CR

    def step(head_grad_DR, rows):
        hidden_CD, positions = rows
        products = _products(hidden_CD, compute_head_DR, positions, shared)
        loss_C, logged, grad_CR = _in_pieces(values, *products)
        hidden_grad_CD = None
        if differentiate:
            hidden_grad_CD = _matmul(grad_CR, compute_head_DR.T).astype(hidden_CD.dtype)
            head_grad_DR += _matmul(hidden_CD.T, grad_CR)
        return head_grad_DR, (loss_C, logged, hidden_grad_CD)

    rows = jax.tree.map(lambda x: _split(x, chunk), (hidden_ND, positions))
    start: Any = None
    if differentiate:
        start = jnp.zeros(head_DR.shape, wide(head_DR.dtype))
        start += _zero_like_rows(positions.labels_N, start.dtype)
    head_grad_DR, (loss_KC, logged_KC, hidden_grad_KCD) = jax.lax.scan(step, start, rows)
    sums = jnp.sum(loss_KC), jax.tree.map(jnp.sum, logged_KC)
    if not differentiate:
        return sums, None
    hidden_grad_ND = hidden_grad_KCD.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return sums, (hidden_grad_ND, head_grad_DR.astype(head_DR.dtype))


def _metrics(loss, logits_CV, target):
    if target is None:
        return {}
    log_p_CV, log_q_CV = log_probs(logits_CV, loss.temperature), target.log_probs(loss.temperature)
    if isinstance(target, StoredTarget):
        low_C, high_C = overlap(log_p_CV[:, :-1], log_q_CV[:, :-1]), overlap(log_p_CV, log_q_CV)
        return {"acceptance_low": low_C, "acceptance_high": high_C, "agreement": target.agrees_C.astype(jnp.float32)}
    return {"acceptance": overlap(log_p_CV, log_q_CV), "agreement": agreement(logits_CV, *target)}


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
    return jnp.matmul(a, b, preferred_element_type=wide(a.dtype))
