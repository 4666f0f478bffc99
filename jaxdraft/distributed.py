"""Several processes as one run: how they find one another, what one decides for all, what all of them see.

Every process runs the same program. What depends on files, clocks or signals is decided by the lead and told to the
others: processes that went different ways would wait for each other for ever.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdraft.errors import ConfigError, Interrupted

T = TypeVar("T")

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# One that is gone for good is noticed after so many seconds, and the others end with it; where one has failed, the
# others are waited for.
_TIMEOUTS: dict[str, Any] = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 10}
_PROBLEM_BYTES = 1000


def initialize() -> None:
    """Joins the job that this process is one of; does nothing where it is alone. Call it before any device is used.

    Cloud TPU, Slurm, Open MPI and Kubernetes are recognised. Elsewhere ``JAX_COORDINATOR_ADDRESS`` (host:port of
    process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` say it, as ``launch/local.sh`` sets them.

    Raises:
      ConfigError: some of the three variables are set and others are not, or one is no number.
    """
    given = {name: os.environ[name] for name in _VARIABLES[1:] if name in os.environ}
    if given:
        if missing := [name for name in _VARIABLES if name not in os.environ]:
            raise ConfigError(f"{', '.join(given)} is set, but not {missing[0]}: set {', '.join(_VARIABLES)}, or none")
        if not all(value.isdigit() for value in given.values()):
            raise ConfigError(f"{given}: write whole numbers")
        count, index = map(int, given.values())
        if index >= count:
            raise ConfigError(f"JAX_PROCESS_ID is {index}: it must be less than JAX_NUM_PROCESSES, {count}")
        if count > 1:
            address = os.environ[_VARIABLES[0]]
            jax.distributed.initialize(address, count, index, **_TIMEOUTS)
    else:
        try:
            jax.distributed.initialize(**_TIMEOUTS)
        except ValueError as error:
            if _VARIABLES[0] in os.environ:
                raise ConfigError(f"{_VARIABLES[0]} is set: set {', '.join(_VARIABLES[1:])} too, or none") from error
            if "coordinator_address" not in str(error):  # that of a process in no job at all
                raise
        except RuntimeError as error:
            if "before any JAX calls" not in str(error):  # a test's or a notebook's, which has used its devices
                raise
    if not is_alone():
        # The CPU's collectives wait for a process for ever, but only once it has been heard of.
        multihost_utils.sync_global_devices("initialize")


def is_alone() -> bool:
    """Whether this process is the only one; asks no device."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_lead() -> bool:
    """Whether this process is the one that decides, logs and writes what is not cut over processes."""
    return is_alone() or jax.process_index() == 0


def on_lead(work: Callable[[], T]) -> T:
    """What ``work`` returns on the lead, a value that JSON can tell, on every process; the others wait.

    Raises:
      ConfigError, Interrupted, OSError: as the lead's ``work`` did; of its other errors OSError on the others.
    """
    if is_alone():
        return work()
    if not is_lead():
        return _told(None)
    try:
        result = work()
    except BaseException as error:
        kind = type(error).__name__
        _told({"error": kind, "message": str(error) or kind})
        raise
    return _told({"result": result})


def from_lead(values: Callable[[], Iterable[T]]) -> Iterator[T]:
    """The lead's values, one after another, on every process."""
    iterator = iter(values()) if is_lead() else iter(())
    while told := on_lead(lambda: list(itertools.islice(iterator, 1))):
        yield told[0]


def from_all(*values: int) -> list[tuple[int, ...]]:
    """The numbers, each below 2³¹, of every process, in their order."""
    if is_alone():
        return [values]
    return [tuple(row) for row in multihost_utils.process_allgather(np.array(values, np.int32)).tolist()]


def on_all(problem: str) -> list[str]:
    """What went wrong on any process, so that all of them do the same about it; empty where nothing did."""
    if is_alone():
        return [problem] if problem else []
    text = np.zeros(_PROBLEM_BYTES, np.uint8)
    told = np.frombuffer(problem.encode()[:_PROBLEM_BYTES], np.uint8)
    text[: len(told)] = told
    heard = multihost_utils.process_allgather(text)
    return [line for row in heard if (line := bytes(row).rstrip(b"\0").decode(errors="ignore"))]


def together(work: Callable[[], T]) -> T:
    """What ``work`` gives on each process, which reads files there; where it fails on one, all of them stop.

    Raises:
      ConfigError, OSError, Interrupted: as ``work`` did here; of another process OSError or Interrupted.
    """
    result: Any = None
    error: BaseException | None = None
    try:
        result = work()
    except (ConfigError, OSError, Interrupted) as caught:
        error = caught
    found = on_all("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if found:
        kind, _, message = found[0].partition(": ")
        raise Interrupted(message) if kind == "Interrupted" else OSError(message)
    return result


def fetch(tree: Any) -> Any:
    """Arrays as numpy has them, whole on every process, wherever their parts lie."""

    def one(x: Any) -> np.ndarray:
        whole = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x if whole else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)


def _told(message: dict[str, Any] | None) -> Any:
    """Tells the others, or hears from the lead; raises what went wrong there."""
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.asarray(multihost_utils.broadcast_one_to_all(text if is_lead() else np.zeros(size, np.uint8)))
    heard = json.loads(text.tobytes())
    if is_lead() or "error" not in heard:
        return heard.get("result")
    kinds = {"ConfigError": ConfigError, "Interrupted": Interrupted, "KeyboardInterrupt": Interrupted}
    raise kinds.get(heard["error"], OSError)(f"the lead process stopped: {heard['message']}")
