"""Signals: raised at once or at the end of a step, and the way out of what does not come back to Python."""

import gc
import signal
import subprocess
import sys
import time

import pytest

from jaxdraft import stopping
from jaxdraft.errors import Interrupted
from jaxdraft.stopping import asked, at_once, deferred, owned


def test_a_signal_is_raised_where_the_program_stands_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), owned():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_deferred_signal_waits_for_the_end():
    done = []

    def step():
        with deferred():
            signal.raise_signal(signal.SIGINT)
            assert asked()
            done.append("the step at hand")

    with pytest.raises(Interrupted), owned():
        step()
    assert done == ["the step at hand"]


def test_inside_a_deferred_part_some_work_may_be_left_at_once():
    done = []

    def step():
        try:
            with at_once():
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("not reached")
        except Interrupted:
            signal.raise_signal(signal.SIGTERM)  # while the step is saved: deferred again
            done.append("saved")
            raise

    with pytest.raises(Interrupted), owned(), deferred():
        step()
    assert done == ["saved"]


def test_what_may_be_left_at_once_does_not_begin_after_a_signal():
    def step():
        signal.raise_signal(signal.SIGTERM)
        with at_once():
            raise AssertionError("not begun")

    with pytest.raises(Interrupted), owned(), deferred():
        step()


def test_a_stop_that_a_callback_swallows_comes_again():
    def stops_in_a_callback(phase, info):
        gc.callbacks.remove(stops_in_a_callback)
        signal.raise_signal(signal.SIGTERM)

    def work():
        gc.callbacks.append(stops_in_a_callback)
        gc.collect()
        time.sleep(5)

    with pytest.raises(Interrupted), owned():
        work()


STUCK = """
import ctypes
from jaxdraft.stopping import owned
shell = b"exec >&- 2>&-; kill -TERM $PPID; while kill -0 $PPID; do sleep 0.1; done"
with owned(leaves=True):
    ctypes.CDLL(None).system(shell)  # as a compilation: does not come back to Python
"""


def test_what_does_not_come_back_to_python_is_left():
    left = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert left.stderr == "jaxdraft: stopped; the same command goes on from here\n"
    assert left.returncode == 75


def test_a_process_that_is_behind_comes_to_the_call_at_which_all_of_them_stop(monkeypatch):
    now = 0.0
    monkeypatch.setattr(stopping, "is_alone", lambda: False)
    monkeypatch.setattr(stopping, "_stop", stopping._Stop())
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    monkeypatch.setattr(stopping.multihost_utils, "reached_preemption_sync_point", lambda call: call == 41)
    stopping._stop.aligned = 0, 0.0
    stopping.poll_apart()
    now = 40 * stopping.TICK  # the other is at call 40, and a signal came
    stopping.poll_apart()
    now = 60 * stopping.TICK  # one answer took long
    with pytest.raises(Interrupted):
        stopping.poll_apart()


def test_a_handler_of_jaxs_is_left_alone_where_there_are_several_processes(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stopping, "is_alone", lambda: False)
    with owned():
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGINT) is not before
