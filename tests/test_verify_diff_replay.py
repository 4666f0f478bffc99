"""What can be asked of a run that is there: whether its files are intact, where it parts from another, and whether its
steps repeat.
"""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdraft.cli import main
from jaxdraft.data.records import PackedRows, write_rows
from jaxdraft.diff import fields
from jaxdraft.file_hashes import write_hashes
from jaxdraft.provenance import output_hash, stage_fingerprint
from jaxdraft.verify import Checked, _Folder

TINY = str(Path(__file__).with_name("tiny_recipe.py"))
STAGES = ("tokenizer", "corpus", "target", "pretrain", "responses", "vocabulary", "distill")


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """The tiny recipe's run, but for the evaluation."""
    others = shutil.ignore_patterns("evaluate", "export", "report")
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("trained") / "run", ignore=others))


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def files(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    """Fields of a JSON file; a dotted one by ``a__b``."""
    value = json.loads(path.read_text())
    for name, new in changes.items():
        *places, last = name.split("__")
        inner = value
        for place in places:
            inner = inner[int(place) if place.isdigit() else place]
        inner[last] = new
    path.write_text(json.dumps(value, indent=2) + "\n")


def vouch(folder, file):
    """Makes a stage's record say of a file what is true now, as a forger would."""
    record = json.loads((folder / "stage.json").read_text())
    outputs = {**record["outputs"], file: hashlib.sha256((folder / file).read_bytes()).hexdigest()}
    edit(folder / "stage.json", outputs=outputs, output=output_hash(outputs))


def verify(capsys, *arguments):
    code = main(["verify", *map(str, arguments)])
    out = capsys.readouterr().out.splitlines()
    return code, [line for line in out if line.startswith("wrong: ")], out


def test_run_json_says_how_the_run_came_about(trained):
    record = json.loads((trained / "run.json").read_text())
    assert record["command"][:3] == ["jaxdraft", "run", TINY]
    assert record["packages"].keys() >= {"jax", "jaxlib", "flax", "optax", "numpy", "transformers"}
    assert record["stage_seeds"] == {"target": 0, "pretrain": 0, "distill": 0}
    assert record.keys() >= {"git", "python", "platform", "xla_flags", "backend", "devices", "device_kind", "mesh"}
    for name in STAGES:
        made = json.loads((trained / name / "stage.json").read_text())
        assert record["inputs"][name] == made["inputs"]
        assert record["outputs"][name] == made["output"]
    assert "corpus.sources.0" in record["inputs"]["corpus"]


def test_an_intact_run_is_said_to_be_and_is_not_written_to(trained, capsys):
    before = files(trained)
    code, wrong, out = verify(capsys, trained)
    assert (code, wrong) == (0, [])
    assert [line.split()[0] for line in out if line.endswith("intact")] == [*STAGES, "run.json"]
    assert [line.split()[-2:] for line in out[7:9]] == [["not", "run"]] * 2
    assert files(trained) == before


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer.model",
        "corpus/manifest.json",
        "corpus/rows-00000.array_record",
        "responses/answers.json",
        "responses/responses-00001-of-00003.jsonl",
        "responses/responses-00001-of-00003.array_record",
        "vocabulary/draft_vocabulary.json",
        "distill/metrics.jsonl",
        "distill/block_efficiency.jsonl",
        "distill/model/model.safetensors",
        "distill/checkpoints/6/state/manifest.ocdbt",
        "distill/checkpoints/3/meta/metadata",
    ],
)
def test_a_damaged_file_is_named(copy, capsys, file):
    flip(copy / file)
    code, wrong, _ = verify(capsys, copy)
    assert code == 2
    assert all(str(copy / file.split("/")[0]) in line for line in wrong)
    assert any(str(copy / file) in line for line in wrong)
    (copy / file).unlink()
    code, wrong, _ = verify(capsys, copy, "--stage", file.split("/")[0])
    assert code == 2
    assert any(str(copy / file) in line for line in wrong)


