"""The one owner of SIGTERM and Ctrl-C, for every loop: what they end goes on with the same command.

One process: ``Interrupted`` is raised where the program stands, which loses the work at hand and nothing else, as every
file is whole or not there; inside ``deferred()``, where a step is made and saved, at its end. The command line also
leaves by itself what does not come back to Python, a long compilation for one.

Several processes: JAX's own handler passes SIGTERM on to all of them, and all of them learn of it at the same call of
``asked``. So every process calls it equally often, or calls ``align`` before it matters; where each has work of its
own, and one may be far ahead, ``poll_apart`` counts by the clock.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from jaxdraft.distributed import from_all, is_alone
from jaxdraft.errors import RESUME, Interrupted

MESSAGE = "stopped; the same command goes on from here"
GRACE = 3.0  # seconds that Python has to come back
TICK = 0.25  # seconds between calls of processes that work apart
_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGALRM


class _Stop:
    """What signals have said in this process."""

    def __init__(self) -> None:
        self.owned = self.asked = False
        self.deferred = 0
        self.calls = 0
        self.aligned = 0, time.monotonic()

    def handle(self, number: int, frame: Any) -> None:
        if not is_alone():  # Ctrl-C: SIGTERM is not heard here any more
            if self.asked:
                os._exit(RESUME)
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.asked = True
        if not self.deferred:
            raise Interrupted(MESSAGE)


_stop = _Stop()


@contextlib.contextmanager
def owned(leaves: bool = False) -> Iterator[None]:
    """Meanwhile a signal means ``Interrupted``; inside another ``owned``, and outside the main thread, nothing changes.

    Args:
      leaves: the process ends with exit code 75 when it has not stopped ``GRACE`` seconds after a signal.
    """
    if _stop.owned or threading.current_thread() is not threading.main_thread():
        yield
        return

    def unraisable(lost: Any) -> None:
        if lost.exc_type is Interrupted:  # raised in a callback of XLA's, which ignores it: again, outside of it
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            hook(lost)

    _stop.owned, _stop.asked = True, False
    taken = _SIGNALS if is_alone() else _SIGNALS[1:]  # else SIGTERM is JAX's own, which a handler would put out of use
    before = {number: signal.signal(number, _stop.handle) for number in taken}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    with contextlib.ExitStack() as watched:
        if leaves:
            watched.enter_context(_watched())
        try:
            yield
        finally:
            _stop.owned = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Meanwhile a signal is only noted; ``Interrupted`` is raised at the end.

    Raises:
      Interrupted: a signal came, or had come before.
    """
    _stop.deferred += 1
    try:
        yield
    finally:
        _stop.deferred -= 1
    if _stop.asked and not _stop.deferred and is_alone():
        raise Interrupted(MESSAGE)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Meanwhile, inside of ``deferred()``, a signal is not deferred.

    Raises:
      Interrupted: one came, or had come before.
    """
    held, _stop.deferred = _stop.deferred, 0
    try:
        if _stop.asked and is_alone():
            raise Interrupted(MESSAGE)
        yield
    finally:
        _stop.deferred = held


def asked() -> bool:
    """Whether a signal has come; of several processes, whether it is time for all of them to stop."""
    if is_alone():
        return _stop.asked
    _stop.calls += 1
    return bool(multihost_utils.reached_preemption_sync_point(_stop.calls))


def poll() -> None:
    """Raises Interrupted where ``asked()``."""
    if asked():
        raise Interrupted(MESSAGE)


def poll_apart() -> None:
    """The same where each process has work of its own since ``align``: all of them stop at the same time instead.

    That call is the next of the process that is ahead; counted by what they have done, another might never come to it.
    """
    if is_alone():
        poll()
        return
    calls, since = _stop.aligned
    due = calls + int((time.monotonic() - since) / TICK)
    while _stop.calls < due:
        poll()


def align() -> None:
    """Makes up for ``asked`` having been called more often by one process than by another. All of them call it."""
    if not is_alone():
        _stop.calls = max(calls for (calls,) in from_all(_stop.calls))
        _stop.aligned = _stop.calls, time.monotonic()


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Leaves the process when a signal came and Python did not come back; a step that is being saved has its time."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    done = threading.Event()

    def watch() -> None:
        os.read(reading, 1)  # a signal, or the end
        deadline = time.monotonic() + GRACE
        while not done.wait(0.05):
            if _stop.deferred or not is_alone():
                deadline = time.monotonic() + GRACE
            elif time.monotonic() > deadline:
                print(f"jaxdraft: {MESSAGE}", file=sys.stderr, flush=True)
                os._exit(RESUME)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)
