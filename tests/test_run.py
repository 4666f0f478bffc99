"""A whole recipe, really run: what is done stays done, what changed runs again, what was killed ends the same."""

import collections
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdraft.cli import main
from jaxdraft.data.pipeline import Batches
from jaxdraft.data.prompts import PromptFile
from jaxdraft.data.records import PackedRows
from jaxdraft.decode import acceptance_ratios, expected_blocks, generate
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.metrics import offline_metrics
from jaxdraft.export import export_stage
from jaxdraft.files import sha256
from jaxdraft.losses import KL, TVDPlusPlus
from jaxdraft.models import Decoder, ModelConfig, head_weight, init_params, logits
from jaxdraft.models.hf import load_config, load_model, save_model
from jaxdraft.models.subclone import project_embedding, subclone
from jaxdraft.plan.hardware import Hardware
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.stages import plan_stages, row_bytes
from jaxdraft.recipe import Generate, HFModel, Recipe, TopK
from jaxdraft.recipe_file import load_recipe
from jaxdraft.run import plan_all, run
from jaxdraft.settings import to_json
from jaxdraft.stages import CALIBRATION_ROWS
from jaxdraft.tokenizers import load_tokenizer
from jaxdraft.tracking import read_jsonl, write_jsonl

TINY = str(Path(__file__).with_name("tiny_recipe.py"))
# Their bytes depend on recipe and seed alone; results hold times.
REPEATABLE = ("*/metrics.jsonl", "*/block_efficiency.jsonl", "responses/*.jsonl", "*/*.array_record")
REPEATABLE += ("export/*.safetensors", "export/*.json")


@pytest.fixture
def copy(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run, tmp_path / "copy"))


