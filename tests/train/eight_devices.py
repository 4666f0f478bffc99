"""Computes losses (``sums``) or train steps (``steps``) on one and on eight devices; test_devices.py compares them.

Writes NAME-DEVICES.npz, what came out, and NAME-DEVICES.hlo, the compiled program, into the current folder.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdraft.losses import (
    DPACE,
    KL,
    AdaSPEC,
    Mixture,
    TVDPlusPlus,
    TVDPlusPlusGlobal,
    TVDPlusPlusLiteral,
    TVDPlusPlusSampled,
    engine,
)
from jaxdraft.models import Decoder, ModelConfig, init_params
from jaxdraft.models.decoder import model_shardings
from jaxdraft.sharding import MeshShape, batch_sharding, replicated
from jaxdraft.train import OptimizerSettings
from jaxdraft.train.state import create_state, state_shardings
from jaxdraft.train.step import Work, build_step, next_tokens
from tests.losses.test_memory import value_and_gradient

LOSSES = {
    "stored": KL(),
    "global": Mixture(terms=((1.0, TVDPlusPlusGlobal()), (0.1, KL()))),
    "literal": TVDPlusPlusLiteral(),
    "sampled": TVDPlusPlusSampled(),
    "dpace": TVDPlusPlus(weights=DPACE()),
    "adaspec": KL(weights=AdaSPEC()),
}
ROWS, LENGTH, VOCABULARY, K = 16, 12, 48, 4
DRAFT = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1
)
TARGET = dataclasses.replace(DRAFT, hidden_size=32, tie_embeddings=False)
OPTIMIZER = OptimizerSettings(steps=6, learning_rate=1e-2, warmup_steps=2)


def batch():
    """Rows packed with two texts, of which a different share of labels counts in each row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32)
    positions = np.repeat([[*range(7), *range(4), 0]], ROWS, 0).astype(np.int32)
    segment_ids = np.repeat([[1] * 7 + [2] * 4 + [0]], ROWS, 0).astype(np.int32)
    loss_mask = (positions > 0) & (rng.random(tokens.shape) < rng.random((ROWS, 1)))
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask.astype(np.float32),
    }


def stored(tokens):
    """Ids and log-probabilities of random distributions, as a batch holds them."""
    probs = np.random.default_rng(1).dirichlet(np.full(VOCABULARY, 0.3), tokens.shape) + 1e-4
    labels = np.roll(tokens, -1, axis=1)[..., None]
    ids = np.argsort(-probs, axis=-1)[..., :K]
    top, label = (np.take_along_axis(probs, x, axis=-1) for x in (ids, labels))
    once = (ids != labels).all(-1, keepdims=True)
    rest = probs.sum(-1, keepdims=True) - top.sum(-1, keepdims=True) - label * once
    return ids.astype(np.int32), np.log(np.concatenate([top, label, rest], axis=-1)).astype(np.float32)


def models(name):
    """The frozen models that a loss needs."""
    return {"stored": [], "adaspec": ["target", "reference"]}.get(name, ["target"])


def sums(name, mesh):
    """Loss, metrics and gradients from random hidden states."""
    rng = np.random.default_rng(2)
    rows = batch()
    labels_BT, weights_BT = next_tokens(jax.tree.map(jnp.asarray, rows))
    sizes = {"draft": 16} | {model: {"target": 24, "reference": 16}[model] for model in models(name)}
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    work = Work(
        hidden={model: normal(ROWS, LENGTH, size) for model, size in sizes.items()},
        heads={model: normal(size, VOCABULARY) / 4 for model, size in sizes.items()},
        labels_BT=labels_BT,
        weights_BT=weights_BT,
        stored=stored(rows["tokens"]) if name == "stored" else None,
        draw_ids_BT=jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) if LOSSES[name].draws else None,
    )
    of_rows, whole = batch_sharding(mesh), replicated(mesh)
    work = jax.device_put(work, Work(of_rows, whole, of_rows, of_rows, of_rows, of_rows))
    return jax.jit(value_and_gradient, static_argnums=(0, 1)).lower(LOSSES[name], mesh, work).compile(), (work,)


def steps(name, mesh):
    """Metrics and AdamW's first moment, which is linear in the gradient; on eight devices in two micro-batches."""
    configs = {"target": TARGET, "reference": DRAFT}
    # Larger weights than a fresh model's, whose distributions are all nearly uniform.
    params = lambda config, seed: jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(seed)))
    frozen = {model: params(configs[model], seed) for seed, model in enumerate(models(name), 1)}
    shardings = state_shardings(DRAFT, OPTIMIZER, mesh)
    frozen_shardings = {model: model_shardings(configs[model], mesh) for model in frozen}
    rows = batch()
    if name == "stored":
        rows["target_ids"], rows["target_log_probs"] = stored(rows["tokens"])
    decoders = {model: Decoder(configs[model]) for model in frozen}
    accumulate = 1 if mesh.size == 1 else 2
    step = build_step(
        Decoder(DRAFT), decoders, LOSSES[name], OPTIMIZER, mesh, shardings, frozen_shardings, accumulate=accumulate
    )
    arguments = (
        create_state(OPTIMIZER, params(DRAFT, 0), shardings),
        jax.device_put(frozen, frozen_shardings),
        jax.device_put(rows, batch_sharding(mesh)),
    )
    with jax.set_mesh(mesh):
        program = step.lower(*arguments).compile()

    def run(*arguments):
        state, metrics = program(*arguments)
        return metrics, state.opt_state[1][0].mu

    return program, arguments, run


def main():
    engine.default_chunk = lambda vocabulary: (
        8
    )  # of a device's 24 positions (48 in whole rows), or half in micro-batches
    eight = MeshShape(data=2, fsdp=2, tensor=2).build()
    one = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), eight.axis_names)
    for name in LOSSES:
        for mesh in one, eight:
            program, arguments, *run = {"sums": sums, "steps": steps}[sys.argv[1]](name, mesh)
            found = (run[0] if run else program)(*arguments)
            np.savez(f"{name}-{mesh.size}", *jax.tree.leaves(found))
            Path(f"{name}-{mesh.size}.hlo").write_text(program.as_text())
    for mesh in one, eight:
        made = jax.jit(init_params, static_argnums=0, out_shardings=model_shardings(DRAFT, mesh))
        key = jax.random.key(0, impl="threefry2x32")
        np.savez(f"initial-{mesh.size}", *jax.tree.leaves(made(DRAFT, key)))


if __name__ == "__main__":
    main()
