"""The decoder against real trained models, against itself in its other forms, and through its files."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder, ModelConfig, for_decoding, head_weight, init_cache, init_params, logits
from jaxdraft.models.decoder import Head
from jaxdraft.models.hf import load_model, save_model

REAL_MODELS = ("stories260K-hf", "llama2xs-hf", "babyllama-tok361-hf")
TINY = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, rope_theta=500.0
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny_params():
    params = init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda x: x * 5, params)  # far from zero, so that mistakes show


def full_logits(config, params, tokens_BT, segment_ids_BT=None, **options):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden = Decoder(config, **options).apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)
    return logits(hidden, head_weight(config, params))


def assert_same_sums(ours, reference):
    """The same float32 sums in another order: 64 rounding errors of the largest logit (3 layers, sums of 32 to 61)."""
    bound = 64 * np.finfo(np.float32).eps * np.abs(reference).max()
    np.testing.assert_allclose(ours, reference, atol=bound, rtol=0)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_give_the_reference_logits(shared_data, name):
    config, params = load_model(shared_data / "models" / name)
    golden = np.load(shared_data / "models" / name / "golden.npz")
    ours = full_logits(config, params, jnp.asarray(golden["greedy"][None, :24]))
    np.testing.assert_allclose(ours[0], golden["logits24"], atol=1e-4, rtol=0)


def test_parameter_count_is_what_is_initialised():
    for config in (TINY, dataclasses.replace(TINY, tie_embeddings=False)):
        shapes = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == config.num_parameters


def test_scan_remat_and_unrolled_layers_agree(tiny_params):
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, TINY.vocabulary)
    scanned = full_logits(TINY, tiny_params, tokens)
    for remat in ("dots", "full"):
        np.testing.assert_array_equal(full_logits(TINY, tiny_params, tokens, remat=remat), scanned)
    unrolled = for_decoding(TINY, tiny_params)
    assert_same_sums(full_logits(TINY, unrolled, tokens, scan=False), scanned)


def test_cached_steps_equal_the_full_forward(tiny_params):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocabulary)
    decoder, params = Decoder(TINY, scan=False), for_decoding(TINY, tiny_params)
    cache, steps = init_cache(TINY, 2, 16, jnp.float32), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        hidden, cache = decoder.apply({"params": params}, tokens[:, start:stop], positions, cache=cache)
        steps.append(logits(hidden, head_weight(TINY, params)))
    assert_same_sums(jnp.concatenate(steps, 1), full_logits(TINY, tiny_params, tokens))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"tie_embeddings": False, "head_ids": (3, 5, 60)}])
def test_wide_weights_that_lie_by_rows_give_the_same_logits(tmp_path, changes):
    config = dataclasses.replace(TINY, hidden_size=768, intermediate_size=800, num_layers=1, **changes)
    params = init_params(config, jax.random.key(0))
    decoder, turned = Decoder(config, scan=False), for_decoding(config, params)
    assert turned["layers_0"]["w_gate"].shape == (800, 768)
    assert turned["layers_0"]["wo"].shape == (768, 4, 192)
    tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, config.vocabulary)
    expected = full_logits(config, params, tokens)
    for rows, length in ((1, 1), (1, 5), (3, 6)):
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        hidden = decoder.apply({"params": turned}, tokens[:rows, :length], positions)
        ours = Head.of(decoder, turned)(hidden)
        assert ours.dtype == jnp.float32
        # Sums of 768 in another order, in each of seven products: 2 √768 rounding errors each.
        bound = 7 * 56 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(ours, expected[:rows, :length], atol=bound, rtol=0)
    if config.head_ids is None:
        save_model(tmp_path, config, params)
        jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path, scan=False)[1], turned)


def test_rolling_back_is_using_smaller_positions(tiny_params):
    decoder, params = Decoder(TINY, scan=False), for_decoding(TINY, tiny_params)

    def step(tokens, start, cache):
        positions = start + jnp.arange(len(tokens))[None]
        return decoder.apply({"params": params}, jnp.asarray([tokens]), positions, cache=cache)

    _, cache = step([5, 6, 7], 0, init_cache(TINY, 1, 8, jnp.float32))
    _, wrong = step([9, 9, 9], 3, cache)
    after_rollback, _ = step([8], 3, wrong)
    without, _ = step([8], 3, cache)
    np.testing.assert_array_equal(after_rollback, without)


def test_a_position_beyond_the_cache_writes_nothing(tiny_params):
    decoder, params = Decoder(TINY, scan=False), for_decoding(TINY, tiny_params)
    before = init_cache(TINY, 1, 8, jnp.float32)
    _, after = decoder.apply({"params": params}, jnp.asarray([[3]]), jnp.asarray([[8]]), cache=before)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_segments_do_not_see_each_other(tiny_params):
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, TINY.vocabulary)
    segments = jnp.asarray([[1] * 7 + [2] * 5])
    positions = jnp.asarray([[*range(7), *range(5)]])
    hidden = Decoder(TINY).apply({"params": tiny_params}, tokens, positions, segments)
    packed = logits(hidden, head_weight(TINY, tiny_params))
    assert_same_sums(packed[:, 7:], full_logits(TINY, tiny_params, tokens[:, 7:]))


def test_a_cache_with_scanned_layers_is_refused(tiny_params):
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="scan=False"):
        Decoder(TINY).apply({"params": tiny_params}, one, one, cache=init_cache(TINY, 1, 4, jnp.float32))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_comes_back_as_it_was(tmp_path, family, tied):
    config = dataclasses.replace(TINY, family=family, tie_embeddings=tied, eos_ids=(2, 7))
    params = init_params(config, jax.random.key(3))
    save_model(tmp_path, config, params)
    loaded_config, loaded = load_model(tmp_path)
    assert loaded_config.num_parameters == config.num_parameters
    assert dataclasses.replace(loaded_config, head_dim=None) == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_phi3_fuses_what_llama_keeps_apart(tmp_path):
    params = init_params(TINY, jax.random.key(3))
    save_model(tmp_path / "llama", TINY, params)
    save_model(tmp_path / "phi3", dataclasses.replace(TINY, family="phi3"), params)
    from safetensors.numpy import load_file

    llama, phi3 = (load_file(tmp_path / name / "model.safetensors") for name in ("llama", "phi3"))
    prefix = "model.layers.1.self_attn."
    fused = np.concatenate([llama[f"{prefix}{n}_proj.weight"] for n in "qkv"])
    np.testing.assert_array_equal(phi3[prefix + "qkv_proj.weight"], fused)
    assert llama[prefix + "q_proj.weight"].shape == (32, 32)
    assert llama["model.layers.0.mlp.down_proj.weight"].shape == (32, 48)


def test_bfloat16_weights_survive_a_folder(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), init_params(TINY, jax.random.key(3)))
    save_model(tmp_path, TINY, params, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "llama3.*lacks a value"),
        ({"rope_theta": 10000.0}, "rope_theta is 10000.0, but 500.0 in rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"intermediate_size": 47}, "mlp.down_proj.weight has shape"),
        ({"num_hidden_layers": 2}, "unknown tensors"),
        ({"num_hidden_layers": 4}, "model.layers.3.*missing"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    save_model(tmp_path, TINY, init_params(TINY, jax.random.key(0)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


def test_either_dialect_of_rope_theta_is_read(tmp_path):
    save_model(tmp_path, TINY, init_params(TINY, jax.random.key(0)))
    path = tmp_path / "config.json"
    both = json.loads(path.read_text())
    for drop in ("rope_parameters", "rope_theta"):
        path.write_text(json.dumps({k: v for k, v in both.items() if k != drop}))
        assert load_model(tmp_path)[0].rope_theta == 500.0


def test_bad_shapes_are_named():
    with pytest.raises(ConfigError, match="num_kv_heads"):
        dataclasses.replace(TINY, num_kv_heads=3)
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        _ = dataclasses.replace(TINY, vocab_size=None).num_parameters


def test_no_deprecated_calls(tiny_params):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        full_logits(TINY, tiny_params, jnp.zeros((1, 4), jnp.int32))
