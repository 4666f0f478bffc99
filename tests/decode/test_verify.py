"""The acceptance rules by exact enumeration: every block that they can emit, with its probability."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.decode.rules import verify, verify_block, verify_equal
from tests.decode import mistakes

V, G = 4, 3
DRAFTS = np.asarray(list(itertools.product(range(V), repeat=G)))
SIDES = np.asarray(list(itertools.product([False, True], repeat=G)))


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
        "random, the other way round": (q, p),
        "top-p": (keep_most_likely(p, 3), keep_most_likely(q, 2)),
        "disjoint": (split, split[:, ::-1]),
        "equal": (p, p),
        "equal up to rounding": (p, p * (1 + 1e-7)),
        "one-hot draft": (one_hot(p), q),
        "one-hot target": (p, one_hot(q)),
        "both one-hot": (one_hot(p), one_hot(q)),
    }


def token_edges(p, q, drafts, drafted):
    """The largest u with which each draft passes, by the definitions of the papers in float64."""
    del drafted
    return np.minimum(1, _ratio(p, q, drafts))


def block_edges(p, q, drafts, drafted):
    reached, edges = np.ones(len(drafts)), np.zeros(drafts.shape)
    ratio = _ratio(p, q, drafts)
    for i in range(1, G + 1):
        reached = np.minimum(reached * ratio[:, i - 1], 1)
        edges[:, i - 1] = reached
        if i < G:
            missing = np.maximum(reached[:, None] * q[:, i] - p[:, i], 0).sum(axis=1)
            inner = np.divide(missing, missing + 1 - reached, out=np.ones_like(reached), where=reached < 1 - 1e-9)
            edges[:, i - 1] = np.where(i < drafted, inner, reached)
    return edges


EDGES = {verify: token_edges, verify_block: block_edges}


def _ratio(p, q, drafts):
    p, q = _at(p, drafts), _at(q[:, :G], drafts)
    return np.divide(q, p, out=np.ones(p.shape), where=p > 0)


def _at(probs, tokens):
    return np.take_along_axis(probs, tokens[..., None], axis=2)[..., 0]


def stopped(p_rows, drafts, stop_below):
    """How many drafts there are when one less likely than this is the last."""
    unsure = _at(p_rows, drafts) < stop_below
    return np.where(unsure.any(axis=1), unsure.argmax(axis=1) + 1, G)


def block_law(rule, p, q, context, stop_below=0.0, edges_of=None):
    """{emitted tokens: probability} of one block. Acceptance is a step in u: one point of each side stands for it."""
    contexts = np.concatenate([np.full((len(DRAFTS), 1), context), DRAFTS], axis=1)
    p_rows, q_rows = p[contexts[:, :G]], q[contexts]
    drafted = stopped(p_rows, DRAFTS, stop_below)
    edges = (edges_of or EDGES[rule])(p_rows, q_rows, DRAFTS, drafted)
    proposed = _at(p_rows, DRAFTS).prod(axis=1)
    rows, side = np.tile(np.arange(len(DRAFTS)), len(SIDES)), np.repeat(SIDES, len(DRAFTS), axis=0)
    drafts, drafted, edges = DRAFTS[rows], drafted[rows], edges[rows]
    u = np.where(side, np.minimum(edges * (1 + 1e-6), 1 - 2**-24), edges * (1 - 1e-6))
    weight = proposed[rows] * np.where(side, 1 - edges, edges).prod(axis=1)
    probs = [jnp.asarray(x, jnp.float32) for x in (p_rows[rows], q_rows[rows], u)]
    accepted, following = jax.jit(rule)(jnp.asarray(drafts), *probs, jnp.asarray(drafted))
    accepted, following = np.asarray(accepted), np.asarray(following, np.float64)
    assert np.all(accepted <= drafted)
    following /= following.sum(axis=1, keepdims=True)
    law = {}
    for xs, count, w, law_next in zip(drafts, accepted, weight, following, strict=True):
        if w:
            for y in np.flatnonzero(law_next):
                block = (*xs[:count].tolist(), int(y))
                law[block] = law.get(block, 0) + w * law_next[y]
    return law


def error(rule, p, q, context=1, **how):
    """Largest difference between the law of G + 1 tokens, blocks completed by the target, and the target's."""
    got = np.zeros((V,) * (G + 1))
    for block, weight in block_law(rule, p, q, context, **how).items():
        rest = {block: weight}
        for _ in range(G + 1 - len(block)):
            rest = {(*b, y): w * q[b[-1], y] for b, w in rest.items() for y in range(V)}
        for b, w in rest.items():
            got[b] += w
    want = np.zeros_like(got)
    for xs in itertools.product(range(V), repeat=G + 1):
        want[xs] = np.prod([q[before, x] for before, x in zip((context, *xs), xs, strict=False)])
    return np.abs(got - want).max()


