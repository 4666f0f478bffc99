"""The acceptance rule by exact enumeration: every block it can emit, with its probability."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.decode.rules import verify, verify_equal

V, G = 4, 3
DRAFTS = np.asarray(list(itertools.product(range(V), repeat=G)))


def table(rng):
    return rng.dirichlet(np.full(V, 0.6), V)


def keep_most_likely(rows, count):
    kept = np.where(rows >= np.sort(rows, axis=1)[:, -count, None], rows, 0)
    return kept / kept.sum(axis=1, keepdims=True)


def one_hot(rows):
    return np.eye(V)[rows.argmax(axis=1)]


def pairs():
    """Draft and target laws as tables [context, token]: tokens depend on the one before."""
    rng = np.random.default_rng(0)
    p, q = table(rng), table(rng)
    split = np.asarray([[0.5, 0.5, 0, 0]] * V)
    return {
        "random": (p, q),
        "top-p": (keep_most_likely(p, 3), keep_most_likely(q, 2)),
        "disjoint": (split, split[:, ::-1]),
        "equal": (p, p),
        "equal up to rounding": (p, p * (1 + 1e-7)),
        "one-hot draft": (one_hot(p), q),
        "one-hot target": (p, one_hot(q)),
        "both one-hot": (one_hot(p), one_hot(q)),
    }


def block_law(rule, p, q, context):
    """{emitted tokens: probability} of one block. Acceptance is a step in u: one point of each side stands for it."""
    law = {}
    contexts = np.concatenate([np.full((len(DRAFTS), 1), context), DRAFTS], axis=1)
    p_rows, q_rows = p[contexts[:, :G]], q[contexts]
    proposed = np.take_along_axis(p_rows, DRAFTS[..., None], 2)[..., 0]
    wanted = np.take_along_axis(q_rows[:, :G], DRAFTS[..., None], 2)[..., 0]
    edge = np.minimum(1, wanted / np.where(proposed > 0, proposed, 1))
    for side in itertools.product([False, True], repeat=G):
        u = np.where(side, np.minimum(edge * (1 + 1e-6), 1 - 2**-24), edge * (1 - 1e-6))
        weight = proposed.prod(1) * np.where(side, 1 - edge, edge).prod(1)
        accepted, following = (
            np.asarray(x, np.float64)
            for x in rule(
                jnp.asarray(DRAFTS),
                jnp.asarray(p_rows, jnp.float32),
                jnp.asarray(q_rows, jnp.float32),
                jnp.asarray(u, jnp.float32),
            )
        )
        following /= following.sum(axis=1, keepdims=True)
        for xs, count, w, law_next in zip(DRAFTS, accepted.astype(int), weight, following, strict=True):
            if w:
                for y in np.flatnonzero(law_next):
                    block = (*xs[:count].tolist(), int(y))
                    law[block] = law.get(block, 0) + w * law_next[y]
    return law


def error(rule, p, q, context=1):
    """Largest difference between the law of G + 1 tokens, blocks completed by the target, and the target's."""
    got = np.zeros((V,) * (G + 1))
    for block, weight in block_law(rule, p, q, context).items():
        rest = {block: weight}
        for _ in range(G + 1 - len(block)):
            rest = {(*b, y): w * q[b[-1], y] for b, w in rest.items() for y in range(V)}
        for b, w in rest.items():
            got[b] += w
    want = np.zeros_like(got)
    for xs in itertools.product(range(V), repeat=G + 1):
        want[xs] = np.prod([q[before, x] for before, x in zip((context, *xs), xs, strict=False)])
    return np.abs(got - want).max()


@pytest.mark.parametrize("case", pairs())
def test_law_is_the_targets(case):
    assert error(verify, *pairs()[case]) <= 1e-6


def test_expected_block_is_one_plus_the_products_of_the_overlap():
    p, q = pairs()["random"]
    expected, reached = 1.0, np.eye(V)[1]
    for _ in range(G):
        reached = reached @ np.minimum(p, q)
        expected += reached.sum()
    assert sum(len(block) * w for block, w in block_law(verify, p, q, 1).items()) == pytest.approx(expected, abs=1e-6)


def inflated(drafts, p, q, u):
    return verify(drafts, p, q, u / 1.05)


def no_residual(drafts, p, q, u):
    accepted, _ = verify(drafts, p, q, u)
    return accepted, q[jnp.arange(len(drafts)), accepted]


def swapped(drafts, p, q, u):
    accepted, _ = verify(drafts, q[:, :G], jnp.concatenate([p, q[:, G:]], 1), u)
    return accepted, verify(drafts, p, q, jnp.where(jnp.arange(G) < accepted[:, None], -1.0, 2.0))[1]


def bonus_from_draft(drafts, p, q, u):
    accepted, following = verify(drafts, p, q, u)
    return accepted, jnp.where(accepted[:, None] == G, p[:, -1], following)


@pytest.mark.parametrize("mistake", [inflated, no_residual, swapped, bonus_from_draft])
def test_enumeration_catches(mistake):
    assert error(mistake, *pairs()["random"]) > 1e-3


def test_a_token_impossible_for_the_target_is_rejected_at_zero():
    p, q = jnp.asarray([[[0.5, 0.5]]]), jnp.asarray([[[1.0, 0.0], [1.0, 0.0]]])
    accepted, following = verify(jnp.asarray([[1]]), p, q, jnp.zeros((1, 1)))
    assert accepted[0] == 0
    np.testing.assert_array_equal(following, [[0.5, 0.0]])


def test_greedy_rule_is_the_rule_for_one_hot_laws():
    rng = np.random.default_rng(0)
    drafts, best = rng.integers(0, V, (200, G)), rng.integers(0, V, (200, G + 1))
    best[:100, :G] = np.where(rng.random((100, G)) < 0.7, drafts[:100], best[:100, :G])
    hot = jnp.eye(V)
    accepted, following = verify(jnp.asarray(drafts), hot[drafts], hot[best], jnp.asarray(rng.random((200, G))))
    got, token = verify_equal(jnp.asarray(drafts), jnp.asarray(best))
    assert set(np.asarray(got)) == set(range(G + 1))
    np.testing.assert_array_equal(got, accepted)
    np.testing.assert_array_equal(hot[token], following)
