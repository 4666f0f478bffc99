"""The platform that programs are made for: the one they run on, or one that they are only compiled for."""

import contextlib
from collections.abc import Iterator

import jax

_assumed: list[str] = []


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what chunk sizes, dtypes and attention kernels are chosen by."""
    return _assumed[-1] if _assumed else jax.default_backend()


@contextlib.contextmanager
def assumed(name: str) -> Iterator[None]:
    """Programs traced inside are made for another platform than the one at hand: ``jaxdraft plan`` compiles ahead.

    Tracing is cached by the functions that are jitted: trace programs of one platform only in one process.
    """
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()
