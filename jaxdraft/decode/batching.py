"""From a list of prompts to batches of few shapes, on the host.

Prompts are grouped by length bucket and every batch of a bucket has the same shape, the last one filled up with rows
that have nothing to do: one compilation per bucket.

Shapes: B batch, L bucket length, S tokens of prompt and answer together.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdraft.errors import ConfigError

_SMALLEST_BUCKET = 128  # a program costs seconds to compile, padding in the prefill next to nothing


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts of one bucket. Rows past ``len(indices)`` are fillers: done before they start.

    Attributes:
      indices: which of the caller's prompts the rows are.
      bucket: every prompt's length is at most this.
      tokens_BS: int32; row b holds its prompt, then room for its answer.
      length_B: int32, tokens of each prompt.
      end_B: int32, the length at which the row is full.
      example_ids_B: uint32, name each row's randomness.
      temperature_B: float32.
      top_p_B: float32.
      top_k_B: int32.
    """

    indices: list[int]
    bucket: int
    tokens_BS: np.ndarray
    length_B: np.ndarray
    end_B: np.ndarray
    example_ids_B: np.ndarray
    temperature_B: np.ndarray
    top_p_B: np.ndarray
    top_k_B: np.ndarray


def bucket_length(length: int) -> int:
    """The smallest power of two, at least 128, that holds ``length`` tokens."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def per_prompt(name: str, value: Any, count: int, kind: type) -> np.ndarray:
    """``value`` as an array ``[count]`` of ``kind``: given once for all prompts, or one for each.

    Raises:
      ConfigError: there are as many as neither.
    """
    values: np.ndarray = np.asarray(value, kind)
    if values.ndim and values.shape != (count,):
        raise ConfigError(f"{name} has {values.shape} values for {count} prompts: give one, or one per prompt")
    return np.broadcast_to(values, (count,))


def prompt_batches(
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float],
    top_p: float | Sequence[float],
    top_k: int | Sequence[int],
    example_ids: Sequence[int] | None,
    batch_size: int,
    vocab_size: int,
    max_positions: int,
) -> list[PromptBatch]:
    """Sorts prompts into batches, shortest bucket first and in the caller's order within a bucket.

    Args:
      prompts: token ids, at least one each.
      max_new_tokens: for all prompts or per prompt.
      temperature: for all prompts or per prompt.
      top_p: for all prompts or per prompt.
      top_k: for all prompts or per prompt.
      example_ids: integers in [0, 2**32); ``None`` numbers the prompts.
      batch_size: rows of every batch.
      vocab_size: every token must be below it.
      max_positions: prompt and answer together must fit.

    Raises:
      ConfigError: a value is out of range; the message names the prompt.
    """
    count = len(prompts)
    limits = per_prompt("max_new_tokens", max_new_tokens, count, np.int64)
    temperatures = per_prompt("temperature", temperature, count, np.float32)
    top_ps = per_prompt("top_p", top_p, count, np.float32)
    top_ks = per_prompt("top_k", top_k, count, np.int32)
    ids = per_prompt("example_ids", range(count) if example_ids is None else example_ids, count, np.int64)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
    if not np.all(np.isfinite(temperatures) & (temperatures >= 0)):
        raise ConfigError(f"temperature must be 0 or more and finite, not {temperature}")
    if not np.all((top_ps > 0) & (top_ps <= 1)):
        raise ConfigError(f"top_p must be in (0, 1], not {top_p}: 1 keeps every token")
    if not np.all(top_ks >= 0):
        raise ConfigError(f"top_k must be 0 or more, not {top_k}: 0 keeps every token")
    if not np.all((ids >= 0) & (ids < 2**32)):
        raise ConfigError("example_ids must be integers in [0, 2**32)")
    if not np.all(limits >= 1):
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        check_prompt(i, prompt, int(limits[i]), vocab_size, max_positions)

    by_bucket: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_bucket.setdefault(bucket_length(len(prompt)), []).append(i)
    batches = []
    for bucket, members in sorted(by_bucket.items()):
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            tokens_BS = np.zeros((batch_size, bucket + int(limits.max())), np.int32)
            for row, i in enumerate(indices):
                tokens_BS[row, : len(prompts[i])] = prompts[i]
            length_B = _fill(np.asarray([len(prompts[i]) for i in indices]), batch_size, 1, np.int32)
            batches.append(
                PromptBatch(
                    indices=indices,
                    bucket=bucket,
                    tokens_BS=tokens_BS,
                    length_B=length_B,
                    end_B=length_B + _fill(limits[indices], batch_size, 0, np.int32),
                    example_ids_B=_fill(ids[indices], batch_size, 0, np.uint32),
                    temperature_B=_fill(temperatures[indices], batch_size, 0, np.float32),
                    top_p_B=_fill(top_ps[indices], batch_size, 1, np.float32),
                    top_k_B=_fill(top_ks[indices], batch_size, 0, np.int32),
                )
            )
    return batches


def check_prompt(name: Any, prompt: Sequence[int], limit: int, vocab_size: int, max_positions: int) -> None:
    """Raises ConfigError, with the prompt's name, where a model cannot go on from it for ``limit`` tokens."""
    if not len(prompt):
        raise ConfigError(f"prompt {name} is empty: generation continues from its last token, give at least one")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ConfigError(
            f"prompt {name} has token ids from {min(prompt)} to {max(prompt)}, the model knows 0 to {vocab_size - 1}: "
            "was it made with another tokenizer?"
        )
    if len(prompt) + limit > max_positions:
        raise ConfigError(
            f"prompt {name} has {len(prompt)} tokens and may grow by {limit}, past the model's {max_positions} "
            "positions: shorten the prompt or lower max_new_tokens"
        )


def _fill(values: np.ndarray, size: int, filler: float, kind: type) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=filler).astype(kind)
