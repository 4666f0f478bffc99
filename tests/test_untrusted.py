"""Model folders made to harm, through the real commands; secrets in every place that a user might put them."""

import gzip
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from jaxdraft import untrusted
from jaxdraft.cli import main
from jaxdraft.data import readers
from jaxdraft.errors import ConfigError
from jaxdraft.models import ModelConfig, init_params
from jaxdraft.models.folder import INDEX
from jaxdraft.models.hf import load_config, save_model
from jaxdraft.redaction import redacted
from jaxdraft.server import Server
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import ChatTemplateError, load_tokenizer

ROOT = Path(__file__).parents[1]
SHAPE = ModelConfig(vocab_size=400, hidden_size=128, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=4)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CODE = """
import pathlib, socket, subprocess
pathlib.Path({here!r}).write_text("this ran")
subprocess.run(["true"])
socket.create_connection(("127.0.0.1", 9))
"""
MESSAGES = [{"role": "user", "content": "Hello"}]
RECIPE = """
from jaxdraft.data.prompts import PromptList
from jaxdraft.losses import CrossEntropy
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Recipe

def recipe():
    prompts = (PromptList([{{"messages": {messages}}}]),)
    generate = Generate("answers", prompts=prompts, length=64, temperatures=(0.0,), max_new_tokens=2)
    draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    return Recipe(title="hostile", target=HFModel({target!r}), draft=draft, stages=(generate,))
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A model folder that every command takes."""
    folder = tmp_path_factory.mktemp("good") / "model"
    save_model(folder, SHAPE, init_params(SHAPE, jax.random.key(0)), shard_bytes=1_000_000)
    train_sentencepiece([str(textwrap.__doc__), Path(textwrap.__file__).read_text()], folder, 400)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sparse(path: Path) -> None:
    os.truncate(path, 4 << 30)


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


def with_huge_tensor(folder: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())


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


CODE_OF_TOKENIZER = {"auto_map code of a tokenizer"}
RENDERING = ("evaluate", "run")  # the commands that use the chat template
# export --untrained reads none.
WEIGHTS = {"pickle weights", "a shard at ../", "a header of 2^62 bytes", "tensors beyond the file"}
HOSTILE = {
    "pickle weights": (with_pickle, "pytorch_model.bin is a pickle"),
    "a shard at ../": (with_outside_shard, "'../model.safetensors' is not a safetensors file of this folder"),
    "a header of 2^62 bytes": (with_huge_header, "model.safetensors: not a readable safetensors file"),
    "tensors beyond the file": (with_huge_tensor, "model.safetensors: not a readable safetensors file"),
    "a tokenizer of 4 GB": (lambda f: sparse(f / "tokenizer.model"), "tokenizer.model has 4,294,967,296 bytes"),
    "a config.json of 4 GB": (lambda f: sparse(f / "config.json"), "config.json has 4,294,967,296 bytes"),
    "10^9 layers": (lambda f: change(f / "config.json", num_hidden_layers=10**9), "more than any model has"),
    "a link out of the folder": (with_outside_link, "special_tokens_map.json is a link to a file outside"),
    "auto_map code": (with_code, "code in model folders, which its auto_map asks for, is never run"),
    "auto_map code of a tokenizer": (with_tokenizer_code, "transformers cannot read the tokenizer"),
}
COMMANDS = {
    "inspect": "inspect {}",
    "check": "check --target {} --draft {}",
    "export": "export --untrained --target {} --shape 200K --out out",
    "sample": "sample --target {} --prompt hello --max-new-tokens 2",
    "evaluate": "evaluate --target {} --draft {} --prompts prompts.jsonl --max-new-tokens 2 --out out",
    "run": "run recipe.py --workdir out",
}
# Runs commands in folders and prints, for each, its exit code, its words and what it did that it must not.
# What Python, JAX and matplotlib do by themselves is let be: reading and running their own code, the compilation
# cache, /dev/null, and `git describe` for run.json.
WATCHED = """
import contextlib, io, json, os, sys
from jaxdraft import untrusted
from jaxdraft.cli import main

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.move"}
PROCESSES = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"}
SOCKETS = {"socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
folder, found = None, []

def outside(path):
    return not os.path.realpath(os.fsdecode(path)).startswith((*allowed, os.path.dirname(folder)))

def hook(event, arguments):
    if folder is None:
        return
    first = arguments[0] if arguments else None
    if event == "open" and isinstance(first, (str, bytes)):
        wrong = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and outside(first)
        wrong = wrong or os.fsdecode(first).startswith(folder) and os.fsdecode(first).endswith((".py", ".bin"))
    elif event == "exec":
        wrong = first.co_filename.startswith(folder)
    elif event in PROCESSES:
        wrong = first != "git"
    else:
        wrong = event in SOCKETS or event in CHANGES and outside(arguments[event == "os.rename"])
    if wrong:
        found.append(f"{event} {arguments}")

sys.addaudithook(hook)
allowed = [os.path.realpath(path) for path in json.loads(sys.argv[1])]
for place, command in json.loads(sys.argv[2]):
    os.chdir(os.path.dirname(place))
    said, found, folder = io.StringIO(), [], place
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(command)
        except BaseException as error:
            code = repr(error)
    folder = None
    print("|" + json.dumps([code, said.getvalue(), found]))
"""


