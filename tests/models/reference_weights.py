"""Weights that follow from a tensor's name and shape alone, the same on every machine: nothing need be stored."""

import zlib

import numpy as np


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32, large enough that a wrong order of anything shows in the logits; norms lie around 1."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32).reshape(shape)
    if "norm" in name:
        return np.float32(1) + np.float32(0.2) * uniform
    if name.endswith("bias"):
        return np.float32(0.5) * uniform
    return np.float32(2.5 / np.sqrt(shape[-1])) * uniform
