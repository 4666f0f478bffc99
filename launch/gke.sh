#!/usr/bin/env bash
# A run on GKE as a JobSet, on a TPU slice or on GPU nodes. It restarts after a preemption, with the same run directory.
#
#   bash launch/gke.sh run NAME --image IMAGE --tpu GENERATION:TOPOLOGY [options] RECIPE --workdir gs://BUCKET/RUN [arguments]
#   bash launch/gke.sh run NAME --image IMAGE --gpu TYPE [options]                RECIPE --workdir gs://BUCKET/RUN [arguments]
#   bash launch/gke.sh render ...             prints the manifests that `run` applies
#   bash launch/gke.sh watch|logs NAME
#   bash launch/gke.sh suspend|resume NAME    SIGTERM, so that the run saves, and the nodes are free; then on from there
#   bash launch/gke.sh delete NAME
#
#   --tpu        v4, v5e, v5p or v6e and the slice's topology, such as v5e:4x4, on nodes with four chips each
#   --gpu        the label cloud.google.com/gke-accelerator of the nodes, such as nvidia-h100-80gb
#   --gpus N     GPUs per node (default 8);  --nodes N  nodes (default 1)
#   --spot       on spot nodes
#   --restarts N (default 20)
#   --namespace NAMESPACE, --dry-run
#
# IMAGE is made with launch/Dockerfile. The cluster needs the JobSet controller, and the service account `jaxdraft` of the
# namespace the right to write to the bucket.
#
# Example: bash launch/gke.sh run draft --image IMAGE --tpu v5e:4x4 --spot quickstart --workdir gs://my-bucket/quickstart
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

image='' tpu='' gpu='' gpus=8 nodes=1 spot='' restarts=20 namespace=''
while (($# > 0)); do
    case $1 in
        -h | --help) show_help && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --spot) spot=1 && shift ;;
        --image) image=$(value "$@"); shift 2 ;;
        --tpu) tpu=$(value "$@"); shift 2 ;;
        --gpu) gpu=$(value "$@"); shift 2 ;;
        --gpus) gpus=$(value "$@"); shift 2 ;;
        --nodes) nodes=$(value "$@"); shift 2 ;;
        --restarts) restarts=$(value "$@"); shift 2 ;;
        --namespace) namespace=$(value "$@"); shift 2 ;;
        -*) fail "unknown option $1" ;;
        *) take_word "$1" || break; shift ;;
    esac
