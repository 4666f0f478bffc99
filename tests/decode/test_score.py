"""The scoring pass against what it is by definition: float64 softmaxes of plain forward passes, segment by segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.data.pipeline import segment_positions
from jaxdraft.decode import score, top_scores
from jaxdraft.sharding import MeshShape

VOCAB, LENGTH = 24, 13
TOLERANCE = 2e-5  # both sides start from float32 logits of size 10, which another order of sums moves by some 1e-6
SEGMENTS = np.asarray([[1] * 5 + [2] * 8, [1] * LENGTH, [1] * 3 + [2] * 6 + [0] * 4], np.int32)
TOKENS = np.random.default_rng(5).integers(0, VOCAB, SEGMENTS.shape).astype(np.int32)


def scores(pair, k, temperature=1.0):
    mesh = MeshShape().build()
    rows = (TOKENS, segment_positions(SEGMENTS), SEGMENTS)
    found = top_scores(pair.target, pair.target_params, *rows, k=k, temperature=temperature, mesh=mesh)
    return np.asarray(found.ids_BTK), np.asarray(found.log_probs_BTS)


def by_hand(pair, plain_forward, temperature):
    """Per position of a segment: (row, place, log-probabilities [V] in float64, label or None)."""
    for row, segments in enumerate(SEGMENTS):
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            alone = np.zeros((1, LENGTH), np.int32)
            alone[0, : len(places)] = TOKENS[row, places]
            logits = np.asarray(plain_forward(pair.target, pair.target_params, alone), np.float64)[0] / temperature
            log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            log_probs -= logits.max(-1, keepdims=True)
            for i, place in enumerate(places):
                label = int(TOKENS[row, places[i + 1]]) if i + 1 < len(places) else None
                yield row, place, log_probs[i], label


@pytest.mark.parametrize("k, temperature", [(1, 1.0), (4, 0.6), (VOCAB - 1, 1.0)])
def test_scores_are_those_of_each_segment_alone(tiny, plain_forward, k, temperature):
    ids, log_probs = scores(tiny, k, temperature)
    assert ids.shape == (*TOKENS.shape, k)
    assert log_probs.shape == (*TOKENS.shape, k + 2)
    among = 0
    for row, place, expected, label in by_hand(tiny, plain_forward, temperature):
        top = np.argsort(-expected, kind="stable")[:k]
        named = {*top.tolist(), *([] if label is None else [label])}
        rest = sorted(set(range(VOCAB)) - named)
        own = -np.inf if label is None else expected[label]
        left = np.log(np.exp(expected[rest]).sum()) if rest else -np.inf
        assert ids[row, place].tolist() == top.tolist()
        np.testing.assert_allclose(log_probs[row, place], [*expected[top], own, left], atol=TOLERANCE)
        among += label in top.tolist()
    assert 0 < among < (SEGMENTS > 0).sum()


def test_the_mass_is_all_there(tiny):
    ids, log_probs = scores(tiny, 4)
    mass = np.exp(log_probs)
    labels = np.roll(TOKENS, -1, axis=1)
    among = (ids == labels[..., None]).any(-1)
    total = mass[..., :4].sum(-1) + np.where(among, 0, mass[..., 4]) + mass[..., 5]
    np.testing.assert_allclose(total[SEGMENTS > 0], 1, atol=TOLERANCE)


def test_the_rest_of_a_confident_model_does_not_cancel():
    logits = jnp.asarray([[40.0, 3.0, 1.0, 0.0, 2.0]])
    found = score.score_next(logits, jnp.asarray([1]), 1)
    assert found.ids_BTK.tolist() == [[0]]
    # 1 minus the two would be 0 in float32, and in float64 too.
    np.testing.assert_allclose(found.log_probs_BTS[0], [0, -37, np.log(np.exp([1, 0, 2]).sum()) - 40], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 39, 1000])
def test_chunks_change_nothing(tiny, monkeypatch, chunk):
    whole = scores(tiny, 3)
    monkeypatch.setattr(score, "default_chunk", lambda vocabulary: chunk)
    jax.clear_caches()
    for a, b in zip(scores(tiny, 3), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_no_array_of_all_logits_exists(tiny, monkeypatch):
    monkeypatch.setattr(score, "default_chunk", lambda vocabulary: 8)
    many = np.ones((4, 2048), np.int32)
    settings = (4, 1.0, MeshShape().build())
    with jax.set_mesh(settings[2]):
        program = score.score_rows.lower(tiny.target, tiny.target_params, many, many, many, *settings)
    assert f"8x{VOCAB}xf32" in program.as_text()
    assert f"{many.size}x{VOCAB}x" not in program.as_text()
    assert f"4x2048x{VOCAB}x" not in program.as_text()
