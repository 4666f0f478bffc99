"""What a target's licence is called, and that a user is asked where it forbids to learn from its output."""

import json
import shutil

import pytest

from jaxdraft.cli import main
from jaxdraft.data.prompts import PromptFile
from jaxdraft.errors import ConfigError
from jaxdraft.licences import NOASSERTION, TERMS, is_expression, model_licence, objection, target_licence
from jaxdraft.losses import KL, CrossEntropy
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Prepare, Recipe, Score, TopK, Train

DRAFT = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
RECIPE = """
from jaxdraft.data.prompts import PromptFile
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Recipe


def recipe(*, target: HFModel):
    prompts = (PromptFile({prompts!r}),)
    made = Generate("made", prompts=prompts, length=32, max_new_tokens=1, temperatures=(0.0,))
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    return Recipe(title="Asked", target=target, draft=draft, stages=(made,))
"""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """What is not told by name or folder would be asked of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("MIT", True),
        ("Apache-2.0 OR (GPL-2.0+ WITH Classpath-exception-2.0)", True),
        ("LicenseRef-llama3.1", True),
        (NOASSERTION, True),
        ("", False),
        ("unknown: for research", False),
        ("MIT AND", False),
        ("(MIT", False),
    ],
)
def test_the_form_of_an_expression(text, is_one):
    assert is_expression(text) == is_one


@pytest.mark.parametrize(
    "name, licence",
    [
        ("meta-llama/Llama-2-7b-chat-hf", "LicenseRef-llama2"),
        ("meta-llama/Llama-2-7b-chat-hf@abc", "LicenseRef-llama2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "LicenseRef-llama3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "LicenseRef-llama3.1"),
        ("meta-llama/Llama-3.2-1B", "LicenseRef-llama3.2"),
        ("microsoft/Phi-3-mini-4k-instruct", "MIT"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Apache-2.0"),
        ("Qwen/Qwen2.5-7B-Instruct", "Apache-2.0"),
        ("Qwen/Qwen2.5-3B-Instruct", NOASSERTION),
        ("gs://bucket/models/Llama-2-13b-hf/", "LicenseRef-llama2"),
        ("owner/of-another-name", NOASSERTION),
    ],
)
def test_a_model_is_known_by_its_name(name, licence):
    assert model_licence(name) == licence


@pytest.mark.parametrize(
    "card, licence",
    [
        ("---\nlicense: llama2\n---\n", "LicenseRef-llama2"),
        ("---\ntags:\n- x\nlicense: 'apache-2.0'\n---\n", "Apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "LicenseRef-llama3"),
        ("---\nlicense: odd_name\n---\n", "LicenseRef-odd-name"),
        ("---\nlicense:\n- mit\nlanguage:\n- en\n---\n", "MIT"),
        ("---\nlicense: [mit, llama2]\n---\n", NOASSERTION),
        ("---\nlicense:\nlanguage: en\n---\n", NOASSERTION),
        ("---\nlicense: unknown\n---\n", NOASSERTION),
        ("# No front matter\nlicense: mit\n", NOASSERTION),
        (None, NOASSERTION),
    ],
)
def test_a_folder_says_its_licence_in_its_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert model_licence(str(tmp_path)) == licence
    assert is_expression(licence)


def test_a_folder_without_card_is_known_by_the_name_in_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "meta-llama/Llama-2-7b-hf"}))
    assert model_licence(str(tmp_path)) == "LicenseRef-llama2"
    assert model_licence(str(tmp_path), given="MIT") == "MIT"
    with pytest.raises(ConfigError, match="licence 'free to use' is no SPDX"):
        model_licence(str(tmp_path), given="free to use")


def test_a_card_on_the_hub_is_fetched_alone(tmp_path):
    commit, repository = "a" * 40, tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert model_licence("owner/name") == "LicenseRef-llama2"


PROMPTS = (PromptFile("prompts.jsonl"),)
TRAIN = {"data": "text", "steps": 1, "batch_size": 1}


@pytest.mark.parametrize(
    "stages, learns",
    [
        ((), None),
        ((Prepare("text", sources=(), length=8), Train("a", loss=CrossEntropy(), **TRAIN)), None),
        ((Prepare("text", sources=(), length=8), Train("a", loss=KL(), **TRAIN)), "a"),
        ((Prepare("text", sources=(), length=8), Score("s", data="text", keep_logits=TopK(4))), "s"),
        ((Generate("g", prompts=PROMPTS, length=8, max_new_tokens=1),), "g"),
        (
            (
                Prepare("text", sources=(), length=8),
                Train("a", loss=CrossEntropy(), **TRAIN),
                Generate("g", prompts=PROMPTS, length=8, max_new_tokens=1, writer="a"),
            ),
            None,
        ),
    ],
)
def test_a_user_is_asked_only_where_something_learns_from_the_target(stages, learns):
    targets = {"meta-llama/Llama-2-7b-hf": True, "meta-llama/Llama-3.1-8B": False, "microsoft/Phi-3-mini-4k": False}
    for name, forbids in targets.items():
        recipe = Recipe(title="", target=HFModel(name), draft=DRAFT, stages=stages)
        told = objection(recipe, target_licence(recipe))
        assert bool(told) == (forbids and learns is not None)
        if told:
            assert f"Stage '{learns}'" in told
            assert "1.b.v: “You will not use the Llama Materials" in told
            assert "models/llama2/LICENSE" in told


def test_only_the_licences_before_llama_3_1_forbid_it():
    assert {name for name, terms in TERMS.items() if terms.forbids} == {"LicenseRef-llama2", "LicenseRef-llama3"}


def test_a_run_asks_once_before_anything_is_done(shared_data, tmp_path, capsys):
    target, workdir = tmp_path / "target", tmp_path / "run"
    shutil.copytree(shared_data / "models" / "stories260K-hf", target, copy_function=shutil.copyfile)
    (target / "README.md").write_text("---\nlicense: llama2\n---\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n')
    (tmp_path / "asked.py").write_text(RECIPE.format(prompts=str(tmp_path / "prompts.jsonl")))
    command = ["run", str(tmp_path / "asked.py"), "--workdir", str(workdir), "--set", f"target.path={target}"]
    assert main(command) == 2
    assert "add --accept-license" in capsys.readouterr().err
    assert not workdir.exists()
    assert main([*command, "--list"]) == 0
    assert "note: target" in capsys.readouterr().out
    assert main([*command, "--accept-license"]) == 0
    record = json.loads((workdir / "run.json").read_text())
    assert record["accepted_licence"] == record["target_licence"] == "LicenseRef-llama2"
    assert main([*command, "--set", "made.max_new_tokens=2"]) == 0
    assert json.loads((workdir / "run.json").read_text())["accepted_licence"] == "LicenseRef-llama2"
    assert main(["inspect", str(workdir)]) == 0
    assert "LicenseRef-llama2, accepted" in capsys.readouterr().out
    (target / "README.md").write_text("---\nlicense: llama3\n---\n")
    assert main(command) == 2
    assert "excluding Meta Llama 3" in capsys.readouterr().err
    assert main([*command, "--set", "target.licence=MIT", "--set", "made.max_new_tokens=2"]) == 0
