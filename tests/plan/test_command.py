"""``jaxdraft plan`` as it is typed, without a topology, and what it says where something is wrong."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from jaxdraft.cli import main
from jaxdraft.decode.batching import bucket_length
from jaxdraft.errors import ConfigError
from jaxdraft.models import presets
from jaxdraft.models.hf_config import config_json
from jaxdraft.plan.flops import block_flops, cache_bytes, head_flops
from jaxdraft.plan.hardware import Hardware, Topology, parse_hardware, parse_topology
from jaxdraft.plan.shapes import PlannedContext
from jaxdraft.plan.stages import plan_stages
from jaxdraft.plan.work import Decoding
from jaxdraft.recipe import Generate, Subset
from jaxdraft.recipe_file import load_recipe
from jaxdraft.server import Server

TINY = str(Path(__file__).parents[1] / "tiny_recipe.py")
DIRECT, FASTDRAFT, LOSSES = "direct_alignment_llama2_115m", "fastdraft_phi3_50m", "fastdraft_losses"


def planned(recipe, hardware, *assignments):
    context = PlannedContext.of(load_recipe(recipe, assignments))
    return {plan.name: plan for plan in plan_stages(context, hardware)}, context


def test_every_stage_has_a_line(capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert main(["plan", TINY, "--hardware", "2xA100", "--set", "distill.steps=8", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    names = [stage["name"] for stage in found["stages"]]
    assert names == [stage.name for stage in load_recipe(TINY).stages]
    assert all(f"\n{name} " in printed for name in names)
    distill = found["stages"][names.index("distill")]
    assert (distill["steps"], distill["tokens"]) == (8, 8 * 10 * 64)
    assert "Assumed:" in printed
    assert "MFU" in printed


def test_pretraining_as_the_paper_says():
    plan = planned(DIRECT, Hardware("A100", 32))[0]["pretrain-0"]
    assert plan.tokens == pytest.approx(600e9, rel=1e-5)
    assert plan.bound(Hardware("A100", 32)) == "compute"
    assert plan.hours(Hardware("A100", 8)) == pytest.approx(4 * plan.hours(Hardware("A100", 32)), rel=1e-6)


def test_a_budget_and_its_samples_are_what_they_say():
    whole = load_recipe(FASTDRAFT)
    text, pretrain = dataclasses.replace(whole.stage("text"), tokens=2e9), whole.stage("pretrain-0")
    part = Subset("part", data="text", tokens=1e9)
    for data, reads in (("text", "reads text 2.5 times"), ("part", "reads part 5 times")):
        stages = (text, part, dataclasses.replace(pretrain, data=data))
        context = PlannedContext.of(dataclasses.replace(whole, stages=stages, reproduces=()))
        plans = {plan.name: plan for plan in plan_stages(context, Hardware("A100", 8))}
        assert (plans["text"].tokens, plans["text"].notes) == (2e9, [])
        assert (plans["part"].tokens, plans["part"].storage) == (1e9, {"rows": 5e9})
        assert reads in plans["pretrain-0"].notes


def test_stored_logits_are_counted_to_the_byte():
    plans, _ = planned(LOSSES, Hardware("H100", 8))
    assert plans["responses"].storage["stored logits"] == plans["responses"].tokens * 132
    llama = "target.path=meta-llama/Llama-3.1-8B-Instruct"  # more tokens than two bytes can number
    plans, _ = planned(LOSSES, Hardware("H100", 8), llama)
    assert plans["responses"].storage["stored logits"] == plans["responses"].tokens * 196
    live, _ = planned(LOSSES, Hardware("H100", 8), llama, "kl-0.target_logits=live")
    assert plans["kl-0"].flops < live["kl-0"].flops / 5
    # Kept while the target writes: no pass of its own, but a second place where it lies.
    assert 0 < plans["responses"].storage["stored logits, beside the answers"] < plans["responses"].tokens * 196
    assert "scores" not in [phase.name for phase in plans["responses"].phases]
    labelled, _ = planned(LOSSES, Hardware("H100", 8), "responses.labels=all")
    assert labelled["responses"].phases[-1].name == "scores"


def test_what_a_server_writes_takes_no_hours_here():
    whole = load_recipe("fastdraft_target_text")
    server = Server("http://localhost:8000/v1")
    served = [dataclasses.replace(s, server=server) if isinstance(s, Generate) else s for s in whole.stages]
    context = PlannedContext.of(dataclasses.replace(whole, stages=tuple(served)))
    plans = [plan for plan in plan_stages(context, Hardware("A100", 8)) if plan.kind == "Generate"]
    assert plans
    for plan in plans:
        assert plan.phases == []
        assert "a server writes: its hours are not here" in plan.notes


def test_a_token_reads_weights_and_cache_once():
    config, batch = presets.llama2_7b, Decoding(rows=12, prompt=200, new=56, groups=4, tensor=2)
    slots = bucket_length(200) + 56
    flops, bytes = batch.step(config)
    table = config.vocabulary * config.hidden_size
    assert flops == 12 * (block_flops(config, slots) + head_flops(config))
    assert bytes == 2 * (config.num_parameters - table) / 2 + 3 * slots * cache_bytes(config, 2) / 2
    assert batch.prefill(config, 1, "").flops == 12 * 200 * block_flops(config, 100.5)
    alone = batch._replace(rows=1)  # does not divide over four groups: all of them do the same
    assert alone.step(config)[0] == 4 * (block_flops(config, slots) + head_flops(config))


def test_config_json_alone_is_a_target(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_json(presets.phi3_mini_4k, "bfloat16")))
    command = ["plan", FASTDRAFT, "--set", f"target.path={tmp_path}"]
    assert main(command) == 0
    assert "3,821,079,552" in capsys.readouterr().out


def test_a_target_that_nobody_knows(capsys):
    assert main(["plan", DIRECT, "--set", "target.path=somebody/model"]) == 2
    assert "a folder that holds its config.json" in capsys.readouterr().err


def test_prompts_that_no_limit_bounds_are_not_guessed(capsys):
    assert main(["plan", DIRECT, "--set", "responses.prompts.0.limit=none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("responses")).split()[4] == "–"  # after "6.74 B"
    assert any("prompts unknown: reads oig-small-chip2" in line for line in lines)


def test_a_tasks_own_limits_count():
    chips = Hardware("v5e", 8)
    (plans, _), (fewer, _) = (planned(DIRECT, chips, *change) for change in ([], ["evaluate.tasks.dolly.limit=10"]))
    assert fewer["evaluate"].tokens == pytest.approx(plans["evaluate"].tokens * 310 / 400)


def test_a_batch_that_cannot_lie_on_a_chip_is_said():
    plans, _ = planned(DIRECT, Hardware("v5e", 8), "responses.batch_size=1024")
    assert any("lower batch_size" in note for note in plans["responses"].notes)
    plans, _ = planned(DIRECT, Hardware("v5e", 8), "responses.batch_size=64")
    assert not any("lower batch_size" in note for note in plans["responses"].notes)


def test_hardware():
    assert parse_hardware("8xH100") == Hardware("H100", 8)
    assert parse_hardware("h200") == Hardware("H200", 1)
    assert parse_topology("2xv5e:4x4") == Topology("v5e", (4, 4), 2)
    assert parse_topology("v5p:2x2x2").hardware == Hardware("v5p", 8)


@pytest.mark.parametrize("text", ["8xH10", "H100x8", "", "0xH100"])
def test_unknown_hardware_names_the_known(text):
    with pytest.raises(ConfigError, match="H100"):
        parse_hardware(text)


@pytest.mark.parametrize("text", ["v5e", "v3:2x2", "v5e:2x2x2", "v5p:4x4", "v5e:0x4", "v5e:3x4"])
def test_unknown_topologies_name_the_known(text):
    with pytest.raises(ConfigError, match=r"v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB"):
        parse_topology(text)


def test_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "cpu")  # put back afterwards: the verb sets them
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    assert main(["plan", TINY, "--topology", "v5e:2x4"]) == 2
    assert "EXTRAS=tpu bash launch/setup.sh" in capsys.readouterr().err


def test_only_is_for_what_is_compiled(capsys):
    assert main(["plan", TINY, "--only", "distill"]) == 2
    assert "--topology" in capsys.readouterr().err
