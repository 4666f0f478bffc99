"""What each launcher says it would do, compared with tests/launch/golden/, and how the scripts are written.

After a wanted change, write the golden files anew and read their diff:

    python -m tests.launch.test_dry_run
"""

import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
LAUNCHERS = ("babysit", "gke", "local", "slurm", "tpu_vm", "worker", "xpk")
RUN = ["quickstart", "--workdir", "gs://bucket/a run", "--set", "draft.text='x'"]
PLACE = ["--zone", "us-west4-a", "--project", "mine"]

# Golden file -> command, without --dry-run.
CASES = {
    "babysit": ["babysit", "draft", "--type", "v6e-16", "--spot", "--delete", *PLACE, *RUN],
    "gke_run_tpu": ["gke", "run", "draft", "--image", "IMAGE", "--tpu", "v5e:4x4", "--spot", *RUN],
    "gke_run_gpu": ["gke", "run", "draft", "--image", "IMAGE", "--gpu", "nvidia-h100-80gb", "--nodes", "2", *RUN],
    "gke_watch": ["gke", "watch", "draft", "--namespace", "mine"],
    "gke_logs": ["gke", "logs", "draft"],
    "gke_suspend": ["gke", "suspend", "draft"],
    "gke_resume": ["gke", "resume", "draft"],
    "gke_delete": ["gke", "delete", "draft"],
    "local": ["local", "--port", "1234", "2", *RUN],
    "slurm": ["slurm", "--nodes", "2", "--gpus", "4", "--time", "12:00:00", "--name", "draft", *RUN],
    **{
        f"tpu_vm_create_{kind.partition('-')[0]}": ["tpu_vm", "create", "draft", "--type", kind, *PLACE]
        for kind in ("v4-8", "v5litepod-16", "v5p-8", "v6e-8")
    },
    "tpu_vm_create_other": ["tpu_vm", "create", "draft", "--type", "v9-8", "--runtime", "v9-image", "--spot"],
    "tpu_vm_watch": ["tpu_vm", "watch", "draft", *PLACE],
    "tpu_vm_setup": ["tpu_vm", "setup", "draft", *PLACE],
    "tpu_vm_run": ["tpu_vm", "run", "draft", *PLACE, *RUN],
    "tpu_vm_logs": ["tpu_vm", "logs", "draft", "--worker", "3"],
    "tpu_vm_status": ["tpu_vm", "status", "draft"],
    "tpu_vm_stop": ["tpu_vm", "stop", "draft"],
    "tpu_vm_delete": ["tpu_vm", "delete", "draft"],
    "tpu_vm_state": ["tpu_vm", "state", "draft"],
    "worker_start": ["worker", "start", *RUN],
    "worker_status": ["worker", "status"],
    "worker_stop": ["worker", "stop"],
    "xpk_run": ["xpk", "run", "draft", "--cluster", "mine", "--type", "v5litepod-16", "--image", "IMAGE", *PLACE, *RUN],
    "xpk_watch": ["xpk", "watch", "draft", "--cluster", "mine"],
    "xpk_logs": ["xpk", "logs", "draft", "--cluster", "mine"],
    "xpk_delete": ["xpk", "delete", "draft", "--cluster", "mine"],
}


# All that a dry run needs: neither gcloud, kubectl, xpk nor sbatch.
TOOLS = ("basename", "bash", "cat", "dirname", "mktemp", "rm", "sed")


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        for tool in TOOLS:
            Path(folder, tool).symlink_to(shutil.which(tool))
        command = ["bash", ROOT / "launch" / f"{launcher}.sh", *arguments]
        return subprocess.run(command, env={"PATH": folder}, cwd=folder, capture_output=True, text=True, timeout=30)


def dry_run(launcher: str, *arguments: str) -> str:
    run = launch(launcher, "--dry-run", *arguments)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.replace(str(ROOT), "CHECKOUT")


@pytest.mark.parametrize("case", CASES)
def test_dry_run_equals_the_golden_file(case):
    assert dry_run(*CASES[case]) == (GOLDEN / case).read_text(), "wanted? python -m tests.launch.test_dry_run"


def test_golden_files_are_those_of_the_cases():
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("case", ["babysit", "gke_run_gpu", "gke_run_tpu", "local", "slurm", "tpu_vm_run", "xpk_run"])
def test_all_end_in_the_same_command(case):
    """The words of `jaxdraft run` arrive whole through every shell and file between."""
    text = (GOLDEN / case).read_text()
    if case.startswith("gke"):
        (job,) = yaml.safe_load_all(text.partition("kind: RoleBinding")[2].partition("---")[2].partition("\nYAML\n")[0])
        (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        assert [*container["command"], *container["args"]] == ["jaxdraft", "run", *RUN]
        return
    (line, *_) = [line for line in text.splitlines() if "a run" in line]
    words = shlex.split(line)
    nested = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    if nested:
        words = shlex.split(nested[0])
    assert words[-len(RUN) :] == RUN


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_has_an_example(launcher):
    for option in ("--help", "-h"):
        run = launch(launcher, option)
        assert (run.returncode, run.stderr) == (0, "")
        assert f"bash launch/{launcher}.sh" in run.stdout.partition("Example:")[2]


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("tpu_vm", "give a verb"),
        ("tpu_vm fly draft", "unknown verb fly"),
        ("tpu_vm create Draft_1", "lower-case"),
        ("tpu_vm create draft", "create needs --type"),
        ("tpu_vm create draft --type v9-8", "give --runtime"),
        ("tpu_vm create draft --zone", "--zone needs a value"),
        ("tpu_vm create draft --typ v4-8", "unknown option --typ"),
        ("tpu_vm stop draft now", "takes no further arguments; got now"),
        ("tpu_vm run draft", "give a RECIPE"),
        ("tpu_vm run draft quickstart", "--workdir DIR is missing"),
        ("tpu_vm run draft quickstart --workdir runs/x", "give gs://"),
        ("babysit draft --type v4-8 quickstart --workdir runs/x", "give gs://"),
        ("babysit draft --type v4-8 --retries many quickstart --workdir gs://b/r", "whole numbers"),
        ("gke run draft quickstart --workdir gs://b/r", "give --image"),
        ("gke render draft --image I --tpu v3:4x4 quickstart --workdir gs://b/r", "give v4, v5e, v5p or v6e"),
        ("gke render draft --image I --tpu v5e:16 quickstart --workdir gs://b/r", "a topology such as"),
        ("gke render draft --image I --tpu v5e:4x4 --gpu x quickstart --workdir gs://b/r", "not both"),
        ("xpk watch draft", "give --cluster"),
        ("slurm --nodes", "--nodes needs a value"),
        ("local two quickstart --workdir d", "number of processes"),
        ("worker", "give start, status or stop"),
    ],
)
def test_wrong_arguments_are_named(command, wrong):
    launcher, *arguments = command.split()
    run = launch(launcher, "--dry-run", *arguments)
    assert run.returncode == 2
    assert wrong in run.stderr
    assert run.stdout == ""


def test_a_missing_tool_is_named():
    run = launch("tpu_vm", "stop", "draft")
    assert run.returncode == 2
    assert "gcloud is not on PATH" in run.stderr


def test_shellcheck_has_nothing_to_say():
    shellcheck = Path(sysconfig.get_path("scripts"), "shellcheck")
    scripts = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])
    run = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    for case, command in CASES.items():
        (GOLDEN / case).write_text(dry_run(*command))
