"""Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of Hugging Face checkpoints.

Two ways of stretching it past the length it was trained on: Llama 3's, which slows low frequencies once and for all,
and Phi-3's LongRoPE (arXiv 2402.13753), which has one set of factors for short texts and one for long ones.

Shapes: B batch, T tokens, H head size, F = H / 2 frequencies.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: wavelengths beyond the original context are stretched by ``factor``, short ones are left alone.

    Attributes:
      factor: of the longest wavelengths.
      low_freq_factor: wavelengths above ``original_max_positions / low_freq_factor`` are stretched in full.
      high_freq_factor: wavelengths below ``original_max_positions / high_freq_factor`` stay; between, it is linear.
      original_max_positions: context length before the stretching.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_max_positions):
            raise ConfigError(f"{self}: factor is at least 1 and 0 < low_freq_factor < high_freq_factor")


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Phi-3's: every frequency divided by a factor of its own, one list for short texts and one for long ones.

    Which list is used is a matter of the whole text: all keys of a text have to be turned by the same angles. A text
    that can grow past ``original_max_positions`` uses the long list from its first token on (as vLLM and llama.cpp
    do for a context of that size; transformers changes over in the middle and computes the cache anew).

    Attributes:
      short_factor: F factors for texts of at most ``original_max_positions`` tokens.
      long_factor: F factors for longer ones.
      original_max_positions: context length before the stretching.
      attention_factor: multiplies cosine and sine; ``None`` is sqrt(1 + ln(s) / ln(original_max_positions)) with s
        how many times longer the model's context is.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float | None = None

    def __post_init__(self):
        if len(self.short_factor) != len(self.long_factor) or min(*self.short_factor, *self.long_factor) <= 0:
            raise ConfigError("longrope: short_factor and long_factor are lists of equal length, all positive")
        if self.original_max_positions < 2:
            raise ConfigError(f"longrope: original_max_positions is {self.original_max_positions}: at least 2")


Scaling = Llama3Scaling | LongRope | None


def rope_angles(
    positions_BT: jax.Array,
    head_size: int,
    theta: float,
    scaling: Scaling = None,
    max_positions: int = 0,
    long_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each ``[B, T, 1, F]`` in float32, of every position's rotation angles.

    Args:
      positions_BT: of each token in its text.
      head_size: H.
      theta: the base.
      scaling: ``None`` for the plain embedding.
      max_positions: the model's context, which sets LongRoPE's attention factor.
      long_B: rows that use LongRoPE's long factors; ``None`` takes those with a position past the original context.
    """
    # Rounded as in transformers: at position 100,000 another last bit moves logits by a hundredth.
    frequencies = 1.0 / theta ** (np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size))
    positions_BT11 = positions_BT[..., None, None].astype(jnp.float32)
    if isinstance(scaling, LongRope):
        if long_B is None:
            long_B = jnp.any(positions_BT >= scaling.original_max_positions, axis=1)
        short, long = (frequencies / np.asarray(f, np.float32) for f in (scaling.short_factor, scaling.long_factor))
        angles = positions_BT11 * jnp.where(long_B[:, None, None, None], long, short)
        factor = _attention_factor(scaling, max_positions)
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor
    if isinstance(scaling, Llama3Scaling):
        frequencies = _llama3(frequencies, scaling)
    angles = positions_BT11 * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_size / 2) of every head by the angles of its position."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _llama3(frequencies_F: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """As transformers' ``_compute_llama3_parameters``: stretched, left alone, or in between by how many turns fit."""
    turns_F = scaling.original_max_positions * frequencies_F / (2 * np.pi)
    share_F = (turns_F - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share_F = np.clip(share_F, 0, 1)
    return ((1 - share_F) * frequencies_F / scaling.factor + share_F * frequencies_F).astype(np.float32)


def longrope_attention(longer: float, original_max_positions: int) -> float:
    """sqrt(1 + ln(longer) / ln(original)): what LongRoPE multiplies cosine and sine by in a context so much longer."""
    return math.sqrt(1 + math.log(longer) / math.log(original_max_positions)) if longer > 1 else 1.0


def _attention_factor(scaling: LongRope, max_positions: int) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return longrope_attention(max_positions / scaling.original_max_positions, scaling.original_max_positions)
