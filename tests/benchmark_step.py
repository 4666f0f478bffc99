"""How fast a training step is: beside PyTorch's on the same model, and how much of a run is not steps.

    python -m tests.benchmark_step             # both, on the shapes below
    python -m tests.benchmark_step host        # without torch: what the loop adds to its steps

Needs torch and transformers for the first part. Both run in turn in one process, medians are compared.
Both do the same: next-token loss, AdamW with clipping, float32, all cores. PyTorch's is the best of eager and
torch.compile.
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxdraft.losses import CrossEntropy
from jaxdraft.models import Decoder, ModelConfig, init_params, presets
from jaxdraft.sharding import MeshShape, batch_sharding
from jaxdraft.tracking import read_jsonl
from jaxdraft.train import OptimizerSettings, train
from jaxdraft.train.state import create_state, state_shardings
from jaxdraft.train.step import build_step

# A target to try things with; a small draft; FastDraft's 50M.
SHAPES = {
    "1.4M target, 10 × 160": (
        ModelConfig(vocab_size=1024, hidden_size=128, intermediate_size=384, num_layers=6, num_heads=2, num_kv_heads=2),
        (10, 160),
    ),
    "16M draft, 4 × 256": (
        ModelConfig(
            vocab_size=32000, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4, num_kv_heads=4
        ),
        (4, 256),
    ),
    "fastdraft_phi3_50m, 2 × 512": (presets.fastdraft_phi3_50m, (2, 512)),
}
OPTIMIZER = OptimizerSettings(steps=1000, learning_rate=1e-4)
ROUNDS = 9


def batch_of(config, rows, length):
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (rows, length), np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "tokens": tokens,
        "segment_ids": ones,
        "positions": positions,
        "loss_mask": (positions > 0).astype(np.float32),
    }


def ours(config, batch):
    """A step as a function without arguments that trains on from its own state."""
    mesh = MeshShape().build()
    shardings = state_shardings(config, OPTIMIZER, mesh)
    step = build_step(Decoder(config), {}, CrossEntropy(), OPTIMIZER, mesh, shardings, {})
    state = create_state(OPTIMIZER, init_params(config, jax.random.key(0)), shardings)
    on_device = jax.device_put(batch, batch_sharding(mesh))

    def run():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, {}, on_device)
        jax.block_until_ready(metrics)

    return run


def torchs(config, batch, compiled):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    forward = torch.compile(model) if compiled else model

    def run():
        optimizer.zero_grad(set_to_none=True)
        forward(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def seconds(forms):
    """Medians over rounds in which the forms take turns, a few steps each.

    The first step of a turn does not count: the threads of the one before still spin. Nor does the first round.
    """
    spent = {name: [] for name in forms}
    for turn in range(ROUNDS + 1):
        for name, run in forms.items():
            run()
            for _ in range(3):
                began = time.perf_counter()
                run()
                if turn:
                    spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in spent.items()}


def beside_torch():
    print(f"{'':<30} {'jaxdraft':>10} {'eager':>10} {'compiled':>10}  tokens/s; ratio to the better")
    for name, (config, (rows, length)) in SHAPES.items():
        batch = batch_of(config, rows, length)
        forms = {"jaxdraft": ours(config, batch)}
        forms |= {"eager": torchs(config, batch, False), "compiled": torchs(config, batch, True)}
        rates = {form: rows * length / spent for form, spent in seconds(forms).items()}
        ratio = rates["jaxdraft"] / max(rates["eager"], rates["compiled"])
        print(f"{name:<30} " + " ".join(f"{rate:10,.0f}" for rate in rates.values()) + f"  {ratio:.2f}", flush=True)


class Rows:
    """Batches as the loop reads them, from memory."""

    def __init__(self, batch):
        self._batch = batch

    def __len__(self):
        return len(self._batch["tokens"])

    def part(self, step, part):
        return {name: x[part] for name, x in self._batch.items()}


def host():
    """A loop's step beside the bare step, in turn: what reading, logging and dispatching add that nothing hides."""
    config, (rows, length) = SHAPES["1.4M target, 10 × 160"]
    batch, steps = batch_of(config, rows, length), 60
    bare, ratios = ours(config, batch), []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            optimizer = OptimizerSettings(steps=steps, learning_rate=1e-4)
            start = functools.partial(init_params, config, jax.random.key(0))
            train(
                Path(folder) / "run",
                draft=Decoder(config),
                params=start(),
                loss=CrossEntropy(),
                batches=Rows(batch),
                optimizer=optimizer,
                mesh=MeshShape().build(),
                save_every=10**9,
            )
            lines = read_jsonl(Path(folder) / "run" / "timing.jsonl")[10:]
            looped = statistics.median(line["seconds"] for line in lines)
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            bare()
            times.append(time.perf_counter() - began)
        ratios.append(looped / statistics.median(times[10:]))
    print(f"a step in the loop takes {statistics.median(ratios):.3f} of a bare step (five rounds: {sorted(ratios)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "host"), default="all")
    if parser.parse_args().what == "all":
        beside_torch()
    host()
