"""Every loss against its closed-form gradient, and where p or q is extreme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import (
    JSD,
    KL,
    TVD,
    CrossEntropy,
    DenseTarget,
    LKHybrid,
    LogAcceptance,
    Mixture,
    ReverseKL,
    TVDPlusPlus,
    TVDPlusPlusGlobal,
    TVDPlusPlusLiteral,
    TVDPlusPlusSampled,
    agreement,
    log_probs,
    overlap,
    parts,
)

C, V = 12, 60


def losses(temperature=1.0):
    mixed = (0.5, CrossEntropy(temperature)), (0.25, KL(temperature)), (2.0, TVDPlusPlusLiteral(temperature))
    return [
        CrossEntropy(temperature),
        KL(temperature),
        ReverseKL(temperature),
        JSD(temperature),
        JSD(temperature, beta=0.2),
        TVD(temperature),
        TVDPlusPlus(temperature),
        TVDPlusPlusGlobal(temperature),
        TVDPlusPlusLiteral(temperature),
        TVDPlusPlusSampled(temperature),
        LogAcceptance(temperature),
        LKHybrid(temperature),
        Mixture(temperature, terms=mixed),
    ]


every_loss = pytest.mark.parametrize("loss", losses(), ids=lambda loss: type(loss).__name__)


def example(dtype=np.float64):
    rng = np.random.default_rng(0)
    draft_CV, other_CV = (3 * rng.standard_normal((C, V)) for _ in range(2))
    target_CV = 0.6 * draft_CV + 0.6 * other_CV
    return draft_CV.astype(dtype), target_CV.astype(dtype), rng.integers(0, V, C)


def softmax(logits_CV, temperature):
    scaled_CV = logits_CV / temperature
    exp_CV = np.exp(scaled_CV - scaled_CV.max(-1, keepdims=True))
    return exp_CV / exp_CV.sum(-1, keepdims=True)


def keys():
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(7), jnp.arange(C))


def drawn(p_CV, dtype):
    """The tokens that TVDPlusPlusSampled draws: Gumbel-argmax with one key per position."""
    noise_CV = jax.vmap(lambda key: jax.random.gumbel(key, p_CV.shape[1:], dtype))(keys())
    return np.argmax(np.log(p_CV) + np.asarray(noise_CV), -1)


def kl(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * np.log(a / b), 0).sum(-1, keepdims=True)


def closed_form(loss, p, q, is_label, dtype=np.float64, outside=0.0):
    """(value, gradient with respect to z/T), in numpy, from the formulas of the docstrings."""
    columns = p.shape[-1]
    r = q > p
    A, m = (p * r).sum(-1, keepdims=True), r.mean(-1, keepdims=True)
    tvd = 0.5 * (np.abs(p - q).sum(-1, keepdims=True) + outside)
    grad_tvd, alpha = -p * (r - A), np.minimum(p, q).sum(-1, keepdims=True)
    sigma = lambda mean: np.sqrt(mean * (1 - mean))
    known = is_label.any(-1, keepdims=True)
    if isinstance(loss, CrossEntropy):
        value, grad = -(np.log(p) * is_label).sum(-1, keepdims=True), np.where(known, p - is_label, 0)
    elif isinstance(loss, KL):
        value, grad = kl(q, p), q.sum(-1, keepdims=True) * p - q
    elif isinstance(loss, ReverseKL):
        value, grad = kl(p, q), p * (np.log(p / q) - kl(p, q))
    elif isinstance(loss, JSD):
        mixed = loss.beta * q + (1 - loss.beta) * p
        value = loss.beta * (kl(q, mixed) - outside * np.log(loss.beta)) + (1 - loss.beta) * kl(p, mixed)
        mass = (p * np.log(p / mixed)).sum(-1, keepdims=True)
        grad = (1 - loss.beta) * p * (np.log(p / mixed) - mass)
    elif isinstance(loss, TVD):
        value, grad = tvd, grad_tvd
    elif isinstance(loss, TVDPlusPlus):
        value, grad = tvd, grad_tvd / sigma(A)
    elif isinstance(loss, TVDPlusPlusGlobal):
        value, grad = tvd, grad_tvd / sigma(A.mean())
    elif isinstance(loss, TVDPlusPlusLiteral):
        mu = m.mean()
        value, grad = tvd, -((r - mu) - p * columns * (m - mu)) / (columns * sigma(mu))
    elif isinstance(loss, TVDPlusPlusSampled):
        token = np.eye(columns)[drawn(p, dtype)]
        reward = (token * r).sum(-1, keepdims=True)
        assert 0 < reward.mean() < 1
        value, grad = tvd, -(reward - reward.mean()) / sigma(reward.mean()) * (token - p)
    elif isinstance(loss, LogAcceptance):
        value, grad = -np.log(alpha), grad_tvd / alpha
    elif isinstance(loss, LKHybrid):
        share = np.exp(-loss.eta * alpha)
        value = share * kl(q, p) + (1 - share) * tvd
        grad = share * (q.sum(-1, keepdims=True) * p - q) + (1 - share) * grad_tvd
    else:
        terms = [(w, *closed_form(term, p, q, is_label, dtype, outside)) for w, term in loss.terms]
        return sum(w * value for w, value, _ in terms), sum(w * grad for w, _, grad in terms)
    return value[:, 0], grad


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(loss, draft_CV, target_CV, labels_C, draft_ids_R=None):
    target = DenseTarget(target_CV, draft_ids_R)
    means = jax.tree.map(jnp.mean, loss.batch_statistics(draft_CV, target, labels_C, keys()))

    def total(draft_CV):
        loss_C, _ = loss.logged_rows(draft_CV, target, labels_C, keys(), means)
        return jnp.sum(loss_C), loss_C

    (_, loss_C), grad_CV = jax.value_and_grad(total, has_aux=True)(draft_CV)
    return loss_C, grad_CV


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("index", range(len(losses())), ids=[type(loss).__name__ for loss in losses()])
def test_value_and_gradient_equal_the_closed_form(index, temperature, dtype):
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    with jax.enable_x64(dtype == np.float64):
        loss = losses(temperature)[index]
        loss_C, grad_CV = value_and_grad(loss, *example(dtype))
        draft_CV, target_CV, labels_C = example()
        p, q = softmax(draft_CV, temperature), softmax(target_CV, temperature)
        expected_C, expected_CV = closed_form(loss, p, q, np.eye(V)[labels_C], dtype)
        assert loss_C.dtype == grad_CV.dtype == dtype
        np.testing.assert_allclose(loss_C, expected_C, rtol=tolerance)
        expected_CV = expected_CV / temperature
        np.testing.assert_allclose(grad_CV, expected_CV, rtol=0, atol=tolerance * np.abs(expected_CV).max())


@every_loss
def test_a_draft_vocabulary_counts_the_targets_mass_outside_as_lost(loss):
    ids_R = np.asarray([0, 2, 3, *range(20, 50)])
    draft_CV, target_CV, _ = example()
    p, q = softmax(draft_CV[:, ids_R], 1), softmax(target_CV, 1)[:, ids_R]
    labels_C = np.arange(C) - 1  # the first is outside: -1
    is_label = np.arange(len(ids_R)) == labels_C[:, None]
    with jax.enable_x64(True):
        expected_C, expected_CR = closed_form(loss, p, q, is_label, outside=1 - q.sum(-1, keepdims=True))
        loss_C, grad_CR = value_and_grad(loss, draft_CV[:, ids_R], target_CV, labels_C, ids_R)
    np.testing.assert_allclose(loss_C, expected_C, rtol=1e-10)
    np.testing.assert_allclose(grad_CR, expected_CR, rtol=0, atol=1e-10)


def test_the_mean_does_not_matter_where_the_draft_is_summed_over():
    """Σ p ∇log p = 0: the μ of eq. (1) drops out of the expected readings."""
    draft_CV, target_CV, _ = example()
    p, q = softmax(draft_CV, 1), softmax(target_CV, 1)
    advantage = (q > p) - np.linspace(-3, 3, C)[:, None]  # any baseline
    grad = -p * (advantage - (p * advantage).sum(-1, keepdims=True))
    np.testing.assert_allclose(grad, closed_form(TVD(), p, q, np.eye(V)[:C])[1], atol=1e-15)


def test_the_sampled_reading_is_the_expected_one_on_average():
    """E[−(r_x − μ)(e_x − p)] = (1 − 1/n) ∇TVD with μ the mean over the same n draws, exactly, before σ."""
    draft_CV, target_CV, _ = example()
    n, v = 3, 4
    p, q = softmax(draft_CV[:n, :v], 1), softmax(target_CV[:n, :v], 1)
    r, mean = q > p, np.zeros((n, v))
    for tokens in np.ndindex(*(v,) * n):
        probability = np.prod([p[i, x] for i, x in enumerate(tokens)])
        reward = np.array([r[i, x] for i, x in enumerate(tokens)], float)
        mean += probability * -(reward - reward.mean())[:, None] * (np.eye(v)[list(tokens)] - p)
    expected = (1 - 1 / n) * closed_form(TVD(), p, q, np.eye(v)[:n])[1]
    np.testing.assert_allclose(mean, expected, atol=1e-15)


def test_the_terms_of_a_mixture_are_logged_without_their_weights():
    draft_CV, target_CV, labels_C = example(np.float32)
    mixture = Mixture(terms=((0.5, KL()), (0.25, LKHybrid()), (2.0, KL(0.5))))
    loss_C, logged = mixture.logged_rows(draft_CV, DenseTarget(target_CV), labels_C)
    alone = {"KL_1": KL(), "LKHybrid": LKHybrid(), "KL_2": KL(0.5)}
    for name, loss in alone.items():
        expected_C, _ = loss.logged_rows(draft_CV, DenseTarget(target_CV), labels_C)
        np.testing.assert_array_equal(logged[name], expected_C)
    assert set(logged) == {*alone, "LKHybrid.KL", "LKHybrid.TVD"}
    total_C = 0.5 * logged["KL_1"] + 0.25 * logged["LKHybrid"] + 2 * logged["KL_2"]
    np.testing.assert_allclose(loss_C, total_C, rtol=1e-6)
    assert parts(Mixture(terms=((1.0, mixture), (1.0, TVD())))) == (KL(), LKHybrid(), KL(0.5), TVD())


def test_gradient_norms_of_the_docstrings():
    draft_CV, target_CV, labels_C = example(np.float32)
    p_CV, q_CV = softmax(draft_CV, 1), softmax(target_CV, 1)
    A_C = (p_CV * (q_CV > p_CV)).sum(-1)
    norm = lambda loss: np.abs(value_and_grad(loss, draft_CV, target_CV, labels_C)[1]).sum(-1)
    norms = {kind: norm(kind()) for kind in (TVD, TVDPlusPlus)}
    np.testing.assert_allclose(norms[TVD], 2 * A_C * (1 - A_C), rtol=1e-4)
    np.testing.assert_allclose(norms[TVDPlusPlus], 2 * np.sqrt(A_C * (1 - A_C)), rtol=1e-4)


@pytest.mark.parametrize(
    "loss", [loss for loss in losses()[1:-1] if not loss.draws], ids=lambda loss: type(loss).__name__
)
def test_descending_the_gradient_raises_acceptance(loss):
    draft_CV, target_CV, labels_C = example(np.float32)
    accepted = lambda draft_CV: float(jnp.mean(overlap(log_probs(draft_CV), log_probs(target_CV))))
    before = accepted(draft_CV)
    for _ in range(20):
        draft_CV = draft_CV - value_and_grad(loss, draft_CV, target_CV, labels_C)[1]
    assert accepted(draft_CV) > before


@every_loss
def test_draft_equal_to_target(loss):
    draft_CV, _, labels_C = example(np.float32)
    loss_C, grad_CV = value_and_grad(loss, draft_CV, draft_CV, labels_C)
    assert np.isfinite(loss_C).all()
    assert np.isfinite(grad_CV).all()
    if all(part.needs_target and not isinstance(part, TVDPlusPlusLiteral) for part in parts(loss)):
        np.testing.assert_allclose(loss_C, 0, atol=1e-6)
        np.testing.assert_allclose(grad_CV, 0, atol=1e-6)


@pytest.mark.parametrize("gap", [30.0, 500.0])
@every_loss
def test_no_overlap(loss, gap):
    side_CV = np.broadcast_to(np.where(np.arange(V) < V // 2, gap, -gap), (C, V)).astype(np.float32)
    loss_C, grad_CV = value_and_grad(loss, side_CV, -side_CV, np.full(C, V - 1))
    assert np.isfinite(loss_C).all()
    assert np.isfinite(grad_CV).all()
    if isinstance(loss, TVD | TVDPlusPlus | TVDPlusPlusGlobal):
        np.testing.assert_allclose(loss_C, 1, rtol=1e-6)
    if isinstance(loss, CrossEntropy | KL | LogAcceptance | LKHybrid | Mixture):
        assert np.abs(grad_CV).max() > 1e-2


@pytest.mark.parametrize("loss", [loss for loss in losses() if not loss.draws], ids=lambda loss: type(loss).__name__)
def test_padded_vocabulary_columns_change_nothing(loss):
    draft_CV, target_CV, labels_C = example(np.float32)
    pad = lambda logits_CV: np.pad(logits_CV, ((0, 0), (0, 4)), constant_values=-np.inf)
    loss_C, grad_CV = value_and_grad(loss, draft_CV, target_CV, labels_C)
    padded_loss_C, padded_grad_CV = value_and_grad(loss, pad(draft_CV), pad(target_CV), labels_C)
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


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ConfigError, match="TVDPlusPlus: temperature must be positive"):
        TVDPlusPlus(temperature=temperature)


def test_agreement_with_a_draft_vocabulary_needs_the_targets_first_token_in_it():
    target_CV = np.asarray([[0.0, 3.0, 1.0, 2.0]] * 3)
    draft_CR = np.asarray([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]])
    np.testing.assert_array_equal(agreement(draft_CR, target_CV, np.asarray([1, 3])), [1, 0, 1])
    np.testing.assert_array_equal(agreement(draft_CR, target_CV, np.asarray([2, 3])), [0, 0, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JSD(beta=1.0), "JSD: beta must lie between 0 and 1"),
        (lambda: LKHybrid(eta=-1.0), "LKHybrid: eta must not be negative"),
        (Mixture, "Mixture: give terms"),
        (lambda: Mixture(0.6, terms=((1.0, TVD()),)), r"Mixture: temperature is 0\.6, .* its terms have 1"),
    ],
)
def test_settings_that_make_no_loss(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
