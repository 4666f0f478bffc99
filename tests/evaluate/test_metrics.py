"""The figures of the papers, from counts that can be checked by hand."""

import numpy as np
import pytest

from jaxdraft.decode import Acceptance, SpeculativeResult
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate import metrics
from jaxdraft.evaluate.tasks import Task

RESULTS = [
    SpeculativeResult(tokens=[1] * 7, accepted=[3, 2], cut=False, drafted=[3, 3], rejected=[-1, 1]),
    SpeculativeResult(tokens=[1] * 6, accepted=[0, 3, 2], cut=True, drafted=[3, 3, 3], rejected=[1, -1, 1]),
]


def test_counts_by_hand():
    found = metrics.acceptance_metrics(RESULTS, block_size=3, ratio=0.1)
    assert (found["prompts"], found["tokens"], found["blocks"]) == (2, 13, 5)
    assert found["block_efficiency"] == pytest.approx(13 / 5)
    assert found["mbsu"] == pytest.approx(13 / 5 / 1.3)
    # Complete blocks only: 3, 2, 0, 3.
    assert found["acceptance_rate"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["block_efficiency_full"] == pytest.approx(3)
    assert found["acceptance_by_position"] == [0.75, 0.75, 0.5]
    # Resamples hold one prompt twice, or both: blocks 3, 2; or 0, 3; or all four.
    assert found["acceptance_by_position_ci95"] == [[0.5, 1.0], [0.5, 1.0], [0.5, 0.5]]


def test_a_draft_that_stops_early_is_counted_by_what_it_proposed():
    stopped = [SpeculativeResult(tokens=[1] * 5, accepted=[1, 2], cut=False, drafted=[1, 3], rejected=[-1, 4])]
    found = metrics.acceptance_metrics(stopped, block_size=3, ratio=0.1)
    assert found["acceptance_rate"] == 0.75
    assert found["acceptance_by_position"] == [1, 0.5, 0]
    assert found["mbsu"] == pytest.approx(2.5 / (1 + 0.1 * 2))


def test_mbsu_is_the_papers_with_its_own_figures():
    # Direct Alignment: 115M / 6.7B, block efficiency 2.3 at γ = 3 gives a little less than 2.3, not 0.04.
    assert metrics.mbsu(2.3, 115 / 6738, 3) == pytest.approx(2.188, abs=1e-3)


def test_intervals_hold_the_value_shrink_with_prompts_and_repeat():
    rng = np.random.default_rng(1)
    widths = []
    for count in (20, 2000):
        tokens = rng.integers(10, 60, count)
        blocks = tokens / rng.uniform(1.5, 3, count)
        found = metrics.with_interval("x", metrics.ratio_of_sums(tokens, blocks))
        assert found == metrics.with_interval("x", metrics.ratio_of_sums(tokens, blocks))
        low, high = found["x_ci95"]
        assert low < found["x"] < high
        widths.append(high - low)
    # Standard errors fall with the root of the count: a factor of 10 here.
    assert 5 < widths[0] / widths[1] < 20


def test_one_prompt_has_an_interval_without_width():
    found = metrics.acceptance_metrics(RESULTS[:1], block_size=3, ratio=0.1)
    assert found["block_efficiency_ci95"] == [3.5, 3.5]


def test_what_cannot_be_said_is_null():
    cut = [SpeculativeResult(tokens=[1], accepted=[2], cut=True, drafted=[3], rejected=[1])]
    found = metrics.acceptance_metrics(cut, block_size=3, ratio=0.1)
    assert found["acceptance_rate"] is None
    assert found["acceptance_by_position"] == [None] * 3


def test_offline_figures_pool_over_prompts():
    seen = [
        Acceptance(np.asarray([1.0, 1.0, 1.0, 0.0]), np.asarray([0.9, 0.8, 0.7, 0.2])),
        Acceptance(np.asarray([0.0, 1.0]), np.asarray([0.5, 0.5])),
    ]
    # γ = 2, greedy: blocks end after tokens 3 and 4 of the first answer, after tokens 1 and 2 of the second.
    assert metrics.offline_metrics([a.accept_N for a in seen], 2)["block_efficiency_offline"] == pytest.approx(6 / 4)
    assert metrics.overlap_metrics(seen)["overlap"] == pytest.approx(3.6 / 6)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}])
def test_a_task_checks_its_settings(wrong):
    with pytest.raises(ConfigError, match="task x"):
        Task("x", None, **wrong)
