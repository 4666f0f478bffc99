import dataclasses
from pathlib import Path

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig, presets
from jaxdraft.models.rope import LongRope

# Counted by hand in the design, or printed on the models' own cards.
COUNTS = {
    "llama2_chat_drafter_115m": 116_925_440,
    "fastdraft_phi3_50m": 52_107_776,
    "fastdraft_phi3_120m": 134_204_160,
    "fastdraft_llama31_150m": 154_147_328,
    "llama2_7b": 6_738_415_616,
    "phi3_mini_4k": 3_821_079_552,
    "llama31_8b": 8_030_261_248,
}


def test_presets_have_the_counts_of_their_docstrings():
    assert {name: config.num_parameters for name, config in presets.PRESETS.items()} == COUNTS
    source = Path(presets.__file__).read_text("utf-8")
    assert all(f'\n"""{count:,} parameters' in source for count in COUNTS.values())


def test_a_misspelt_preset_is_corrected():
    assert presets.preset("fastdraft_phi3_50m") is presets.fastdraft_phi3_50m
    with pytest.raises(ConfigError, match="did you mean 'fastdraft_phi3_50m'"):
        presets.preset("fastdraft_phi_50m")


@pytest.mark.parametrize(
    "target, parameters",
    [("llama2_7b", 115e6), ("phi3_mini_4k", 50e6), ("phi3_mini_4k", 120e6), ("llama31_8b", 150e6), ("llama2_7b", 1e9)],
)
def test_a_proposed_draft_is_of_the_size_and_fits_every_engine(target, parameters):
    target = presets.preset(target)
    draft = ModelConfig.for_target(target, parameters=int(parameters))
    assert abs(draft.num_parameters / parameters - 1) <= 0.06
    assert draft.head_size in (64, 128)
    assert draft.intermediate_size % 256 == draft.hidden_size % 256 == 0
    assert draft.num_kv_heads % 8 == draft.num_heads % draft.num_kv_heads == 0
    shared = ("vocab_size", "bos_id", "eos_ids", "max_positions", "rope_theta", "rope_scaling", "family")
    assert all(getattr(draft, name) == getattr(target, name) for name in shared)
    assert draft.sliding_window is None


def test_the_default_draft_is_a_fiftieth_of_the_target():
    draft = ModelConfig.for_target(presets.llama2_7b)
    assert draft.num_parameters == pytest.approx(presets.llama2_7b.num_parameters / 50, rel=0.06)


def test_longrope_stays_with_its_own_head_size():
    rope = LongRope((1.0,) * 48, (2.0,) * 48, 4096)
    target = dataclasses.replace(presets.phi3_mini_4k, rope_scaling=rope, max_positions=131072)
    assert ModelConfig.for_target(target, 50_000_000).rope_scaling is None


SMALL = ModelConfig(128, 256, 2, 2, 2, 512, tie_embeddings=False)
TINY = ModelConfig(32, 64, 2, 2, 2, 256)
QWEN = ModelConfig(896, 4864, 24, 14, 2, 151936, family="qwen2", qkv_bias=True)


@pytest.mark.parametrize(
    "target, parameters",
    [
        (presets.llama2_7b, [10**7, 10**8, 10**9, 3 * 10**9]),
        (presets.phi3_mini_4k, [10**7, 10**8, 10**9]),
        (presets.llama31_8b, [3 * 10**7, 10**8, 10**9, 5 * 10**9]),
        (dataclasses.replace(presets.llama31_8b, hidden_size=8192, num_layers=80, num_heads=64), [10**9, 8 * 10**9]),
        (QWEN, [2 * 10**7, 10**8]),
        (SMALL, [140_000, 300_000, 390_000]),
    ],
)
def test_any_size_makes_the_same_sound_draft_twice(target, parameters):
    for wanted in [None, *parameters]:
        for tie in (False, True):
            draft = ModelConfig.for_target(target, wanted, tie_embeddings=tie)
            assert draft == ModelConfig.for_target(target, wanted, tie_embeddings=tie)
            assert draft.num_parameters < target.num_parameters
            assert draft.family == ("phi3" if target.family == "phi3" else "llama")
            assert draft.hidden_size == draft.num_heads * draft.head_size
            assert draft.intermediate_size % 256 == draft.num_heads % draft.num_kv_heads == 0
            assert draft.num_kv_heads in (1, 2, 4, 8)
            assert draft.tie_embeddings is tie


def test_sizes_that_make_no_draft_are_refused():
    with pytest.raises(ConfigError, match="the smallest draft for this vocabulary has"):
        ModelConfig.for_target(presets.llama2_7b, 1000)
    with pytest.raises(ConfigError, match="a draft has to be smaller"):
        ModelConfig.for_target(presets.llama2_7b, 7_000_000_000)
    with pytest.raises(ConfigError, match="the largest draft for this target has"):
        ModelConfig.for_target(SMALL, SMALL.num_parameters - 1)
    with pytest.raises(ConfigError, match=r"the target has .* the smallest draft for its vocabulary has"):
        ModelConfig.for_target(TINY)
