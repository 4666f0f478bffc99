"""Every fault of the suite a few times; ``python -m tests.faults`` does them more often."""

import pytest

from tests.faults import FAULTS, Bench
from tests.faults.endurance import endure, grown


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"), effort=1)


@pytest.fixture(scope="module")
def thorough(bench):
    bench.effort = 3
    return bench


def _check(fault, bench):
    outcome = fault.run(bench)
    assert outcome.injected > 0
    assert outcome.held == outcome.injected, outcome


@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.slow], ids=lambda f: f"{f.number} {f.injection}")
def test_quick(fault, bench):
    _check(fault, bench)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.slow], ids=lambda f: f"{f.number} {f.injection}")
def test_thorough(fault, thorough):
    _check(fault, thorough)


@pytest.mark.slow
def test_files_and_threads_of_a_run_do_not_grow(tmp_path):
    """Memory too takes more steps to tell: ``python -m tests.faults.endurance``."""
    early, late = endure(tmp_path / "run", steps=600, saves=12, early=300)  # when its pools of threads are full
    assert early.step < late.step == 600
    assert not grown(early._replace(memory=late.memory), late)
