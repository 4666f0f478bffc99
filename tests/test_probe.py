"""What a draft is measured on while it learns."""

import textwrap
from pathlib import Path

import jax
import pytest

from jaxdraft.data.prompts import PromptFile
from jaxdraft.errors import ConfigError
from jaxdraft.losses import KL
from jaxdraft.models import ModelConfig, init_params
from jaxdraft.models.hf import save_model
from jaxdraft.probe import efficiency_summary, first_answers
from jaxdraft.recipe import Generate, HFModel, Recipe, TopK, Train
from jaxdraft.run import run
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tracking import read_jsonl, write_jsonl

DECODED = 3


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """The lines of a real little training: a draft learns from what somebody else's target stored.

    The target's weights are random, larger than a fresh model's, so that its most likely tokens are not nearly tied.
    """
    folder = tmp_path_factory.mktemp("looks")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 2}
    target = ModelConfig(vocab_size=400, num_layers=2, bos_id=1, eos_ids=(2,), max_positions=128, **shape)
    params = jax.tree.map(lambda x: 3 * x, init_params(target, jax.random.key(0)))
    train_sentencepiece([Path(textwrap.__file__).read_text()], folder / "target", 400)
    save_model(folder / "target", target, params)
    prompts = [{"prompt": text} for text in ("def f(x):", "import", "return the", "for i in", "class A")]
    prompts[1] |= {"max_new_tokens": 5}  # of its own, which no answer tells
    write_jsonl(folder / "prompts.jsonl", prompts)
    recipe = Recipe(
        title="Looks",
        target=HFModel(str(folder / "target")),
        draft=ModelConfig(num_layers=1, **shape),
        stages=(
            Generate(
                "answers",
                prompts=(PromptFile(str(folder / "prompts.jsonl")),),
                temperatures=(0.0, 1.0),
                max_new_tokens=24,
                length=64,
                batch_size=8,
                keep_logits=TopK(4),
            ),
            Train(
                "distill",
                data="answers",
                loss=KL(),
                target_logits="stored",
                steps=40,
                learning_rate=2e-2,
                batch_size=4,
                probe_every=20,
                probe_block_sizes=(2, 4),
                probe_limit=DECODED,
                probe_decode=DECODED,
            ),
        ),
    )
    run(recipe, folder / "run")
    return read_jsonl(folder / "run" / "distill" / "block_efficiency.jsonl")


def test_greedy_decoding_takes_as_many_blocks_as_were_counted_without(looks):
    greedy = [line for line in looks if line["temperature"] == 0]
    for line in greedy:
        assert line["block_efficiency"] == line["block_efficiency_offline"]
        assert line["block_efficiency_ci95"] == line["block_efficiency_offline_ci95"]
        assert (line["decoded_prompts"], line["decoded_tokens"]) == (line["prompts"], line["tokens"])
        assert line["decoded_blocks"] == round(line["tokens"] / line["block_efficiency_offline"])
    blocks = [line["decoded_blocks"] for line in greedy if line["block_size"] == 4]
    assert len(set(blocks)) == len(blocks) == 3, "the draft learns: it must not be an old one that decodes"


def test_sampled_decoding_is_counted_too(looks):
    for line in looks:
        assert line["decoded_prompts"] == DECODED
        assert line["block_efficiency"] == pytest.approx(line["decoded_tokens"] / line["decoded_blocks"], abs=1e-6)
        low, high = line["block_efficiency_ci95"]
        assert 1 <= low <= line["block_efficiency"] <= high <= line["block_size"] + 1
    first = [line for line in looks if (line["step"], line["temperature"]) == (0, 1)]
    for line in first:  # later ones know the answers by heart, but no others
        assert line["block_efficiency"] == pytest.approx(line["block_efficiency_offline"], abs=0.6)


def test_no_more_is_decoded_than_measured():
    with pytest.raises(ConfigError, match=r"probe_decode is 9: of the probe_limit=8"):
        Train("distill", data="rows", loss=KL(), batch_size=1, steps=1, probe_limit=8, probe_decode=9)


def test_the_first_answers_of_each_temperature_are_measured_and_only_the_targets(tmp_path):
    stage = Generate("probe", prompts=(), length=8, temperatures=(0.0, 0.6))
    lines = [
        {"id": f"{i}@{t:g}", "temperature": t, "writer": "target", "number": 2 * i + (t > 0)}
        for i in range(5)
        for t in stage.temperatures
    ]
    lines[0]["writer"] = "draft"
    lines[3]["error"] = "empty answer"
    for i in range(2):  # files hold questions of one length, and not in the order in which they were asked
        write_jsonl(tmp_path / f"responses-{i:05d}-of-00002.jsonl", lines[5 * (1 - i) : 5 * (1 - i) + 5])
    ids = [line["id"] for line in first_answers(tmp_path, stage, 2)]
    assert ids == ["1@0", "2@0", "0@0.6", "2@0.6"]
    assert len(first_answers(tmp_path, stage, 32)) == 8


def test_the_summary_is_the_last_value_at_the_largest_block_size():
    lines = [
        {"step": step, "temperature": t, "top_p": 0.9, "block_size": g, "block_efficiency_offline": 1 + step + t + g}
        for step in (0, 3)
        for t in (0.0, 0.5)
        for g in (5, 3)
    ]
    assert efficiency_summary(lines) == {"block efficiency at γ 5": "9.00 (greedy), 9.50 (T 0.5, top-p 0.9)"}
    assert efficiency_summary([]) == {}
    decoded = [line | {"block_efficiency": 2.0} for line in lines]
    assert efficiency_summary(decoded)["decoded block efficiency at γ 5"] == "2.00 (greedy), 2.00 (T 0.5, top-p 0.9)"
