import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxdraft.decode import sampling
from jaxdraft.decode.sampling import Sampling, draw, position_keys, probabilities, row_keys, uniforms

probabilities = jax.jit(probabilities)


def settings(rows, temperature=1.0, top_p=1.0, top_k=0):
    number = lambda x: jnp.full(rows, x, jnp.float32)
    return Sampling(number(temperature), number(top_p), jnp.full(rows, top_k, jnp.int32))


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def top_p_by_sorting(probs, top_p):
    """The textbook nucleus, and how far the mass with and without its last token is from ``top_p``."""
    kept, margins = np.zeros_like(probs), []
    for row, p in enumerate(probs):
        order = np.argsort(-p, kind="stable")
        mass = np.cumsum(p[order])
        last = int(np.argmax(mass >= top_p))
        kept[row, order[: last + 1]] = p[order[: last + 1]]
        margins.append(min(abs(mass[last] - top_p), abs(mass[last] - p[order[last]] - top_p)))
    return kept / kept.sum(axis=-1, keepdims=True), np.asarray(margins)


@pytest.mark.parametrize("top_p", [1e-4, 0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_top_p_equals_the_sorting_version(top_p, spread):
    logits = np.random.default_rng(0).normal(0, spread, (64, 500)).astype(np.float32)
    expected, margins = top_p_by_sorting(softmax(logits.astype(np.float64)), top_p)
    decided = margins > 1e-6  # elsewhere float32 may rightly cut one token away
    assert decided.sum() >= 16
    got = np.asarray(probabilities(jnp.asarray(logits), settings(64, 1.0, top_p)))
    np.testing.assert_array_equal(got[decided] > 0, expected[decided] > 0)
    np.testing.assert_allclose(got[decided], expected[decided], rtol=1e-4, atol=1e-7)


def test_top_p_keeps_every_token_of_a_tie():
    probs = jnp.asarray([[0.4, 0.2, 0.2, 0.2]])
    got = probabilities(jnp.log(probs), settings(1, 1.0, 0.5))
    np.testing.assert_allclose(got, probs, rtol=1e-6)
    np.testing.assert_allclose(probabilities(jnp.log(probs), settings(1, 1.0, 0.3)), [[1, 0, 0, 0]])


@pytest.mark.parametrize("top_k", [1, 2, 50, 499, 500, 600])
def test_top_k_equals_the_sorting_version(top_k):
    logits = np.random.default_rng(0).normal(0, 3, (64, 500)).astype(np.float32)
    kept = np.argsort(np.argsort(-logits, axis=-1), axis=-1) < top_k
    expected = softmax(np.where(kept, logits.astype(np.float64), -np.inf))
    np.testing.assert_allclose(probabilities(logits, settings(64, 1.0, 1.0, top_k)), expected, rtol=1e-5)


def test_top_k_keeps_every_token_of_a_tie():
    got = probabilities(jnp.log(jnp.asarray([[0.4, 0.2, 0.2, 0.15, 0.05]])), settings(1, 1.0, 1.0, 2))
    np.testing.assert_allclose(got, [[0.5, 0.25, 0.25, 0, 0]], rtol=1e-6)


def test_top_k_comes_before_top_p_which_is_of_what_it_left():
    logits = np.log(np.asarray([[0.4, 0.3, 0.2, 0.1]], np.float32))
    np.testing.assert_allclose(probabilities(logits, settings(1, 1.0, 0.5, 2)), [[1, 0, 0, 0]])  # 4/7 of the mass
    np.testing.assert_allclose(probabilities(logits, settings(1, 1.0, 0.5)), [[4 / 7, 3 / 7, 0, 0]], rtol=1e-6)


def test_top_k_zero_keeps_every_token_beside_rows_that_cut():
    logits = np.random.default_rng(0).normal(0, 3, (2, 50)).astype(np.float32)
    whole, cut = probabilities(logits, Sampling(np.ones(2, np.float32), np.ones(2, np.float32), np.asarray([0, 3])))
    np.testing.assert_array_equal(whole, probabilities(logits[:1], settings(1))[0])
    assert np.count_nonzero(cut) == 3


def test_top_p_one_keeps_every_token_beside_rows_that_cut():
    logits = jnp.asarray([[0.0, -30.0], [0.0, -30.0]])
    got = probabilities(logits, Sampling(jnp.ones(2), jnp.asarray([1.0, 0.5]), jnp.zeros(2, jnp.int32)))
    assert got[0, 1] > 0
    assert got[1, 1] == 0


def test_temperature_comes_before_top_p():
    logits = np.log(np.asarray([[0.6, 0.3, 0.1]], np.float32))
    flat = softmax(logits / 2)
    expected, _ = top_p_by_sorting(flat, 0.85)
    assert (expected > 0).sum() == 3 > (top_p_by_sorting(softmax(logits), 0.85)[0] > 0).sum()
    np.testing.assert_allclose(probabilities(logits, settings(1, 2.0, 0.85)), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6])
def test_temperature_zero_and_nearly_zero_are_the_argmax(temperature):
    logits = np.random.default_rng(0).normal(0, 50, (8, 100)).astype(np.float32)
    got = probabilities(jnp.asarray(logits), settings(8, temperature, 0.9))
    np.testing.assert_array_equal(got, np.eye(100)[logits.argmax(-1)])


def test_rows_and_positions_have_their_own_settings():
    logits = np.random.default_rng(0).normal(0, 2, (3, 4, 10)).astype(np.float32)
    mixed = Sampling(jnp.asarray([0.0, 0.5, 2.0]), jnp.asarray([1.0, 0.7, 1.0]), jnp.asarray([0, 0, 3]))
    got = probabilities(jnp.asarray(logits), mixed)
    for row in range(3):
        alone = Sampling(*(x[row : row + 1] for x in mixed))
        for position in range(4):
            one = probabilities(jnp.asarray(logits[row : row + 1, position]), alone)
            np.testing.assert_allclose(got[row, position], one[0], rtol=1e-6)


def test_draw_follows_the_law_and_never_the_impossible():
    probs = jnp.asarray([0.5, 0.0, 0.3, 0.0, 0.19, 0.01])
    keys = row_keys(0, sampling.SAMPLE, jnp.arange(100_000, dtype=jnp.uint32))
    tokens = jax.jit(lambda keys: draw(keys, jnp.broadcast_to(probs, (keys.shape[0], 6))))(keys)
    counts = np.bincount(tokens, minlength=6)
    assert counts[1] == counts[3] == 0
    possible = [0, 2, 4, 5]
    assert chisquare(counts[possible], np.asarray(probs, np.float64)[possible] * 100_000).pvalue > 1e-6


def test_most_likely_is_argmax_with_ties_and_infinities():
    x = np.random.default_rng(0).integers(0, 5, (3, 40, 7)).astype(np.float32)
    x[0, 0], x[0, 1] = -np.inf, [0, np.inf, 1, np.inf, 0, 0, 0]
    np.testing.assert_array_equal(sampling.most_likely(x), np.argmax(x, axis=-1))
    assert sampling.most_likely(np.full((1, 7), np.nan, np.float32)) == 6, "a token, whatever the logits"


def test_keys_are_pinned_and_differ_by_seed_purpose_example_and_position():
    purposes = (sampling.SAMPLE, sampling.PROPOSE, sampling.ACCEPT, sampling.REPLACE)
    assert purposes == (1001, 1002, 1003, 1004)
    seen = set()
    for seed in (0, 1):
        for purpose in purposes:
            keys = row_keys(seed, purpose, jnp.asarray([0, 1, 2**32 - 1], jnp.uint32))
            for position in (0, 1):
                data = jax.random.key_data(position_keys(keys, jnp.full(3, position)))
                seen.update(tuple(row.tolist()) for row in np.asarray(data))
    assert len(seen) == 2 * 4 * 3 * 2
    expected = jax.random.fold_in(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), 1001), 5), 9
    )
    got = position_keys(row_keys(7, sampling.SAMPLE, jnp.asarray([5], jnp.uint32)), jnp.asarray([9]))[0]
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(expected))


