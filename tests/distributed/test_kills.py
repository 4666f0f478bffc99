"""Generation killed again and again, by more and fewer processes: what is left is what an undisturbed run leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxdraft.models import ModelConfig, init_params
from jaxdraft.models.hf import save_model
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tracking import read_jsonl
from tests.distributed.layouts import free_port, run

RECIPE = """
from jaxdraft.data.prompts import PromptFile
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Recipe

def recipe(*, folder: str = ""):
    return Recipe(
        title="answers",
        target=HFModel(f"{folder}/target"),
        draft=ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1),
        stages=(
            Generate(
                "responses",
                prompts=(PromptFile(f"{folder}/prompts.jsonl", max_tokens=200),),
                temperatures=(0.0, 0.7, 1.0),
                max_new_tokens=64,
                length=256,
                batch_size=8,
                shard_size=12,
            ),
        ),
    )
"""
WORDS = ["the", "of", "a", "and", "then", "she", "he", "dragon", "queen", "river", "old", "tower", "walked", "forest"]
KILLS = 10


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A target of random weights with a tokenizer, and prompts of two lengths with limits of their own."""
    folder, rng = tmp_path_factory.mktemp("material"), random.Random(7)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(400)]
    (folder / "target").mkdir()
    train_sentencepiece(iter(texts), folder / "target", 300)
    config = ModelConfig(
        hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4, num_kv_heads=2,
        vocab_size=300, bos_id=1, eos_ids=(2,), max_positions=512,
    )  # fmt: skip
    save_model(folder / "target", config, init_params(config, jax.random.key(3)))
    rows = [
        {
            "id": f"p{i}",
            "prompt": " ".join(rng.choices(WORDS, k=rng.choice((5, 60)))),
            "max_new_tokens": rng.randint(8, 64),
        }
        for i in range(160)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def made(workdir: Path) -> dict[str, bytes]:
    """What the stage leaves, but for its record, which knows how long it took."""
    files = [path for path in (workdir / "responses").iterdir() if path.name not in ("stage.json",)]
    return {path.name: path.read_bytes() for path in files}


def shards(workdir: Path) -> int:
    return len(list((workdir / "responses").glob("responses-*.json")))


def killed(material: Path, workdir: Path, processes: int, new: int) -> None:
    """Starts the run and kills all its processes when it has written so many shards more."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "jaxdraft.cli", "run", str(material / "recipe.py"), "--workdir", str(workdir)]
    command += ["--set", f"folder={material}"]
    before, started = shards(workdir), []
    for index in range(processes):
        job = {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)} if processes > 1 else {}
        own = {key: value for key, value in environment.items() if job or key != "JAX_COORDINATOR_ADDRESS"}
        started.append(
            subprocess.Popen(command, env={**own, **job}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    deadline = time.monotonic() + 120
    while shards(workdir) < before + new and all(process.poll() is None for process in started):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in started:
        process.send_signal(signal.SIGKILL)
    assert [process.wait(30) for process in started] == [-signal.SIGKILL] * processes, (
        "it was done before it was killed"
    )


@pytest.mark.slow
def test_ten_kills_and_other_numbers_of_processes_change_nothing(material, tmp_path):
    rng = random.Random(11)
    arguments = ["--set", f"folder={material}"]
    run(material / "recipe.py", tmp_path / "undisturbed", 1, 1, *arguments)
    expected = made(tmp_path / "undisturbed")
    total = shards(tmp_path / "undisturbed")
    assert total >= 40
    workdir = tmp_path / "killed"
    for _ in range(KILLS):
        killed(material, workdir, rng.choice((1, 2, 3)), rng.randint(1, (total - shards(workdir)) // 4))
    run(material / "recipe.py", workdir, 2, 1, *arguments)
    assert made(workdir) == expected
    lines = [line for path in sorted((workdir / "responses").glob("responses-*.jsonl")) for line in read_jsonl(path)]
    assert sorted(line["number"] for line in lines) == list(range(3 * 160))
    assert len({line["id"] for line in lines}) == 3 * 160


@pytest.mark.slow
def test_neither_rows_nor_devices_nor_processes_change_an_answer(material, tmp_path):
    arguments = ["--set", f"folder={material}"]
    by_id = lambda workdir: {
        line["id"]: line for path in (workdir / "responses").glob("responses-*.jsonl") for line in read_jsonl(path)
    }
    run(material / "recipe.py", tmp_path / "1x1", 1, 1, *arguments)
    expected = by_id(tmp_path / "1x1")
    for name, processes, devices, rows in (("batch32", 1, 1, 32), ("1x4", 1, 4, 8), ("2x2", 2, 2, 8)):
        run(
            material / "recipe.py",
            tmp_path / name,
            processes,
            devices,
            *arguments,
            "--set",
            f"responses.batch_size={rows}",
        )
        assert by_id(tmp_path / name) == expected
        assert made(tmp_path / name) == made(tmp_path / "1x1")