def watched(commands: list[tuple[Path, list[str]]], scratch: Path) -> list[tuple[int, str, list[str]]]:
    """Exit code, words and misdeeds of commands that are called in one process, each beside its model folder."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/jaxdraft").expanduser()))
    environment = {**os.environ, "MPLCONFIGDIR": str(scratch), "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "0"}
    allowed = json.dumps([str(scratch), cache, os.devnull])
    calls = json.dumps([(str(folder), command) for folder, command in commands])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, allowed, calls], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line[1:])) for line in done.stdout.splitlines() if line.startswith("|")]


def test_hostile_folders_are_refused_by_name(good, tmp_path):
    cases, before = [], {}
    for what, (harm, told) in HOSTILE.items():
        folder = Path(shutil.copytree(good, tmp_path / what.replace("/", "") / "model"))
        harm(folder)
        (folder.parent / "recipe.py").write_text(RECIPE.format(target=str(folder), messages=MESSAGES))
        (folder.parent / "prompts.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
        before[folder] = sorted(folder.rglob("*"))
        cases += [(what, verb, told, folder) for verb in (RENDERING if what in CODE_OF_TOKENIZER else COMMANDS)]
    calls = [(folder, filled(COMMANDS[verb], folder)) for _, verb, _, folder in cases]
    wrong = []
    for (what, verb, told, _), (code, said, misdeeds) in zip(cases, watched(calls, tmp_path / "scratch"), strict=True):
        unread = verb == "export" and what in WEIGHTS
        words = "named" if told in said else said.strip()
        print(f"| {what} | {verb} | exit {code} | {words} | {misdeeds or 'nothing'} |")
        if misdeeds or code != (0 if unread else 2) or (told not in said and not unread):
            wrong.append((what, verb, code, said[-500:], misdeeds))
    assert not wrong
    assert all(sorted(folder.rglob("*")) == files for folder, files in before.items())


def filled(command: str, folder: Path) -> list[str]:
    return [word.replace("{}", str(folder)) for word in command.split()]


def test_the_watcher_sees_what_a_command_does(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    (folder / "recipe.py").write_text(CODE.format(here=str(tmp_path.parent / "ran")))
    [(_, _, misdeeds)] = watched([(folder, filled("run {}/recipe.py --workdir out", folder))], tmp_path / "scratch")
    (tmp_path.parent / "ran").unlink()
    assert {misdeed.split()[0] for misdeed in misdeeds} >= {"open", "exec", "subprocess.Popen", "socket.connect"}


def test_code_that_is_not_needed_is_let_lie(good, tmp_path):
    """As in Phi-3's folders: a known model_type, and an auto_map beside it."""
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    (folder / "tokenization_evil.py").write_text(CODE.format(here=str(tmp_path / "ran")))
    change(folder / "config.json", auto_map={"AutoConfig": "configuration_evil.Evil"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    assert load_config(folder).num_layers == 2
    assert load_tokenizer(folder).render(MESSAGES) == "Hello"
    assert not (tmp_path / "ran").exists()


def test_a_template_cannot_leave_its_sandbox(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    ran = tmp_path / "ran"
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ChatTemplateError):
            load_tokenizer(folder).render(MESSAGES)
    assert not ran.exists()


def test_a_link_is_followed_inside_of_its_folder_and_of_the_hub_cache(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "1").write_text("{}")
    (snapshot / "real.json").write_text("{}")
    (tmp_path / "private.json").write_text("{}")
    for name, place in {"a": "real.json", "b": "../../blobs/1", "c": "../../../private.json", "d": "d"}.items():
        (snapshot / name).symlink_to(place)
    assert untrusted.read_json(snapshot / "a") == untrusted.read_json(snapshot / "b") == {}
    (snapshot / "deeper").mkdir()
    (snapshot / "deeper" / "b").symlink_to("../../../blobs/1")
    assert untrusted.read_json(snapshot / "deeper" / "b") == {}
    for name in "cd":
        with pytest.raises(ConfigError, match=rf"{snapshot}/{name} (is a link|does not exist)"):
            untrusted.read_json(snapshot / name)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (snapshot / "e").symlink_to("../../refs/main")
    (tmp_path / "models--a--b" / "refs" / "main").symlink_to(tmp_path / "private.json")
    with pytest.raises(ConfigError, match="is a link"):
        untrusted.read_json(snapshot / "e")


@pytest.mark.parametrize(
    "content, told",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[]", "not an object"),
        (b"\xff", "utf-8"),
        (b'{"a": "1"}', "'a' is \"1\", not of type int"),
        (b"{}", "no 'a'"),
    ],
)
def test_json_that_is_none_is_named(tmp_path, content, told):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.json is damaged \(.*{told}.*\): do this"):
        untrusted.read_json(tmp_path / "x.json", fields={"a": int}, remedy="do this")


def test_a_panic_of_a_library_is_named(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    special = {"id": "<none>", "ids": [1], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<none>": special}}
    change(folder / "tokenizer.json", post_processor=post)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a readable tokenizer\.json \(no entry"):
        load_tokenizer(folder)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="no plain file"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.gz", "x.json.gz"])
def test_what_unpacks_to_more_than_its_limit_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(untrusted, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(b"[" + b" " * (2 << 20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=rf"{name}: .*more than 1,048,576"):
        list(readers.read_rows(tmp_path / name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


SECRETS = {"HF_TOKEN": "hf_" + "q" * 30, "OPENAI_API_KEY": "not-a-known-form-1", "WANDB_API_KEY": "f" * 40}
SECRETS |= {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG"}


def test_secrets_reach_no_file_and_no_message(good, tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.py").write_text(RECIPE.format(target=str(good), messages=MESSAGES))
    monkeypatch.setattr(logging.root, "handlers", [])  # as when the command starts
    run = ["run", str(tmp_path / "recipe.py"), "--workdir"]
    url = "http://user:pass-word-1@127.0.0.1:9/v1"
    assert main([*run, str(tmp_path / "a"), "--set", f"title={SECRETS['OPENAI_API_KEY']} token=planted-1"]) == 0
    assert main([*run, str(tmp_path / "b"), "--set", f"target.path={url}?token=planted-2"]) == 2
    assert main([*run, f"https://user:pass-word-1@host/{SECRETS['HF_TOKEN']}"]) == 2
    assert main(["inspect", f"https://host/x?key=planted-3&sig=planted-4&api_key={SECRETS['WANDB_API_KEY']}"]) == 2
    logging.getLogger("anyone").warning("Authorization: Bearer %s", SECRETS["AWS_SECRET_ACCESS_KEY"])
    said = "".join(capfd.readouterr())
    assert "WARNING: Authorization: Bearer (secret)" in said
    written = {path: path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()}
    assert "(secret)" in written[tmp_path / "a" / "run.json"]
    assert "(secret)" in written[tmp_path / "a" / "recipe.json"]
    for secret in [*SECRETS.values(), "pass-word-1", *(f"planted-{i}" for i in range(1, 5))]:
        assert secret not in said
        assert not [path for path, content in written.items() if secret in content]


def test_a_server_that_repeats_the_key_is_not_repeated(good, monkeypatch):
    """What a failing server says of the key, and a key among the settings."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["OPENAI_API_KEY"])
    for extra in ({"api_key": "planted"}, {"hf_token": "planted"}):
        with pytest.raises(ConfigError, match=r"extra holds '(api_key|hf_token)'.* key_variable") as refused:
            Server("http://127.0.0.1:9/v1", extra=extra)
        assert "planted" not in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        Server("http://127.0.0.1:9/v1?token=planted")
    assert "planted" not in str(refused.value)


def test_words_that_are_no_secrets_stay(monkeypatch):
    monkeypatch.setenv("MY_KEY", "short")
    monkeypatch.setenv("TOKEN_PATH", "a-long-value")
    monkeypatch.setenv("SSL_KEY", "/etc/a/file")
    for text in (
        "--set distill.max_new_tokens=128 tokenizer=short key_variable=OPENAI_API_KEY a-long-value /etc/a/file",
        "hf://datasets/owner/name@main/x.parquet gs://bucket/run owner/name@0123456",
    ):
        assert redacted(text) == text
    assert redacted({"bos_token": "<s>", "tokens": [1], "x": None}) == {"bos_token": "<s>", "tokens": [1], "x": None}
