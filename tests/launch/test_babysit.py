"""launch/babysit.sh against a gcloud that plays a part, and launch/worker.sh with a real process.

The cloud cannot be reached from a test, so a few lines of bash stand for gcloud: they write down what they are asked
for, give the next line of `states` as the state of the queued resource, and the next of `statuses` as what its workers
say of the run.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GCLOUD = r"""#!/usr/bin/env bash
cd -- "$(dirname -- "$0")"
next() {  # the first line of a file, which is taken off unless it is the last
    head -n 1 "$1"
    (($(wc -l <"$1") == 1)) || sed -i 1d "$1"
}
case "$*" in
    *describe*)
        echo describe >>calls
        answer=$(next states)
        if [[ $answer == NONE ]]; then echo "ERROR: NOT_FOUND: Resource 'x' was not found" >&2 && exit 1; fi
        if [[ $answer == DENIED ]]; then echo "ERROR: PERMISSION_DENIED" >&2 && exit 1; fi
        echo "$answer"
        ;;
    *"worker.sh status"*)
        echo status >>calls
        answer=$(next statuses)
        [[ $answer != silence ]] || exit 255
        tr , '\n' <<<"$answer"
        ;;
    *queued-resources*) echo "$4" >>calls ;;
    *"worker.sh start"*)
        [[ -z $REFUSE ]] || exit 2
        echo "run ${*: -1}" >>calls
        ;;
    *"worker.sh stop"*) echo stop >>calls ;;
    *setup.sh*) echo setup >>calls ;;
    *scp*) echo scp >>calls ;;
    *) echo "unexpected: $*" >>calls && exit 1 ;;
