"""How fast the decoders are on a CPU, alone and with a draft, beside transformers on the same weights.

    python -m tests.benchmark_decode [--threads 1 2] [--targets 58M 220M] [--rounds 5] [--no-batches]

Where torch and transformers are installed in this Python, transformers runs in turn with the decoders, in one process:
float32, the same prompts, batch 1, assisted generation with as many draft tokens in every block, greedy answers equal
token for token. Medians over the rounds; prefill and compilation are outside on both sides. A thread count and a target
are a process of their own: XLA is told of threads when it starts.

Nothing is trained: targets and draft have random weights in every matrix of full size, and heads that make the same
token likely after each (``write_model``), so that a draft is accepted about as often as a good one.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
VOCABULARY, NEW, PROMPTS, BATCH = 32000, 128, 4, 8
DRAFT, BLOCK_SIZES, TRIED = "18M", (3, 5), (0, 1, 2, 3, 5)
SHAPES = {"58M": (8, 512, 8, 1408), "220M": (12, 1024, 16, 2816), "18M": (2, 256, 4, 704)}
AGREEMENT = {"58M": 0.85, "220M": 0.85, "18M": 0.9}
SAMPLED = {"temperature": 0.6, "top_p": 0.9}
SHARPER = 3.0  # of the heads when sampling: as they are, the next token is anybody's guess


def config(size):
    from jaxdraft.models import ModelConfig

    layers, hidden, heads, intermediate = SHAPES[size]
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        max_positions=2048,
        tie_embeddings=False,
        eos_ids=(VOCABULARY,),  # never comes
    )


def write_model(folder, size, seed):
    """Random weights, and a head for which a share ``AGREEMENT`` of tokens is followed by its successor: the scale of
    the embedding, against what the layers add to it, is bisected."""
    import jax
    import jax.numpy as jnp

    from jaxdraft.models import Decoder, head_weight, init_params, logits
    from jaxdraft.models.hf import save_model

    shape = config(size)
    params = jax.tree.map(np.array, init_params(shape, jax.random.key(seed)))
    for name in ("wo", "w_down"):
        params["layers"][name] *= 4 * (2 * shape.num_layers) ** 0.5
    successor_V = np.random.default_rng(0).permutation(VOCABULARY)
    directions_VD = np.random.default_rng(seed).standard_normal((VOCABULARY, shape.hidden_size)).astype(np.float32)
    directions_VD /= np.linalg.norm(directions_VD, axis=1, keepdims=True)
    params["head"][:, successor_V] = directions_VD.T
    tokens_BT = np.random.default_rng(7).integers(0, VOCABULARY, (4, 96))

    @jax.jit
    def agreement(params):
        hidden_BTD = Decoder(shape).apply({"params": params}, tokens_BT, jnp.broadcast_to(jnp.arange(96), (4, 96)))
        return jnp.mean(jnp.argmax(logits(hidden_BTD, head_weight(shape, params)), -1) == successor_V[tokens_BT])

    low, high = -8.0, 8.0
    for _ in range(14):
        middle = (low + high) / 2
        params["embed"] = directions_VD * 10**middle
        low, high = (middle, high) if agreement(params) < AGREEMENT[size] else (low, middle)
    save_model(folder, shape, params)


class Run(NamedTuple):
    """What was written, in how many seconds, a row's seconds for a token, and tokens per run of the target."""

    answers: list[list[int]]
    seconds: float
    tpot: float
    efficiency: float = 1.0

    @property
    def rate(self):
        return sum(map(len, self.answers)) / self.seconds


class Ours:
    """The decoders of this project."""

    def __init__(self, folders, sharper):
        from jaxdraft.evaluate.measure import Model

        self.target, self.draft = (self._sharpened(Model.load(folder), sharper) for folder in folders)

    @staticmethod
    def _sharpened(model, by):
        params = {**model.params, "head": model.params["head"] * np.float32(by)}
        return dataclasses.replace(model, params=params)

    def work(self, prompts, batch_size, sampling):
        from jaxdraft.data.prompts import Prompt
        from jaxdraft.evaluate.measure import Work
        from jaxdraft.evaluate.tasks import Task

        given = [Prompt(str(i), tuple(tokens), "") for i, tokens in enumerate(prompts)]
        return Work(Task("random", None, max_new_tokens=NEW, **sampling), given, batch_size, repeats=1)

    def write(self, prompts, block_size, sampling, batch_size=1):
        from jaxdraft.decode import Speculation
        from jaxdraft.evaluate.measure import write_alone, write_with_draft

        work, ignore = self.work(prompts, batch_size, sampling), lambda _: None
        if block_size:
            results, batches = write_with_draft(self.target, self.draft, work, Speculation(block_size), ignore)
            answers, steps = [r.tokens for r in results], [len(r.accepted) for r in results]
        else:
            baseline = write_alone(self.target, work, ignore)
            answers, batches = baseline.answers, baseline.batches
            steps = list(map(len, answers))
        seconds = sum(batch.seconds.decode for batch in batches)
        efficiency = sum(map(len, answers)) / sum(steps)
        step = seconds / sum(max(steps[i] for i in batch.prompts) for batch in batches)
        return Run(answers, seconds, step / efficiency, efficiency)

    def predicted(self, prompts, block_size, sampling, batch_size, efficiency):
        from jaxdraft.evaluate.tpot import Latencies

        work = self.work(prompts, batch_size, sampling)
        latencies = Latencies(self.target, self.draft, work, recall=lambda of, find: find())
        return latencies.predict(efficiency, block_size)


