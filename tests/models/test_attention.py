"""Attention by kernels against attention by its formula: interpreted here, compiled ahead of time for a TPU."""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdraft.backend import assumed
from jaxdraft.models import Decoder, ModelConfig, attention, init_params
from jaxdraft.models.attention import causal_mask, on_devices, plain, splash
from jaxdraft.models.decoder import model_shardings
from jaxdraft.sharding import BATCH_AXES, MESH_AXES

ROOT = Path(__file__).parents[2]


def inputs(rows, length, heads, kv_heads, head_size, dtype=jnp.float32):
    """Queries, keys, values, and a gradient of what comes out; scores are about 1 at most, so that all keys count."""
    keys = jax.random.split(jax.random.key(length + head_size), 4)
    draw = lambda key, count, scale: scale * jax.random.normal(key, (rows, length, count, head_size))
    arrays = (
        draw(keys[0], heads, 0.4),
        draw(keys[1], kv_heads, 0.4),
        draw(keys[2], kv_heads, 1),
        draw(keys[3], heads, 1),
    )
    return [x.astype(dtype) for x in arrays]


def segments(length):
    """A row of three texts and padding, and a row of padding only."""
    first = np.repeat([1, 2, 3, 0], [length // 2, 5, length // 4, length - length // 2 - 5 - length // 4])
    return jnp.asarray(np.stack([first, np.zeros(length)]), jnp.int32)


def value_and_gradients(attend, q, k, v, gradient, segment_ids, window):
    def both(q, k, v):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, segment_ids, window), q, k, v)
        return out, *pull(gradient)

    return jax.jit(both)(q, k, v)