def _other_rows(run):
    edit(run / "corpus" / "manifest.json", shards__0__rows=3021)
    vouch(run / "corpus", "manifest.json")


def _another_answer(run):
    with (run / "responses" / "responses-00000-of-00003.jsonl").open("a") as file:
        file.write("{}\n")
    name = "responses-00000-of-00003.jsonl"
    digest = hashlib.sha256((run / "responses" / name).read_bytes()).hexdigest()
    edit(run / "responses" / "answers.json", shards__0__sha256=digest)
    vouch(run / "responses", name)
    vouch(run / "responses", "answers.json")


def _other_settings(run):
    record = json.loads((run / "pretrain" / "stage.json").read_text())
    record["settings"]["steps"] = 7
    made_of = (record["settings"], record["shape"], record["inputs"], record["seed"])
    edit(run / "pretrain" / "stage.json", settings=record["settings"], fingerprint=stage_fingerprint(*made_of))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda run: edit(run / "pretrain" / "stage.json", seed=5), "stage.json: fingerprint is not that of its"),
        (lambda run: edit(run / "pretrain" / "stage.json", output="0" * 64), "stage.json: output is not the hash of"),
        (lambda run: (run / "pretrain" / "stage.json").write_text("{"), "stage.json is damaged"),
        (lambda run: edit(run / "pretrain" / "stage.json", inputs=None), "stage.json is damaged"),
        (_other_settings, "pretrain is not the stage of recipe.json, steps was 7 and is 6"),
        (lambda run: edit(run / "recipe.json", seed=1), "not the stage of recipe.json, recipe's seed was 0 and is 1"),
        (lambda run: edit(run / "run.json", outputs__pretrain="0" * 64), "run.json has another output of pretrain"),
        (lambda run: edit(run / "pretrain" / "stage.json", status="running"), "has read pretrain, which is being made"),
        (_other_rows, "manifest.json: rows is 3022, its shards have 3021"),
        (_other_rows, "rows-00000.array_record has 3022 rows, its record says 3021"),
        (_other_rows, "target has read corpus, which has been made anew since"),
        (_another_answer, "responses-00000-of-00003.jsonl has 5 answers, answers.json says 4"),
    ],
)
def test_records_that_do_not_fit_together_are_named(copy, capsys, damage, told):
    damage(copy)
    code, wrong, _ = verify(capsys, copy)
    assert code == 2
    assert any(told in line for line in wrong), wrong


