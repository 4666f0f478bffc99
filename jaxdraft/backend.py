"""The platform that programs are made for, the one they run on or one they are only compiled for, and what it wants."""

import contextlib
from collections.abc import Iterator

import jax

_assumed: list[str] = []


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what chunk sizes, dtypes and attention kernels are chosen by."""
    return _assumed[-1] if _assumed else jax.default_backend()


def default_chunk(vocabulary: int) -> int:
    """Positions whose logits are held at once, at least 128: 2 MiB of float32 on a CPU, 128 MiB elsewhere.

    In training every chunk reads the head twice and its gradient once and writes it once, about 2/C bytes for each
    floating-point operation: a CPU is a sixth slower with 64 positions, accelerators need some 500 before the products
    dominate.
    """
    return max(128, (2 if platform() == "cpu" else 128) * 2**20 // (4 * vocabulary))


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
