"""Every family against logits that transformers computed (tests/models/make_reference.py), and through a folder."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdraft.models import Decoder, head_weight, init_cache, logits
from jaxdraft.models.hf import load_model, save_model

GOLDEN = sorted(Path(__file__).with_name("golden").glob("*.npz"))
_spec = importlib.util.spec_from_file_location("reference_weights", Path(__file__).with_name("reference_weights.py"))
reference_weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_weights)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def reference(request, tmp_path):
    golden = np.load(request.param)
    (tmp_path / "config.json").write_text(str(golden["config"]))
    shapes = json.loads(str(golden["shapes"]))
    tensors = {name: reference_weights.weights(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, golden


def full(config, params, tokens, positions):
    hidden = Decoder(config).apply({"params": params}, jnp.asarray(tokens)[None], jnp.asarray(positions)[None])
    return logits(hidden, head_weight(config, params))[0]


def test_logits_are_those_of_transformers(reference):
    folder, golden = reference
    ours = full(*load_model(folder), golden["tokens"], golden["positions"])
    np.testing.assert_allclose(ours, golden["logits"], atol=1e-4, rtol=0)


def test_a_written_folder_is_the_same_model_in_both_dialects(reference, tmp_path):
    folder, _ = reference
    config, params = load_model(folder)
    save_model(tmp_path / "ours", config, params)
    ours, theirs = load_file(tmp_path / "ours" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    path = tmp_path / "ours" / "config.json"
    written = json.loads(path.read_text())
    for dialect in ("rope_parameters",), ("rope_theta", "rope_scaling"), ():
        path.write_text(json.dumps({key: value for key, value in written.items() if key not in dialect}))
        read, _ = load_model(tmp_path / "ours")
        assert dataclasses.replace(read, head_dim=None) == dataclasses.replace(config, head_dim=None)


def test_cached_steps_are_the_full_forward(reference):
    folder, golden = reference
    config, params = load_model(folder, scan=False)
    tokens = jnp.asarray(golden["tokens"])[None]
    count = tokens.shape[1]
    cache, steps = init_cache(config, 1, 64, jnp.float32, end_B=jnp.asarray([count])), []
    apply = jax.jit(Decoder(config, scan=False).apply)
    for start, stop in [(0, 10), *((i, i + 1) for i in range(10, count))]:
        hidden, cache = apply({"params": params}, tokens[:, start:stop], jnp.arange(start, stop)[None], cache=cache)
        steps.append(logits(hidden, head_weight(config, params)))
    whole = full(*load_model(folder), golden["tokens"], np.arange(count))
    np.testing.assert_allclose(jnp.concatenate(steps, 1)[0], whole, atol=1e-4, rtol=0)
