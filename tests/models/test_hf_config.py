"""``config.json``: values of the wrong type are named."""

import dataclasses
import json

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig
from jaxdraft.models.hf_config import config_json, load_config

LLAMA = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, max_positions=1024
)
PHI3 = dataclasses.replace(LLAMA, family="phi3")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ABSENT = object()


def write(folder, config=LLAMA, **change):
    raw = config_json(config, "float32") | change
    raw = {key: value for key, value in raw.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def write_rope(folder, config=LLAMA, **change):
    """A config.json whose rope settings are ``change`` and no more."""
    bare = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"), ABSENT)
    return write(folder, config, **bare | change)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("hidden_size", "128", "a whole number above 0"),
        ("hidden_size", None, "a whole number above 0"),
        ("num_hidden_layers", 1.5, "a whole number above 0"),
        ("num_attention_heads", True, "a whole number above 0"),
        ("vocab_size", 0, "a whole number above 0"),
        ("max_position_embeddings", None, "a whole number above 0"),
        ("num_key_value_heads", "2", "a whole number above 0, or null"),
        ("head_dim", 8.0, "a whole number above 0, or null"),
        ("sliding_window", "512", "a whole number above 0, or null"),
        ("bos_token_id", "1", "a whole number or null"),
        ("eos_token_id", "2", "a whole number, a list of them, or null"),
        ("eos_token_id", [2, "3"], "a whole number, a list of them, or null"),
        ("rms_norm_eps", "1e-5", "a number above 0"),
        ("rms_norm_eps", None, "a number above 0"),
        ("rope_theta", "10000", "a number above 0, or null"),
        ("rope_theta", float("nan"), "a number above 0, or null"),
        ("tie_word_embeddings", "false", "true or false"),
        ("attention_bias", 0, "true or false"),
        ("rope_scaling", [LLAMA3], "an object or null"),
        ("rope_parameters", "default", "an object or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, key, value, wanted):
    write(tmp_path, **{key: value})
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    found = json.dumps(value)[:80]
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {key} is {found}, but must be {wanted}"


@pytest.mark.parametrize(
    ("family", "rope", "message"),
    [
        (LLAMA, LLAMA3 | {"factor": "8"}, r'rope_scaling\.factor is "8", but must be a number above 0'),
        (LLAMA, LLAMA3 | {"factor": None}, "'llama3' lacks a value or holds a wrong one"),
        (LLAMA, LLAMA3 | {"original_max_position_embeddings": "128"}, r"rope_scaling\.original_max\w+ is \"128\""),
        (LLAMA, LLAMA3 | {"rope_type": ["llama3"]}, "is not supported"),
        (PHI3, LONGROPE | {"short_factor": 1.0}, r"rope_scaling\.short_factor is 1.0, but must be a list of numbers"),
        (PHI3, LONGROPE | {"long_factor": [1, 2, 3, "4"]}, r"rope_scaling\.long_factor is .*a list of numbers above 0"),
        (PHI3, LONGROPE | {"attention_factor": "2"}, r'rope_scaling\.attention_factor is "2"'),
    ],
)
def test_a_rope_setting_of_the_wrong_type_is_named(tmp_path, family, rope, message):
    write_rope(tmp_path, family, rope_scaling=rope, original_max_position_embeddings=128)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


def test_a_family_that_is_no_text_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model_type \['llama'\] is not supported"):
        load_config(write(tmp_path, model_type=["llama"]))


def test_end_tokens_of_the_wrong_type_are_named_in_their_own_file(tmp_path):
    (write(tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(ConfigError, match=r'generation_config\.json: eos_token_id is "2"'):
        load_config(tmp_path)


def test_null_is_as_good_as_absent_where_transformers_writes_it(tmp_path):
    keys = ("num_key_value_heads", "head_dim", "bos_token_id", "rope_scaling", "rope_theta")
    assert load_config(write(tmp_path, **dict.fromkeys(keys))) == dataclasses.replace(
        LLAMA, num_kv_heads=4, bos_id=None
    )
