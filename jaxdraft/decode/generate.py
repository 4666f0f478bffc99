"""Autoregressive generation: what a model writes by itself.

Two jitted programs, one that reads prompts and a ``lax.while_loop`` over positions, compiled once per prompt bucket.
Rows finish independently; a finished row keeps its shape and writes nothing.

Shapes: B batch, T tokens, L bucket, S tokens of prompt and answer (also cache slots), V vocabulary, E end tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdraft.decode.batching import prompt_batches
from jaxdraft.decode.driver import (
    NO_LIMIT,
    Seconds,
    all_finite,
    bounds,
    end_tokens,
    new_tokens,
    on_rows,
    with_room,
    write_batches,
    write_on,
)
from jaxdraft.decode.sampling import (
    SAMPLE,
    Draws,
    Sampling,
    draw,
    is_any,
    most_likely,
    position_keys,
    probabilities,
    row_keys,
)
from jaxdraft.decode.score import TopK, TopScores, keep_scores, room_for_scores
from jaxdraft.models.cache import KVCache, init_cache
from jaxdraft.models.decoder import Decoder, Head, Params, compute_dtype, token_ids
from jaxdraft.sharding import mesh_of

_PREFILL_CHUNK = 128


class GeneratedBatch(NamedTuple):
    """What one batch wrote.

    Attributes:
      indices: positions of its prompts in the caller's list.
      tokens: new tokens of each of them, an end token included.
      seconds: what it took.
    """

    indices: list[int]
    tokens: list[list[int]]
    seconds: Seconds


class Written(NamedTuple):
    """Where a batch stands: its tokens, each row's length and the length at which it is done, the cache, whether all
    logits so far were finite, how many steps each row took part in, and what is kept of the distributions."""

    tokens_BS: jax.Array
    length_B: jax.Array
    end_B: jax.Array
    cache: KVCache
    finite_B: jax.Array
    steps_B: jax.Array
    scores: TopScores | None = None

    @property
    def finite(self) -> dict[str, jax.Array]:
        return {"the model": self.finite_B}


@dataclasses.dataclass(frozen=True, eq=False)
class Alone:
    """A model that writes by itself: the ``driver.Writer`` of ``generate_batches``.

    Attributes:
      decoder: with ``scan=False``.
      params: of ``for_decoding``.
      eos_E: tokens that end an answer.
      keep: of the distributions that tokens are drawn from, for a model without a draft vocabulary.
    """

    decoder: Decoder
    params: Params
    eos_E: np.ndarray
    keep: TopK | None = None

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.params)

    def start(self, tokens_BL: np.ndarray, length_B: np.ndarray, end_B: np.ndarray, size: int) -> Written:
        return start(self.decoder, self.params, tokens_BL, length_B, end_B, size, self.keep)

    def write(
        self, state: Written, sampling: Sampling | None, draws: Draws | None, floor: int = 0, most: int | None = None
    ) -> Written:
        return write(
            self.decoder,
            self.params,
            state,
            eos_E=self.eos_E,
            sampling=sampling,
            draws=draws,
            keep=self.keep,
            **bounds(floor, most),
        )


def generate(decoder: Decoder, params: Params, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """New tokens of every prompt, in the caller's order. The settings and errors are those of ``generate_batches``."""
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in generate_batches(decoder, params, prompts, **settings):
        for i, tokens in zip(batch.indices, batch.tokens, strict=True):
            answers[i] = tokens
    return answers


def generate_batches(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    seed: int = 0,
    example_ids: Sequence[int] | None = None,
    eos_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    repeats: int = 1,
) -> Iterator[GeneratedBatch]:
    """Generates batch by batch, so that a caller can show progress and save what is done.

    In float32, what is written for a prompt depends on the model, the prompt, its settings, the seed and its example
    id, and on nothing else. In bfloat16 the shape of the batch changes the rounding: keep it fixed.

    Args:
      decoder: with ``scan=False``.
      params: of ``for_decoding``.
      prompts: token ids, at least one each.
      max_new_tokens: for all prompts or per prompt.
      temperature: for all prompts or per prompt; 0 is greedy, and all 0 leaves sampling out of the program.
      top_p: for all prompts or per prompt.
      top_k: for all prompts or per prompt; 0 keeps every token.
      seed: of all randomness.
      example_ids: integers in [0, 2**32) naming each prompt's randomness; ``None`` numbers the prompts.
      eos_ids: tokens that end an answer; ``None`` takes the model's.
      batch_size: rows of every batch.
      repeats: run each batch so often, with the same keys, and report the best times.

    Raises:
      ConfigError: a value is out of range.
      FloatingPointError: the model gave logits that are not finite.
    """
    config = decoder.config
    batches = prompt_batches(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        example_ids=example_ids,
        batch_size=batch_size,
        vocab_size=config.vocabulary,
        max_positions=config.max_positions,
    )
    writer = Alone(decoder, params, end_tokens(config, eos_ids))
    for batch, state, seconds in write_batches(writer, batches, seed, repeats):
        yield GeneratedBatch(batch.indices, new_tokens(batch, state), seconds)


