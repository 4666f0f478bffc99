"""The per-position form of the engine, and weights that are made from it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import (
    DPACE,
    KL,
    TVD,
    AdaSPEC,
    CrossEntropy,
    DenseTarget,
    LKHybrid,
    Mixture,
    Positions,
    Shared,
    TVDPlusPlusLiteral,
    TVDPlusPlusSampled,
    batch_statistics,
    chunked,
    log_probs,
    per_position,
    weighted,
)

B, T, D, V = 4, 11, 6, 40
N = B * T


def example():
    rng = np.random.default_rng(5)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    weights_N = np.where(rng.random(N) < 0.25, 0, rng.integers(1, 3, N)).astype(np.float32)
    positions = Positions(rng.integers(0, V, N), weights_N, normal(N, D))
    return normal(N, D), normal(D, V), positions, Shared(normal(D, V))


def naive_rows(loss, hidden_ND, head_DV, positions, shared, means=None):
    target = DenseTarget(positions.target_hidden_NE @ shared.target_head_EV)
    return jnp.where(
        positions.weights_N != 0,
        loss.logged_rows(hidden_ND @ head_DV, target, positions.labels_N, None, means)[0],
        0,
    )


@pytest.mark.parametrize("loss", [CrossEntropy(), KL(0.7), LKHybrid()], ids=lambda loss: type(loss).__name__)
def test_the_loss_at_every_position_for_any_reduction(loss):
    hidden_ND, head_DV, positions, shared = example()
    square = lambda loss_N: jnp.sum(jnp.square(loss_N) * jnp.arange(N))
    ours = lambda hidden_ND, head_DV: square(per_position(loss, hidden_ND, head_DV, positions, shared, 16)[0])
    plain = lambda hidden_ND, head_DV: square(naive_rows(loss, hidden_ND, head_DV, positions, shared))
    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden_ND, head_DV) for f in (ours, plain))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def test_both_forms_give_the_same_sums():
    hidden_ND, head_DV, positions, shared = example()
    output = chunked(LKHybrid(), hidden_ND, head_DV, positions, shared, 16)
    loss_N, logged = per_position(LKHybrid(), hidden_ND, head_DV, positions, shared, 16)
    np.testing.assert_allclose(jnp.sum(loss_N * positions.weights_N), output.sum, rtol=1e-5)
    log_p_N = log_probs(hidden_ND @ head_DV)[np.arange(N), positions.labels_N]
    np.testing.assert_allclose(logged.pop("log_prob"), np.where(positions.weights_N, log_p_N, 0), rtol=1e-4)
    assert set(logged) == set(output.metrics) == {"KL", "TVD", "acceptance", "agreement"}
    for name, value_N in logged.items():
        np.testing.assert_allclose(jnp.sum(value_N * positions.weights_N), output.metrics[name], rtol=1e-5)


def test_statistics_are_sums_over_what_counts():
    hidden_ND, head_DV, positions, shared = example()
    loss = Mixture(terms=((1.0, TVDPlusPlusLiteral()), (0.5, KL())))
    found = batch_statistics(loss, hidden_ND, head_DV, positions, shared, 16)
    log_p, log_q = log_probs(hidden_ND @ head_DV), log_probs(positions.target_hidden_NE @ shared.target_head_EV)
    expected = jnp.sum(jnp.mean(log_q > log_p, -1) * positions.weights_N)
    assert set(found) == {"TVDPlusPlusLiteral.reward"}
    np.testing.assert_allclose(found["TVDPlusPlusLiteral.reward"], expected, rtol=1e-5)

    means = {name: total / positions.weights_N.sum() for name, total in found.items()}
    output = chunked(loss, hidden_ND, head_DV, positions, shared._replace(means=means), 16)
    loss_N = naive_rows(loss, hidden_ND, head_DV, positions, shared, means)
    np.testing.assert_allclose(output.sum, jnp.sum(loss_N * positions.weights_N), rtol=1e-5)


def test_what_a_loss_takes_besides_has_to_be_given():
    hidden_ND, head_DV, positions, shared = example()
    with pytest.raises(ValueError, match="TVDPlusPlusLiteral needs means over the batch"):
        chunked(TVDPlusPlusLiteral(), hidden_ND, head_DV, positions, shared)
    with pytest.raises(ValueError, match="TVDPlusPlusSampled draws"):
        batch_statistics(TVDPlusPlusSampled(), hidden_ND, head_DV, positions, shared)
    with pytest.raises(ConfigError, match="KL has weights of its own"):
        Mixture(terms=((1.0, KL(weights=DPACE())),))


def test_draws_are_named_by_position_and_not_by_chunk():
    hidden_ND, head_DV, positions, shared = example()
    key = jax.random.key(3)
    positions = positions._replace(draw_ids_N=jnp.arange(N))
    shared = shared._replace(key=key, means={"reward": jnp.float32(0.4)})
    loss = TVDPlusPlusSampled()
    rows = [per_position(loss, hidden_ND, head_DV, positions, shared, size) for size in (8, 24)]
    grads = [
        jax.grad(lambda h, size=size: chunked(loss, h, head_DV, positions, shared, size).sum)(hidden_ND)
        for size in (8, 24)
    ]
    np.testing.assert_allclose(rows[0][0], rows[1][0], rtol=1e-5)
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-5)
    shared = shared._replace(key=jax.random.key(4))
    other = jax.grad(lambda h: chunked(loss, h, head_DV, positions, shared, 8).sum)(hidden_ND)
    assert np.abs(other - grads[0]).max() > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpace_is_the_mean_over_blocks(alpha):
    rng = np.random.default_rng(1)
    weights_BT = (rng.random((B, T)) < 0.8).astype(np.float32) * 2
    log_prob_BT = np.log(rng.random((B, T))).astype(np.float32)
    found = DPACE(block_size=3, alpha=alpha)({"log_prob": log_prob_BT}, jnp.asarray(weights_BT))
    expected = np.zeros((B, T))
    for b, j in itertools.product(range(B), range(T)):
        values = []
        for start in range(max(0, j - 2), j + 1):
            block = []
            for i in range(start, min(start + 3, T)):
                if not weights_BT[b, i]:
                    break
                block.append((1 - alpha) * np.exp(log_prob_BT[b, i]) + alpha)
            if j - start < len(block):
                values.append(sum(np.prod(block[: m + 1]) for m in range(j - start, len(block))))
        expected[b, j] = weights_BT[b, j] * np.mean(values) if values else 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_adaspec_keeps_the_largest_gaps_of_each_row(keep):
    rng = np.random.default_rng(2)
    weights_BT = (rng.random((B, T)) < 0.7).astype(np.float32)
    values = {name: rng.random((B, T)).astype(np.float32) for name in ("loss", "reference_loss")}
    found = np.asarray(AdaSPEC(keep=keep)(values, jnp.asarray(weights_BT)))
    for b in range(B):
        counted = np.flatnonzero(weights_BT[b])
        gaps = (values["loss"] - values["reference_loss"])[b, counted]
        kept = counted[np.argsort(-gaps)[: int(np.ceil(np.float32(keep) * len(counted)))]]
        np.testing.assert_array_equal(np.flatnonzero(found[b]), np.sort(kept))


def test_a_row_where_nothing_counts_has_no_weight():
    zeros = jnp.zeros((2, 5))
    values = {"loss": zeros, "reference_loss": zeros, "log_prob": zeros}
    for weights in DPACE(), AdaSPEC():
        np.testing.assert_array_equal(weights(values, zeros), zeros)


@pytest.mark.parametrize("weights", [DPACE(block_size=3), AdaSPEC(keep=0.5)], ids=lambda w: type(w).__name__)
def test_the_weighted_sum_and_its_gradient(weights):
    hidden_ND, head_DV, positions, shared = example()
    loss = TVD(weights=weights)
    reference = hidden_ND[::-1].copy(), head_DV

    def ours(hidden_ND, head_DV):
        output = weighted(loss, hidden_ND, head_DV, positions, shared, T, reference)
        return output.sum, output

    plain_loss = dataclasses.replace(loss, weights=None)
    rows_N = naive_rows(plain_loss, hidden_ND, head_DV, positions, shared)
    log_prob_N = log_probs(hidden_ND @ head_DV)[np.arange(N), positions.labels_N]
    values = {
        "loss": rows_N,
        "log_prob": log_prob_N,
        "reference_loss": naive_rows(plain_loss, *reference, positions, shared),
    }
    shape = lambda x: jnp.asarray(x).reshape(B, T)
    new_N = weights({name: shape(x) for name, x in values.items()}, shape(positions.weights_N)).reshape(-1)
    plain = lambda hidden_ND, head_DV: jnp.sum(naive_rows(plain_loss, hidden_ND, head_DV, positions, shared) * new_N)
    (total, output), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden_ND, head_DV)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(hidden_ND, head_DV)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(output.weight, new_N.sum(), rtol=1e-5)
    for x, y in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
    alone = chunked(plain_loss, hidden_ND, head_DV, positions, shared).metrics
    np.testing.assert_allclose(output.metrics["acceptance"], alone["acceptance"], rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: DPACE(block_size=0), lambda: DPACE(alpha=2.0), lambda: AdaSPEC(keep=0.0)])
def test_settings_that_make_no_weights(make):
    with pytest.raises(ConfigError, match=r"DPACE|AdaSPEC"):
        make()
