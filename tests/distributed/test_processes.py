"""Real processes on this machine: what they agree on, and a whole recipe as one of them and as several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdraft import distributed
from jaxdraft.errors import ConfigError
from tests.distributed.layouts import differences, free_port, run

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny_recipe.py"

TWO = """
import jax, numpy as np
from jaxdraft import distributed, sharding
from jaxdraft.errors import ConfigError, Interrupted
from jaxdraft.sharding import MeshShape, batch_sharding, place

distributed.initialize()
me = jax.process_index()
assert jax.process_count() == 2 and distributed.is_lead() == (me == 0)

assert distributed.on_lead(lambda: {"from": jax.process_index(), "text": "γ" * 5000}) == {"from": 0, "text": "γ" * 5000}
assert distributed.on_lead(lambda: None) is None
read = []
for value in distributed.from_lead(lambda: ([i] * i for i in range(4))):
    read.append(value)
assert read == [[], [1], [2, 2], [3, 3, 3]]
assert distributed.on_all("") == []
assert distributed.on_all("disk" if me else "") == ["disk"]

def fails(error):
    def work():
        assert me == 0, "only the lead works"
        raise error
    return work

for error, heard in ((ConfigError("no"), ConfigError), (Interrupted("no"), Interrupted), (KeyError("no"), OSError)):
    try:
        distributed.on_lead(fails(error))
    except BaseException as told:
        assert type(told) is (heard if me else type(error)) and "no" in str(told), repr(told)
    else:
        raise AssertionError("nothing was raised")

def reads(error):
    def work():
        if me and error:
            raise error
        return me
    return work

assert distributed.together(reads(None)) == me
try:
    distributed.together(reads(ConfigError("no such file")))
except (ConfigError, OSError) as told:
    assert isinstance(told, ConfigError if me else OSError) and str(told) == "no such file"
else:
    raise AssertionError("nothing was raised")

sharding._memory.__globals__["_OTHER_MEMORY"] = 100 * (1 + me)  # the lead's counts: processes must not choose apart
assert MeshShape().build(sharding.Load(bytes=80)).shape["fsdp"] == 2
mesh = MeshShape().build()
x = np.arange(12.0).reshape(4, 3)
cut, whole = place(mesh, x, rows=True), place(mesh, x[:3], rows=True)  # three rows do not divide
assert cut.sharding == batch_sharding(mesh) and not cut.is_fully_addressable and whole.is_fully_replicated
both = distributed.fetch({"cut": cut, "whole": whole, "host": 7})
np.testing.assert_array_equal(both["cut"], x)
np.testing.assert_array_equal(both["whole"], x[:3])
"""


def test_two_processes_agree(tmp_path):
    program = tmp_path / "two.py"
    program.write_text(TWO)
    job = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, program],
            env={**os.environ, **job, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


def test_alone_nothing_is_asked_of_others():
    assert distributed.is_lead()
    assert distributed.on_lead(lambda: "own") == "own"
    assert list(distributed.from_lead(lambda: iter("ab"))) == ["a", "b"]
    assert distributed.on_all("disk") == ["disk"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, "but not JAX_NUM_PROCESSES"),
        ({"JAX_PROCESS_ID": "x", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "whole numbers"),
        ({"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "must be less than"),
    ],
)
def test_a_job_half_described_is_refused(given, message, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.initialize()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("layouts") / "1x1"
    run(TINY, workdir, 1, 1)
    return workdir


# Rounding differs with the layout; over six steps of a rate that large it grows to some 1e-6 of the parameters.
@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, devices, mesh", [(2, 1, ()), (2, 2, ("fsdp=2", "tensor=1")), (1, 8, ("fsdp=2", "tensor=2"))]
)
def test_every_stage_gives_what_one_process_gives(alone, tmp_path, processes, devices, mesh):
    run(TINY, tmp_path / "run", processes, devices, *(word for axis in mesh for word in ("--set", f"mesh.{axis}")))
    found = differences(alone, tmp_path / "run")
    assert found["loss"] < 1e-5
    assert found["parameters"] < 1e-5
    assert found["tokens"] == 0, "answers in float32 do not depend on the layout, but for ties"
    assert found["blocks"] == 0, "nor does what is decoded while a draft learns"


@pytest.mark.slow
def test_a_process_may_hold_filler_alone(tmp_path):
    """Five rows on four devices are filled up to eight: the last process has none of its own."""
    five = ("--only", "tokenizer", "corpus", "target", "--set", "target.batch_size=5", "--set", "mesh.tensor=1")
    for processes in (1, 4):
        run(TINY, tmp_path / str(processes), processes, 1, *five)
    found = differences(tmp_path / "1", tmp_path / "4")
    assert found["loss"] < 1e-5
    assert found["parameters"] < 1e-5


@pytest.mark.slow
def test_a_mistake_ends_every_process_with_the_same_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit codes \[2, 2\]") as failed:
        run(TINY, tmp_path / "run", 2, 1, "--set", "pretrain.init=subclone", "--set", "draft.hidden_size=64")
    assert str(failed.value).count("hidden_size is 64, larger than the target's 32") == 2