done
[[ -n "$verb" ]] || fail "give a verb: run, render, watch, logs, suspend, resume or delete"
# The names of the pods add to it, and may have 63 characters.
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "give a NAME after $verb: up to 40 lower-case letters, digits and hyphens; got '$name'"
[[ "$verb" == run || "$verb" == render || $# == 0 ]] || fail "$verb takes no further arguments; got $1"

cluster() {
    [[ -z "$namespace" ]] || set -- "--namespace=$namespace" "$@"
    run kubectl "$@"
}

# A string of YAML.
text() {
    local escaped=${1//\\/\\\\}
    printf '"%s"' "${escaped//\"/\\\"}"
}

# Sets hosts, chips, resource and the nodes' labels.
place() {
    local accelerator topology
    if [[ -n "$tpu" ]]; then
        topology=${tpu#*:}
        case $tpu in
            v4:*) accelerator="tpu-v4-podslice" ;;
            v5e:*) accelerator="tpu-v5-lite-podslice" ;;
            v5p:*) accelerator="tpu-v5p-slice" ;;
            v6e:*) accelerator="tpu-v6e-slice" ;;
            *) fail "--tpu $tpu: give v4, v5e, v5p or v6e and a topology, such as v5e:4x4" ;;
        esac
        [[ "$topology" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--tpu $tpu: give a topology such as 4x4 or 2x2x1"
        chips=$((${topology//x/*}))
        hosts=$(((chips + 3) / 4))
        ((chips < 4)) || chips=4
        resource=google.com/tpu
        labels="cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology"
    else
        [[ "$gpus$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--gpus and --nodes are numbers; got $gpus and $nodes"
        [[ "$gpu" =~ ^[-a-z0-9]+$ ]] || fail "--gpu $gpu: give the nodes' label, such as nvidia-h100-80gb"
        hosts=$nodes chips=$gpus resource=nvidia.com/gpu
        labels="cloud.google.com/gke-accelerator: $gpu"
    fi
    if [[ -n "$spot" ]]; then
        labels+='
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule'
    fi
}

# The role is what JAX asks the cluster for to find its processes: the pod it is in, and that pod's job.
rights() {
    cat <<YAML
apiVersion: v1
kind: ServiceAccount
metadata:
  name: jaxdraft
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: jaxdraft
rules:
  - apiGroups: [""]
    resources: [pods]
    verbs: [get, list]
  - apiGroups: [batch]
    resources: [jobs]
    verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: jaxdraft
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: jaxdraft
subjects:
  - kind: ServiceAccount
    name: jaxdraft
YAML
}

# Exit code 2 (configuration) ends the JobSet at once. Any other restarts it, 1 too: a process whose peer was preempted fails.
jobset() {
    local argument
    cat <<YAML
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
YAML
    # One slice to a JobSet: all of its pods on the same node pool, and nobody else's.
    [[ -z "$tpu" ]] || cat <<YAML
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
YAML
    cat <<YAML
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: configuration
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: worker
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: jaxdraft
                  operator: In
                  values: [2]
          template:
            spec:
              serviceAccountName: jaxdraft
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                $labels
              containers:
                - name: jaxdraft
                  image: $(text "$image")
                  command: [jaxdraft, run]
                  args:
YAML
    for argument in "$@"; do printf '                    - %s\n' "$(text "$argument")"; done
    cat <<YAML
                  resources:
                    limits:
                      $resource: $chips
YAML
    # Where GKE puts the driver, and the memory that NCCL shares.
    [[ -z "$gpu" ]] || cat <<YAML
                  env:
                    - name: LD_LIBRARY_PATH
                      value: /usr/local/nvidia/lib64
                  volumeMounts:
                    - name: shm
                      mountPath: /dev/shm
              volumes:
                - name: shm
                  emptyDir:
                    medium: Memory
YAML
}

render() {
    [[ -n "$image" ]] || fail "give --image IMAGE, made with launch/Dockerfile"
    [[ -n "$tpu" || -n "$gpu" ]] || fail "give --tpu GENERATION:TOPOLOGY or --gpu TYPE"
    [[ -z "$tpu" || -z "$gpu" ]] || fail "give --tpu or --gpu, not both"
    [[ "$restarts" =~ ^[0-9]+$ ]] || fail "--restarts is a whole number; got $restarts"
    [[ "$image$*" != *[[:cntrl:]]* ]] || fail "arguments with line breaks cannot be sent to a cluster: put them into the recipe"
    need_shared_workdir "$@"
    place
    rights
    jobset "$@"
}

pods="--selector=jobset.sigs.k8s.io/jobset-name=$name"
[[ "$verb" == render ]] || need kubectl "install it, then: gcloud container clusters get-credentials CLUSTER"
case $verb in
    render) render "$@" ;;
    run)
        manifests=$(render "$@")
        if [[ -n "$dry_run" ]]; then
            printf "%s <<'YAML'\n%s\nYAML\n" "$(cluster apply --filename=-)" "$manifests"
        else
            cluster apply --filename=- <<<"$manifests"
        fi
        ;;
    watch) cluster get pods "$pods" --watch ;;
    logs) cluster logs "$pods" --follow --prefix --tail=100 --max-log-requests=100 ;;
    suspend) cluster patch jobset "$name" --type=merge '--patch={"spec":{"suspend":true}}' ;;
    resume) cluster patch jobset "$name" --type=merge '--patch={"spec":{"suspend":false}}' ;;
    delete) cluster delete jobset "$name" ;;
    *) fail "unknown verb $verb: run, render, watch, logs, suspend, resume or delete" ;;
esac
