"""Texts from a queue: a row of the running batch that is done is given the next one, so that no device waits.

Answers differ in length by more than ten times, and a batch that runs to its end waits for its longest. Here the loop
of a batch stops whenever an eighth of its rows is free, as "continuous batching" does after every token (Yu et al.,
Orca, OSDI 2022); new prompts are read by a program of a few rows, whose state is put into the free ones.

While the host takes finished answers, the devices write on: everything is dispatched before an answer is handed over.

Shapes: B batch, L bucket, D groups of devices with rows of their own, P rows of a group that are refilled together,
R = D · P, S tokens of prompt and answer.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.decode.batching import bucket_length, check_prompt
from jaxdraft.decode.blocks import WithDraft
from jaxdraft.decode.driver import Writer, check_finite, end_tokens, on_rows
from jaxdraft.decode.generate import Alone
from jaxdraft.decode.rules import Speculation
from jaxdraft.decode.sampling import Draws, Sampling
from jaxdraft.decode.score import TopK, TopScores
from jaxdraft.distributed import fetch
from jaxdraft.errors import ConfigError
from jaxdraft.models.decoder import Decoder, Params
from jaxdraft.sharding import replicated, row_groups


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to be written.

    Attributes:
      key: the caller's name for it.
      tokens: the prompt, at least one.
      max_new_tokens: at least 1.
      temperature: 0 is greedy.
      top_p: in (0, 1]; 1 keeps every token.
      example_id: in [0, 2**32), names its randomness.
      top_k: 0 keeps every token.

    Raises:
      ConfigError: a value is out of range.
    """

    key: Any
    tokens: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    example_id: int = 0
    top_k: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError(f"{self.key}: max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"{self.key}: temperature must be 0 or more and finite, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"{self.key}: top_p must be in (0, 1], not {self.top_p}: 1 keeps every token")
        if not 0 <= self.example_id < 2**32:
            raise ConfigError(f"{self.key}: example_id must be in [0, 2**32), not {self.example_id}")
        if self.top_k < 0:
            raise ConfigError(f"{self.key}: top_k must be 0 or more, not {self.top_k}: 0 keeps every token")


class Finished(NamedTuple):
    """A text that is written: the new tokens, an end token included.

    Attributes:
      request: what was asked.
      tokens: N new tokens.
      scores: of ``keep``, what the model said of each of them, ``[N, K]`` and ``[N, K + 2]``; else ``None``.
    """

    request: Request
    tokens: list[int]
    scores: TopScores | None = None


@dataclasses.dataclass
class Usage:
    """What a stream has taken so far.

    Attributes:
      steps: of the loop, each of which runs the model (the target) once.
      slots: rows of all steps.
      useful: rows of all steps that a text was written in.
      tokens: written, of finished texts.
      prefills: groups of prompts read.
      compiling: seconds of dispatching programs for the first time, which compiles unless an earlier run did.
      waiting: seconds of waiting for the devices, which work on while the host does something else.
    """

    steps: int = 0
    slots: int = 0
    useful: int = 0
    tokens: int = 0
    prefills: int = 0
    compiling: float = 0.0
    waiting: float = 0.0

    @property
    def busy(self) -> float:
        """Share of the slots that were useful; 1 before the first step."""
        return self.useful / self.slots if self.slots else 1.0


