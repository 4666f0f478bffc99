"""A mesh changes where text is written, not what; and neither caches nor weights travel for it."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.decode.eight_devices import NEW, ROWS, TARGET

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """What eight_devices.py prints, and the folder with the programs that it compiled."""
    folder = tmp_path_factory.mktemp("decoded")
    dumped = f"--xla_dump_to={folder}", "--xla_dump_hlo_module_re=.*(write|insert).*"
    flags = "--xla_force_host_platform_device_count=8", *dumped
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}  # compiled: dumped
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "tests.decode.eight_devices"]
    run = subprocess.run(program, check=True, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, timeout=900)
    return [json.loads(line) for line in run.stdout.splitlines()], folder


@pytest.mark.slow
def test_answers_are_those_of_one_device(decoded):
    assert decoded[0] == [{"shards": shards, "same": True} for shards in (1, 2, 4)]


@pytest.mark.slow
def test_neither_caches_nor_weights_travel(decoded):
    """Eight devices hold a cache or a matrix in parts of at least an eighth: no message is as large as one."""
    cache = ROWS * TARGET.num_kv_heads * (128 + NEW) * TARGET.head_size
    matrix = TARGET.hidden_size**2
    moved = r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\("
    shapes = [shape for program in programs(decoded[1], "write") for shape in re.findall(moved, program)]
    assert shapes, "devices have to talk somewhere"
    assert max(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes) < min(cache, matrix) // 8


@pytest.mark.slow
def test_new_rows_are_put_in_where_they_were_read(decoded):
    found = programs(decoded[1], "insert")
    assert any("num_partitions=8" in program for program in found)
    talk = r" (?:all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
    assert not [line for program in found for line in re.findall(talk, program)]


def programs(folder, name):
    return [path.read_text() for path in folder.glob(f"*jit_{name}*after_optimizations.txt")]
