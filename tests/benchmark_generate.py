"""How full a stream keeps its batch, what that and a draft bring beside batches that run to their end, and what it
costs to keep the model's 32 most likely tokens.

    python -m tests.benchmark_generate

Texts of 8 to 256 tokens, uniformly, by a model that never ends one by itself: what a device does for a row that has
nothing to write is then all that differs. Streams and batches run in turn in one process, medians are compared.
Compilation is left out of both; of the batches, also what lies between them.
"""

import functools
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdraft.decode import Request, TopK, Usage, generate_batches, stream
from jaxdraft.models import Decoder, ModelConfig, for_decoding, init_params

SHORTEST, LONGEST, BLOCK_SIZE = 8, 256, 3
TARGET = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    tie_embeddings=False,
    eos_ids=(4096,),  # never comes
)
DRAFT = ModelConfig(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=256,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    tie_embeddings=False,
    eos_ids=(4096,),
)


def model(config, seed):
    """Random weights, but for a head that makes one token likely after each, the same in every model."""
    params = init_params(config, jax.random.key(seed))
    embed_VD = params["embed"] / jnp.linalg.norm(params["embed"], axis=1, keepdims=True)
    following_V = np.random.default_rng(0).permutation(config.vocabulary)
    sharpness = 10 / config.hidden_size**0.5
    params |= {"embed": embed_VD, "head": jnp.zeros_like(params["head"]).at[:, following_V].set(sharpness * embed_VD.T)}
    return Decoder(config, scan=False), for_decoding(config, params)


def requests(count):
    rng = np.random.default_rng(0)
    return [
        Request(
            key=key,
            tokens=rng.integers(0, TARGET.vocabulary, int(rng.integers(4, 64))).tolist(),
            max_new_tokens=int(rng.integers(SHORTEST, LONGEST + 1)),
            temperature=1.0,
            example_id=key,
        )
        for key in range(count)
    ]


class Run(NamedTuple):
    seconds: float
    texts: dict[int, list[int]]
    usage: Usage


def streamed(target, draft, keep, batch_size, asked):
    usage, began = Usage(), time.perf_counter()
    found = stream(
        *target,
        asked,
        batch_size=batch_size,
        longest=LONGEST,
        draft=draft,
        block_size=BLOCK_SIZE,
        keep=keep,
        usage=usage,
    )
    texts = {finished.request.key: finished.tokens for finished in found}
    return Run(time.perf_counter() - began - usage.compiling, texts, usage)


def in_batches(target, batch_size, asked):
    batches = list(
        generate_batches(
            *target,
            [request.tokens for request in asked],
            max_new_tokens=[request.max_new_tokens for request in asked],
            temperature=1.0,
            batch_size=batch_size,
        )
    )
    texts = {i: tokens for batch in batches for i, tokens in zip(batch.indices, batch.tokens, strict=True)}
    return Run(sum(batch.seconds.decode + batch.seconds.prefill for batch in batches), texts, Usage())


def compare(batch_size, count, rounds):
    target, draft, asked = model(TARGET, 0), model(DRAFT, 1), requests(count)
    forms = {
        "in batches": functools.partial(in_batches, target, batch_size),
        "stream": functools.partial(streamed, target, None, None, batch_size),
        "top 32 kept": functools.partial(streamed, target, None, TopK(32), batch_size),
        "with a draft": functools.partial(streamed, target, draft, None, batch_size),
    }
    for run in forms.values():
        run([Request(0, [1], LONGEST, 1.0)])  # compiles
    runs = {name: [] for name in forms}
    for _ in range(rounds):
        for name, run in forms.items():
            runs[name].append(run(asked))
            assert runs[name][-1].texts == runs["in batches"][0].texts, name

    tokens, first = sum(request.max_new_tokens for request in asked), runs["in batches"]
    print(f"{count} texts, {tokens:,} tokens, batches of {batch_size}, {rounds} rounds")
    for name, found in runs.items():
        rate = statistics.median(tokens / run.seconds for run in found)
        ratios = sorted(before.seconds / run.seconds for before, run in zip(first, found, strict=True))
        print(f"  {name:<13} {rate:7,.0f} tokens/s, {statistics.median(ratios):.2f} times batches' {ratios}")
    alone, drafted = runs["stream"][0].usage, runs["with a draft"][0].usage
    print(f"  stream: {alone.busy:.1%} of the rows busy in {alone.steps} steps, {alone.prefills} prefills")
    kept = sorted(
        run.seconds / plain.seconds - 1 for run, plain in zip(runs["top 32 kept"], runs["stream"], strict=True)
    )
    print(f"  top 32 kept: {statistics.median(kept):+.1%} time {kept}")
    host = statistics.median(1 - run.usage.waiting / run.seconds for run in runs["stream"])
    print(f"  stream: {host:.1%} of the time the host does not wait for the device")
    print(f"  with a draft: {drafted.tokens / drafted.useful:.2f} tokens per run of the target", flush=True)


def main():
    compare(batch_size=32, count=512, rounds=3)
    compare(batch_size=4, count=64, rounds=5)


if __name__ == "__main__":
    main()
