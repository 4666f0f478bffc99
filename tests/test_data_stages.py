"""Who writes an answer: by its id and the seed alone, in the shares that were asked for."""

import collections

import pytest

from jaxdraft.data.prompts import Prompt
from jaxdraft.data_stages import _Question

QUESTIONS = [_Question(Prompt(str(i), (1,), ""), temperature) for i in range(5000) for temperature in (0.0, 1.0)]


@pytest.mark.parametrize("shares", [{"target": 0.5, "a": 0.5}, {"a": 0.2, "b": 0.7, "target": 0.1}, {"a": 1.0}])
def test_every_writer_gets_its_share(shares):
    written = collections.Counter(question.writer(shares, seed=3) for question in QUESTIONS)
    for name, share in shares.items():
        error = (share * (1 - share) * len(QUESTIONS)) ** 0.5
        assert abs(written[name] - share * len(QUESTIONS)) <= 4 * error


def test_writers_differ_between_seeds_and_temperatures():
    shares = {"target": 0.5, "a": 0.5}
    chosen = {(q.id, seed): q.writer(shares, seed) for q in QUESTIONS for seed in (0, 1)}
    same = sum(chosen[q.id, 0] == chosen[q.id, 1] for q in QUESTIONS)
    assert abs(same - 5000) < 4 * 50
    pairs = [chosen[f"{i}@0", 0] == chosen[f"{i}@1", 0] for i in range(5000)]
    assert abs(sum(pairs) - 2500) < 4 * 5000**0.5 / 2


def test_pinned_choice():
    """What a seed means may not change: old runs could not be repeated."""
    for shares in ({"t": 0.5, "a": 0.5}, {"a": 0.5, "t": 0.5}):
        assert "".join(q.writer(shares, 0) for q in QUESTIONS[:16]) == "aataaataaattaata"
