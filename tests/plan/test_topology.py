"""A full-size step compiled by the TPU compiler, against what it took before.

After a change that is meant, write the golden file anew from ``programs[0]`` of
``jaxdraft plan direct_alignment_llama2_115m --topology v5e:2x4 --only tvdpp-0 --json FILE``.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdraft.plan.compiled import Memory
from jaxdraft.plan.hardware import CHIPS

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "direct_alignment-tvdpp-v5e-2x4.json"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)


@pytest.mark.slow
@needs_compiler
def test_distillation_from_llama_2_7b_on_eight_v5e(tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "jaxdraft.cli", "plan", "direct_alignment_llama2_115m"]
    command += ["--topology", "v5e:2x4", "--only", "tvdpp-0", "--json", str(out)]
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr
    assert "nvoluntary full rematerialization" not in run.stderr
    [found] = json.loads(out.read_text())["programs"]
    golden = json.loads(GOLDEN.read_text())
    assert {key: found[key] for key in ("rows", "mesh", "fits")} == {
        key: golden[key] for key in ("rows", "mesh", "fits")
    }
    assert found["memory"]["arguments"] == golden["memory"]["arguments"]  # weights and state: no compiler changes them
    assert found["memory"]["total"] == pytest.approx(golden["memory"]["total"], rel=0.1)
    assert found["collectives"].keys() == golden["collectives"].keys()
    moved = [sum(kind["bytes"] for kind in plan["collectives"].values()) for plan in (found, golden)]
    assert moved[0] == pytest.approx(moved[1], rel=0.1)
    assert found["most_rows"] >= found["rows"]


def test_the_golden_step_fits():
    memory = Memory(**json.loads(GOLDEN.read_text())["memory"])
    assert memory.total < CHIPS["v5e"].memory
    assert memory.total == memory.arguments + memory.temporaries + memory.outputs - memory.in_place + memory.code
