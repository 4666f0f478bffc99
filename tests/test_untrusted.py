"""Model folders made to harm, through the real commands; secrets in every place that a user might put them."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from jaxdraft.models import ModelConfig, init_params
from jaxdraft.models.folder import INDEX
from jaxdraft.models.hf import save_model
from jaxdraft.tokenizer_training import train_sentencepiece

SHAPE = ModelConfig(vocab_size=400, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CODE = """
import pathlib, socket, subprocess
pathlib.Path({here!r}).write_text("this ran")
socket.create_connection(("127.0.0.1", 9))
subprocess.run(["true"])
"""
RECIPE = """
from jaxdraft.data.prompts import PromptList
from jaxdraft.losses import CrossEntropy
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Recipe

ROWS = [{{"messages": [{{"role": "user", "content": "Hello"}}]}}]


def recipe():
    generate = Generate("answers", prompts=(PromptList(ROWS),), length=64, temperatures=(0.0,), max_new_tokens=2)
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    return Recipe(title="hostile", target=HFModel({target!r}), draft=draft, stages=(generate,))
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A model folder that every command takes."""
    folder = tmp_path_factory.mktemp("good") / "model"
    save_model(folder, SHAPE, init_params(SHAPE, jax.random.key(0)), shard_bytes=20_000)
    train_sentencepiece([str(textwrap.__doc__), Path(textwrap.__file__).read_text()], folder, 400)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def with_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


def with_outside_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def with_huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def with_outside_link(folder: Path) -> None:
    (folder.parent / "private").write_text("{}")
    (folder / "special_tokens_map.json").unlink()
    (folder / "special_tokens_map.json").symlink_to(folder.parent / "private")


def with_code(folder: Path) -> None:
    code = CODE.format(here=str(folder / "ran"))
    for name in ("configuration_evil.py", "tokenization_evil.py", "modeling_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    where = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change(folder / "config.json", model_type="evil", auto_map=where)


def with_tokenizer_code(folder: Path) -> None:
    with_code(folder)
    change(folder / "config.json", model_type="llama")
    where = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    change(folder / "tokenizer_config.json", auto_map=where, tokenizer_class="Evil")


HOSTILE = {
    "pickle weights": (with_pickle, "pytorch_model.bin is a pickle"),
    "a shard at ../": (with_outside_shard, "'../model.safetensors' is not a safetensors file of this folder"),
    "a header of 2^62 bytes": (with_huge_header, "model.safetensors: not a readable safetensors file"),
    "a tokenizer of 4 GB": (
        lambda f: sparse(f / "tokenizer.model", 4 << 30),
        "tokenizer.model has 4,294,967,296 bytes",
    ),
    "a config.json of 4 GB": (lambda f: sparse(f / "config.json", 4 << 30), "config.json has 4,294,967,296 bytes"),
    "a link out of the folder": (with_outside_link, "special_tokens_map.json is a link to a file outside"),
    "auto_map code": (with_code, "code in model folders, which its auto_map asks for, is never run"),
}
# What each command says it in: the folder stands for {}.
COMMANDS = {
    "inspect": "inspect {}",
    "check": "check --target {} --draft {}",
    "export --untrained": "export --untrained --target {} --shape 1K --out out",
    "sample": "sample --target {} --prompt hello --max-new-tokens 2",
    "evaluate": "evaluate --target {} --draft {} --prompts prompts.jsonl --max-new-tokens 2 --out out",
    "run": "run recipe.py --workdir out",
}
# Watches the commands from inside of their process and prints what they did that they must not.
WATCHED = """
import json, os, runpy, sys, time
folder, commands = sys.argv[1], json.loads(sys.argv[2])
allowed = tuple(map(os.path.realpath, json.loads(sys.argv[3])))
found, code_of = [], set()

def within(path):
    return os.path.realpath(os.fsdecode(path)).startswith(allowed)

def hook(event, arguments):
    if not watching:
        return
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.truncate"):
        path = arguments[1] if event == "os.rename" else arguments[0]
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(path, (str, bytes)) and not within(path) and os.fsdecode(path) != os.devnull:
            found.append(f"{event} {os.fsdecode(path)}")
        if event == "open" and isinstance(path, str) and path.startswith(folder) and path.endswith(".py"):
            found.append(f"read {path}")
    elif event == "exec" and arguments[0].co_filename.startswith(folder):
        found.append(f"exec {arguments[0].co_filename}")
    elif event in ("os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "subprocess.Popen"):
        if not str(arguments[0]).endswith("git"):
            found.append(f"{event} {arguments[0]}")
    elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        found.append(f"{event} {arguments[-1]}")
    elif event in ("pickle.find_class",):
        found.append(f"{event} {arguments}")

watching = False
sys.addaudithook(hook)
import io, contextlib
from jaxdraft.cli import main
for command in commands:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        watching, began = True, time.monotonic()
        try:
            code = main(command.split())
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            code = repr(error)
        watching = False
    print(json.dumps([code, said.getvalue(), found, round(time.monotonic() - began, 1)]), flush=True)
    found = []
"""


def watched(folder: Path, commands: list[str], place: Path) -> list[tuple[int, str, list[str], float]]:
    """Exit code, words, misdeeds and seconds of each command, with ``place`` as its working folder."""
    (place / "recipe.py").write_text(RECIPE.format(target=str(folder)))
    (place / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    allowed = [place, os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache"), "/proc/self", "/dev/shm"]
    arguments = [
        str(folder),
        json.dumps([c.replace("{}", str(folder)) for c in commands]),
        json.dumps(list(map(str, allowed))),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_hostile_folders_are_refused_by_name(good, tmp_path):
    rows = []
    for what, (harm, told) in HOSTILE.items():
        place = tmp_path / what.replace(" ", "-").replace("/", "")
        place.mkdir()
        folder = Path(shutil.copytree(good, place / "model"))
        harm(folder)
        before = sorted(folder.rglob("*"))
        for verb, outcome in zip(COMMANDS, watched(folder, list(COMMANDS.values()), place), strict=True):
            rows.append((what, verb, told, outcome))
        assert sorted(folder.rglob("*")) == before
    for what, verb, _, (code, said, misdeeds, seconds) in rows:
        print(f"| {what} | {verb} | {code} | {misdeeds or 'none'} | {seconds} | {said.strip().splitlines()[-1:]} |")
    assert not [row for row in rows if row[3][0] != 2 or row[2] not in row[3][1] or row[3][2]]
