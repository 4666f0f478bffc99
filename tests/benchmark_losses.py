"""What computing a loss in chunks costs, in memory and in time; run by hand, from the top of a checkout:

    .venv/bin/python -m tests.benchmark_losses
    .venv/bin/python -m tests.benchmark_losses --vocabulary 128256 --only KL --only TVDPlusPlus
    .venv/bin/python -m tests.benchmark_losses --step

Prints a table. Times are CPU seconds of this process, medians over rounds in which every variant runs once, so that
other programs on the machine disturb all of them alike. "Naive" holds all logits, computes the batch's statistics from
them, and lets JAX differentiate; it logs nothing. The chunked loss also logs acceptance and agreement, as it always
does.

Shapes: B rows, T positions of a row, N = B × T, D hidden size, V vocabulary.
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from jaxdraft.losses import KL, CrossEntropy, DenseTarget, TVDPlusPlus, bucketed, log_probs
from jaxdraft.losses.divergences import label_log_prob
from jaxdraft.models import Decoder, ModelConfig, head_weight, init_params, logits
from jaxdraft.models.decoder import model_shardings
from jaxdraft.sharding import MeshShape
from jaxdraft.train import OptimizerSettings
from jaxdraft.train.state import create_state, state_shardings
from jaxdraft.train.step import Work, build_step
from tests.losses.test_memory import LOSSES, shapes, value_and_gradient


def naive(loss, work):
    """What ``value_and_gradient`` computes, from all logits at once."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    labels_N, weights_N = flat(work.labels_BT), flat(work.weights_BT)

    def mean(hidden_BTD, head_DV):
        logits_of = lambda model: flat(work.hidden[model]) @ work.heads[model]
        target = DenseTarget(logits_of("target")) if "target" in work.hidden else None
        keys_N = None
        if loss.draws:
            keys_N = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), flat(work.draw_ids_BT))

        def rows(logits_NV):
            seen_N, seen_target = labels_N, target
            if work.stored is not None:
                stored = map(flat, work.stored)
                logits_NV, seen_target, seen_N = bucketed(logits_NV, labels_N, *stored, loss.temperature)
            found = loss.batch_statistics(logits_NV, seen_target, seen_N, keys_N)
            means = {name: jnp.sum(x_N * weights_N) / jnp.sum(weights_N) for name, x_N in found.items()}
            loss_N, _ = loss.logged_rows(logits_NV, seen_target, seen_N, keys_N, jax.lax.stop_gradient(means))
            return loss_N, label_log_prob(log_probs(logits_NV, loss.temperature), seen_N)

        loss_N, log_prob_N = rows(flat(hidden_BTD) @ head_DV)
        counts_N = weights_N
        if loss.weights is not None:
            values = {"loss": loss_N, "log_prob": log_prob_N}
            if "reference" in work.hidden:
                values["reference_loss"] = rows(logits_of("reference"))[0]
            values = {name: x_N.reshape(work.labels_BT.shape) for name, x_N in values.items()}
            counts_N = flat(loss.weights(jax.lax.stop_gradient(values), work.weights_BT))
        return jnp.sum(loss_N * counts_N) / jnp.sum(counts_N)

    return jax.value_and_grad(mean, (0, 1))(work.hidden["draft"], work.heads["draft"])


def arrays(name, vocabulary):
    """Random contents for ``shapes``: hidden states and heads that make logits of standard deviation 3."""
    wanted = shapes(name, vocabulary)
    keys = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda x: jax.random.normal(next(keys), x.shape, x.dtype)
    stored, labels_BT = None, jax.random.randint(next(keys), wanted.labels_BT.shape, 0, vocabulary)
    if wanted.stored is not None:
        ids = jax.random.randint(next(keys), wanted.stored[0].shape, 0, vocabulary)
        stored = ids, jax.nn.log_softmax(2 * normal(wanted.stored[1]))
    draw_ids = wanted.draw_ids_BT
    return Work(
        hidden={model: normal(x) for model, x in wanted.hidden.items()},
        heads={model: 3 * normal(x) / x.shape[0] ** 0.5 for model, x in wanted.heads.items()},
        labels_BT=labels_BT,
        weights_BT=(jax.random.uniform(next(keys), labels_BT.shape) < 0.9).astype(jnp.float32),
        stored=stored,
        draw_ids_BT=None if draw_ids is None else jnp.arange(draw_ids.size).reshape(draw_ids.shape),
    )


