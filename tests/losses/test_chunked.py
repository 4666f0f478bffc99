"""The engine: chunked equals naive, in value, gradients and metrics, in less memory and on any number of devices."""

import functools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import (
    DPACE,
    KL,
    TVD,
    CrossEntropy,
    DenseTarget,
    Loss,
    Positions,
    Shared,
    TVDPlusPlus,
    TVDPlusPlusGlobal,
    agreement,
    batch_statistics,
    engine,
    log_probs,
    overlap,
    per_position,
)
from jaxdraft.losses import chunked as chunked_positions

N, D, E, V = 300, 16, 24, 500
LOSSES = [CrossEntropy(), KL(), TVD(), TVDPlusPlus(temperature=0.7)]


def chunked(loss, hidden, head, labels, weights, target_hidden=None, target_head=None, draft_ids_R=None, chunk=None):
    """The engine, given arrays one by one."""
    positions = Positions(labels, weights, target_hidden)
    return chunked_positions(loss, hidden, head, positions, Shared(target_head, draft_ids_R), chunk)


def example():
    """(draft_hidden, draft_head, labels, weights, target_hidden, target_head); a third of the weights are 0."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    weights_N = np.where(rng.random(N) < 0.3, 0, rng.integers(1, 3, N)).astype(np.float32)
    return normal(N, D), normal(D, V) / 3, rng.integers(0, V, N), weights_N, normal(N, E), normal(E, V) / 4


def naive(loss, draft_hidden_ND, draft_head_DV, labels_N, weights_N, target_hidden_NE, target_head_EV):
    """The same sum, and metrics, from full logits and JAX's own gradient."""
    logits_NV = draft_hidden_ND @ draft_head_DV
    target = DenseTarget(jax.lax.stop_gradient(target_hidden_NE @ target_head_EV))
    log_p_NV, log_q_NV = log_probs(logits_NV, loss.temperature), target.log_probs(loss.temperature)
    metrics = {"acceptance": overlap(log_p_NV, log_q_NV), "agreement": agreement(logits_NV, target.logits_CV)}
    metrics = {name: jnp.sum(value_N * weights_N) for name, value_N in metrics.items()}
    return jnp.sum(loss.rows(logits_NV, target, labels_N) * weights_N), metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_a_draft_vocabulary_equals_unchunked_rows_of_it(loss):
    draft_hidden, draft_head, labels, weights, target_hidden, target_head = example()
    ids = jnp.sort(jnp.asarray(np.random.default_rng(1).permutation(V)[:60]))
    place = {token: i for i, token in enumerate(ids.tolist())}
    places = np.asarray([place.get(int(label), -1) for label in labels])
    assert 0 < (places >= 0).sum() < N

    def ours(hidden, head):
        out = chunked(loss, hidden, head, labels, weights, target_hidden, target_head, draft_ids_R=ids, chunk=64)
        return out.sum, out.metrics

    def plain(hidden, head):
        logits_NR, target = hidden @ head, DenseTarget(target_hidden @ target_head, ids)
        log_p, log_q = log_probs(logits_NR, loss.temperature), target.log_probs(loss.temperature)
        metrics = {"acceptance": overlap(log_p, log_q), "agreement": agreement(logits_NR, *target)}
        sums = {name: jnp.sum(value_N * weights) for name, value_N in metrics.items()}
        return jnp.sum(loss.rows(logits_NR, target, places) * weights), sums

    grads = [jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (ours, plain)]
    assert_close(*(grad(draft_hidden, draft_head[:, ids]) for grad in grads))
    with pytest.raises(ValueError, match="draft_ids_R has shape"):
        chunked(loss, draft_hidden, draft_head, labels, weights, target_hidden, target_head, draft_ids_R=ids)


def assert_close(actual, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@functools.partial(jax.jit, static_argnums=(0, 1))
def chunked_value_and_grad(loss, chunk, *arrays):
    def total(draft_hidden_ND, draft_head_DV):
        output = chunked(loss, draft_hidden_ND, draft_head_DV, *arrays[2:], chunk=chunk)
        return output.sum, output

    return jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays[:2])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_equals_naive_with_garbage_in_rows_that_do_not_count(loss):
    arrays = example()
    weights_N = arrays[3]
    total = lambda hidden, head: naive(loss, hidden, head, *arrays[2:])
    full = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (expected_sum, expected_metrics), expected_grads = full(*arrays[:2])

    hidden_ND, head_DV, labels_N, _, target_hidden_NE, target_head_EV = arrays
    garbage_N = weights_N == 0
    hidden_ND = np.where(garbage_N[:, None], 1e30 * hidden_ND, hidden_ND)
    target_hidden_NE = np.where(garbage_N[:, None], -1e30 * target_hidden_NE, target_hidden_NE)
    arrays = hidden_ND, head_DV, np.where(garbage_N, -100, labels_N), weights_N, target_hidden_NE, target_head_EV
    (total_sum, output), grads = chunked_value_and_grad(loss, 72, *arrays)
    assert_close(total_sum, expected_sum)
    assert_close(grads, expected_grads)
    assert_close(output.metrics, expected_metrics)
    assert (grads[0][garbage_N] == 0).all()
    np.testing.assert_allclose(output.weight, weights_N.sum())