def rounding(q, k, v, gradient, segment_ids, window):
    """How far two float32 computations of attention can be apart: bounds for the output and its three gradients.

    To first order, in units of u = 2⁻²⁴, with S the largest Σ|q·k|/√H and G query heads to a key:

    - a score, H products summed and scaled, and its distance to the row's largest, is off by (H + 4)·S·u;
    - p = exp(score − largest) / Σ exp(score − largest) has that error twice above and twice below, T terms in the
      sum, and a few roundings for exponentials and rescaling: e = (4·(H + 4)·S + T + 8)·u of itself;
    - what comes out sums T of them; a gradient of a score is p·(∂out·v − Σ p ∂out·v), two sums over H and one over
      T with p twice; gradients of queries, keys and values sum up to G·T of those: 2·e + 2·(H + G·T)·u in all.

    Relative to sums of magnitudes, and twice, since both computations round.
    """
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    (B, T, N, H), K = q.shape, k.shape[2]
    group, u = N // K, 2.0**-24
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    mask = np.asarray(causal_mask((B, T), segment_ids, window))[:, None]
    scores = np.where(mask, np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    q, k, v, gradient = map(np.abs, (q, k, v, gradient))
    largest = np.max(np.einsum("btnh,bsnh->bnts", q, k)) * H**-0.5
    e = 2 * (4 * (H + 4) * largest + T + 8) * u + 2 * (H + group * T) * u
    dp = np.einsum("btnh,bsnh->bnts", gradient, v)
    ds = p * (dp + np.sum(p * dp, -1, keepdims=True)) * H**-0.5
    of_groups = lambda x: x.reshape(B, T, K, group, H).sum(3)
    return [
        2 * e * sums
        for sums in (
            np.einsum("bnts,bsnh->btnh", p, v),
            np.einsum("bnts,bsnh->btnh", ds, k),
            of_groups(np.einsum("bnts,btnh->bsnh", ds, q)),
            of_groups(np.einsum("bnts,btnh->bsnh", p, gradient)),
        )
    ]


def assert_within(bounds, found, expected):
    for bound, ours, theirs in zip(bounds, found, expected, strict=True):
        assert np.all(np.isfinite(ours))
        assert np.all(np.abs(np.asarray(ours) - np.asarray(theirs)) <= bound)


def uses_a_kernel(length=256, segment_ids=None, dtype=jnp.bfloat16):
    q, k, v, _ = inputs(2, length, 2, 1, 64, dtype)
    anew = lambda *rows: attention.attention(*rows)  # what was traced for one platform is not traced for another
    return "pallas_call" in str(jax.make_jaxpr(anew)(q, k, v, segment_ids))


@pytest.mark.parametrize(
    "length, heads, kv_heads, head_size, window",
    [
        (256, 4, 2, 64, None),
        (200, 2, 2, 96, 50),  # filled up to 256
        (640, 2, 1, 128, 130),  # five blocks, some of which nothing sees
        (128, 2, 2, 80, 600),  # a window longer than the row, which is one text
    ],
)
def test_splash_is_the_formula(monkeypatch, length, heads, kv_heads, head_size, window):
    segment_ids = segments(length) if length > 128 else None
    given = *inputs(2, length, heads, kv_heads, head_size), segment_ids, window
    expected, bounds = value_and_gradients(plain, *given), rounding(*given)
    monkeypatch.setattr(attention, "_kernel", lambda *_: splash)
    found = value_and_gradients(attention.attention, *given)
    assert_within(bounds, found, expected)
    if window == 50:
        off_by_one = value_and_gradients(plain, *given[:-1], window + 1)
        for bound, ours, theirs in zip(bounds, off_by_one, expected, strict=True):
            assert np.any(np.abs(ours - theirs) > bound), "the bound would let a wrong window pass"


def test_a_tpu_gets_splash_and_a_cpu_the_formula():
    assert not uses_a_kernel()
    with assumed("tpu"):
        assert uses_a_kernel()
        assert not uses_a_kernel(length=100)


def test_a_decoder_for_a_tpu_builds_no_mask():
    config = ModelConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def gradient():
        loss = lambda params, *rows: jnp.sum(Decoder(config, remat="full").apply({"params": params}, *rows))
        return str(jax.make_jaxpr(jax.grad(loss))(params, ids, ids, ids))

    assert re.search(r",256,256\]", gradient())
    with assumed("tpu"):
        traced = gradient()
    assert traced.count("pallas_call") == 4  # forward, again for the backward pass, and its two kernels
    assert not re.search(r",256,256\]", traced)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU. Returns where calls of JAX's attention are noted; they run as XLA's formula."""
    device, calls, formula = SimpleNamespace(compute_capability="9.0"), [], jax.nn.dot_product_attention

    def noted(*args, implementation=None, **options):
        calls.append(implementation)
        return formula(*args, implementation="xla", **options)

    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    with assumed("gpu"):
        yield SimpleNamespace(device=device, calls=calls)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("segment_ids", [None, segments(256)], ids=["one text", "packed"])
def test_what_cudnn_is_asked_for_is_the_formula(gpu, segment_ids, window):
    q, k, v, _ = inputs(2, 256, 4, 2, 64, jnp.bfloat16)
    found = attention.attention(q, k, v, segment_ids, window)
    assert gpu.calls == ["cudnn"]
    np.testing.assert_array_equal(found, plain(q, k, v, segment_ids, window))


def test_cudnn_only_where_it_is_known_to_do(gpu, monkeypatch):
    def asked(head_size=64, dtype=jnp.bfloat16, segment_ids=None):
        gpu.calls.clear()
        jax.eval_shape(lambda: attention.attention(*inputs(2, 256, 2, 1, head_size, dtype)[:3], segment_ids))
        return gpu.calls == ["cudnn"]

    assert asked()
    assert asked(segment_ids=segments(256))
    assert not asked(dtype=jnp.float32)
    assert not asked(head_size=60)
    assert not asked(head_size=136)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert asked()
    assert not asked(segment_ids=segments(256))
    for other in ("7.5", "gfx90a"):
        gpu.device.compute_capability = other
        assert not asked()


def in_another_process(function, folder, **environment):
    """Runs a function of this file where JAX starts anew."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | environment
    program = f"from tests.models import test_attention; test_attention.{function.__name__}()"
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def mesh_of(devices, data, fsdp, tensor):
    devices = np.array(devices[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def eight_devices():
    """Key/value heads cut with their query heads, or whole: one for each device, or two to three query heads."""
    with assumed("tpu"):
        assert not uses_a_kernel(), "without a mesh there is no telling how a kernel is cut"
    cut = functools.partial(on_devices, splash)
    for sizes, heads, kv_heads in (((2, 2, 2), 4, 2), ((1, 2, 4), 8, 2), ((1, 1, 4), 12, 6)):
        arrays = inputs(4, 128, heads, kv_heads, 64)
        given = *arrays, jnp.tile(segments(128), (2, 1)), 20
        with jax.set_mesh(mesh_of(jax.devices(), *sizes)):
            found = value_and_gradients(cut, *given)
            assert "shard_map" in str(jax.make_jaxpr(functools.partial(cut, window=None))(*arrays[:3], None))
        assert len(found[0].sharding.device_set) == math.prod(sizes)
        assert_within(rounding(*given), found, value_and_gradients(plain, *given))


def test_eight_devices(tmp_path):
    compiles_faster = "--xla_backend_optimization_level=0"
    in_another_process(eight_devices, tmp_path, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {compiles_faster}")


def compiled_for_a_tpu():
    """A train step's worth of a decoder, 1024 tokens a row, on four chips: two by rows and two by heads."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = ModelConfig(
        vocab_size=512, hidden_size=384, intermediate_size=640, num_layers=2, num_heads=4, num_kv_heads=2
    )
    mesh = mesh_of(devices, 1, 2, 2)
    shardings = model_shardings(config, mesh)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(place, shapes, shardings)
    ids = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    def loss(params, *rows):
        return jnp.sum(jnp.square(Decoder(config, remat="full").apply({"params": params}, *rows).astype(jnp.float32)))

    with assumed("tpu"), jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss)).lower(params, ids, ids, ids).compile()
    hlo = program.as_text()
    assert hlo.count("tpu_custom_call") >= 3  # forward, and backward for queries and for keys and values
    assert not re.search(r"1024,1024\b", hlo), "scores of every query and key, or their mask"
    scores = 4 * 2 * 1024**2 * 4  # of one device's rows and heads, in float32
    assert program.memory_analysis().temp_size_in_bytes < 2 * scores


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install jax[tpu]")
def test_compiled_for_a_tpu(tmp_path):
    in_another_process(
        compiled_for_a_tpu,
        tmp_path,
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
