"""The target's distribution stored beside rows: made by a stage, the right one, refused where it would not fit."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft import stored_targets
from jaxdraft.context import Context
from jaxdraft.data.pipeline import segment_positions
from jaxdraft.data.records import PackedRows
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError
from jaxdraft.home import Home
from jaxdraft.losses import KL, CrossEntropy
from jaxdraft.models import Decoder, ModelConfig, head_weight, logits
from jaxdraft.models.hf import load_model
from jaxdraft.recipe import Generate, HFModel, Prepare, Recipe, Score, TopK, Train
from jaxdraft.run import plan_all, run
from jaxdraft.tracking import read_jsonl

LENGTH, K = 64, 32
HOW = {"steps": 2, "batch_size": 2}
TRAIN = Train("distill", data="scored", loss=KL(), target_logits="stored", **HOW)
TALE = "Once upon a time there was a {} cat. It liked to {} in the garden, and {} came to see it every day.\n"


@pytest.fixture(scope="module")
def recipe(shared_data, tmp_path_factory):
    words = ("small", "big", "red", "play", "sleep", "sing", "Tim", "a bird", "the sun")
    text = "\n\n".join(TALE.format(a, b, c) for a in words[:3] for b in words[3:6] for c in words[6:])
    file = tmp_path_factory.mktemp("text") / "tales.txt"
    file.write_text(text)
    return Recipe(
        title="Stored",
        target=HFModel(str(shared_data / "models" / "stories260K-hf")),
        draft=ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1),
        stages=(
            Prepare("corpus", sources=(Text(str(file), separator="\n\n"),), length=LENGTH),
            Score("scored", data="corpus", keep_logits=TopK(K)),
            TRAIN,
        ),
    )


@pytest.fixture(scope="module")
def workdir(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    run(recipe, folder, only=["corpus", "scored"])
    return folder


def test_a_real_targets_distribution_is_stored_to_the_rounding_of_float16(recipe, workdir):
    plain, stored = PackedRows(workdir / "corpus"), PackedRows(workdir / "scored")
    assert len(stored) == len(plain) > 10
    config, params = load_model(recipe.target.path)
    assert stored.manifest["target_logits"] == {
        "k": K,
        "temperature": 1.0,
        "target": Context(recipe, Home(workdir)).target_hash,
        "vocabulary": config.vocabulary,
    }
    rows = [stored[i] for i in range(len(stored))]
    for i, row in enumerate(rows):
        for name, values in plain[i].items():
            np.testing.assert_array_equal(row[name], values)
    tokens, segments = (np.stack([row[key] for row in rows]).astype(np.int32) for key in ("tokens", "segment_ids"))
    hidden = Decoder(config).apply({"params": params}, tokens, segment_positions(segments), segments)
    exact = np.asarray(logits(hidden, jnp.asarray(head_weight(config, params))), np.float64)
    exact -= exact.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    for row, labels, segment_ids, expected in zip(rows, tokens, segments, exact, strict=True):
        for t in range(LENGTH):
            ends = t + 1 == LENGTH or segment_ids[t + 1] != segment_ids[t]
            top = np.argsort(-expected[t])[:K]
            others = np.setdiff1d(np.arange(config.vocabulary), top if ends else [*top, labels[t + 1]])
            own = -np.inf if ends else expected[t, labels[t + 1]]
            wanted = np.asarray([*expected[t, top], own, np.log(np.exp(expected[t, others]).sum())])
            # float16 rounds by half of 2**-10; the float32 logits, up to 30, by another order of sums.
            found = row["target_log_probs"][t].astype(np.float64)
            np.testing.assert_allclose(found, wanted, rtol=2**-11, atol=1e-4)
            # Of two tokens that float32 cannot tell apart either may come first.
            np.testing.assert_allclose(expected[t, row["target_ids"][t]], wanted[:K], atol=1e-4)


def test_training_from_stored_targets_is_training_from_live_ones(recipe, workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    stages = (*recipe.stages, dataclasses.replace(TRAIN, name="live", target_logits="live"))
    run(dataclasses.replace(recipe, stages=stages), copy)
    stored, live = (read_jsonl(copy / name / "metrics.jsonl") for name in ("distill", "live"))
    for a, b in zip(stored, live, strict=True):
        assert a["tokens"] == b["tokens"]
        # KL over merged columns is at most that over all; here the draft knows nothing, and the tail is nearly empty.
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
        assert a["acceptance_low"] - 1e-3 <= b["acceptance"] <= a["acceptance_high"] + 1e-3


def test_a_second_run_scores_nothing_and_another_k_scores_again(recipe, workdir):
    states = {plan.stage.name: plan.state for plan in plan_all(recipe, workdir)}
    assert states["scored"] == "done"
    other = dataclasses.replace(recipe.stage("scored"), keep_logits=TopK(4))
    changed = dataclasses.replace(recipe, stages=(recipe.stages[0], other))
    assert plan_all(changed, workdir)[1].state == "changed"


def test_room_is_asked_for_before_anything_is_written(recipe, workdir, tmp_path, monkeypatch, capsys):
    shutil.copytree(workdir / "corpus", tmp_path / "corpus")
    rows = PackedRows(workdir / "scored")
    needed = len(rows) * LENGTH * (5 + 2 * K + 2 * (K + 2))
    payload = sum(shard["bytes"] for shard in rows.manifest["shards"])
    assert needed < payload < needed + 200 * len(rows) + 2**17, "not what the rows take"
    monkeypatch.setattr(stored_targets.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(ConfigError, match=r"scored: .* kB of rows .*lower keep_logits\.k"):
        run(recipe, tmp_path, only=["scored"])
    assert not list((tmp_path / "scored").glob("rows-*"))
    monkeypatch.setattr(stored_targets.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    run(recipe, tmp_path, only=["scored"])
    assert f"({len(rows) * LENGTH:,} tokens × 137 bytes)" in capsys.readouterr().err


def test_more_tokens_than_the_vocabulary_has_are_refused(recipe, workdir):
    context = Context(recipe, Home(workdir))
    for k in (512, 513):
        with pytest.raises(ConfigError, match=f"keep_logits.k is {k}: it must be less than the target's 512"):
            stored_targets.target_logits("scored", TopK(k), context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "0" * 64}, "another target's probabilities"),
        ({"temperature": 0.5}, "at temperature 0.5, the loss's is 1"),
        (None, "stores nothing of the target"),
    ],
)
def test_training_refuses_what_was_stored_otherwise(recipe, workdir, tmp_path, change, message):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    context = Context(recipe, Home(copy))
    stored_targets.check_stored(TRAIN, context, {"scored": context.rows("scored")})
    path = copy / "scored" / "manifest.json"
    manifest = json.loads(path.read_text())
    if change is None:
        del manifest["target_logits"]
        manifest["columns"] = {key: x for key, x in manifest["columns"].items() if not key.startswith("target_")}
    else:
        manifest["target_logits"] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=message):
        stored_targets.check_stored(TRAIN, context, {"scored": context.rows("scored")})


def recipe_of(*stages):
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    return Recipe(title="", target=HFModel("nowhere"), draft=draft, stages=stages)


CORPUS = Prepare("corpus", sources=(), length=LENGTH)


def score(name="scored", **changes):
    return Score(name, data="corpus", keep_logits=TopK(**{"k": K, **changes}))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((CORPUS, dataclasses.replace(TRAIN, data="corpus")), r"stores none: train on Score\(…, data='corpus'"),
        (
            (Generate("answers", prompts=(), length=LENGTH), dataclasses.replace(TRAIN, data="answers")),
            r"'answers' stores none: give answers keep_logits=TopK\(32\)",
        ),
        ((CORPUS, score(temperature=0.5), TRAIN), "at temperature 0.5, but the loss's is 1: set scored"),
        (
            (CORPUS, score(), score("few", k=4), dataclasses.replace(TRAIN, data={"scored": 0.5, "few": 0.5})),
            "different numbers of tokens cannot be mixed: {'scored': 32, 'few': 4}",
        ),
        (
            (
                CORPUS,
                score(),
                Generate("answers", prompts=(), length=32, keep_logits=TopK(K)),
                dataclasses.replace(TRAIN, data={"scored": 0.5, "answers": 0.5}),
            ),
            "different lengths cannot be mixed: {'scored': 64, 'answers': 32}",
        ),
        (
            (Score("scored", data="corpus", keep_logits=TopK(K)),),
            "no earlier Prepare or Generate or Subset stage 'corpus'",
        ),
    ],
)
def test_a_recipe_that_would_train_on_what_is_not_stored_is_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(*stages)


def test_a_target_is_loaded_only_where_it_is_read():
    stages = recipe_of(CORPUS, score(), TRAIN).stages
    assert [stage.uses_target for stage in stages] == [False, True, False]
    assert dataclasses.replace(TRAIN, init="subclone").uses_target
    assert dataclasses.replace(TRAIN, target_logits="live").uses_target
    assert not dataclasses.replace(TRAIN, loss=CrossEntropy(), target_logits="live").uses_target
    assert recipe_of(CORPUS, score(), TRAIN).needs(stages[1]) == ("corpus",)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 4, "temperature": 0.0}, {"k": 4, "temperature": float("nan")}])
def test_top_k_is_checked(wrong):
    with pytest.raises(ConfigError, match="TopK: "):
        TopK(**wrong)
