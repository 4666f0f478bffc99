"""What XLA makes of the train step on eight devices: no table travels in a loop, no batch's logits exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdraft.plan.hlo import buffers, collectives
from tests.plan.compile_steps import DRAFT, LENGTH, MESHES, ROWS, TARGET, VOCABULARY

ROOT = Path(__file__).parents[2]
REMATERIALISED = "nvoluntary full rematerialization"


def compiled(folder):
    """Runs compile_steps.py in a process with eight devices; what it wrote to standard error."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",  # compiles faster
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program from the cache would warn of nothing
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    program = [sys.executable, "-m", "tests.plan.compile_steps"]
    run = subprocess.run(program, cwd=folder, env=env, timeout=600, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    return compiled(folder), {name: (folder / f"{name}.hlo").read_text() for name in MESHES}


def test_nothing_is_rematerialised_whole(steps):
    assert REMATERIALISED not in steps[0]


@pytest.mark.parametrize("name", MESHES)
def test_no_table_travels_in_a_loop(steps, name):
    """Once for each micro-batch, whose loop is the outermost; not for each layer or chunk."""
    mesh, accumulate = MESHES[name]
    found = collectives(steps[1][name])
    assert any(c.kind == "all-gather" for c in found), "fsdp gathers weights"
    tables = {str(VOCABULARY), str(VOCABULARY // (mesh.tensor or 1))}
    moved = [c for c in found if tables & set(re.findall(r"\d+", c.shape))]
    assert moved, "the head at least is gathered"
    assert all(c.depth <= (accumulate > 1) and c.times < max(2, accumulate) for c in moved), moved


@pytest.mark.parametrize("name", MESHES)
def test_no_buffer_holds_the_logits_of_a_batch(steps, name):
    mesh, accumulate = MESHES[name]
    positions = ROWS * LENGTH // accumulate // 8
    columns = (VOCABULARY, VOCABULARY // (mesh.tensor or 1))
    heads = {DRAFT.hidden_size, TARGET.hidden_size}
    for kind, shape, instruction in buffers(steps[1][name]):
        rest = 1
        for size in shape[:-1]:
            rest *= size
        if len(shape) > 1 and shape[-1] in columns and rest not in heads:
            assert rest < positions, (kind, shape, instruction)