def hashes(workdir):
    files = sorted({file for pattern in REPEATABLE for file in workdir.glob(pattern) if file.name != "stage.json"})
    return {str(file.relative_to(workdir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def states(workdir, *assignments):
    return {plan.stage.name: plan.state for plan in plan_all(load_recipe(TINY, assignments), workdir)}


def test_every_stage_leaves_what_the_interface_promises(tiny_run):
    record = json.loads((tiny_run / "run.json").read_text())
    assert {"git", "packages", "devices", "mesh", "seed", "xla_flags"} <= record.keys()
    recipe = json.loads((tiny_run / "recipe.json").read_text())
    for stage in recipe["stages"]:
        made = json.loads((tiny_run / stage["name"] / "stage.json").read_text())
        assert made["status"] == "done"
        assert made["outputs"]
        for name, digest in made["outputs"].items():
            assert hashlib.sha256((tiny_run / stage["name"] / name).read_bytes()).hexdigest() == digest
    for name in ("target", "pretrain", "distill"):
        metrics = [json.loads(line) for line in (tiny_run / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(range(1, 7))
        assert not any("second" in key or "time" in key for key in metrics[0])
        assert ("acceptance" in metrics[0]) == (name == "distill")


def test_results_are_complete_and_consistent(tiny_run):
    for draft in ("pretrain", "distill"):
        results = json.loads((tiny_run / "evaluate" / draft / "results.json").read_text())
        assert results["parameters"]["ratio"] == results["parameters"]["draft"] / results["parameters"]["target"]
        samples = (tiny_run / "evaluate" / draft / "samples.jsonl").read_text().splitlines()
        assert len(samples) == sum(row["prompts"] for row in results["runs"])
        for row in results["runs"]:
            assert row["tokens"] / row["blocks"] == pytest.approx(row["block_efficiency"], abs=1e-6)
            assert row["mbsu"] == pytest.approx(
                row["block_efficiency"] / (results["parameters"]["ratio"] * row["block_size"] + 1), abs=1e-5
            )
            low, high = row["block_efficiency_ci95"]
            assert low <= row["block_efficiency"] <= high
            if row["temperature"] == 0:
                assert row["identical_to_target"] == row["prompts"]
                assert row["block_efficiency_offline"] == row["block_efficiency"]
        assert results["target_perplexity"]["perplexity"] > 1
        if draft == "pretrain":
            assert results["perplexity"]["perplexity"] > 1
        else:
            assert results["perplexity"]["perplexity"] is None, "a draft vocabulary cannot say every token"
        assert results["perplexity"]["text"] == "PythonLibrary/eval"
    lines = [json.loads(line) for line in (tiny_run / "evaluate" / "checkpoints.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if line["draft"] == "distill"} == {3, 6}


def test_samples_add_up_to_the_results(tiny_run):
    folder = tiny_run / "evaluate" / "distill"
    samples = read_jsonl(folder / "samples.jsonl")
    for row in json.loads((folder / "results.json").read_text())["runs"]:
        mine = [line for line in samples if (line["task"], line["block_size"]) == (row["task"], row["block_size"])]
        total = {key: sum(line[key] for line in mine) for key in ("target_tokens", "expected_blocks", "overlap_sum")}
        assert total["target_tokens"] / total["expected_blocks"] == pytest.approx(
            row["block_efficiency_offline"], abs=1e-5
        )
        assert total["overlap_sum"] / total["target_tokens"] == pytest.approx(row["overlap"], abs=1e-5)
        # Only a cut block writes less than its accepted tokens and one more.
        is_cut = [len(line["tokens"]) < sum(line["accepted"]) + len(line["accepted"]) for line in mine]
        complete = [a for cut, line in zip(is_cut, mine, strict=True) for a in line["accepted"][: -1 if cut else None]]
        assert np.mean(complete) / row["block_size"] == pytest.approx(row["acceptance_rate"], abs=1e-6)


def test_the_last_checkpoint_is_the_model_that_was_evaluated(tiny_run):
    results = json.loads((tiny_run / "evaluate" / "distill" / "results.json").read_text())
    expected = {row["task"]: row["block_efficiency_offline"] for row in results["runs"]}
    for line in map(json.loads, (tiny_run / "evaluate" / "checkpoints.jsonl").read_text().splitlines()):
        if (line["draft"], line["step"]) == ("distill", 6):
            assert line["block_efficiency_offline"] == expected[line["task"]]


def test_an_evaluation_that_is_asked_for_more_does_that_alone(copy):
    read = lambda draft: json.loads((copy / "evaluate" / draft / "results.json").read_text())
    before = {draft: read(draft) for draft in ("pretrain", "distill")}
    run(load_recipe(TINY, ["evaluate.decode_checkpoints=true"]), copy, only=["evaluate"])
    assert (copy / "superseded" / "evaluate.1" / "distill" / "results.json").exists()
    assert {draft: read(draft) for draft in before} == before  # times and all: nothing was decoded again
    lines = read_jsonl(copy / "evaluate" / "checkpoints.jsonl")
    assert [(line["draft"], line["step"], line["task"]) for line in lines] == [
        (draft, step, task)
        for draft, steps in (("pretrain", (6,)), ("distill", (3, 6)))
        for step in steps
        for task in ("open", "greedy")
    ]
    at_end = [line for line in lines if (line["draft"], line["step"]) == ("distill", 6)]
    assert [{"draft": "distill", "step": 6, **run} for run in before["distill"]["runs"]] == at_end
    assert all(line["identical_to_target"] == line["prompts"] for line in lines if line["task"] == "greedy")


def test_what_was_logged_while_a_draft_learned_ends_with_the_model_it_became(tiny_run):
    lines = read_jsonl(tiny_run / "distill" / "block_efficiency.jsonl")
    keys = [(line["step"], line["temperature"], line["block_size"]) for line in lines]
    assert keys == list(itertools.product((0, 4, 6), (0.0, 1.0), (3, 5)))
    target, draft = (Model.load(tiny_run / name / "model") for name in ("target", "distill"))
    answers = [line for file in sorted((tiny_run / "responses").glob("responses-*.jsonl")) for line in read_jsonl(file)]
    for line in lines[-4:]:
        mine = [answer for answer in answers if answer["temperature"] == line["temperature"]]
        mine.sort(key=lambda answer: answer["number"])
        text = [answer["prompt_tokens"] for answer in mine], [answer["tokens"] for answer in mine]
        how = {"temperature": line["temperature"], "top_p": line["top_p"], "max_new_tokens": 16}
        found = acceptance_ratios(target.decoder, target.params, draft.decoder, draft.params, *text, **how)
        expected = offline_metrics([a.accept_N for a in found], line["block_size"])
        assert line["block_efficiency_offline"] == pytest.approx(expected["block_efficiency_offline"], abs=1e-5)
        assert line["block_efficiency_offline_ci95"] == pytest.approx(
            expected["block_efficiency_offline_ci95"], abs=1e-5
        )
        assert (line["prompts"], line["tokens"]) == (len(mine), sum(map(len, text[1])))
        if line["temperature"] == 0:
            blocks = [expected_blocks(a.accept_N, line["block_size"]) for a in found[: line["decoded_prompts"]]]
            assert (line["decoded_prompts"], line["decoded_blocks"]) == (2, sum(blocks))
    record = json.loads((tiny_run / "distill" / "stage.json").read_text())
    assert "block_efficiency.jsonl" in record["outputs"]
    assert record["summary"]["block efficiency at γ 5"].endswith("(T 1, top-p 0.95)")
    assert not (tiny_run / "pretrain" / "block_efficiency.jsonl").exists()


def test_a_draft_that_learns_without_the_target_in_the_loop_is_measured_too(copy):
    run(load_recipe(TINY, ["distill.loss=CrossEntropy", "distill.probe_block_sizes=2"]), copy, only=["distill"])
    assert "acceptance" not in read_jsonl(copy / "distill" / "metrics.jsonl")[0]
    assert {line["block_size"] for line in read_jsonl(copy / "distill" / "block_efficiency.jsonl")} == {2}
    assert "target" in json.loads((copy / "distill" / "stage.json").read_text())["inputs"]


def test_responses_keep_the_settings_that_made_them(tiny_run):
    files = sorted((tiny_run / "responses").glob("responses-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(lines) == 12
    assert len({line["id"] for line in lines}) == 12
    assert {line["temperature"] for line in lines} == {0.0, 1.0}
    tokenizer = load_tokenizer(tiny_run / "tokenizer")
    for line in lines:
        assert line["top_p"] == 0.95
        assert len(line["tokens"]) <= 16
        assert line["text"] == tokenizer.decode(line["tokens"])
        assert (line["finish"] == "eos") == (line["tokens"][-1] == tokenizer.eos_id)


def test_responses_keep_what_the_target_thought_of_them(tiny_run):
    rows = PackedRows(tiny_run / "responses")
    assert rows.manifest["target_logits"]["k"] == 4
    batch = Batches({"responses": rows}, batch_size=len(rows), seed=0, stored=True)[0]
    is_label = np.roll(batch["loss_mask"], -1, axis=1) > 0  # of the token after each position
    is_label[:, -1] = False
    ids, mass = batch["target_ids"], np.exp(batch["target_log_probs"].astype(np.float64))
    labels = np.roll(batch["tokens"], -1, axis=1)
    among = (ids == labels[..., None]).any(-1)
    total = mass[..., :4].sum(-1) + np.where(among, 0, mass[..., 4]) + mass[..., 5]
    # Each logarithm, down to ln 400, is rounded by half of 2**-10 of itself.
    np.testing.assert_allclose(total[batch["segment_ids"] > 0], 1, atol=6 * 2**-11)
    config, params = load_model(tiny_run / "target" / "model")
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden = Decoder(config).apply({"params": params}, *inputs)
    best = np.argmax(logits(hidden, head_weight(config, params)), axis=-1)
    assert (ids[..., 0] == best)[is_label].mean() > 0.99


def answers(workdir):
    lines = [line for file in (workdir / "responses").glob("responses-*.jsonl") for line in read_jsonl(file)]
    return sorted(lines, key=lambda line: line["number"])


def test_a_draft_writes_its_share_of_the_answers(tiny_run, copy):
    shares = "responses.writer={'target': 0.5, 'pretrain': 0.5}"
    run(load_recipe(TINY, [shares]), copy, only=["responses"])
    mixed, by_target = answers(copy), answers(tiny_run)
    assert [line["id"] for line in mixed] == [line["id"] for line in by_target]
    assert {line["writer"] for line in by_target} == {"target"}
    own = [line for line in mixed if line["writer"] == "pretrain"]
    assert 2 <= len(own) <= 10
    assert all(line == other for line, other in zip(mixed, by_target, strict=True) if line["writer"] == "target")
    draft = Model.load(copy / "pretrain" / "model")
    for line in own:
        if line["temperature"] == 0:
            (alone,) = generate(draft.decoder, draft.params, [line["prompt_tokens"]], max_new_tokens=16, batch_size=4)
            assert line["tokens"] == alone
    rows = PackedRows(copy / "responses")
    assert rows.manifest["source"]["settings"]["writer"] == {"target": 0.5, "pretrain": 0.5}
    assert rows.manifest["target_logits"]["k"] == 4
    # Neither the size of a shard nor a second attempt at one changes who writes what.
    before = hashes(copy)
    sorted((copy / "responses").glob("responses-*.jsonl"))[1].unlink()
    run(load_recipe(TINY, [shares]), copy, only=["responses"])
    assert hashes(copy) == before
    run(load_recipe(TINY, [shares, "responses.shard_size=5", "responses.batch_size=3"]), copy, only=["responses"])
    assert answers(copy) == mixed


def test_a_draft_that_writes_alone_needs_no_target(tiny_run):
    recipe = load_recipe(TINY, ["responses.writer=pretrain", "responses.keep_logits=none"])
    assert recipe.needs(recipe.stage("responses")) == ("pretrain", "tokenizer")
    recipe = load_recipe(TINY, ["responses.writer=pretrain"])
    assert recipe.needs(recipe.stage("responses")) == ("pretrain", "target", "tokenizer")


def test_a_second_run_does_nothing(tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    assert set(states(tiny_run).values()) == {"done"}
    run(load_recipe(TINY), tiny_run)
    changed = {path.name for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert changed <= {"recipe.json", ".lock"}


def test_a_changed_setting_reruns_its_stage_and_what_depends_on_it(copy, capsys):
    assert states(copy, "distill.learning_rate=2e-3") == {
        **dict.fromkeys(("tokenizer", "corpus", "target", "pretrain", "responses", "vocabulary"), "done"),
        "distill": "changed",
        "evaluate": "waiting",
        "export": "waiting",
    }
    before = (copy / "export" / "model.safetensors").read_bytes()
    run(load_recipe(TINY, ["distill.learning_rate=2e-3"]), copy)
    said = capsys.readouterr().err
    assert "distill (Train): runs again, learning_rate was 0.001 and is 0.002" in said
    assert "superseded/distill.1" in said
    assert (copy / "superseded" / "distill.1" / "model" / "model.safetensors").exists()
    assert (copy / "export" / "model.safetensors").read_bytes() != before


def test_another_seed_or_shape_changes_what_depends_on_it(tiny_run):
    assert states(tiny_run, "draft.hidden_size=32")["pretrain"] == "changed"
    assert states(tiny_run, "draft.hidden_size=32")["target"] == "done"
    assert states(tiny_run, "seed=1")["tokenizer"] == "changed"


def test_a_draft_vocabulary_is_the_most_frequent_of_what_the_target_wrote(tiny_run):
    lines = [line for file in (tiny_run / "responses").glob("responses-*.jsonl") for line in read_jsonl(file)]
    counts = collections.Counter(token for line in lines for token in line["tokens"])
    record = json.loads((tiny_run / "vocabulary" / "draft_vocabulary.json").read_text())
    ids, (eos,) = set(record["ids"]), load_config(tiny_run / "target" / "model").eos_ids
    assert len(ids) == 48 < len(counts)
    assert eos in ids
    rarest = min(counts[id] for id in ids - {eos})
    assert max((count for token, count in counts.items() if token not in ids), default=0) <= rarest
    assert record["coverage"] == sum(counts[id] for id in ids) / counts.total()


def test_a_draft_with_a_draft_vocabulary_is_trained_measured_and_exported(tiny_run, tmp_path):
    config, params = load_model(tiny_run / "distill" / "model")
    assert list(config.head_ids) == json.loads((tiny_run / "vocabulary" / "draft_vocabulary.json").read_text())["ids"]
    assert load_config(tiny_run / "pretrain" / "model").head_ids is None
    assert load_config(tiny_run / "export").head_ids is None
    export_stage(tiny_run, "distill", tmp_path / "own", vocabulary="draft")
    own, own_params = load_model(tmp_path / "own")
    assert own.head_ids == config.head_ids
    np.testing.assert_array_equal(own_params["embed"], params["embed"])
    with pytest.raises(ConfigError, match="no draft vocabulary"):
        export_stage(tiny_run, "pretrain", tmp_path / "none", vocabulary="draft")
    for line in read_jsonl(tiny_run / "evaluate" / "distill" / "samples.jsonl"):
        at = 0
        for accepted in line["accepted"]:
            assert set(line["tokens"][at : at + accepted]) <= set(config.head_ids)
            at += accepted + 1


@pytest.mark.parametrize("init", ["subclone", "target-embedding"])
def test_a_draft_can_start_from_the_targets_weights(copy, init):
    # At this rate no step moves a weight by more than 1e-9.
    still = ["pretrain.learning_rate=1e-12", "pretrain.steps=2", f"pretrain.init={init}"]
    run(load_recipe(TINY, still), copy, only=["pretrain"])
    assert "target" in json.loads((copy / "pretrain" / "stage.json").read_text())["inputs"]
    config, params = load_model(copy / "pretrain" / "model")
    target, target_params = load_model(copy / "target" / "model")
    if init == "subclone":
        corpus = PackedRows(copy / "corpus")
        rows = [corpus[i] for i in range(CALIBRATION_ROWS)]
        tokens, segments = (np.stack([row[key] for row in rows]) for key in ("tokens", "segment_ids"))
        expected = subclone(target, target_params, config, tokens.astype(np.int32), segments > 0)
    else:
        expected = project_embedding(target, target_params, config, params)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-9), params, dict(expected))


def test_a_target_that_proposes_a_part_of_its_vocabulary_is_refused(tiny_run, tmp_path):
    export_stage(tiny_run, "distill", tmp_path / "narrow", vocabulary="draft")
    folder = str(tiny_run / "pretrain" / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    pair = ["--target", str(tmp_path / "narrow"), "--draft", folder, "--prompts", str(tmp_path / "p.jsonl")]
    assert main(["evaluate", *pair, "--out", str(tmp_path / "out")]) == 2


def test_a_draft_that_does_not_fit_into_its_target_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="pretrain: init='subclone': num_layers is 3, larger than the target's 2"):
        run(load_recipe(TINY, ["pretrain.init=subclone", "draft.num_layers=3"]), tmp_path / "new")
    assert not (tmp_path / "new" / "tokenizer").exists()


def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(copy, capsys):
    shutil.rmtree(copy / "pretrain")
    arguments = ["run", TINY, "--workdir", str(copy), "--set", "pretrain.learning_rate=1e30", "--only", "pretrain"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "3 steps in a row were not finite and were skipped: step 1, rows corpus " in said
    assert not (copy / "pretrain" / "model").exists()
    lines = read_jsonl(copy / "pretrain" / "metrics.jsonl")
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 1), (2, 1), (3, 1)]
    assert len({line["loss"] for line in lines}) == 3, "other rows, and still the parameters it began with"


def test_a_changed_title_reaches_the_report(copy):
    run(load_recipe(TINY, ["title=Another title"]), copy)
    assert "Another title" in (copy / "report" / "index.html").read_text()


def test_line_ends_inside_text_survive(tmp_path):
    lines = [{"text": "a\u2028b\x85c\u2029\nd"}, {"text": ""}]
    write_jsonl(tmp_path / "lines.jsonl", lines)
    assert read_jsonl(tmp_path / "lines.jsonl") == lines


def test_a_loss_of_ones_own_is_told_apart_from_ours_and_by_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    body = "from jaxdraft.losses import TVDPlusPlus as Ours\n\n\nclass TVDPlusPlus(Ours):\n    number = {}\n"
    names = []
    for number in (1, 2):
        (tmp_path / f"own{number}.py").write_text(body.format(number))
        module = importlib.import_module(f"own{number}")
        names.append(to_json(module.TVDPlusPlus())["type"].partition(":")[2])
    assert len({*names, to_json(TVDPlusPlus())["type"]}) == 3


def test_lost_output_is_made_again(copy):
    (copy / "export" / "model.safetensors").unlink()
    assert states(copy)["export"] == "unfinished"


def test_only_runs_what_it_names(copy, tmp_path, capsys):
    for name in ("evaluate", "export"):
        shutil.rmtree(copy / name)
    run(load_recipe(TINY, ["export.evaluation=none"]), copy, only=["export"])
    assert (copy / "export" / "config.json").exists()
    assert not (copy / "evaluate").exists()
    with pytest.raises(ConfigError, match="'tokenizer' has to run first"):
        run(load_recipe(TINY), tmp_path / "new", only=["corpus"])
    with pytest.raises(ConfigError, match="did you mean 'export'"):
        run(load_recipe(TINY), copy, only=["exprot"])


def test_rows_made_with_another_tokenizer_are_refused(copy):
    manifest, record = (copy / "corpus" / name for name in ("manifest.json", "stage.json"))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokenizer": "another"}))
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged: it is not what its stage wrote"):
        run(load_recipe(TINY, ["pretrain.steps=7"]), copy, only=["pretrain"])
    done = json.loads(record.read_text())
    done["outputs"]["manifest.json"] = sha256(manifest)
    record.write_text(json.dumps(done))
    with pytest.raises(ConfigError, match="another tokenizer"):
        run(load_recipe(TINY, ["pretrain.steps=7"]), copy, only=["pretrain"])


def test_a_damaged_row_file_is_named(copy):
    (shard,) = (copy / "corpus").glob("*.array_record")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=shard.name):
        run(load_recipe(TINY, ["pretrain.steps=7"]), copy, only=["pretrain"])


def test_an_export_holds_the_trained_weights_and_the_targets_tokenizer(tiny_run, tmp_path):
    exported = load_file(tiny_run / "export" / "model.safetensors")
    trained = load_file(tiny_run / "distill" / "model" / "model.safetensors")
    del trained["d2t"]  # a full export holds plain weights
    assert exported.keys() == trained.keys()
    for name, weights in trained.items():
        assert exported[name].dtype.name == "bfloat16"
        np.testing.assert_allclose(exported[name].astype(np.float32), weights, rtol=2**-8)
    for file in (tiny_run / "tokenizer").glob("tokenizer*"):
        assert (tiny_run / "export" / file.name).read_bytes() == file.read_bytes()
    generation = json.loads((tiny_run / "export" / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 5
    assert generation["assistant_confidence_threshold"] == 0.0
    assert "| greedy | greedy | 2 |" in (tiny_run / "export" / "README.md").read_text()
    export_stage(tiny_run, "distill", tmp_path / "again", dtype="bfloat16", evaluation="evaluate")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tiny_run / "export" / file.name).read_bytes()
    with pytest.raises(ConfigError, match=r"no finished Train stage 'corpus'; it has: distill, pretrain, target"):
        export_stage(tiny_run, "corpus", tmp_path / "no")


def test_an_export_of_the_recipes_target_says_that_it_is_one(copy):
    settings = ["export.draft=target", "export.evaluation=none", "description=It knows little."]
    run(load_recipe(TINY, settings), copy, only=["export"])
    folder = copy / "export"
    card = (folder / "README.md").read_text()
    assert re.search(r"^# A target model of [\d,]+ parameters$", card, re.MULTILINE)
    assert "\nIt knows little.\n" in card
    assert "| trained | 6 steps of 8 rows |" in card
    assert "| licences of the data | PSF-2.0 |" in card
    assert f"jaxdraft at revision {json.loads((copy / 'run.json').read_text())['git']}, Python 3." in card
    assert not re.search(r"draft-model|A draft|assistant_model|^\| target \|", card, re.MULTILINE)
    assert not any(str(copy).encode() in file.read_bytes() for file in folder.iterdir())
    assert "num_assistant_tokens" not in json.loads((folder / "generation_config.json").read_text())


def test_the_command_line_evaluates_and_samples_the_export(tiny_run, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x):"}\n{"id": "two", "prompt": "Return", "kept": 1}\n')
    target, draft = str(tiny_run / "target" / "model"), str(tiny_run / "export")
    pair = ["--target", target, "--draft", draft, "--max-new-tokens", "8"]
    out = tmp_path / "out"
    measure = ["--prompts", str(prompts), "--block-sizes", "2", "--predict-up-to", "1", "--out", str(out)]
    assert main(["evaluate", *pair, *measure]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["runs"][0]["task"] == "prompts"
    assert results["runs"][0]["identical_to_target"] == 2
    assert [json.loads(line)["id"] for line in (out / "samples.jsonl").read_text().splitlines()] == ["1", "two"]
    assert "2 of 2 greedy answers are the target's own" in capsys.readouterr().out

    # Of several drafts each has a folder; one that is a Train stage may be measured as it was at a checkpoint.
    several = [*pair, "--draft", str(tiny_run / "pretrain"), "--draft", str(tiny_run / "target"), *measure]
    assert main(["evaluate", *several]) == 0
    assert {path.parent.name for path in out.glob("*/results.json")} == {"export", "pretrain", "target"}
    assert json.loads((out / "export" / "results.json").read_text())["runs"] == results["runs"]
    (run,) = json.loads((out / "target" / "results.json").read_text())["runs"]
    assert run["acceptance_rate"] == 1
    past = ["--target", target, "--draft", str(tiny_run / "pretrain"), "--max-new-tokens", "8", "--checkpoints"]
    other = ["--out", str(tmp_path / "past")]
    assert main(["evaluate", *past, "6", *measure, *other]) == 0
    at_end, became = (
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "past", out / "pretrain")
    )
    assert at_end["draft"] == "pretrain@6"
    assert at_end["settings"] == became["settings"]
    assert at_end["runs"][0]["block_efficiency"] == became["runs"][0]["block_efficiency"]
    capsys.readouterr()
    assert main(["evaluate", *past, "4", *measure, *other]) == 2
    assert "kept no checkpoint of step 4: it has 6" in capsys.readouterr().err
    assert main(["evaluate", *pair, *measure, *other]) == 2
    assert "was measured with weights" in capsys.readouterr().err
    long = ["--max-new-tokens", "9999", "--prompts", str(prompts), "--out", str(out)]
    assert main(["evaluate", "--target", target, "--draft", draft, *long]) == 2
    assert "only 2048 positions" in capsys.readouterr().err
    assert main(["sample", *pair, "--prompt", "def f(x):", "--block-size", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("def f(x):")
    assert "runs of the target" in printed.err


MY_TASKS = """
from jaxdraft.data.prompts import PromptList
from jaxdraft.evaluate.tasks import Task

def functions(path="names.txt"):
    names = open(path).read().split()
    return Task("functions", PromptList([{"prompt": f"def {name}("} for name in names]), max_new_tokens=5)
"""


def test_the_command_line_measures_on_tasks_and_a_text(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)  # undone after the test, with what the import adds
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tasks.py").write_text(MY_TASKS)
    (tmp_path / "names.txt").write_text("f getattr")
    (tmp_path / "de.jsonl").write_text(
        '{"source": "Ja .", "reference": "Yes ."}\n{"source": "No", "reference": "No"}\n'
    )
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 20)
    pair = ["--target", str(tiny_run / "target" / "model"), "--draft", str(tiny_run / "export")]
    asked = ["--task", "my_tasks:functions", "--task", "wmt18-de-en=de.jsonl", "--max-new-tokens", "6", "--limit", "1"]
    command = ["evaluate", *pair, *asked, "--perplexity", "text.txt", "--block-sizes", "2", "--predict-up-to", "0"]
    assert main([*command, "--out", "out"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["task"], run["prompts"], run["temperature"]) for run in results["runs"]] == [
        ("functions", 1, 0.0),
        ("wmt18-de-en", 1, 0.0),
    ]
    draft, target = results["perplexity"], results["target_perplexity"]
    assert (draft["text"], draft["documents"], draft["words"]) == ("text.txt", 1, 120)
    assert draft["perplexity"] > 1
    assert draft["tokens"] == target["tokens"]
    assert f"the draft's perplexity on text.txt: {draft['perplexity']:.3f} per token" in capsys.readouterr().out
    assert main(["evaluate", *pair, "--out", "out"]) == 2
    assert "nothing to measure on: give --prompts FILE, or --task with one of dolly, xsum" in capsys.readouterr().err


def test_wrong_input_exits_with_2_and_a_held_directory_with_75(tiny_run, tmp_path, capsys):
    assert main(["run", TINY, "--workdir", str(tmp_path), "--set", "distil.steps=1"]) == 2
    assert "did you mean 'distill'" in capsys.readouterr().err
    target, draft = str(tiny_run / "target" / "model"), tmp_path / "draft"
    shutil.copytree(tiny_run / "export", draft)
    swapped = json.loads((draft / "tokenizer.json").read_text())
    vocab = swapped["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (draft / "tokenizer.json").write_text(json.dumps(swapped))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    out = ["--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--target", target, "--draft", str(draft), *out]) == 2
    assert "different tokenizers: id" in capsys.readouterr().err
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "vocab_size": 401}))
    assert main(["evaluate", "--target", target, "--draft", str(draft), *out]) == 2
    assert "a vocabulary of 400 and" in capsys.readouterr().err
    assert main(["sample", "--target", target, "--draft", "nowhere", "--prompt", "a"]) == 2
    assert "nowhere" in capsys.readouterr().err
    import fcntl

    with (tiny_run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["run", TINY, "--workdir", str(tiny_run)]) == 75
    assert "another jaxdraft run" in capsys.readouterr().err


def start(workdir, *arguments):
    command = [sys.executable, "-m", "jaxdraft.cli", "run", TINY, "--workdir", str(workdir), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bytes(tiny_run, tmp_path):
    assert start(tmp_path / "fresh").wait() == 0
    assert hashes(tmp_path / "fresh") == hashes(tiny_run)


OWN = """
from dataclasses import dataclass
import jax.numpy as jnp
from jaxdraft.losses import Loss, log_probs

@dataclass(frozen=True)
class Own(Loss):
    skew: float = 0.5

    def rows(self, draft_logits_CV, target, labels_C):
        p_CV = jnp.exp(log_probs(draft_logits_CV, self.temperature))
        loss_C = jnp.sum((p_CV - jnp.exp(target.log_probs(self.temperature))) ** 2, axis=-1)
        return self.skew * loss_C, {"squares": loss_C}

@dataclass(frozen=True)
class Flat(Loss):
    def rows(self, draft_logits_CV, target, labels_C):
        return jnp.sum(draft_logits_CV)
"""


def test_a_loss_of_ones_own_from_the_command_line(copy, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["run", TINY, "--workdir", str(copy), "--only", "distill", "--set"]
    assert main([*arguments, "distill.loss=own_losses:Flat"]) == 2
    assert "distill: loss Flat.rows: one number per position, (12,); got ()" in capsys.readouterr().err
    assert main([*arguments, "distill.loss=own_losses:Own", "--set", "distill.loss.skew=0.25"]) == 0
    for line in read_jsonl(copy / "distill" / "metrics.jsonl"):
        np.testing.assert_allclose(line["loss"], 0.25 * line["squares"], rtol=1e-6)


def test_a_loss_is_tried_once_and_again_when_it_has_changed(copy, monkeypatch):
    tried = []
    monkeypatch.setattr("jaxdraft.run.check_loss", lambda loss, stored: tried.append((loss, stored)))
    run(load_recipe(TINY, []), copy)
    assert tried == []
    run(load_recipe(TINY, ["distill.loss=KL"]), copy, only=["vocabulary"])
    assert tried == [(KL(), False)]


def test_plan_foretells_what_lies_there(tiny_run):
    """Up to what containers add: under 100 bytes a row, 128 KiB a file, headers.

    Checkpoints are compressed, and their index is written as often as a flush comes: up to 32 KiB each.
    """
    context = PlannedContext.of(load_recipe(TINY))
    plans = {plan.name: plan for plan in plan_stages(context, Hardware("H100", 1))}
    for name, keep in {"corpus": None, "responses": TopK(4)}.items():
        manifest = json.loads((tiny_run / name / "manifest.json").read_text())
        row = manifest["length"] * row_bytes(400, keep)
        [file] = (tiny_run / name).glob("rows-*.array_record")
        assert row * manifest["rows"] < file.stat().st_size < (row + 100) * manifest["rows"] + 2**17
    for name, count in {"target": 2, "pretrain": 2}.items():
        planned = plans[name].storage
        kept = sorted(path for path in (tiny_run / name / "checkpoints").iterdir() if path.is_dir())
        assert len(kept) == count
        files = [path for path in (tiny_run / name / "checkpoints").rglob("d/*") if path.is_file()]
        stored = sum(path.stat().st_size for path in files)
        assert 0.9 * planned["2 checkpoints"] < stored < planned["2 checkpoints"] + count * 2**15
        weights = (tiny_run / name / "model" / "model.safetensors").stat().st_size
        assert 0 < weights - planned["model"] < 4096
    assert len(list((tiny_run / "distill" / "checkpoints").glob("*.json"))) == 3
    assert "3 checkpoints" in plans["distill"].storage
    exported = (tiny_run / "export" / "model.safetensors").stat().st_size
    assert 0 < exported - plans["export"].storage["model"] < 4096


def test_another_chat_template_asks_anew(shared_data, tmp_path):
    target, prompts = tmp_path / "target", tmp_path / "prompts.jsonl"
    shutil.copytree(shared_data / "models" / "stories260K-hf", target, copy_function=shutil.copyfile)
    template = target / "chat_template.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    prompts.write_text('{"messages": [{"role": "user", "content": "Once"}]}\n')
    stage = Generate("made", prompts=(PromptFile(str(prompts)),), length=32, max_new_tokens=4, temperatures=(0.0,))
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    recipe = Recipe(title="Chat", target=HFModel(str(target)), draft=draft, stages=(stage,))
    run(recipe, tmp_path / "run")
    assert [plan.state for plan in plan_all(recipe, tmp_path / "run")] == ["done"]
    template.write_text(template.read_text().replace("m.content", "'USER: ' + m.content"))
    (plan,) = plan_all(recipe, tmp_path / "run")
    assert (plan.state, plan.reason) == ("changed", "runs again, input chat template has changed")


def test_a_token_that_the_tokenizer_does_not_have_costs_its_answer_alone(shared_data, tmp_path):
    """Phi-3 and Qwen have rows that no token of their tokenizers uses; here there are as many as others."""
    target, prompts = tmp_path / "target", tmp_path / "prompts.jsonl"
    shutil.copytree(shared_data / "models" / "stories260K-hf", target, copy_function=shutil.copyfile)
    config = dataclasses.replace(load_config(target), vocab_size=1024)
    save_model(target, config, init_params(config, jax.random.key(0)))
    prompts.write_text("".join(json.dumps({"prompt": f"Once {i}"}) + "\n" for i in range(40)))
    how = {"length": 32, "max_new_tokens": 1, "temperatures": (1.0,), "keep_logits": TopK(4)}
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    stages = (Generate("made", prompts=(PromptFile(str(prompts)),), **how),)
    run(Recipe(title="Spare", target=HFModel(str(target)), draft=draft, stages=stages), tmp_path / "run")
    account = json.loads((tmp_path / "run" / "made" / "answers.json").read_text())["answers"]
    assert 0 < account["written"] < account["asked"] == 40
    assert account["errors"] == {"the writer drew a token id that the tokenizer does not have": 40 - account["written"]}
    assert (
        json.loads((tmp_path / "run" / "made" / "manifest.json").read_text())["counts"]["examples"]
        == account["written"]
    )


def test_questions_whose_numbers_are_not_finite_are_named(shared_data, tmp_path):
    target, prompts = tmp_path / "target", tmp_path / "prompts.jsonl"
    shutil.copytree(shared_data / "models" / "stories260K-hf", target, copy_function=shutil.copyfile)
    config, params = load_model(target)
    save_model(target, config, jax.tree.map(lambda x: x * np.nan, params))
    prompts.write_text('{"id": "tale", "prompt": "Once"}\n')
    stage = Generate("made", prompts=(PromptFile(str(prompts)),), length=32, max_new_tokens=1, temperatures=(0.0,))
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    with pytest.raises(FloatingPointError, match="tale@0"):
        run(Recipe(title="Broken", target=HFModel(str(target)), draft=draft, stages=(stage,)), tmp_path / "run")