def test_values_alone_are_the_same():
    arrays = example()
    (_, output), _ = chunked_value_and_grad(KL(), 72, *arrays)
    values = jax.jit(functools.partial(chunked, KL(), chunk=72)).lower(*arrays).compile()
    assert_close(values(*arrays), output)
    assert values.as_text().count(" dot(") == 2, "one product with each head, none for gradients"


@pytest.mark.parametrize("chunk", [1, 296, None])
def test_any_chunk_gives_the_same(chunk):
    arrays = example()
    assert_close(chunked_value_and_grad(KL(), chunk, *arrays), chunked_value_and_grad(KL(), 72, *arrays))


@pytest.mark.parametrize("piece", [8, 40])
@pytest.mark.parametrize("loss", [KL(weights=DPACE()), TVDPlusPlusGlobal()], ids=["per position", "summed"])
def test_any_piece_of_a_chunk_gives_the_same(loss, piece, monkeypatch):
    hidden_ND, head_DV, labels_N, weights_N, target_hidden_NE, target_head_EV = example()
    positions = Positions(labels_N, weights_N, target_hidden_NE)

    def total(hidden_ND, head_DV):
        shared, chunk = Shared(target_head_EV), 72
        if loss.weights is not None:
            loss_N, logged = per_position(loss, hidden_ND, head_DV, positions, shared, chunk)
            return jnp.sum(loss_N**2), logged
        found = batch_statistics(loss, hidden_ND, head_DV, positions, shared, chunk)
        shared = shared._replace(means=jax.tree.map(lambda x: x / weights_N.sum(), found))
        output = chunked_positions(loss, hidden_ND, head_DV, positions, shared, chunk)
        return output.sum, (output, found)

    # A new function each time: JAX keeps what it has traced.
    run = lambda: jax.jit(jax.value_and_grad(lambda *args: total(*args), (0, 1), has_aux=True))(hidden_ND, head_DV)
    whole = run()
    sizes = []
    monkeypatch.setattr(engine, "default_piece", lambda vocabulary: sizes.append(vocabulary) or piece)
    assert_close(run(), whole)
    assert set(sizes) == {V}


def test_the_gradient_follows_what_is_done_with_the_sum():
    arrays = example()
    embedding_VD = arrays[1].T

    def mean(run, embedding_VD):
        return 3 * run(KL(), arrays[0], embedding_VD.T, *arrays[2:])[0] / arrays[3].sum() + jnp.sum(embedding_VD)

    actual, expected = (jax.jit(jax.grad(functools.partial(mean, run)))(embedding_VD) for run in (chunked, naive))
    assert_close(actual, expected)


def test_metrics_have_no_gradient():
    arrays = example()
    acceptance = lambda head_DV: chunked(KL(), arrays[0], head_DV, *arrays[2:]).metrics["acceptance"]
    assert (jax.jit(jax.grad(acceptance))(arrays[1]) == 0).all()


def test_labels_alone_need_no_target():
    arrays = example()
    (total, output), grads = chunked_value_and_grad(CrossEntropy(), 72, *arrays[:4])
    (expected, _), expected_grads = chunked_value_and_grad(CrossEntropy(), 72, *arrays)
    assert_close((total, grads), (expected, expected_grads))
    assert output.metrics == {}


def test_half_precision_hidden_states():
    hidden_ND, head_DV, labels_N, weights_N, target_hidden_NE, target_head_EV = example()
    half = lambda x: jnp.asarray(x, jnp.bfloat16)
    rest = labels_N, weights_N
    (total, _), grads = chunked_value_and_grad(
        KL(), 72, half(hidden_ND), head_DV, *rest, half(target_hidden_NE), target_head_EV
    )
    rounded = [np.asarray(half(x), np.float32) for x in (hidden_ND, head_DV, target_hidden_NE, target_head_EV)]
    (expected, _), expected_grads = chunked_value_and_grad(KL(), 72, *rounded[:2], *rest, *rounded[2:])
    assert (total.dtype, grads[0].dtype, grads[1].dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert_close(total, expected)
    assert_close(jax.tree.map(lambda x: np.asarray(x, np.float32), grads), expected_grads, tolerance=5e-3)


def test_memory_is_that_of_a_chunk():
    n, d, v = 2048, 128, 8000
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    arrays = shape(n, d), shape(d, v), labels, shape(n), shape(n, d), shape(d, v)

    def mebibytes(run):
        program = jax.jit(jax.value_and_grad(functools.partial(run, TVDPlusPlus()), (0, 1), has_aux=True))
        return program.lower(*arrays).compile().memory_analysis().temp_size_in_bytes / 2**20

    logits, head = n * v * 4 / 2**20, d * v * 4 / 2**20
    assert mebibytes(naive) > 2 * logits
    assert mebibytes(lambda *args: (chunked(*args, chunk=128).sum, None)) < head + 5 * logits * 128 / n


SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxdraft.losses import Positions, Shared, TVDPlusPlus, chunked

assert jax.device_count() == 8
arrays = tuple(np.load("arrays.npz").values())
mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
axes = mesh.axis_names
rows, whole = P(axes), P()
specs = rows, whole, rows, rows, rows, whole
arrays = tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs))

