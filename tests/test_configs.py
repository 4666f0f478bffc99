"""Every recipe in configs/, at each of its sizes: that it is planned, and that a run of it could begin."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from jaxdraft.cli import main
from jaxdraft.context import Context
from jaxdraft.early_checks import check_early
from jaxdraft.home import open_home
from jaxdraft.models import presets
from jaxdraft.models.hf_config import config_json
from jaxdraft.recipe_file import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = {path.stem: path.read_text() for path in sorted(CONFIGS.glob("[!_]*.py"))}
SIZES = {name: ("full", "small") if "(*, scale: " in text else ("",) for name, text in RECIPES.items()}
CASES = [(name, scale) for name, scales in SIZES.items() for scale in scales]
FULL = [name for name, scales in SIZES.items() if "full" in scales]

# Target on the hub -> its tokenizer in the test material, and its shape.
TARGETS = {
    "meta-llama/Llama-2-7b-chat-hf": ("llama2", presets.llama2_7b),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3", presets.llama31_8b),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3-mini", presets.phi3_mini_4k),
}
# What a recipe has no default for -> where it is in the test material.
NEEDED = {
    "chat_target": {"tokenizer.path": "tokenizers/llama2", "text.path": "corpora/grimm.txt"},
    "loss_comparison": {"target.path": "models/stories260K-hf", "text.path": "corpora/tinystories_head.txt"},
    "tinystories": {"target.path": "models/stories260K-hf", "text.path": "corpora/tinystories_head.txt"},
}


@pytest.fixture
def settings(request, name, scale):
    """What has to be ``--set`` for a recipe to be read."""
    given = [f"scale={scale}"] if scale else []
    if name in NEEDED:
        material = request.getfixturevalue("shared_data")
        given += [f"{field}={material / where}" for field, where in NEEDED[name].items()]
    return given


@pytest.fixture(scope="session")
def stand_in(shared_data, tmp_path_factory):
    """A function: target on the hub -> a folder of its tokenizer and shape, which holds no weights."""
    from safetensors.numpy import save_file

    def folder(target: str) -> Path:
        tokenizer, shape = TARGETS[target]
        path = tmp_path_factory.getbasetemp() / tokenizer
        if not path.exists():
            shutil.copytree(shared_data / "tokenizers" / tokenizer, path)
            config = config_json(shape, "bfloat16") | {"_name_or_path": target}
            (path / "config.json").write_text(json.dumps(config))
            save_file({}, path / "model.safetensors")
        return path

    return folder


def command(verb, name, *options, settings):
    return main([verb, name, *options, *(word for setting in settings for word in ("--set", setting))])


@pytest.mark.parametrize("name, scale", CASES)
def test_is_planned(name, scale, settings, tmp_path):
    assert command("plan", name, "--json", str(tmp_path / "plan.json"), settings=settings) == 0
    stages = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == [stage.name for stage in load_recipe(name, settings).stages]
    assert all(stage["hours"] > 0 for stage in stages if stage["kind"] == "Train")
    if scale == "full":  # a paper's recipe leaves nothing to be guessed
        assert not [note for stage in stages for note in stage["notes"] if "unknown" in note or "assumed" in note]


@pytest.mark.parametrize("name, scale", CASES)
def test_is_ready_to_run(name, scale, settings, request, tmp_path, capsys):
    if scale == "full":
        target = load_recipe(name, settings).target.path
        settings.append(f"target.path={request.getfixturevalue('stand_in')(target)}")
    recipe = load_recipe(name, settings)
    check_early(Context(recipe, open_home(tmp_path / "run", None)))
    capsys.readouterr()
    assert command("run", name, "--workdir", str(tmp_path / "run"), "--dry-run", settings=settings) == 0
    printed = capsys.readouterr().out
    states = re.findall(r"^(\S+) +\w+ +(missing|waiting) ", printed, re.MULTILINE)
    assert [stage for stage, _ in states] == [stage.name for stage in recipe.stages]
    assert states[0][1] == "missing"
    assert ("--accept-license" in printed) == ("Llama-2-7b-chat" in recipe.title)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", FULL)
def test_says_what_it_takes(name, tmp_path):
    said = " ".join(ast.get_docstring(ast.parse(RECIPES[name])).split())
    hours = float(re.search(r"What it takes: ([\d.]+) hours", said)[1])
    storage, unit = re.search(r"[Ss]torage ([\d.]+) ([GT])B", said).groups()
    (plan,) = re.findall(r"`jaxdraft (plan \S+ --hardware \S+)`", said)
    assert main([*plan.split(), "--json", str(tmp_path / "plan.json")]) == 0
    stages = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert plan.split()[1] == name
    assert sum(stage["hours"] for stage in stages) == pytest.approx(hours, rel=0.03)
    bytes = sum(sum(stage["storage"].values()) for stage in stages)
    assert bytes == pytest.approx(float(storage) * {"G": 1e9, "T": 1e12}[unit], rel=0.02)
