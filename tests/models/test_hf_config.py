"""``config.json``: values of the wrong type, and two dialects that say different things.

What transformers reads was found by running 5.23 on the same files.
"""

import dataclasses
import json

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig
from jaxdraft.models.hf_config import config_json, load_config
from jaxdraft.models.rope import Llama3Scaling, LongRope

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


def test_an_original_context_of_one_is_no_traceback(tmp_path):
    write_rope(tmp_path, PHI3, rope_scaling=LONGROPE | {"factor": 4.0}, original_max_position_embeddings=1)
    with pytest.raises(ConfigError, match="original_max_positions is 1: at least 2"):
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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LLAMA3 | {"factor": 4.0}, LLAMA3, "factor is 4.0 by rope_scaling, but 8.0 by rope_parameters"),
        (LLAMA3, {"rope_type": "default"}, "rope_type is llama3 by rope_scaling, but default by rope_parameters"),
        ({"type": "default"}, LLAMA3, "rope_type is default by rope_scaling, but llama3 by rope_parameters"),
        ({"type": "linear", "factor": 2.0}, LLAMA3, "'linear' is not supported"),
    ],
)
def test_two_scalings_that_contradict_each_other_are_refused(tmp_path, old, new, message):
    write_rope(tmp_path, rope_theta=500000.0, rope_scaling=old, rope_parameters=new)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


def test_two_longropes_that_contradict_each_other_are_refused(tmp_path):
    other = LONGROPE | {"short_factor": [1.5, 1.1, 1.2, 1.3]}
    for new in other, LONGROPE | {"factor": 4.0}:
        write_rope(tmp_path, PHI3, rope_scaling=LONGROPE, rope_parameters=new, original_max_position_embeddings=32)
        with pytest.raises(ConfigError, match=r"(short|attention)_factor is .* by rope_scaling, but .* by rope_param"):
            load_config(tmp_path)


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_rope_scaling_leaves_rope_parameters(tmp_path, empty):
    read = load_config(write_rope(tmp_path, rope_scaling=empty, rope_parameters=LLAMA3 | {"rope_theta": 500000.0}))
    assert (read.rope_theta, read.rope_scaling) == (500000.0, Llama3Scaling(8.0, 1.0, 4.0, 128))


@pytest.mark.parametrize("top", [ABSENT, 500000.0, 500000])
def test_a_theta_in_rope_scaling_is_read(tmp_path, top):
    read = load_config(write_rope(tmp_path, rope_theta=top, rope_scaling=LLAMA3 | {"rope_theta": 500000.0}))
    assert (read.rope_theta, read.rope_scaling) == (500000.0, Llama3Scaling(8.0, 1.0, 4.0, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}},
            r"rope_theta is 10000\.0, but 500000\.0 in rope_scaling",
        ),
        (
            {"rope_scaling": LLAMA3 | {"rope_theta": 1e6}, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            r"rope_theta is 1000000\.0 in rope_scaling, but 500000\.0 in rope_parameters",
        ),
        # transformers 5.23 reads nothing of rope_parameters here, and 4.44 never does: both take 10000.
        (
            {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            r"rope_theta is 10000\.0 by default, but 500000\.0 in rope_parameters",
        ),
    ],
)
def test_thetas_that_contradict_each_other_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_rope(tmp_path, **change))


@pytest.mark.parametrize("where", ["", "rope_scaling", "rope_parameters"])
def test_a_partial_rotary_factor_is_refused_wherever_it_stands(tmp_path, where):
    part = {"partial_rotary_factor": 0.5}
    change = {where: LLAMA3 | part} if where else part
    with pytest.raises(ConfigError, match=r"partial_rotary_factor 0\.5"):
        load_config(write_rope(tmp_path, **{"rope_scaling": LLAMA3, "rope_parameters": LLAMA3} | change))


def test_phi3_takes_4096_where_the_original_context_is_missing(tmp_path):
    read = load_config(write_rope(tmp_path, PHI3, rope_scaling=LONGROPE, max_position_embeddings=8192))
    assert read.rope_scaling == LongRope((1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0), 4096)


@pytest.mark.parametrize(
    ("family", "rope", "change", "message"),
    [
        (PHI3, LONGROPE | {"original_max_position_embeddings": 32}, {}, "is 4096 by default, but 32 in the rope"),
        (
            PHI3,
            LONGROPE | {"original_max_position_embeddings": 32},
            {"original_max_position_embeddings": 64},
            "is 64, but 32 in the rope",
        ),
        (LLAMA, LLAMA3, {"original_max_position_embeddings": 64}, "is 64, but 128 in the rope"),
    ],
)
def test_original_contexts_that_contradict_each_other_are_refused(tmp_path, family, rope, change, message):
    for name in ("rope_scaling", "rope_parameters"):
        write_rope(tmp_path, family, **{name: rope}, **change)
        with pytest.raises(ConfigError, match=f"original_max_position_embeddings {message}"):
            load_config(tmp_path)


def test_a_missing_window_or_context_is_what_transformers_takes(tmp_path):
    config = ModelConfig(8, 16, 1, 2, 1, vocab_size=11)
    for family, window, positions in (("mistral", 4096, 131072), ("llama", None, 2048), ("phi3", None, 4096)):
        raw = config_json(dataclasses.replace(config, family=family), "float32")
        for key in ("sliding_window", "max_position_embeddings"):
            raw.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        read = load_config(tmp_path)
        assert (read.sliding_window, read.max_positions) == (window, positions)
