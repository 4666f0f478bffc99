"""Autoregressive generation: what a model writes by itself.

A host driver over two jitted programs, prefill and a ``lax.while_loop`` over positions, compiled once per prompt
bucket. Rows finish independently; a finished row keeps its shape and writes nothing.

Shapes: B batch, T tokens, L bucket, S tokens of prompt and answer (also cache slots), V vocabulary, E end tokens.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdraft.decode.batching import PromptBatch, prompt_batches
from jaxdraft.decode.sampling import SAMPLE, Draws, Sampling, draw, is_any, position_keys, probabilities, row_keys
from jaxdraft.distributed import fetch
from jaxdraft.errors import ConfigError
from jaxdraft.models.cache import KVCache, init_cache
from jaxdraft.models.decoder import Decoder, Params, compute_dtype, head_weight, logits, token_ids
from jaxdraft.sharding import mesh_of, place

_PREFILL_CHUNK = 128


class Seconds(NamedTuple):
    """Wall time of one batch.

    Attributes:
      decode: of the loop alone, the best of the repeats.
      prefill: of reading the prompts, the best of the repeats.
      compile: of the first call of this bucket, which compiles unless an earlier run did; 0 for later batches.
    """

    decode: float
    prefill: float
    compile: float


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
    """Where a batch stands: its tokens, each row's length and the length at which it is done, the cache, and whether
    all logits so far were finite."""

    tokens_BS: jax.Array
    length_B: jax.Array
    end_B: jax.Array
    cache: KVCache
    finite_B: jax.Array


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
        example_ids=example_ids,
        batch_size=batch_size,
        vocab_size=config.vocabulary,
        max_positions=config.max_positions,
    )
    greedy, mesh = all_greedy(batches), mesh_of(params)
    eos_E = np.asarray(config.eos_ids if eos_ids is None else eos_ids, np.int32)
    seen: set[int] = set()
    for batch in batches:
        sampling = None if greedy else Sampling(batch.temperature_B, batch.top_p_B)
        draws = None if greedy else Draws(np.int32(seed), batch.example_ids_B)

        def start(end_B: np.ndarray, batch: PromptBatch = batch) -> Written:
            size = batch.tokens_BS.shape[1]
            prompts_BL = batch.tokens_BS[:, : batch.bucket]
            cache = prefill(decoder, params, prompts_BL, batch.length_B, batch.end_B, size)
            return Written(*arrays(mesh, batch, end_B), cache, *place(mesh, (np.ones(len(end_B), bool),), rows=True))

        decode = functools.partial(write, decoder, params, eos_E=eos_E, sampling=sampling, draws=draws)
        with jax.set_mesh(mesh):
            state, seconds = timed(start, decode, batch, repeats, warm=batch.bucket in seen)
        seen.add(batch.bucket)
        check_finite("the model", state.finite_B, batch)
        yield GeneratedBatch(batch.indices, new_tokens(batch, state.tokens_BS, state.length_B), seconds)


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


@functools.partial(jax.jit, static_argnames=("decoder",), donate_argnames=("state",))
def write(decoder, params, state, *, eos_E, sampling, draws):
    """Goes on with a ``Written`` until every row is done; greedy without ``sampling`` and ``draws``."""
    head_DV = head_weight(decoder.config, params)
    keys_B: Any = None if draws is None else row_keys(draws.seed, SAMPLE, draws.example_ids_B)
    rows_B = jnp.arange(state.tokens_BS.shape[0])
    nowhere = state.tokens_BS.shape[1]

    def step(state: Written) -> Written:
        live_B = state.length_B < state.end_B
        last_B = state.length_B - 1
        slots_B1 = jnp.where(live_B, last_B, nowhere)[:, None]
        last_B1 = state.tokens_BS[rows_B, last_B][:, None]
        hidden_B1D, cache = decoder.apply({"params": params}, last_B1, slots_B1, cache=state.cache)
        logits_BV = logits(hidden_B1D, head_DV)[:, 0]
        if sampling is None:
            next_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
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
        )

    return jax.lax.while_loop(lambda state: jnp.any(state.length_B < state.end_B), step, state)


def all_finite(logits: jax.Array) -> jax.Array:
    """Whether each row's largest logit is a number: NaN and +inf anywhere in a row show in its maximum."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def all_greedy(batches: Sequence[PromptBatch]) -> bool:
    """Whether no row of any batch is sampled."""
    return all(np.all(batch.temperature_B == 0) for batch in batches)


def arrays(mesh: Mesh, batch: PromptBatch, end_B: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fresh device arrays of tokens, lengths and ends: a decode program may reuse their memory."""
    return place(mesh, (batch.tokens_BS, batch.length_B, end_B), rows=True)


def timed(
    start: Callable[[np.ndarray], Any], decode: Callable[[Any], Any], batch: PromptBatch, repeats: int, warm: bool
) -> tuple[Any, Seconds]:
    """Runs prefill and decode of one batch and times them apart.

    Where the shapes are new, both run first with every row full from the start, which compiles and decodes nothing.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}: it must be at least 1")
    compiling = 0.0 if warm else _clock(lambda: decode(start(batch.length_B)))[1]
    times = []
    for _ in range(repeats):
        state, reading = _clock(lambda: start(batch.end_B))
        state, writing = _clock(functools.partial(decode, state))
        times.append((writing, reading))
    return state, Seconds(min(w for w, _ in times), min(r for _, r in times), compiling)


def _clock(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - began


def new_tokens(batch: PromptBatch, tokens_BS: jax.Array, length_B: jax.Array) -> list[list[int]]:
    """What was written after each prompt of the batch, fillers left out."""
    tokens, lengths = fetch((tokens_BS, length_B))
    return [tokens[row, batch.length_B[row] : lengths[row]].tolist() for row in range(len(batch.indices))]


def check_finite(model: str, finite_B: jax.Array, batch: PromptBatch) -> None:
    """Raises FloatingPointError, naming the prompts, where a row met logits that are not finite."""
    bad = [i for i, finite in zip(batch.indices, fetch(finite_B), strict=False) if not finite]
    if bad:
        raise FloatingPointError(f"{model} gave logits that are not finite for prompts {bad}: are its weights damaged?")
