"""The model of time per token, with latencies that are given."""

import hashlib
import types

import pytest

from jaxdraft.data.prompts import Prompt
from jaxdraft.evaluate.measure import Work
from jaxdraft.evaluate.tasks import Task
from jaxdraft.evaluate.tpot import Latencies, curve, predicted_speedup


def test_predicted_speedup_of_a_free_draft_is_block_efficiency():
    assert predicted_speedup(2.5, 4, draft=0.0, target_1=2.0, target_block=2.0) == 2.5
    assert predicted_speedup(2.5, 4, draft=0.5, target_1=2.0, target_block=3.0) == pytest.approx(1.0)


@pytest.fixture
def latencies():
    """A target's step takes 10 + width, a draft's as long as its width."""
    big = hashlib.sha256(repr("big").encode()).hexdigest()
    asked = []

    def recall(of, measure):
        asked.append(of)
        return of["width"] + 10.0 * big.startswith(of["model"])

    target, draft = (types.SimpleNamespace(decoder=types.SimpleNamespace(config=name)) for name in ("big", "small"))
    prompts = [Prompt(str(size), (1,) * size, "") for size in (3, 200, 180)]
    work = Work(Task("open", None, 0.6, 0.9, max_new_tokens=44), prompts, batch_size=4)
    return types.SimpleNamespace(of=Latencies(target, draft, work, recall), asked=asked)


def test_a_drafts_first_step_reads_two_tokens(latencies):
    assert latencies.of.draft(1) == 2.0
    assert latencies.of.draft(4) == (2 + 3 * 1) / 4
    assert latencies.of.target(5) == 15.0
    assert latencies.of.predict(3.0, 4) == pytest.approx(3 * 11 / (5 + 15))


def test_steps_are_timed_as_they_are_decoded(latencies):
    latencies.of.draft(2)
    assert all(of["slots"] == 256 + 44 and of["batch_size"] == 4 for of in latencies.asked)  # of most prompts' bucket
    assert all((of["temperature"], of["top_p"]) == (0.6, 0.9) for of in latencies.asked)
    # A step of one token is the same program whether the head reads the last position or all.
    assert [(of["width"], of["last_only"]) for of in latencies.asked] == [(2, True), (1, False)]


def test_the_curve_begins_without_a_draft(latencies):
    points = curve(latencies.of, lambda block_size: 1 + 0.5 * block_size, range(1, 4))
    assert [point["block_size"] for point in points] == [0, 1, 2, 3]
    assert points[0]["predicted_speedup"] == 1.0
    assert points[2]["predicted_speedup"] == pytest.approx(2 * 11 / (3 + 13), abs=1e-6)
