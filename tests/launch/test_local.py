"""launch/local.sh with real processes, in which a few lines of Python stand for jaxdraft."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = f"""#!{sys.executable}
import os, signal, sys, time
me = int(os.environ["JAX_PROCESS_ID"])
def say(text): print(text, flush=True)
def on_term(*_): say("saving"); sys.exit(75)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "launch" / "setup.sh").write_text("")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return root


def start(checkout: Path, program: str, processes: int = 2, **environment: str) -> subprocess.Popen:
    jaxdraft = checkout / ".venv" / "bin" / "jaxdraft"
    jaxdraft.write_text(START + program)
    jaxdraft.chmod(0o755)
    command = ["bash", checkout / "launch" / "local.sh", str(processes), "recipe", "--workdir", "a folder"]
    env = {**os.environ, "GRACE": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, sorted(out.splitlines()), err


def test_processes_learn_their_place_and_the_arguments(checkout):
    program = """
port = os.environ["JAX_COORDINATOR_ADDRESS"].removeprefix("127.0.0.1:")
say([int(port) > 0, os.environ["JAX_NUM_PROCESSES"], me, os.environ["JAX_PLATFORMS"], *sys.argv[1:]])
"""
    code, lines, errors = outcome(start(checkout, program, 3))
    arguments = "'run', 'recipe', '--workdir', 'a folder'"
    assert lines == [f"[{i}] [True, '3', {i}, 'cpu', {arguments}]" for i in range(3)]
    assert (code, errors) == (0, "")


def test_jax_makes_one_job_of_them(checkout):
    program = """
import jax
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), me)
say((jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()))
"""
    code, lines, errors = outcome(start(checkout, program, JAX_NUM_CPU_DEVICES="2"))
    assert [line for line in lines if line.startswith(("[0] (", "[1] ("))] == ["[0] (0, 2, 2, 4)", "[1] (1, 2, 2, 4)"]
    assert code == 0, errors


@pytest.mark.parametrize(
    "codes, worst",
    [((0, 0, 0), 0), ((0, 75, 0), 75), ((75, 1, 0), 1), ((1, 75, 2), 2), ((3, 0, 75), 3)],
    ids=str,
)
def test_exit_code_is_the_worst(checkout, codes, worst):
    """They end at the same moment, and none of them minds a SIGTERM."""
    program = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(0.5); sys.exit({codes}[me])"
    assert outcome(start(checkout, program, 3, GRACE="20"))[0] == worst


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_reaches_every_process_once(checkout, number):
    process = start(checkout, "signal.signal(signal.SIGTERM, on_term); say('ready'); time.sleep(60)")
    assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    process.send_signal(number)
    code, lines, errors = outcome(process)
    assert (code, lines) == (75, ["[0] saving", "[1] saving"])
    assert "stopping all processes" in errors


def test_a_second_signal_kills(checkout):
    program = "signal.signal(signal.SIGTERM, lambda *_: say('no')); say('ready')\nwhile True: time.sleep(1)"
    process = start(checkout, program)
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert {process.stdout.readline() for _ in range(2)} == {"[0] no\n", "[1] no\n"}
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert outcome(process)[0] == 75
    assert time.monotonic() - began < 10


def test_one_that_dies_takes_the_others_with_it(checkout):
    """The other process saves at the SIGTERM; what ended the job is still the exit code."""
    program = """
signal.signal(signal.SIGTERM, on_term)
say("ready")
if me == 1: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    code, lines, errors = outcome(start(checkout, program))
    assert code == 128 + signal.SIGKILL
    assert lines == ["[0] ready", "[0] saving", "[1] ready"]
    assert "process 1 ended with 137: stopping the others" in errors


def test_what_hangs_is_killed_with_its_children(checkout):
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if me == 0: sys.exit(2)
if os.fork() == 0: say("child")
time.sleep(60)
"""
    code, lines, errors = outcome(start(checkout, program))
    assert (code, lines) == (2, ["[1] child"])
    assert "killing what has not ended after 1 s" in errors


@pytest.mark.parametrize("arguments, wrong", [([], "number of processes"), (["2", "x"], "--workdir DIR is missing")])
def test_wrong_arguments_are_named(arguments, wrong):
    run = subprocess.run(["bash", ROOT / "launch" / "local.sh", *arguments], capture_output=True, text=True, timeout=20)
    assert run.returncode == 2
    assert wrong in run.stderr
