"""What all decoding has in common: the state of a batch, what writes, and a host driver over whole batches.

Shapes: B batch, L bucket, S tokens of prompt and answer, V vocabulary, E end tokens.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdraft.decode.batching import PromptBatch
from jaxdraft.decode.sampling import Draws, Sampling
from jaxdraft.distributed import fetch
from jaxdraft.errors import ConfigError
from jaxdraft.models.config import ModelConfig
from jaxdraft.sharding import CACHE, constrain

NO_LIMIT = np.int32(np.iinfo(np.int32).max)
"""More steps than any loop takes."""


class State(Protocol):
    """What the drivers read of where a batch stands: of ``Written`` or ``blocks.WrittenInBlocks``."""

    @property
    def tokens_BS(self) -> jax.Array:
        """``int32[B, S]``: prompts and answers."""

    @property
    def length_B(self) -> jax.Array:
        """``int32[B]``: tokens of each row."""

    @property
    def end_B(self) -> jax.Array:
        """``int32[B]``: the length at which a row is done."""

    @property
    def steps_B(self) -> jax.Array:
        """``int32[B]``: runs of the model (the target) that each row took part in."""

    @property
    def finite(self) -> dict[str, jax.Array]:
        """For each model, ``bool[B]``: whether all its logits were finite."""


class Writer(Protocol):
    """What writes: a model ``Alone``, or ``blocks.WithDraft``. Both methods only dispatch."""

    @property
    def mesh(self) -> Mesh:
        """Its devices; ``jax.set_mesh`` of it has to be in effect in both methods."""

    def start(self, tokens_BL: np.ndarray, length_B: np.ndarray, end_B: np.ndarray, size: int) -> Any:
        """The ``State`` of rows whose prompts are read, with room for ``size`` tokens of prompt and answer."""

    def write(
        self, state: Any, sampling: Sampling | None, draws: Draws | None, floor: int = 0, most: int | None = None
    ) -> Any:
        """Goes on with a ``State``, whose memory it takes, until at most ``floor`` rows are live, or for ``most`` runs
        of the model (the target)."""


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


def write_batches(
    writer: Writer, batches: Sequence[PromptBatch], seed: int, repeats: int
) -> Iterator[tuple[PromptBatch, Any, Seconds]]:
    """Runs one batch after another to its end: the batch, its ``State`` and what it took.

    Raises:
      FloatingPointError: a model gave logits that are not finite.
    """
    greedy = all(np.all(batch.temperature_B == 0) for batch in batches)
    seen: set[int] = set()
    for batch in batches:
        size = batch.tokens_BS.shape[1]
        begin = functools.partial(writer.start, batch.tokens_BS[:, : batch.bucket], batch.length_B, size=size)
        decode = functools.partial(
            writer.write,
            sampling=None if greedy else Sampling(batch.temperature_B, batch.top_p_B, batch.top_k_B),
            draws=None if greedy else Draws(np.int32(seed), batch.example_ids_B),
        )
        with jax.set_mesh(writer.mesh):
            state, seconds = timed(begin, decode, batch, repeats, warm=batch.bucket in seen)
        seen.add(batch.bucket)
        for model, finite_B in fetch(state.finite).items():
            check_finite(model, finite_B, batch.indices)
        yield batch, state, seconds


def timed(
    begin: Callable[..., Any], decode: Callable[[Any], Any], batch: PromptBatch, repeats: int, warm: bool
) -> tuple[Any, Seconds]:
    """Runs prefill and decode of one batch and times them apart.

    Where the shapes are new, both run first with every row full from the start, which compiles and decodes nothing.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}: it must be at least 1")
    compiling = 0.0 if warm else _clock(lambda: decode(begin(end_B=batch.length_B)))[1]
    times = []
    for _ in range(repeats):
        state, reading = _clock(lambda: begin(end_B=batch.end_B))
        state, writing = _clock(functools.partial(decode, state))
        times.append((writing, reading))
    return state, Seconds(min(w for w, _ in times), min(r for _, r in times), compiling)


def _clock(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - began


def new_tokens(batch: PromptBatch, state: State) -> list[list[int]]:
    """What was written after each prompt of the batch, fillers left out."""
    tokens, lengths = fetch((state.tokens_BS, state.length_B))
    return [tokens[row, batch.length_B[row] : lengths[row]].tolist() for row in range(len(batch.indices))]


def check_finite(model: str, finite_B: np.ndarray, names: Sequence[Any]) -> None:
    """Raises FloatingPointError, with the names of their prompts, where rows met logits that are not finite."""
    bad = [name for name, finite in zip(names, finite_B, strict=False) if not finite]
    if bad:
        raise FloatingPointError(f"{model} gave logits that are not finite for prompts {bad}: are its weights damaged?")


def end_tokens(config: ModelConfig, eos_ids: Sequence[int] | None) -> np.ndarray:
    """``int32[E]``: the given end tokens, or the model's."""
    return np.asarray(config.eos_ids if eos_ids is None else eos_ids, np.int32)


def write_on(step: Callable[[Any], Any], state: Any, floor: jax.Array, most: jax.Array) -> Any:
    """Inside ``jit``, takes steps until at most ``floor`` rows are live, or ``most`` of them."""
    go_on = lambda carry: (count_live(carry[0]) > floor) & (carry[1] < most)
    return jax.lax.while_loop(go_on, lambda carry: (step(carry[0]), carry[1] + 1), (state, jnp.int32(0)))[0]


def bounds(floor: int, most: int | None) -> dict[str, np.int32]:
    """As ``write_on`` takes them: whatever they are, the program is one."""
    return {"floor": np.int32(floor), "most": NO_LIMIT if most is None else np.int32(most)}


def count_live(state: State) -> jax.Array:
    """How many rows are not done."""
    return jnp.sum(state.length_B < state.end_B)


def with_room(tokens_BL: jax.Array, size: int) -> jax.Array:
    """``[B, S]``: the prompts, and zeros up to ``size`` tokens."""
    return jnp.pad(tokens_BL, ((0, 0), (0, size - tokens_BL.shape[1])))


def on_rows(state: Any) -> Any:
    """Inside ``jit``, a ``State`` laid out over the mesh as decoding wants it: cut by rows, caches by heads too."""
    axes = lambda x: CACHE if x.ndim == len(CACHE) else ("batch", *[None] * (x.ndim - 1))
    return jax.tree.map(lambda x: constrain(x, axes(x)), state)


def all_finite(logits: jax.Array) -> jax.Array:
    """Whether each row's largest logit is a number: NaN and +inf anywhere in a row show in its maximum."""
    return jnp.isfinite(jnp.max(logits, axis=-1))
