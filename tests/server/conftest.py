"""Real servers of a real model: llama.cpp's, from the package xllamacpp, and transformers' own, which needs torch.

They run in the interpreter that JAXDRAFT_SERVER_PYTHON names, by default this one, if it has their packages:
`pip install -r tests/server/requirements.txt` for llama.cpp, `pip install torch "transformers[serving]"` for the other.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxdraft.tokenizers import Tokenizer, load_tokenizer
from tests.server.gguf import write_gguf

PYTHON = os.environ.get("JAXDRAFT_SERVER_PYTHON", sys.executable)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
)
PATIENCE = 60  # seconds for a server to start


class Process:
    """A server that can be killed and started again at the same address."""

    def __init__(self, command: Callable[[str], list[str]], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}/v1"
        self.command = command(port)
        self.log = log
        self.start()

    def start(self) -> None:
        with self.log.open("wb") as log:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        self.kill()
        pytest.fail(f"{self.command} does not serve:\n{self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def served(shared_data, tmp_path_factory) -> Path:
    """stories260K with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "stories260K"
    shutil.copytree(shared_data / "models" / "stories260K-hf", folder)
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tokenizer(served) -> Tokenizer:
    return load_tokenizer(served)


def needs(module: str, package: str) -> None:
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if subprocess.run([PYTHON, "-c", found], cwd="/").returncode:
        pytest.skip(f"{PYTHON} has no {package}; JAXDRAFT_SERVER_PYTHON can name an interpreter that has")


@pytest.fixture(scope="session")
def gguf(served, tmp_path_factory) -> Path:
    needs("xllamacpp", "xllamacpp")
    path = tmp_path_factory.mktemp("gguf") / "stories260K.gguf"
    write_gguf(served, path, TEMPLATE)
    return path


@pytest.fixture(scope="session")
def start_llama_cpp(gguf, tmp_path_factory):
    """Starts one more of llama.cpp's servers, with an API key where one is given."""
    started = []

    def start(*key: str) -> Process:
        program = str(Path(__file__).with_name("llama_cpp.py"))
        log = tmp_path_factory.mktemp("llama_cpp") / "log"
        started.append(Process(lambda port: [PYTHON, program, str(gguf), port, *key], log))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def llama_cpp(start_llama_cpp) -> Process:
    return start_llama_cpp()


@pytest.fixture(scope="session")
def transformers_serve(served, tmp_path_factory):
    needs("torch", "torch")
    needs("fastapi", "transformers[serving]")
    options = ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    program = "from transformers.cli.transformers import main; main()"
    command = [PYTHON, "-c", program, "serve", str(served), *options, "--port"]
    process = Process(lambda port: [*command, port], tmp_path_factory.mktemp("transformers") / "log")
    yield process
    process.kill()
