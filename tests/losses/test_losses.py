"""Every loss against its closed-form gradient, and where p or q is extreme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import KL, TVD, CrossEntropy, DenseTarget, TVDPlusPlus, agreement, log_probs, overlap

C, V = 12, 60
LOSSES = [CrossEntropy, KL, TVD, TVDPlusPlus]


def example(dtype=np.float64):
    rng = np.random.default_rng(0)
    draft_CV, target_CV = (3 * rng.standard_normal((C, V)) for _ in range(2))
    return draft_CV.astype(dtype), target_CV.astype(dtype), rng.integers(0, V, C)


def softmax(logits_CV, temperature):
    scaled_CV = logits_CV / temperature
    exp_CV = np.exp(scaled_CV - scaled_CV.max(-1, keepdims=True))
    return exp_CV / exp_CV.sum(-1, keepdims=True)


def closed_form(kind, draft_CV, target_CV, labels_C, temperature):
    """(value, gradient with respect to the logits), in numpy, from the formulas of the docstrings."""
    p, q = softmax(draft_CV, temperature), softmax(target_CV, temperature)
    label = np.eye(V)[labels_C]
    tvd = 0.5 * np.abs(p - q).sum(-1)
    r = q > p
    A = (p * r).sum(-1, keepdims=True)
    value, grad = {
        CrossEntropy: (-np.log((p * label).sum(-1)), p - label),
        KL: ((q * np.log(q / p)).sum(-1), p - q),
        TVD: (tvd, -p * (r - A)),
        TVDPlusPlus: (tvd, -p * (r - A) / np.sqrt(A * (1 - A))),
    }[kind]
    return value, grad / temperature


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(loss, draft_CV, target_CV, labels_C):
    def total(draft_CV):
        loss_C = loss.rows(draft_CV, DenseTarget(target_CV), labels_C)
        return jnp.sum(loss_C), loss_C

    (_, loss_C), grad_CV = jax.value_and_grad(total, has_aux=True)(draft_CV)
    return loss_C, grad_CV


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_equal_the_closed_form(kind, temperature):
    for dtype, tolerance in (np.float32, 1e-5), (np.float64, 1e-10):
        with jax.enable_x64(dtype == np.float64):
            draft_CV, target_CV, labels_C = example(dtype)
            loss_C, grad_CV = value_and_grad(kind(temperature), draft_CV, target_CV, labels_C)
            expected_C, expected_CV = closed_form(kind, *example(), temperature)
            assert loss_C.dtype == grad_CV.dtype == dtype
            np.testing.assert_allclose(loss_C, expected_C, rtol=tolerance)
            np.testing.assert_allclose(grad_CV, expected_CV, rtol=0, atol=tolerance * np.abs(expected_CV).max())


@pytest.mark.parametrize("kind", LOSSES)
def test_a_draft_vocabulary_counts_the_targets_mass_outside_as_lost(kind):
    ids_R, temperature = np.asarray([0, 2, 3, *range(20, 50)]), 0.7
    draft_CV, target_CV, _ = example()
    p, q = softmax(draft_CV[:, ids_R], temperature), softmax(target_CV, temperature)
    labels_C = np.arange(C) - 1  # the first is outside: -1
    label = np.arange(len(ids_R)) == labels_C[:, None]
    q_R = q[:, ids_R]
    mass = q_R.sum(-1, keepdims=True)
    r = q_R > p
    A = (p * r).sum(-1, keepdims=True)
    tvd = 0.5 * (np.abs(p - q_R).sum(-1) + 1 - mass[:, 0])
    expected_C, expected_CR = {
        CrossEntropy: (-(np.log(p) * label).sum(-1), np.where(labels_C[:, None] < 0, 0, p - label)),
        KL: ((q_R * np.log(q_R / p)).sum(-1), mass * p - q_R),
        TVD: (tvd, -p * (r - A)),
        TVDPlusPlus: (tvd, -p * (r - A) / np.sqrt(A * (1 - A))),
    }[kind]
    with jax.enable_x64(True):
        draft_CR, ids = jnp.asarray(draft_CV[:, ids_R]), jnp.asarray(ids_R)
        rows = lambda draft_CR: kind(temperature).rows(draft_CR, DenseTarget(jnp.asarray(target_CV), ids), labels_C)
        loss_C, pullback = jax.vjp(rows, draft_CR)
        (grad_CR,) = pullback(jnp.ones(C))
    np.testing.assert_allclose(loss_C, expected_C, rtol=1e-10)
    np.testing.assert_allclose(grad_CR, expected_CR / temperature, rtol=0, atol=1e-10)


def test_gradient_norms_of_the_docstrings():
    draft_CV, target_CV, labels_C = example(np.float32)
    p_CV, q_CV = softmax(draft_CV, 1), softmax(target_CV, 1)
    A_C = (p_CV * (q_CV > p_CV)).sum(-1)
    norms = {kind: np.abs(value_and_grad(kind(), draft_CV, target_CV, labels_C)[1]).sum(-1) for kind in LOSSES}
    np.testing.assert_allclose(norms[TVD], 2 * A_C * (1 - A_C), rtol=1e-4)
    np.testing.assert_allclose(norms[TVDPlusPlus], 2 * np.sqrt(A_C * (1 - A_C)), rtol=1e-4)


@pytest.mark.parametrize("kind", [KL, TVD, TVDPlusPlus])
def test_descending_the_gradient_raises_acceptance(kind):
    draft_CV, target_CV, labels_C = example(np.float32)
    accepted = lambda draft_CV: float(jnp.mean(overlap(log_probs(draft_CV), log_probs(target_CV))))
    before = accepted(draft_CV)
    for _ in range(20):
        draft_CV = draft_CV - value_and_grad(kind(), draft_CV, target_CV, labels_C)[1]
    assert accepted(draft_CV) > before + 0.05


@pytest.mark.parametrize("kind", LOSSES)
def test_draft_equal_to_target(kind):
    draft_CV, _, labels_C = example(np.float32)
    loss_C, grad_CV = value_and_grad(kind(), draft_CV, draft_CV, labels_C)
    assert np.isfinite(loss_C).all()
    assert np.isfinite(grad_CV).all()
    if kind.needs_target:
        np.testing.assert_allclose(loss_C, 0, atol=1e-6)
        np.testing.assert_allclose(grad_CV, 0, atol=1e-6)


@pytest.mark.parametrize("gap", [30.0, 500.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_no_overlap(kind, gap):
    side_CV = np.broadcast_to(np.where(np.arange(V) < V // 2, gap, -gap), (C, V)).astype(np.float32)
    loss_C, grad_CV = value_and_grad(kind(), side_CV, -side_CV, np.full(C, V - 1))
    assert np.isfinite(loss_C).all()
    assert np.isfinite(grad_CV).all()
    if kind in (TVD, TVDPlusPlus):
        np.testing.assert_allclose(loss_C, 1, rtol=1e-6)
    else:
        assert np.abs(grad_CV).max() > 1e-2


@pytest.mark.parametrize("kind", LOSSES)
def test_padded_vocabulary_columns_change_nothing(kind):
    draft_CV, target_CV, labels_C = example(np.float32)
    pad = lambda logits_CV: np.pad(logits_CV, ((0, 0), (0, 4)), constant_values=-np.inf)
    loss_C, grad_CV = value_and_grad(kind(), draft_CV, target_CV, labels_C)
    padded_loss_C, padded_grad_CV = value_and_grad(kind(), pad(draft_CV), pad(target_CV), labels_C)
    np.testing.assert_allclose(padded_loss_C, loss_C, rtol=1e-6)
    np.testing.assert_allclose(padded_grad_CV[:, :V], grad_CV, rtol=1e-4, atol=1e-7)
    assert (padded_grad_CV[:, V:] == 0).all()


def test_half_precision_logits_are_compared_in_float32():
    draft_CV, target_CV, labels_C = example(np.float32)
    draft_CV, target_CV = draft_CV.astype(jnp.bfloat16), target_CV.astype(jnp.bfloat16)
    loss_C, _ = value_and_grad(TVDPlusPlus(), draft_CV, target_CV, labels_C)
    expected_C, _ = value_and_grad(TVDPlusPlus(), *(x.astype(np.float32) for x in (draft_CV, target_CV)), labels_C)
    assert loss_C.dtype == jnp.float32
    np.testing.assert_array_equal(loss_C, expected_C)


def test_overlap_is_one_minus_tvd():
    draft_CV, target_CV, labels_C = example(np.float32)
    p_CV, q_CV = softmax(draft_CV, 0.7), softmax(target_CV, 0.7)
    overlap_C = overlap(log_probs(draft_CV, 0.7), log_probs(target_CV, 0.7))
    np.testing.assert_allclose(overlap_C, np.minimum(p_CV, q_CV).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(overlap_C, 1 - value_and_grad(TVD(0.7), draft_CV, target_CV, labels_C)[0], atol=1e-6)


def test_agreement_is_the_same_top_token():
    draft_CV, target_CV, _ = example(np.float32)
    target_CV[::3] += 100 * np.eye(V, dtype=np.float32)[draft_CV[::3].argmax(-1)]
    expected_C = (draft_CV.argmax(-1) == target_CV.argmax(-1)).astype(np.float32)
    assert 0 < expected_C.sum() < C
    np.testing.assert_array_equal(agreement(draft_CV, target_CV), expected_C)
    tied_CV = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(agreement(tied_CV, jnp.array([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]])), [1, 0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ConfigError, match="TVDPlusPlus: temperature must be positive"):
        TVDPlusPlus(temperature=temperature)


def test_agreement_with_a_draft_vocabulary_needs_the_targets_first_token_in_it():
    target_CV = np.asarray([[0.0, 3.0, 1.0, 2.0]] * 3)
    draft_CR = np.asarray([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    np.testing.assert_array_equal(agreement(draft_CR, target_CV, np.asarray([1, 3])), [1, 0, 1])
    np.testing.assert_array_equal(agreement(draft_CR, target_CV, np.asarray([2, 3])), [0, 0, 0])