def test_uniforms_are_those_of_single_positions():
    keys = row_keys(0, sampling.ACCEPT, jnp.arange(2, dtype=jnp.uint32))
    grid = uniforms(keys, jnp.asarray([[3, 4], [8, 9]]))
    single = jax.random.uniform(position_keys(keys, jnp.asarray([4, 9]))[1])
    assert grid[1, 1] == single
    assert len(np.unique(grid)) == 4


def test_two_laws_that_share_their_noise_mostly_draw_the_same():
    """Equal with a probability of at least (1 - TVD) / (1 + TVD): Daliri, Musco & Suresh 2024, arXiv 2408.07978."""
    rng, draws = np.random.default_rng(0), 20_000
    keys = row_keys(0, sampling.SAMPLE, np.arange(draws, dtype=np.uint32))
    for sharpness in (0.1, 1.0, 10.0):
        p, q = rng.dirichlet(np.full(8, sharpness), 2).astype(np.float32)
        tvd = np.abs(p - q).sum() / 2
        drawn = [np.asarray(draw(keys, jnp.broadcast_to(law, (draws, 8)))) for law in (p, q)]
        same = np.mean(drawn[0] == drawn[1])
        error = 4 * 0.5 / draws**0.5
        assert (1 - tvd) / (1 + tvd) - error < same < 1 - tvd + error