def stream(
    decoder: Decoder,
    params: Params,
    requests: Iterable[Request],
    *,
    batch_size: int,
    longest: int,
    seed: int = 0,
    eos_ids: Sequence[int] | None = None,
    sampled: bool = True,
    draft: tuple[Decoder, Params] | None = None,
    block_size: int = 4,
    keep: TopK | None = None,
    usage: Usage | None = None,
) -> Iterator[Finished]:
    """Writes the requested texts and gives each when it is done.

    In float32, what is written for a request depends on the model, the request and the seed, and on nothing else. In
    bfloat16 ``batch_size``, ``longest`` and whether there is a draft change the rounding: keep them fixed.

    Args:
      decoder: with ``scan=False``.
      params: of ``for_decoding``.
      requests: sorted by ``bucket_length`` of their prompts, as a batch has one bucket and is emptied for the next; of
        any lengths within it. Taken as rows get free, and one ahead. Where the mesh spans processes, all of them give
        the same.
      batch_size: rows.
      longest: the most new tokens that any request may ask for.
      seed: of all randomness.
      eos_ids: tokens that end a text; ``None`` takes the model's.
      sampled: ``False`` leaves sampling out of the program, for requests that are all greedy.
      draft: proposes tokens, and changes nothing of what is written.
      block_size: draft tokens proposed per run of the model.
      keep: how much of the model's distributions is given with the texts; not of one with a draft vocabulary.
      usage: is kept up to date.

    Raises:
      ConfigError: a value is out of range.
      FloatingPointError: a model gave logits that are not finite; the message has the keys.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
    config, eos_E = decoder.config, end_tokens(decoder.config, eos_ids)
    if keep is not None:
        config.check_target()
    writer: Writer = Alone(decoder, params, eos_E, keep)
    if draft is not None:
        writer = WithDraft(decoder, params, *draft, Speculation(block_size), eos_E, drafter_invariant=True, keep=keep)

    def checked(request: Request) -> Request:
        check_prompt(request.key, request.tokens, request.max_new_tokens, config.vocabulary, config.max_positions)
        if request.max_new_tokens > longest:
            raise ConfigError(f"{request.key}: max_new_tokens is {request.max_new_tokens}, longest {longest}")
        if request.temperature and not sampled:
            raise ConfigError(f"{request.key}: temperature is {request.temperature}, and sampled=False")
        return request

    usage = Usage() if usage is None else usage
    for bucket, queue in itertools.groupby(map(checked, requests), lambda request: bucket_length(len(request.tokens))):
        if isinstance(writer, WithDraft):
            writer.warn_of_length(bucket + longest)
        yield from _Batch(writer, batch_size, bucket, longest, seed if sampled else None, usage).run(queue)


class _Batch:
    """The running batch of one bucket: B // D rows for each group of devices, one group after another."""

    def __init__(self, writer: Writer, batch_size: int, bucket: int, longest: int, seed: int | None, usage: Usage):
        self._writer, self._seed, self._usage = writer, seed, usage
        self._batch_size, self._bucket, self._size = batch_size, bucket, bucket + longest
        groups = row_groups(writer.mesh)
        self._groups = 1 if batch_size % groups else groups
        self._enough = max(1, batch_size // 8)
        self._rows: dict[int, Request] = {}
        self._steps_B = np.zeros(batch_size, np.int32)
        self._state: Any = None

    def run(self, queue: Iterator[Request]) -> Iterator[Finished]:
        """Writes all of the queue."""
        finished: list[Finished] = []
        following, compiled = next(queue, None), False
        while following or self._rows:
            began = time.perf_counter()
            while following and self._batch_size - len(self._rows) >= self._enough:
                following = self._refill(itertools.chain([following], queue))
            self._write(floor=self._batch_size - self._enough if following else 0)
            if not compiled:
                self._usage.compiling += time.perf_counter() - began
                compiled = True
            yield from map(_here, finished)
            finished = self._take()
        yield from map(_here, finished)

    def _refill(self, queue: Iterator[Request]) -> Request | None:
        """Gives free rows the next requests, as many as one prefill reads; returns the request after them."""
        D, P = self._groups, -(-self._enough // self._groups)
        own = self._batch_size // D
        rows_DP = np.full((D, P), own, np.int32)  # outside: fillers are put nowhere
        tokens_RL = np.zeros((D * P, self._bucket), np.int32)
        length_R, end_R = np.ones(D * P, np.int32), np.ones(D * P, np.int32)
        for group in range(D):
            free = [row for row in range(own) if group * own + row not in self._rows]
            for place, (row, request) in enumerate(zip(free[:P], queue, strict=False)):
                self._rows[group * own + row] = request
                self._steps_B[group * own + row] = 0
                rows_DP[group, place] = row
                r, length = group * P + place, len(request.tokens)
                tokens_RL[r, :length] = request.tokens
                length_R[r], end_R[r] = length, length + request.max_new_tokens
        with jax.set_mesh(self._writer.mesh):
            new = self._writer.start(tokens_RL, length_R, end_R, self._size)
            state = empty(new, self._batch_size) if self._state is None else self._state
            self._state = insert(state, new, rows_DP)
        self._usage.prefills += 1
        return next(queue, None)

    def _write(self, floor: int) -> None:
        sampling, draws = None, None
        if self._seed is not None:
            temperature_B, top_p_B = np.zeros(self._batch_size, np.float32), np.ones(self._batch_size, np.float32)
            top_k_B, example_ids_B = np.zeros(self._batch_size, np.int32), np.zeros(self._batch_size, np.uint32)
            for row, request in self._rows.items():
                temperature_B[row], top_p_B[row] = request.temperature, request.top_p
                top_k_B[row], example_ids_B[row] = request.top_k, request.example_id
            sampling, draws = Sampling(temperature_B, top_p_B, top_k_B), Draws(np.int32(self._seed), example_ids_B)
        with jax.set_mesh(self._writer.mesh):
            self._state = self._writer.write(self._state, sampling, draws, floor)

    def _take(self) -> list[Finished]:
        """Waits for the devices and takes the texts that are done out of their rows."""
        began, state, usage = time.perf_counter(), self._state, self._usage
        tokens_BS, length_B, end_B, steps_B, finite = fetch(
            (state.tokens_BS, state.length_B, state.end_B, state.steps_B, state.finite)
        )
        usage.waiting += time.perf_counter() - began
        rows = list(self._rows)
        for model, finite_B in finite.items():
            check_finite(model, finite_B[rows], [request.key for request in self._rows.values()])
        run_B = (steps_B - self._steps_B)[rows]
        self._steps_B = steps_B.copy()
        usage.steps += int(run_B.max())
        usage.slots += int(run_B.max()) * self._batch_size
        usage.useful += int(run_B.sum())
        finished = []
        for row in rows:
            if length_B[row] == end_B[row]:
                request = self._rows.pop(row)
                tokens = tokens_BS[row, len(request.tokens) : length_B[row]].tolist()
                scores = None if state.scores is None else row_of(state.scores, np.int32(row), self._writer.mesh)
                finished.append(Finished(request, tokens, scores))
                usage.tokens += len(finished[-1].tokens)
        return finished


def _here(finished: Finished) -> Finished:
    """With its scores fetched, and cut to the tokens that they are of."""
    if finished.scores is None:
        return finished
    first = len(finished.request.tokens) - 1
    cut = lambda x: x[first : first + len(finished.tokens)]
    return finished._replace(scores=jax.tree.map(cut, fetch(finished.scores)))


@functools.partial(jax.jit, static_argnames=("mesh",))
def row_of(tree, row, mesh):
    """One row of each array, whole on every device."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[row], replicated(mesh)), tree)


@functools.partial(jax.jit, static_argnames=("rows",))
def empty(like, rows):
    """A ``State`` of so many rows that are done, with the slots of another one."""
    return on_rows(jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), like))


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(state, new, rows_DP):
    """Puts rows of ``new``, P for each of D groups of devices, into their group's rows of ``state``.

    Group by group, so that a mesh whose groups have rows of their own has nothing to send. A row outside is put
    nowhere.
    """
    groups = rows_DP.shape[0]

    def put(x, new):
        cut = lambda x: x.reshape(groups, -1, *x.shape[1:])
        of_group = lambda x, new, rows: x.at[rows].set(new, mode="drop")
        return jax.vmap(of_group)(cut(x), cut(new), rows_DP).reshape(x.shape)

    return on_rows(jax.tree.map(put, state, new))
