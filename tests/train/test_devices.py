"""Eight devices give what one gives, for the forms of a loss that need more than the sum of its rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("stored", "global", "literal", "sampled", "dpace", "adaspec")


def computed(what, folder):
    """Runs eight_devices.py, all losses in one process."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",  # compiles faster
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    program = [sys.executable, "-m", "tests.train.eight_devices", what]
    subprocess.run(program, check=True, cwd=folder, env=env, timeout=600)
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return computed("sums", tmp_path_factory.mktemp("sums"))


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return computed("steps", tmp_path_factory.mktemp("steps"))


def assert_equal(folder, name):
    """Equal up to rounding: float32 sums of up to 192 terms, in another order, differ by about 1e-6 of the largest."""
    one, eight = (np.load(folder / f"{name}-{count}.npz").values() for count in (1, 8))
    for expected, actual in zip(one, eight, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def computations(hlo):
    """The text of each computation of a compiled program, by name."""
    named = ((re.match(r"(?:ENTRY )?(%[\w.-]+) \(", text), text) for text in hlo.split("\n\n"))
    return {head[1]: text for head, text in named if head}


def in_loops(found):
    """Names of the computations that loops run, whatever calls them there."""
    pending = [name for text in found.values() for name in re.findall(r" while\(.*?body=(%[\w.-]+)", text)]
    names = set()
    while pending:
        name = pending.pop()
        if name not in names:
            names.add(name)
            pending += [called for called in re.findall(r"%[\w.-]+", found[name]) if called in found]
    return names


def test_initial_parameters_are_the_same_numbers(sums):
    one, eight = (np.load(sums / f"initial-{count}.npz").values() for count in (1, 8))
    for expected, actual in zip(one, eight, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_losses(sums, name):
    assert_equal(sums, name)


@pytest.mark.parametrize("name", NAMES)
def test_devices_do_not_talk_in_a_loop(sums, name):
    found = computations((sums / f"{name}-8.hlo").read_text())
    talking = {name for name, text in found.items() if re.search(r"\ball-(reduce|gather)(-start)?\(", text)}
    assert talking, "devices have to talk somewhere"
    assert in_loops(found), "a loss runs in chunks"
    assert not talking & in_loops(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_train_step_in_micro_batches(steps, name):
    assert_equal(steps, name)