def run(hidden, head, labels, weights, target_hidden, target_head):
    positions = Positions(labels, weights, target_hidden)
    return chunked(TVDPlusPlus(), hidden, head, positions, Shared(target_head), chunk=16)

def program(run):
    def mean(*arrays):
        output = run(*arrays)
        return output.sum / output.weight, output
    return jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True)).lower(*arrays).compile()

results = {"partitioned": program(run)}
for check in True, False:
    summed = lambda *arrays: jax.lax.psum(run(*arrays), axes)
    split = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
    results[f"shard_map_{check}"] = program(split)
for name, compiled in results.items():
    np.savez(name, *jax.tree.leaves(compiled(*arrays)))
    open(name + ".hlo", "w").write(compiled.as_text())
"""


def test_eight_devices_give_what_one_gives(tmp_path):
    hidden_ND, head_DV, labels_N, weights_N, target_hidden_NE, target_head_EV = example()
    arrays = hidden_ND[:256], head_DV, labels_N[:256], weights_N[:256], target_hidden_NE[:256], target_head_EV
    np.savez(tmp_path / "arrays.npz", *arrays)
    devices = "--xla_force_host_platform_device_count=8"
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": devices,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    subprocess.run([sys.executable, "-c", SHARDED], check=True, cwd=tmp_path, env=env, timeout=120)

    (total, output), grads = chunked_value_and_grad(TVDPlusPlus(), 16, *arrays)
    expected = jax.tree.leaves(((total / output.weight, output), [grad / output.weight for grad in grads]))
    for name in "partitioned", "shard_map_True", "shard_map_False":
        assert_close(list(np.load(tmp_path / f"{name}.npz").values()), expected)
    for name in "shard_map_True", "shard_map_False":
        computations = re.split(r"\n\n", (tmp_path / f"{name}.hlo").read_text())
        talking = [text.split("(")[0] for text in computations if re.search(r"all-(reduce|gather)(-start)?\(", text)]
        assert len(talking) == 1, f"devices talk in {talking}"
        assert "ENTRY" in talking[0]


def test_a_loss_is_a_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(loss, *arrays):
        traces.append(loss)
        return chunked(loss, *arrays).sum

    arrays = example()
    run(KL(temperature=0.5), *arrays)
    run(KL(temperature=0.5), *arrays)
    assert len(traces) == 1


@dataclass(frozen=True)
class Averaged(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.mean(draft_logits_CV)


@dataclass(frozen=True)
class Singular(Loss):
    """Its gradient is infinite where draft and target are equal."""

    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sqrt(jnp.sum((draft_logits_CV - target.logits_CV) ** 2, axis=-1))


def test_rows_that_do_not_count_and_padding_may_be_singular():
    hidden_ND, head_DV, labels_N, weights_N, *_ = example()
    target_hidden_ND = np.where(weights_N[:, None] == 0, hidden_ND, hidden_ND[::-1])
    (total, _), grads = chunked_value_and_grad(
        Singular(), 72, hidden_ND, head_DV, labels_N, weights_N, target_hidden_ND, head_DV
    )
    for x in total, *grads:
        assert np.isfinite(x).all()


def test_what_does_not_fit_is_refused():
    hidden_ND, head_DV, labels_N, weights_N, target_hidden_NE, target_head_EV = example()
    draft = hidden_ND, head_DV, labels_N, weights_N
    with pytest.raises(ConfigError, match="KL compares the draft with a target"):
        chunked(KL(), *draft)
    with pytest.raises(ValueError, match="go together"):
        chunked(KL(), *draft, target_hidden_NE)
    with pytest.raises(ValueError, match=r"\(300, 500\) and \(300, 499\)"):
        chunked(KL(), *draft, target_hidden_NE, target_head_EV[:, :-1])
    with pytest.raises(ValueError, match="300 rows of hidden states, labels"):
        chunked(CrossEntropy(), hidden_ND, head_DV, labels_N[1:], weights_N)
    with pytest.raises(ValueError, match=r"Averaged\.rows: one number per position"):
        chunked(Averaged(), *example())
