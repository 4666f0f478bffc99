"""Folders of weights: several files, damaged tables, other dtypes, a mesh, and repositories of the hub."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig, for_decoding, init_params
from jaxdraft.models.folder import INDEX
from jaxdraft.models.hf import load_config, load_model, save_model
from jaxdraft.models.hub import model_folder
from jaxdraft.models.rope import LongRope

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, tie_embeddings=False
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def test_shards_come_back_as_one_model(tmp_path, params):
    files = save_model(tmp_path, CONFIG, params, shard_bytes=20_000)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 3
    assert all(file.stat().st_size < 22_000 for file in shards)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * CONFIG.num_parameters
    assert {name: file for file in shards for name in load_file(file)}.keys() == index["weight_map"].keys()
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)
    save_model(tmp_path, CONFIG, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_unstacked_layers_are_those_of_for_decoding(tmp_path, params):
    save_model(tmp_path, CONFIG, params)
    _, flat = load_model(tmp_path, scan=False, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, flat, for_decoding(CONFIG, params, jnp.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtypes_are_read_as_asked(tmp_path, params, dtype):
    save_model(tmp_path, CONFIG, params, dtype=jnp.dtype(dtype))
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(dtype).astype(jnp.float32)), params)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], rounded)
    assert {x.dtype for x in jax.tree.leaves(load_model(tmp_path, dtype=jnp.dtype(dtype))[1])} == {jnp.dtype(dtype)}


def test_float16_that_overflows_is_refused(tmp_path, params):
    with pytest.raises(ConfigError, match=r"model.norm.weight does not fit into float16"):
        save_model(tmp_path, CONFIG, {**params, "final_norm": params["final_norm"] * 1e5}, dtype=jnp.float16)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model.layers.1.mlp.up_proj.weight is missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "unknown tensors extra"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
            r"norm.weight has shape \(31",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}), "of dtype I8.*not quantised"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, params, change, message):
    save_model(tmp_path, CONFIG, params)
    rewrite(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_a_wrong_index_is_named(tmp_path, params):
    files = save_model(tmp_path, CONFIG, params, shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    twice = load_file(files[1]) | load_file(files[2])
    save_file(twice, files[2])
    with pytest.raises(ConfigError, match=r"is also stored in model-00001"):
        load_model(tmp_path)
    for name, message in {
        "../x.safetensors": "not a safetensors file of this folder",
        "y.safetensors": "complete",
    }.items():
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"lm_head.weight": name}}))
        with pytest.raises(ConfigError, match=message):
            load_model(tmp_path)


MESH = """
import dataclasses, sys, jax, numpy as np
from jaxdraft.models.decoder import init_boxed
from jaxdraft.models.hf import load_model
from jaxdraft.sharding import MeshShape, param_shardings
mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
for scan in (True, False):
    config, whole = load_model(sys.argv[1], scan=scan)
    _, parts = load_model(sys.argv[1], mesh=mesh, scan=scan)
    boxed = jax.eval_shape(lambda: init_boxed(config, jax.random.key(0), scan=scan))
    for a, b, sharding in zip(*map(jax.tree.leaves, (whole, parts, param_shardings(mesh, boxed))), strict=True):
        assert b.sharding.is_equivalent_to(sharding, b.ndim), (b.sharding, sharding)
        np.testing.assert_array_equal(a, b)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(parts))
"""


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_a_mesh_gets_each_device_its_part(tmp_path, family):
    config = dataclasses.replace(CONFIG, family=family, qkv_bias=family == "qwen2")
    save_model(tmp_path, config, init_params(config, jax.random.key(1)))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", MESH, str(tmp_path)], check=True, env=environment)


@pytest.fixture
def hub(tmp_path, params, monkeypatch):
    """huggingface_hub's cache as a download leaves it, and no network."""
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("a" * 40)
    save_model(snapshot, CONFIG, params)
    reference = tmp_path / "models--owner--tiny" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_repository_is_its_snapshot(hub, monkeypatch):
    for name, revision in (("owner/tiny", None), ("owner/tiny@" + "a" * 40, None), ("owner/tiny", "main")):
        found = model_folder(name, revision)
        assert found.resolve() == hub.resolve()
    assert load_model(model_folder("owner/tiny"))[0].hidden_size == 32


def test_what_is_no_folder_and_no_repository_is_named(hub, tmp_path):
    with pytest.raises(ConfigError, match=r"owner/other.*give its folder"):
        model_folder("owner/other")
    with pytest.raises(ConfigError, match="neither a folder here nor a hub repository"):
        model_folder("no-such-folder")
    assert model_folder(tmp_path) == tmp_path
    assert isinstance(model_folder(str(tmp_path)), Path)
    shutil.rmtree(hub)
    with pytest.raises(ConfigError):
        model_folder("owner/tiny")


def test_longrope_takes_its_factor_and_is_not_written_where_it_would_be_lost(tmp_path):
    rope = LongRope((1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0), 32)
    config = dataclasses.replace(CONFIG, family="phi3", rope_scaling=rope, max_positions=1024)
    save_model(tmp_path, config, init_params(config, jax.random.key(0)))
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert load_config(tmp_path).rope_scaling == rope
    new = written["rope_parameters"] | {"factor": 4.0}
    path.write_text(json.dumps(written | {"rope_scaling": None, "rope_parameters": new}))
    read = load_config(tmp_path).rope_scaling
    assert read.attention_factor == pytest.approx(
        1.18322, abs=1e-5
    )  # of transformers 5.23, where 1024 / 32 gives 1.414
    with pytest.raises(ConfigError, match="attention_factor of its own"):
        save_model(tmp_path / "again", dataclasses.replace(config, rope_scaling=read), load_model(tmp_path)[1])


def test_a_stored_head_that_a_tied_model_would_not_use_is_refused(tmp_path):
    config = ModelConfig(8, 16, 1, 2, 1, vocab_size=11)
    params = init_params(config, jax.random.key(0))
    save_model(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    for head, fits in ((embed.copy(), True), (embed + 1, False), (embed[:3].copy(), False)):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if fits:
            jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], dict(params))
        else:
            with pytest.raises(ConfigError, match=r"ties the head .* but tensor lm_head\.weight differs"):
                load_model(tmp_path)