def test_what_is_no_damage_is_mentioned(copy, capsys):
    (copy / "corpus" / "notes.txt").write_text("mine")
    shutil.rmtree(copy / "distill")
    (copy / "target" / "checkpoints" / "4.json").unlink()
    (copy / "superseded").mkdir()
    shutil.copytree(copy / "pretrain", copy / "superseded" / "pretrain.1")
    flip(copy / "superseded" / "pretrain.1" / "metrics.jsonl")
    with (copy / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, wrong, out = verify(capsys, copy)
    assert (code, wrong) == (0, [])
    told = "\n".join(out)
    assert "of no record: notes.txt" in told
    assert "target/checkpoints: 4 without hashes" in told
    assert "left out: superseded/, 1 stages" in told
    assert "a run is at work in it now" in told
    code, wrong, out = verify(capsys, copy, "--superseded")
    assert code == 2
    assert "superseded/pretrain.1/metrics.jsonl is damaged" in wrong[0]
    assert "at work" not in "\n".join(out)


def test_the_record_of_a_checkpoint_that_a_newer_one_replaced_is_no_damage(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        (folder / str(step)).mkdir(parents=True)
        (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
        write_hashes(folder / str(step), folder / f"{step}.json", complete=True)
    shutil.rmtree(folder / "2")  # as a run that is killed before its next save leaves it
    found = {status: Checked("s", status) for status in ("running", "done")}
    for checked in found.values():
        _Folder(tmp_path, lambda size: None)._checkpoints(checked)
    assert found["running"].problems == []
    assert "2/_CHECKPOINT_METADATA is gone" in found["done"].problems[0]
    shutil.rmtree(folder / "6")
    _Folder(tmp_path, lambda size: None)._checkpoints(found["running"])
    (problem,) = found["running"].problems
    assert "/6/" in problem


def test_only_runs_and_their_stages_are_verified(trained, tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["verify", str(trained), "--stage", "pretrian"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err


def diff(capsys, first, second):
    code = main(["diff", str(first), str(second)])
    return code, capsys.readouterr().out.splitlines()


def test_a_run_is_identical_to_itself_whatever_the_time(trained, copy, capsys):
    folder = copy / "pretrain"
    edit(folder / "stage.json", seconds=99.0)
    (folder / "timing.jsonl").write_text("")
    edit(copy / "run.json", packages__jax="0.0.1")
    code, out = diff(capsys, trained, copy)
    assert code == 0
    assert out[-1] == "identical"
    assert any(line.startswith("software") and '"0.0.1"' in line for line in out)
    assert main(["diff", str(trained), str(copy.parent)]) == 2


def test_of_results_all_but_times_is_compared():
    times = ("tokens_per_second", "token_rate_ratio_ci95", "draft_latency", "target_latency_1", "predicted_speedup")
    times += ("tpot", "measured_speedup", "mbsu_by_time", "compile_seconds", "best_block_size")
    one, other = ({"runs": [{"task": "a", **dict.fromkeys(times, i), "mbsu": i}]} for i in (1.0, 2.0))
    assert [found.split(":")[0] for found in fields(one, other)] == ["runs[0].mbsu"]


def _step(run):
    path = run / "distill" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["loss"] = float(np.nextafter(np.float32(lines[4]["loss"]), np.float32(9)))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _token(run):
    path = run / "responses" / "responses-00001-of-00003.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["tokens"][3] += 1
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _row(run):
    rows = PackedRows(run / "corpus")
    changed = [{name: values.copy() for name, values in rows[i].items()} for i in range(len(rows))]
    changed[17]["tokens"][5] ^= 1
    how = {"length": rows.length, "vocab_size": 400, "tokenizer_fingerprint": rows.manifest["tokenizer"]}
    write_rows(run / "corpus", iter(changed), **how, source=rows.manifest["source"], counts=rows.manifest["counts"])


def _tensor(run):
    path = run / "pretrain" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, told",
    [
        (_step, "distill, metrics.jsonl, step 5, loss: "),
        (_token, "responses, responses-00001-of-00003.jsonl, "),
        (_token, ", tokens[3]: "),
        (_row, "row 17, tokens, position 5: "),
        (_tensor, "1 of 11 tensors differ, the first is model.norm.weight: 1 of 16 elements, by up to 5.00e-01"),
        (lambda run: shutil.rmtree(run / "distill"), "first difference: distill, only in the first"),
        (
            lambda run: edit(run / "corpus" / "stage.json", inputs={"corpus.sources.0": "f"}),
            "first difference: corpus, input corpus.sources.0 differs",
        ),
        (lambda run: edit(run / "recipe.json", title="Other"), 'recipe, title: "Tiny" and "Other"'),
        (lambda run: (run / "distill" / "model" / "config.json").write_text("{}"), "distill, model/config.json, "),
    ],
)
def test_where_two_runs_part_is_told(trained, copy, capsys, change, told):
    change(copy)
    code, out = diff(capsys, trained, copy)
    assert code == 1
    assert any(told in line for line in out), out
    assert out[-1].startswith("first difference: ")
    if change is _step:
        assert out[-1].endswith("(1 ulp)")


def test_runs_with_damaged_rows_cannot_be_compared(trained, copy, capsys):
    path = copy / "responses" / "rows-00000.array_record"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(64) + content[264:])
    assert main(["diff", str(trained), str(copy)]) == 2
    assert "`jaxdraft verify` says which" in capsys.readouterr().err


def test_another_setting_shows_from_its_first_step_on(trained, copy, capsys):
    again = ["run", TINY, "--workdir", str(copy), "--set", "pretrain.weight_decay=0.02"]
    assert main([*again, "--only", "pretrain"]) == 0
    code, out = diff(capsys, trained, copy)
    assert code == 1
    assert out[-1] == "first difference: pretrain, settings.weight_decay: 0.01 and 0.02"
    assert any("metrics.jsonl, step 2, " in line for line in out), "the first step's loss is that of the start"
    assert any(line.split() == ["target", "identical"] for line in out)
    code, wrong, _ = verify(capsys, copy)
    assert code == 2
    assert [line for line in wrong if "distill has read pretrain, which has been made anew since" in line]


def replay(capsys, *arguments):
    code = main(["replay", *map(str, arguments)])
    return code, capsys.readouterr()


def test_steps_repeat_to_the_byte_and_nothing_is_written_into_the_run(trained, capsys):
    before = files(trained)
    code, said = replay(capsys, trained, "--stage", "distill")
    assert code == 0
    assert "distill, after step 4: 2 of 2 steps repeat to the byte" in said.out
    assert "the state after step 6 has the fingerprint of its checkpoint" in said.out
    assert files(trained) == before


def test_a_stage_is_repeated_from_its_start(trained, capsys):
    code, said = replay(capsys, trained, "--stage", "pretrain", "--from", "0", "--steps", "3")
    assert code == 0
    assert said.out == "pretrain, after step 0: 3 of 3 steps repeat to the byte\n"


def test_what_does_not_repeat_is_named(copy, capsys):
    path = copy / "pretrain" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[5] = json.dumps({**json.loads(lines[5]), "loss": 1.0})
    path.write_text("".join(f"{line}\n" for line in lines))
    edit(copy / "run.json", packages__jax="0.0.1")
    code, said = replay(capsys, copy, "--stage", "pretrain")
    assert code == 1
    assert "1 of 2 steps repeat" in said.out
    assert "first difference: metrics.jsonl, step 6, loss: 1.0 and " in said.out
    assert 'note: packages.jax was "0.0.1"' in said.err


def test_another_state_than_the_checkpoint_s_is_told(copy, capsys):
    meta = copy / "pretrain" / "checkpoints" / "6" / "meta" / "metadata"
    edit(meta, fingerprint=[0])
    code, said = replay(capsys, copy, "--stage", "pretrain")
    assert code == 1
    assert "first difference: the state after step 6 is another than its checkpoint's" in said.out


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--stage", "corpus"), "corpus is a Prepare stage: only Train stages have steps to repeat"),
        (("--stage", "distill", "--from", "5"), "no checkpoint of step 5 to go on from: there are 0, 3, 4"),
        (("--stage", "distill", "--steps", "3"), "distill has 6 steps: after step 4 there are 2 to repeat"),
        (
            ("--stage", "pretrain", "--recipe", TINY, "--set", "pretrain.weight_decay=0.02"),
            "pretrain cannot be repeated: ",
        ),
    ],
)
def test_what_cannot_be_repeated_is_refused(trained, capsys, arguments, told):
    code, said = replay(capsys, trained, *arguments)
    assert code == 2
    assert told in said.err


def test_a_model_card_states_the_licences_of_target_and_data(copy, tmp_path):
    edit(copy / "run.json", target_licence="LicenseRef-llama3.1")
    assert main(["export", "--run", str(copy), "--stage", "pretrain", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| licence of the target | LicenseRef-llama3.1 |" in card
    assert "display “Built with Llama”" in card
    assert "| licences of the data | PSF-2.0 |" in card