def cpu_seconds(variants, rounds):
    """Median CPU seconds of each variant, a function without arguments, after one run of each to warm up."""
    spent = {name: [] for name in variants}
    for measured in [False] + [True] * rounds:
        for name, run in variants.items():
            start = time.process_time()
            jax.block_until_ready(run())
            if measured:
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def compare_losses(names, vocabulary, rounds, with_naive):
    print(f"{'loss':20} {'MB chunked':>10} {'MB naive':>9} {'s chunked':>9} {'s naive':>8} {'ratio':>6}")
    for name in names:
        loss, work = LOSSES[name], arrays(name, vocabulary)
        forms = {"chunked": functools.partial(value_and_gradient, loss, MeshShape().build())}
        if with_naive:
            forms["naive"] = functools.partial(naive, loss)
        programs = {form: jax.jit(run).lower(work).compile() for form, run in forms.items()}
        memory = {form: program.memory_analysis().temp_size_in_bytes / 1e6 for form, program in programs.items()}
        if with_naive:
            values = [jax.tree.leaves(program(work)[0])[0] for program in programs.values()]
            assert jnp.allclose(*values, rtol=1e-4), f"{name}: {values}"
        runs = {form: functools.partial(program, work) for form, program in programs.items()}
        seconds = cpu_seconds(runs, rounds)
        line = f"{name:20} {memory['chunked']:10.0f} "
        if with_naive:
            ratio = seconds["chunked"] / seconds["naive"]
            line += f"{memory['naive']:9.0f} {seconds['chunked']:9.2f} {seconds['naive']:8.2f} {ratio:6.2f}"
        else:
            line += f"{'':9} {seconds['chunked']:9.2f}"
        print(line, flush=True)


TARGET = ModelConfig(
    vocab_size=32000, hidden_size=512, intermediate_size=1536, num_layers=10, num_heads=8, num_kv_heads=8
)
DRAFT = dataclasses.replace(TARGET, hidden_size=384, intermediate_size=1024, num_layers=2, num_heads=6, num_kv_heads=6)
OPTIMIZER = OptimizerSettings(steps=100, learning_rate=1e-4)


def step_program(loss, params, target_params, batch):
    """A compiled train step as a function without arguments that trains on from its own state."""
    mesh = MeshShape().build()
    shardings = state_shardings(DRAFT, OPTIMIZER, mesh)
    frozen = {"target": Decoder(TARGET)} if loss.needs_target else {}
    frozen_shardings = {name: model_shardings(TARGET, mesh) for name in frozen}
    step = build_step(Decoder(DRAFT), frozen, loss, OPTIMIZER, mesh, shardings, frozen_shardings)
    state = create_state(OPTIMIZER, jax.tree.map(jnp.copy, params), shardings)

    def run():
        nonlocal state
        state, metrics = step(state, dict.fromkeys(frozen, target_params), batch)
        return metrics

    return run


def compare_steps(rounds):
    """A distillation step against its parts timed apart: the target's forward pass, and a step on text."""
    params, target_params = init_params(DRAFT, jax.random.key(0)), init_params(TARGET, jax.random.key(1))
    rows, length = 4, 256
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, TARGET.vocabulary)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": positions, "loss_mask": ones.astype(jnp.float32)}
    inputs = tokens, positions, ones

    @jax.jit
    def hidden(params):
        return Decoder(TARGET).apply({"params": params}, *inputs)

    @jax.jit
    def forward(params):
        return logits(Decoder(TARGET).apply({"params": params}, *inputs), head_weight(TARGET, params))

    seconds = cpu_seconds(
        {
            "target, to hidden states": lambda: hidden(target_params),
            "target, to logits": lambda: forward(target_params),
            "draft, CrossEntropy": step_program(CrossEntropy(), params, target_params, batch),
            "distillation, KL": step_program(KL(), params, target_params, batch),
            "distillation, TVDPlusPlus": step_program(TVDPlusPlus(), params, target_params, batch),
        },
        rounds,
    )
    sizes = [round(config.num_parameters / 1e6) for config in (TARGET, DRAFT)]
    print(f"{rows} × {length} tokens, vocabulary {TARGET.vocabulary}, target {sizes[0]}M, draft {sizes[1]}M parameters")
    for name, value in seconds.items():
        line = f"{name:26} {value:7.2f} s"
        if name.startswith("distillation"):
            for part in "hidden states", "logits":
                ratio = (seconds[f"target, to {part}"] + seconds["draft, CrossEntropy"]) / value
                line += f"   {ratio:.2f} with the target to {part}"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--only", action="append", choices=list(LOSSES), help="a loss; may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each variant (default: 5)")
    parser.add_argument("--without-naive", action="store_true", help="where all logits do not fit into memory")
    parser.add_argument("--step", action="store_true", help="time a distillation step against its parts instead")
    options = parser.parse_args()
    if options.step:
        compare_steps(options.rounds)
    else:
        compare_losses(options.only or LOSSES, options.vocabulary, options.rounds, not options.without_naive)


if __name__ == "__main__":
    main()