def expected_length(rule, p, q, **how):
    return sum(len(block) * w for block, w in block_law(rule, p, q, 1, **how).items())


@pytest.mark.parametrize("stop_below", [0, 0.3, 1])
@pytest.mark.parametrize("case", pairs())
@pytest.mark.parametrize("rule", EDGES)
def test_law_is_the_targets(rule, case, stop_below):
    assert error(rule, *pairs()[case], stop_below=stop_below) <= 1e-6


def test_expected_block_is_one_plus_the_products_of_the_overlap():
    p, q = pairs()["random"]
    expected, reached = 1.0, np.eye(V)[1]
    for _ in range(G):
        reached = reached @ np.minimum(p, q)
        expected += reached.sum()
    assert expected_length(verify, p, q) == pytest.approx(expected, abs=1e-6)


def test_expected_block_of_block_verification_is_the_mean_of_the_running_minimum():
    """1 + Σ over texts of the target and i of its probability times min over k ≤ i of Π p/q up to k."""
    p, q = pairs()["random"]
    expected = 1.0
    for count in range(1, G + 1):
        for xs in itertools.product(range(V), repeat=count):
            steps = list(zip((1, *xs), xs, strict=False))
            text, draft = (np.cumprod([law[step] for step in steps]) for law in (q, p))
            expected += text[-1] * min(1, (draft / text).min())
    assert expected_length(verify_block, p, q) == pytest.approx(expected, abs=1e-6)
    assert expected_length(verify_block, p, q) > 1.01 * expected_length(verify, p, q)


def test_a_draft_that_stops_is_not_more_than_accepted():
    p, q = pairs()["random"]
    for rule in EDGES:
        whole, some, none = (expected_length(rule, p, q, stop_below=s) for s in (0, 0.3, 1))
        assert whole > some > none > 1


@pytest.mark.parametrize("mistake", mistakes.TOKEN_RULE)
def test_enumeration_catches(mistake):
    assert error(mistakes.TOKEN_RULE[mistake], *pairs()["random"], edges_of=token_edges) > 1e-3


@pytest.mark.parametrize("mistake", mistakes.BLOCK_RULE)
def test_enumeration_catches_of_block_verification(mistake):
    laws = pairs()["random, the other way round"]
    assert error(mistakes.BLOCK_RULE[mistake], *laws, edges_of=block_edges) > 1e-3


@pytest.mark.parametrize("rule", EDGES)
def test_a_token_impossible_for_the_target_is_rejected_at_zero(rule):
    p, q = jnp.asarray([[[0.5, 0.5]]]), jnp.asarray([[[1.0, 0.0], [1.0, 0.0]]])
    accepted, following = rule(jnp.asarray([[1]]), p, q, jnp.zeros((1, 1)), jnp.ones(1, jnp.int32))
    assert accepted[0] == 0
    np.testing.assert_array_equal(following, [[0.5, 0.0]])


@pytest.mark.parametrize("rule", EDGES)
def test_greedy_rule_is_the_rule_for_one_hot_laws(rule):
    rng = np.random.default_rng(0)
    drafts, best = rng.integers(0, V, (200, G)), rng.integers(0, V, (200, G + 1))
    best[:100, :G] = np.where(rng.random((100, G)) < 0.7, drafts[:100], best[:100, :G])
    drafted, hot = jnp.asarray(rng.integers(1, G + 1, 200)), jnp.eye(V)
    u = jnp.asarray(rng.random((200, G)))
    accepted, following = rule(jnp.asarray(drafts), hot[drafts], hot[best], u, drafted)
    got, token = verify_equal(jnp.asarray(drafts), jnp.asarray(best), drafted)
    assert set(np.asarray(got)) == set(range(G + 1))
    np.testing.assert_array_equal(got, accepted)
    np.testing.assert_array_equal(hot[token], following)