class Transformers:
    """transformers' generate, alone and assisted, which takes one prompt at a time."""

    def __init__(self, folders, sharper, threads):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch = torch
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.target, self.draft = (load(folder, dtype=torch.float32).eval() for folder in folders)
        for model in (self.target, self.draft):
            model.generation_config.eos_token_id = None
            with torch.no_grad():
                model.lm_head.weight.mul_(sharper)
        self.target.register_forward_hook(self._has_read)
        self.began = None

    def _has_read(self, *_):
        self.began = self.began or time.perf_counter()

    def write(self, prompts, block_size, sampling):
        """Seconds are from the end of the target's first pass on."""
        torch, seconds, answers = self.torch, 0.0, []
        how = {"do_sample": True, "top_k": 0, **sampling} if sampling else {"do_sample": False}
        if block_size:
            settings = self.draft.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = block_size, "constant"
            settings.assistant_confidence_threshold = 0.0
            how["assistant_model"] = self.draft
        for tokens in prompts:
            self.began = None
            given = torch.tensor([tokens])
            mask = torch.ones_like(given)
            found = self.target.generate(given, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **how)
            seconds += time.perf_counter() - self.began
            answers.append(found[0, len(tokens) :].tolist())
        return Run(answers, seconds, seconds / sum(map(len, answers)))


def in_turn(writers, rounds):
    """Each of these once to warm up, then ``rounds`` times in turn."""
    for write in writers.values():
        write()
    turns = [{name: write() for name, write in writers.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in writers}


def median(runs, what):
    return statistics.median(getattr(run, what) for run in runs)


def beside_transformers(ours, theirs, prompts, sampling, rounds, title):
    writers = {}
    for block_size in (0, *BLOCK_SIZES):
        for name, side in {"jaxdraft": ours, "transformers": theirs}.items():
            if side:
                writers[name, block_size] = functools.partial(side.write, prompts, block_size, sampling)
    found = in_turn(writers, rounds)
    if not sampling:
        expected = found["jaxdraft", 0][0].answers
        assert all(run.answers == expected for runs in found.values() for run in runs), "greedy answers differ"
    rates = {key: median(runs, "rate") for key, runs in found.items()}
    for name in ("transformers", "jaxdraft") if theirs else ("jaxdraft",):
        alone = rates[name, 0]
        cells = [f"{alone:.1f}", *(f"{rates[name, b]:.1f} ({rates[name, b] / alone:.2f}×)" for b in BLOCK_SIZES)]
        if theirs and name == "jaxdraft":
            gains = [rates[name, b] / rates["transformers", b] for b in (0, *BLOCK_SIZES)]
            cells = [f"{cell}, **{gain:.2f}**" for cell, gain in zip(cells, gains, strict=True)]
        print(f"| {title} | {name} | {' | '.join(cells)} |", flush=True)


def in_batches(ours, prompts, rounds, title):
    """The best block size of each batch size, and how near equation 2 of FastDraft comes to what is measured."""
    for batch_size, given in ((1, prompts[:PROMPTS]), (BATCH, prompts)):
        found = in_turn({b: functools.partial(ours.write, given, b, {}, batch_size) for b in TRIED}, rounds)
        for block_size, runs in found.items():
            alone, efficiency = found[0], runs[0].efficiency
            measured = statistics.median(a.tpot / b.tpot for a, b in zip(alone, runs, strict=True))
            predicted = ours.predicted(given, block_size, {}, batch_size, efficiency) if block_size else 1.0
            print(
                f"| {title} | {batch_size} | {block_size} | {median(runs, 'rate'):.0f} | {efficiency:.2f} "
                f"| {1e3 * median(runs, 'tpot'):.2f} | {measured:.2f} | {predicted:.2f} | {measured / predicted:.2f} |",
                flush=True,
            )


def measure(folders, size, threads, rounds, batches):
    """All of one target and thread count, in a process that was started for it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCABULARY, 32 + 16 * (i % 4)).tolist() for i in range(BATCH)]
    for sampling, how, sharper in (({}, "greedy", 1.0), (SAMPLED, "T 0.6, top-p 0.9", SHARPER)):
        ours, theirs = Ours(folders, sharper), None
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            theirs = Transformers(folders, sharper, threads)
        title = f"{size}, {threads} thread{'s' * (threads > 1)}, {how}"
        beside_transformers(ours, theirs, prompts[:PROMPTS], sampling, rounds, title)
        if batches and not sampling:
            in_batches(ours, prompts, rounds, title)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--targets", nargs="+", choices=["58M", "220M"], default=["58M", "220M"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", action=argparse.BooleanOptionalAction, default=True, help="every γ, and batch 8")
    parser.add_argument("--folders", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folders:
        measure(asked.folders, asked.targets[0], asked.threads[0], asked.rounds, asked.batches)
        return
    with tempfile.TemporaryDirectory() as folder:
        for seed, size in enumerate([*asked.targets, DRAFT]):
            write_model(Path(folder) / size, size, seed)
        print("| pair, threads | | alone, tokens/s | γ 3 | γ 5 |   (times alone), **times transformers**")
        print("| pair, threads | batch | γ | tokens/s | τ | ms a token | speed-up | predicted | measured / predicted |")
        for size in asked.targets:
            for threads in asked.threads:
                flags = [os.environ.get("XLA_FLAGS", ""), ONE_THREAD if threads == 1 else ""]
                subprocess.run(
                    [sys.executable, "-m", "tests.benchmark_decode", "--targets", size, "--threads", str(threads)]
                    + ["--rounds", str(asked.rounds), "--batches" if asked.batches else "--no-batches"]
                    + ["--folders", f"{folder}/{size}", f"{folder}/{DRAFT}"],
                    env={**os.environ, "XLA_FLAGS": " ".join(filter(None, flags))},
                    check=True,
                )


if __name__ == "__main__":
    main()
