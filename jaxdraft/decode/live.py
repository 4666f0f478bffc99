"""One text while it is written: the loop of a writer in calls of a few steps, each of about a tenth of a second.

The text is that of a single call, whose program this is. What lies between two calls, taking the tokens and showing
them, is on no clock.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from jaxdraft.decode.batching import PromptBatch
from jaxdraft.decode.blocks import WrittenInBlocks
from jaxdraft.decode.driver import Writer, calls, check_finite, clock, new_tokens
from jaxdraft.decode.speculative import SpeculativeResult, results
from jaxdraft.distributed import fetch

_CALL_SECONDS = 0.1  # a call more costs some 2 ms on two CPU cores


class Progress(NamedTuple):
    """Where a text stands.

    Attributes:
      result: what is written so far; of a model alone, a block for each token, and nothing drafted.
      prefill: seconds of reading the prompt.
      decode: seconds of the calls so far.
    """

    result: SpeculativeResult
    prefill: float
    decode: float


def compile_live(writer: Writer, batch: PromptBatch, seed: int, greedy: bool) -> float:
    """Reads a prompt and takes one step, as ``write_live`` will; returns the seconds, of compiling mostly.

    A step, because the first one of a program is slower than others by more than what compiling takes.
    """
    begin, write = calls(writer, batch, seed, greedy)
    with jax.set_mesh(writer.mesh):
        return clock(lambda: write(begin(end_B=batch.end_B), most=1))[1]


def write_live(writer: Writer, batch: PromptBatch, seed: int, greedy: bool) -> Iterator[Progress]:
    """Writes after the one prompt of a batch; says where it stands after each call, the last time when it is done.

    Args:
      writer: a model ``Alone``, or ``WithDraft``.
      batch: of one row.
      seed: of all randomness.
      greedy: leave sampling out of the program.

    Raises:
      FloatingPointError: a model gave logits that are not finite.
    """
    begin, write = calls(writer, batch, seed, greedy)
    with jax.set_mesh(writer.mesh):
        state, prefill = clock(lambda: begin(end_B=batch.end_B))
    decode, steps = 0.0, 1
    while True:
        with jax.set_mesh(writer.mesh):
            state, seconds = clock(functools.partial(write, state, most=steps))
        decode += seconds
        length_B, end_B, finite = fetch((state.length_B, state.end_B, state.finite))
        for model, finite_B in finite.items():
            check_finite(model, finite_B, batch.indices)
        yield Progress(_result(batch, state), prefill, decode)
        if length_B[0] == end_B[0]:
            return
        steps = max(1, int(steps * _CALL_SECONDS / seconds))


def _result(batch: PromptBatch, state) -> SpeculativeResult:
    if isinstance(state, WrittenInBlocks):
        return results(batch, state)[0]
    (tokens,) = new_tokens(batch, state)
    none = [0] * len(tokens)
    return SpeculativeResult(tokens, accepted=none, cut=False, drafted=none, rejected=[-1] * len(tokens))
