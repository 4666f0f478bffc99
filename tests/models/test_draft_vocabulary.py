"""The head of a draft vocabulary: selected, counted, stored whole or narrow with its map, and read back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig, head_weight, init_params
from jaxdraft.models.decoder import token_ids, widen
from jaxdraft.models.hf import load_config, load_model, save_model

IDS = (0, 3, 4, 9)
UNTIED = ModelConfig(8, 16, 1, 2, 1, vocab_size=11, tie_embeddings=False, head_ids=IDS)
TIED = dataclasses.replace(UNTIED, tie_embeddings=True)
either = pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])


@either
def test_columns_of_the_whole_head(config):
    params = init_params(config, jax.random.key(0))
    whole = head_weight(dataclasses.replace(config, head_ids=None), params)
    np.testing.assert_array_equal(head_weight(config, params), whole[:, list(IDS)])
    np.testing.assert_array_equal(token_ids(config, jnp.asarray([3, 0])), [9, 0])
    wide = widen(config, jnp.asarray([[0.1, 0.2, 0.3, 0.4]]))
    np.testing.assert_array_equal(wide, np.float32([[0.1, 0, 0, 0.2, 0.3, 0, 0, 0, 0, 0.4, 0]]))


@either
def test_parameters_are_counted_with_the_rows_of_the_head(config):
    params = init_params(config, jax.random.key(0))
    whole = sum(x.size for x in jax.tree.leaves(params))
    assert config.num_parameters == whole - (0 if config.tie_embeddings else 7 * 8)


@either
@pytest.mark.parametrize("narrow", [False, True])
def test_a_folder_keeps_it(config, narrow, tmp_path):
    params = init_params(config, jax.random.key(0))
    save_model(tmp_path, config, params, narrow_head=narrow)
    stored = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored["d2t"] + np.arange(4), IDS)
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] == 4
    if not config.tie_embeddings:
        assert stored["lm_head.weight"].shape == (4 if narrow else 11, 8)
    read, back = load_model(tmp_path)
    assert read.head_ids == IDS
    np.testing.assert_array_equal(head_weight(read, back), head_weight(config, params))
    if not config.tie_embeddings and narrow:
        params = {**params, "head": params["head"] * np.isin(np.arange(11), IDS)}
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda tensors: tensors.pop("d2t"), "no file the map d2t"),
        (lambda tensors: tensors.update(d2t=np.arange(3)), r"d2t is I64\[3\]; draft_vocab_size is 4"),
        (lambda tensors: tensors.update(d2t=np.zeros(4, np.float32)), r"d2t is F32\[4\]"),
        (lambda tensors: tensors.update(d2t=np.asarray([0, 0, 9, 0])), "head_ids must be ids of the vocabulary"),
        (lambda tensors: tensors.update({"lm_head.weight": np.zeros((5, 8), np.float32)}), r"has shape \(5, 8\)"),
    ],
)
def test_a_damaged_map_is_named(change, answer, tmp_path):
    save_model(tmp_path, UNTIED, init_params(UNTIED, jax.random.key(0)), narrow_head=True)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=answer):
        load_model(tmp_path)


def test_a_map_without_its_size_is_an_unknown_tensor(tmp_path):
    save_model(tmp_path, UNTIED, init_params(UNTIED, jax.random.key(0)))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["draft_vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="unknown tensors d2t"):
        load_model(tmp_path)
    assert load_config(tmp_path).head_ids is None


@pytest.mark.parametrize("ids", [(), (3, 1), (1, 1), (-1, 2), (2, 11)])
def test_wrong_ids_are_refused(ids):
    with pytest.raises(ConfigError, match="head_ids"):
        dataclasses.replace(UNTIED, head_ids=ids)
