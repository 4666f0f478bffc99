"""Stored targets: the same losses on the few columns that were stored, and what lies between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import (
    KL,
    TVD,
    DenseTarget,
    Positions,
    ReverseKL,
    Shared,
    TVDPlusPlus,
    bucketed,
    chunked,
    log_probs,
    per_position,
)
from tests.losses.test_losses import every_loss, softmax, value_and_grad

N, D, V, K = 40, 8, 30, 6
DRAFT_IDS = np.asarray([0, 1, 2, 3, 5, 8, *range(12, 28)])


def stored(q_NV, labels_N, k):
    """(ids, log-probabilities) as LOSSES.md defines them, from full probabilities."""
    ids_NK = np.argsort(-q_NV, axis=-1, kind="stable")[:, :k]
    rest_NV = q_NV.copy()
    np.put_along_axis(rest_NV, ids_NK, 0, axis=-1)
    np.put_along_axis(rest_NV, labels_N[:, None], 0, axis=-1)
    top_NK = np.take_along_axis(q_NV, ids_NK, axis=-1)
    label_N1 = np.take_along_axis(q_NV, labels_N[:, None], axis=-1)
    with np.errstate(divide="ignore"):
        return ids_NK, np.log(np.concatenate([top_NK, label_N1, rest_NV.sum(-1, keepdims=True)], -1))


def example():
    rng = np.random.default_rng(3)
    hidden_ND, head_DV = rng.standard_normal((N, D)), rng.standard_normal((D, V))
    target_NV = hidden_ND @ head_DV + rng.standard_normal((N, V))
    labels_N = rng.integers(0, V, N)
    labels_N[::2] = target_NV[::2].argmax(-1)  # among the K
    return hidden_ND, head_DV, target_NV, labels_N


def merged(p_NV, ids_NK, labels_N, draft_ids=None):
    """Probabilities of the S columns, summed in numpy; of a token that the draft cannot propose, 0."""
    known = np.isin(np.arange(p_NV.shape[-1]), np.arange(V) if draft_ids is None else draft_ids)
    out = np.zeros((len(p_NV), ids_NK.shape[1] + 2))
    for row, (p_V, ids_K, label) in enumerate(zip(p_NV, ids_NK, labels_N, strict=True)):
        own = [*ids_K, *([] if label in ids_K else [label])]
        for column, token in enumerate(own):
            out[row, column] = p_V[token] if known[token] else 0
        out[row, -1] = p_V[~np.isin(np.arange(len(p_V)), own)].sum()
    return out


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["whole", "draft vocabulary"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_columns_hold_the_draft_and_the_target_exactly(draft_ids, temperature):
    hidden_ND, head_DV, target_NV, labels_N = example()
    ids_NK, log_q_NS = stored(softmax(target_NV, temperature), labels_N, K)
    with jax.enable_x64(True):
        logits_NR = jnp.asarray((hidden_ND @ head_DV)[:, slice(None) if draft_ids is None else draft_ids])
        ids = None if draft_ids is None else jnp.asarray(draft_ids)
        draft_NS, target, column_N = bucketed(logits_NR, labels_N, ids_NK, log_q_NS, temperature, ids)
        p_NS, q_NS = np.exp(log_probs(draft_NS, temperature)), np.exp(target.log_probs())
    p_NV = np.zeros((N, V))
    p_NV[:, slice(None) if draft_ids is None else draft_ids] = softmax(np.asarray(logits_NR), temperature)
    np.testing.assert_allclose(p_NS, merged(p_NV, ids_NK, labels_N, draft_ids), rtol=1e-12, atol=1e-15)
    expected_NS = merged(softmax(target_NV, temperature), ids_NK, labels_N, draft_ids)
    np.testing.assert_allclose(q_NS, expected_NS, rtol=1e-12, atol=1e-15)
    known = np.isin(labels_N, np.arange(V) if draft_ids is None else draft_ids)
    np.testing.assert_array_equal(column_N >= 0, known)
    p_label_N = p_NS[np.arange(N), column_N]
    np.testing.assert_allclose(p_label_N[known], p_NV[np.arange(N), labels_N][known], rtol=1e-12)
    assert target.is_partial == (draft_ids is not None)
    place = {token: i for i, token in enumerate(range(V) if draft_ids is None else draft_ids.tolist())}
    agrees = [place.get(int(ids_K[0])) == z.argmax() for ids_K, z in zip(ids_NK, np.asarray(logits_NR), strict=True)]
    np.testing.assert_array_equal(target.agrees_C, agrees)
    assert 0 < sum(agrees) < N


@every_loss
def test_everything_stored_is_everything(loss):
    """With K = V − 1 each column holds one token: value and gradient are those of the full distribution."""
    if loss.draws:
        pytest.skip("the same draw falls on another column")
    from tests.losses.test_losses import C, example

    draft_CV, target_CV, labels_C = example()
    columns = draft_CV.shape[1]
    ids_CK, log_q_CS = stored(softmax(target_CV, 1), labels_C, columns - 1)
    with jax.enable_x64(True):
        expected = value_and_grad(loss, draft_CV, target_CV, labels_C)

        def rows(draft_CV):
            draft_CS, target, column_C = bucketed(draft_CV, labels_C, ids_CK, log_q_CS, 1.0)
            found = loss.batch_statistics(draft_CS, target, column_C)
            means = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.mean(x)), found)
            return loss.logged_rows(draft_CS, target, column_C, None, means)[0]

        loss_C, pullback = jax.vjp(rows, jnp.asarray(draft_CV))
        (grad_CV,) = pullback(jnp.ones(C))
    np.testing.assert_allclose(loss_C, expected[0], rtol=1e-9)
    np.testing.assert_allclose(grad_CV, expected[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["whole", "draft vocabulary"])
@pytest.mark.parametrize("loss", [KL(), TVDPlusPlus(0.7)], ids=lambda loss: type(loss).__name__)
def test_chunked_equals_full_logits_with_garbage_where_nothing_counts(loss, draft_ids):
    hidden_ND, head_DV, target_NV, labels_N = (np.asarray(x, np.float32) for x in example())
    labels_N = labels_N.astype(np.int32)
    ids_NK, log_q_NS = stored(softmax(target_NV, loss.temperature), labels_N, K)
    weights_N = np.where(np.arange(N) % 3, 1.5, 0).astype(np.float32)
    columns = slice(None) if draft_ids is None else draft_ids
    head_DR, shared = head_DV[:, columns], Shared(draft_ids_R=None if draft_ids is None else jnp.asarray(draft_ids))

    def plain(hidden_ND, head_DR):
        draft_NS, target, column_N = bucketed(
            hidden_ND @ head_DR, labels_N, ids_NK, log_q_NS, loss.temperature, shared.draft_ids_R
        )
        return jnp.sum(loss.rows(draft_NS, target, column_N) * weights_N)

    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(hidden_ND, head_DR)
    dead_N = weights_N == 0
    given = np.where(dead_N[:, None], 65535, ids_NK), np.where(dead_N[:, None], -np.inf, log_q_NS)
    positions = Positions(np.where(dead_N, -100, labels_N), weights_N, stored=given)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def ours(hidden_ND, head_DR):
        output = chunked(loss, hidden_ND, head_DR, positions, shared, chunk=16)
        return output.sum, output

    (total, output), grads = jax.jit(ours)(np.where(dead_N[:, None], 1e30 * hidden_ND, hidden_ND), head_DR)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for x, y in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
    assert set(output.metrics) == {"acceptance_low", "acceptance_high", "agreement"}


def test_both_forms_agree_where_a_segment_ends():
    hidden_ND, head_DV, target_NV, labels_N = (np.asarray(x, np.float32) for x in example())
    labels_N = labels_N.astype(np.int32)
    ids_NK, log_q_NS = stored(softmax(target_NV, 1.0), labels_N, K)
    ends_N = np.arange(N) % 5 == 4
    log_q_NS[ends_N, K] = -np.inf  # no label: ReverseKL is infinite, and counts nothing
    positions = Positions(labels_N, np.where(ends_N, 0, 1).astype(np.float32), stored=(ids_NK, log_q_NS))
    once = lambda *inputs: chunked(ReverseKL(), *inputs, positions, Shared(), 16).sum
    each = lambda *inputs: per_position(ReverseKL(), *inputs, positions, Shared(), 16)[0].sum()
    found, expected = (jax.jit(jax.value_and_grad(form, (0, 1)))(hidden_ND, head_DV) for form in (each, once))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("k", [2, 8, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_acceptance_lies_in_the_bracket(k, dtype):
    """Σ_K min ≤ α ≤ Σ_K min + min(tails); float16 moves a probability by 2⁻¹¹ × log q ≤ 1 % here."""
    hidden_ND, head_DV, target_NV, labels_N = (np.asarray(x, np.float32) for x in example())
    labels_N = labels_N.astype(np.int32)
    positions = Positions(labels_N, np.ones(N, np.float32), stored=stored(softmax(target_NV, 1), labels_N, k))
    positions = positions._replace(stored=(positions.stored[0], positions.stored[1].astype(dtype)))
    found = chunked(TVD(), hidden_ND, head_DV, positions, chunk=16).metrics
    alpha = np.minimum(softmax(hidden_ND @ head_DV, 1), softmax(target_NV, 1)).sum()
    slack = 0.01 * N if dtype == np.float16 else 1e-4
    assert found["acceptance_low"] - slack <= alpha <= found["acceptance_high"] + slack
    assert k < 20 or found["acceptance_high"] - found["acceptance_low"] < 0.05 * N


def test_what_is_stored_has_to_fit():
    hidden_ND, head_DV, target_NV, labels_N = example()
    ids_NK, log_q_NS = stored(softmax(target_NV, 1), labels_N, K)
    positions = Positions(labels_N, np.ones(N), stored=(ids_NK, log_q_NS[:, :-1]))
    with pytest.raises(ValueError, match=r"stored \(40, 6\) ids, \(40, 7\) log_probs"):
        chunked(KL(), hidden_ND, head_DV, positions)
    both = Positions(labels_N, np.ones(N), hidden_ND, (ids_NK, log_q_NS))
    with pytest.raises(ValueError, match="not both"):
        chunked(KL(), hidden_ND, head_DV, both, Shared(head_DV))
    with pytest.raises(ConfigError, match="no target was given"):
        chunked(KL(), hidden_ND, head_DV, Positions(labels_N, np.ones(N)))


def test_a_dense_target_knows_whether_the_draft_can_say_all():
    logits_NV = jnp.zeros((2, 4))
    assert not DenseTarget(logits_NV).is_partial
    assert DenseTarget(logits_NV, jnp.asarray([1, 2])).is_partial