@functools.partial(jax.jit, static_argnames=("decoder", "size", "keep"))
def start(
    decoder: Decoder,
    params: Params,
    tokens_BL: jax.Array,
    length_B: jax.Array,
    end_B: jax.Array,
    size: int,
    keep: TopK | None = None,
) -> Written:
    """A ``Written`` of rows whose prompts are read, with room for ``size`` tokens of prompt and answer."""
    state = Written(
        tokens_BS=with_room(tokens_BL, size),
        length_B=length_B,
        end_B=end_B,
        cache=prefill(decoder, params, tokens_BL, length_B, end_B, size),
        finite_B=jnp.ones_like(length_B, bool),
        steps_B=jnp.zeros_like(length_B),
        scores=room_for_scores(keep, len(length_B), size),
    )
    return on_rows(state)


@functools.partial(jax.jit, static_argnames=("decoder", "size"))
def prefill(
    decoder: Decoder, params: Params, tokens_BL: jax.Array, length_B: jax.Array, end_B: jax.Array, size: int
) -> KVCache:
    """A cache of ``size`` slots that holds every prompt except its last token; no logits are computed.

    ``end_B`` is how long each row may grow: what LongRoPE's factors are chosen by.

    Runs in chunks, as many as the longest prompt needs, so that attention never spans bucket x slots at once.
    """
    batch, bucket = tokens_BL.shape
    chunk = min(bucket, _PREFILL_CHUNK)
    cache = init_cache(decoder.config, batch, size, decoder.dtype or compute_dtype(), end_B)

    def read(i: jax.Array, cache: KVCache) -> KVCache:
        tokens_BT = jax.lax.dynamic_slice_in_dim(tokens_BL, i * chunk, chunk, axis=1)
        positions_T = i * chunk + jnp.arange(chunk)
        slots_BT = jnp.where(positions_T < length_B[:, None] - 1, positions_T, size)
        return decoder.apply({"params": params}, tokens_BT, slots_BT, cache=cache)[1]

    chunks = (jnp.max(length_B) - 1 + chunk - 1) // chunk
    return jax.lax.fori_loop(0, chunks, read, cache)


@functools.partial(jax.jit, static_argnames=("decoder", "keep"), donate_argnames=("state",))
def write(decoder, params, state, *, eos_E, sampling, draws, floor=0, most=NO_LIMIT, keep=None):
    """Goes on with a ``Written`` until at most ``floor`` rows are live, or for ``most`` steps.

    Greedy without ``sampling`` and ``draws``.
    """
    head = Head.of(decoder, params)
    keys_B: Any = None if draws is None else row_keys(draws.seed, SAMPLE, draws.example_ids_B)
    rows_B = jnp.arange(state.tokens_BS.shape[0])
    nowhere = state.tokens_BS.shape[1]

    def step(state: Written) -> Written:
        live_B = state.length_B < state.end_B
        last_B = state.length_B - 1
        slots_B1 = jnp.where(live_B, last_B, nowhere)[:, None]
        last_B1 = state.tokens_BS[rows_B, last_B][:, None]
        hidden_B1D, cache = decoder.apply({"params": params}, last_B1, slots_B1, cache=state.cache)
        logits_B1V = head(hidden_B1D)
        logits_BV = logits_B1V[:, 0]
        if sampling is None:
            next_B = most_likely(logits_BV)
        else:
            next_B = draw(position_keys(keys_B, state.length_B), probabilities(logits_BV, sampling))
        next_B = token_ids(decoder.config, next_B)
        length_B = state.length_B + live_B
        return Written(
            tokens_BS=state.tokens_BS.at[rows_B, jnp.where(live_B, state.length_B, nowhere)].set(next_B, mode="drop"),
            length_B=length_B,
            end_B=jnp.where(live_B & is_any(next_B, eos_E), length_B, state.end_B),
            cache=cache,
            finite_B=state.finite_B & (~live_B | all_finite(logits_BV)),
            steps_B=state.steps_B + live_B,
            scores=keep_scores(state.scores, keep, logits_B1V, next_B[:, None], slots_B1),
        )

    return write_on(step, state, floor, most)