esac
"""
LOOKS = ("describe", "status")
BEGIN = ["scp", "setup", "run"]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def babysit(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "co" / "launch")
    for command in ("init -q", "-c user.name=x -c user.email=x commit -q --allow-empty -m x"):
        subprocess.run(["git", "-C", tmp_path / "co", *command.split()], check=True)
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)

    def run(
        states: str, statuses: str, *options: str, stop_when: str = "", refuse: str = ""
    ) -> tuple[int, list[str], str]:
        """Exit code, what gcloud was asked for besides looking, and what the babysitter said."""
        asked = gcloud.parent / "calls"
        asked.write_text("")
        (gcloud.parent / "states").write_text("\n".join(states.split()) + "\n")
        (gcloud.parent / "statuses").write_text("\n".join(statuses.split("; ")) + "\n")
        command = ["bash", tmp_path / "co" / "launch" / "babysit.sh", "draft", "--type", "v5litepod-16"]
        speed = ["--poll", "0", "--backoff", "0"]
        arguments = [*command, *speed, *options, "quickstart", "--workdir", "gs://b/r"]
        env = {**os.environ, "REFUSE": refuse, "PATH": f"{gcloud.parent}:{os.environ['PATH']}"}
        with subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True) as process:
            if stop_when:
                wait_for(lambda: asked.read_text().count(stop_when) == 2)
                process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        calls = [call for call in asked.read_text().splitlines() if call not in LOOKS]
        started = [call for call in calls if call.startswith("run ")]
        assert all(call.endswith("worker.sh start quickstart --workdir gs://b/r") for call in started), calls
        return process.returncode, ["run" if call in started else call for call in calls], said

    return run


def test_preempted_twice_then_done(babysit):
    active = "WAITING_FOR_RESOURCES PROVISIONING ACTIVE ACTIVE"
    states = f"NONE {active} SUSPENDING SUSPENDED NONE {active} SUSPENDED NONE {active} ACTIVE"
    statuses = "none,none; running,running; none,none; running,running; none,none; running,exited 0; exited 0,exited 0"
    code, calls, said = babysit(states, statuses)
    assert code == 0, said
    assert calls == ["create", *BEGIN, *["delete", "create", *BEGIN] * 2], "the lead process may end later: no stop"
    assert said.count("was preempted; retry") == 2
    assert "the run is done: gs://b/r" in said
    assert "tpu_vm.sh delete draft" in said, "a slice that is left costs money"


def test_gives_up_when_the_retries_are_used_up(babysit):
    code, calls, said = babysit("SUSPENDED NONE SUSPENDED NONE SUSPENDED", "none", "--retries", "2")
    assert code == 75
    assert calls == ["delete", "create"] * 2
    assert "2 retries are used up" in said


def test_configuration_errors_are_not_tried_again(babysit):
    code, calls, said = babysit("NONE ACTIVE", "none,none; exited 2,running", "--delete")
    assert code == 2
    assert calls == ["create", *BEGIN, "stop", "delete"]
    assert "exit code 2 (configuration): not tried again" in said


def test_errors_are_not_tried_again(babysit):
    code, calls, said = babysit("ACTIVE", "none; exited 1,running")
    assert (code, calls) == (1, [*BEGIN, "stop"])
    assert "exit code 1: not tried again" in said


def test_an_error_of_a_slice_that_is_being_preempted_is_not_the_end(babysit):
    code, calls, said = babysit(
        "ACTIVE ACTIVE SUSPENDING SUSPENDED NONE ACTIVE", "none; exited 1,running; none; exited 0"
    )
    assert (code, calls) == (0, [*BEGIN, "delete", "create", *BEGIN]), said


@pytest.mark.parametrize("status", ["exited 75,exited 75", "exited 75,exited 0", "exited 137,exited 75", "lost,lost"])
def test_an_interrupted_run_goes_on_where_it_is(babysit, status):
    code, calls, said = babysit("ACTIVE", f"none; {status}; running,running; exited 0,exited 0")
    assert (code, calls) == (0, BEGIN * 2)
    assert "the run was interrupted; retry 1 of 20" in said


def test_the_others_are_stopped_when_a_worker_has_been(babysit):
    code, calls, _ = babysit("ACTIVE", "none; running,exited 75; exited 75,exited 75; exited 0,exited 0")
    assert (code, calls) == (0, [*BEGIN, "stop", *BEGIN])


def test_a_run_that_is_going_on_is_taken_over(babysit):
    """Starting it again does nothing on a worker that runs it."""
    code, calls, _ = babysit("ACTIVE", "running,running; running,running; exited 0,exited 0")
    assert (code, calls) == (0, ["run"])


@pytest.mark.parametrize("left", ["exited 0,exited 0", "exited 2,exited 1", "lost,none"])
def test_what_an_earlier_run_left_behind_does_not_count(babysit, left):
    code, calls, _ = babysit("ACTIVE", f"{left}; running,running; exited 0,exited 0")
    assert (code, calls) == (0, BEGIN)


def test_a_signal_ends_the_babysitter_and_not_the_run(babysit):
    code, calls, said = babysit("ACTIVE", "running", "--poll", "60", stop_when="status")
    assert (code, calls) == (75, ["run"])
    assert "the run goes on" in said


def test_a_slice_that_does_not_answer_is_made_anew(babysit):
    code, calls, said = babysit("ACTIVE " * 5 + "NONE ACTIVE", "silence; " * 5 + "none; exited 0")
    assert (code, calls) == (0, ["delete", "create", *BEGIN]), said
    assert "does not answer, five times in a row; retry 1" in said


def test_nothing_is_deleted_while_gcloud_cannot_be_asked(babysit):
    code, calls, said = babysit("ACTIVE " + "DENIED " * 9 + "ACTIVE", "running; exited 0")
    assert (code, calls) == (0, ["run"])
    assert said.count("no answer about the state of draft") == 9


def test_a_slice_that_is_busy_with_another_run_is_left_alone(babysit):
    code, calls, said = babysit("ACTIVE", "running", "--delete", refuse="busy")
    assert (code, calls) == (1, [])
    assert "draft is busy" in said


def test_a_failed_request_is_made_anew(babysit):
    code, calls, said = babysit("FAILED NONE ACTIVE", "none; exited 0")
    assert (code, calls) == (0, ["delete", "create", *BEGIN])
    assert "the request for draft failed" in said


def test_says_why_it_cannot_begin(babysit):
    code, calls, said = babysit("DENIED", "none")
    assert (code, calls) == (2, [])
    assert "PERMISSION_DENIED" in said


@pytest.fixture
def worker(tmp_path):
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    jaxdraft = root / ".venv" / "bin" / "jaxdraft"
    jaxdraft.parent.mkdir(parents=True)
    jaxdraft.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(sys.argv[1:], flush=True)\nif sys.argv[2] == 'long': time.sleep(60)\n"
    )
    jaxdraft.chmod(0o755)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["bash", root / "launch" / "worker.sh", *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    yield run, root / "runs" / "worker"
    run("stop")


def test_worker_outlives_its_shell_and_stops_when_asked(worker):
    run, state = worker
    assert run("status") == "none"
    run("start", "long", "--workdir", "a folder")
    assert run("status") == "running"
    run("start", "long", "--workdir", "a folder")
    with pytest.raises(subprocess.CalledProcessError) as other:
        run("start", "other", "--workdir", "x")
    assert "run long --workdir 'a folder' is going on here: stop it first" in other.value.stderr
    wait_for(lambda: "['run', 'long', '--workdir', 'a folder']" in (state / "log").read_text())
    assert (state / "log").read_text().count("== ") == 1, "the second start changed nothing"
    assert run("stop") == "exited 75"
    assert run("status") == "exited 75"


def test_worker_tells_how_a_run_ended(worker):
    run, state = worker
    run("start", "short", "--workdir", "x")
    wait_for(lambda: run("status") == "exited 0")
    run("start", "long", "--workdir", "x")
    os.kill(int((state / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: run("status") == "exited 137")


def test_worker_notices_a_run_that_left_no_exit_code(worker):
    """After a restart of the machine, say: the number of the process belongs to another one."""
    run, state = worker
    state.mkdir(parents=True)
    (state / "pid").write_text(str(os.getppid()))
    assert run("status") == "lost"
