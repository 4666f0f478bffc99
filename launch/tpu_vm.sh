#!/usr/bin/env bash
# Cloud TPU VMs: a queued resource with one slice, and a run on all of its workers.
#
#   bash launch/tpu_vm.sh create NAME --type TYPE [--spot] [--runtime VERSION]
#   bash launch/tpu_vm.sh watch  NAME             says how the request fares, until the slice is there
#   bash launch/tpu_vm.sh setup  NAME             copies this checkout's HEAD to every worker and installs it there
#   bash launch/tpu_vm.sh run    NAME RECIPE --workdir gs://BUCKET/RUN [arguments of jaxdraft run]
#   bash launch/tpu_vm.sh logs   NAME [--worker N]
#   bash launch/tpu_vm.sh status NAME             of the run: a line per worker
#   bash launch/tpu_vm.sh stop   NAME             SIGTERM: the run saves and exits with 75; `run` again goes on
#   bash launch/tpu_vm.sh delete NAME             the slice, its disks and the request
#   bash launch/tpu_vm.sh state  NAME             of the request: NONE, WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED ...
#
# TYPE is what Google calls the accelerator type: v4-8, v5litepod-16 (v5e), v5p-8, v6e-8 ...
# --zone and --project default to those of `gcloud config`; --dry-run prints the commands. Options stand before RECIPE:
# what follows it goes to jaxdraft as it is, and RECIPE is a name or a path in the checkout.
#
# Example:
#   bash launch/tpu_vm.sh create draft --type v5litepod-16 --spot --zone us-west4-a
#   bash launch/tpu_vm.sh run draft --zone us-west4-a quickstart --workdir gs://my-bucket/quickstart
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

zone='' project='' type='' runtime='' spot='' worker=0
while (($# > 0)); do
    case $1 in
        -h | --help) show_help && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --spot) spot=1 && shift ;;
        --zone) zone=$(value "$@"); shift 2 ;;
        --project) project=$(value "$@"); shift 2 ;;
        --type) type=$(value "$@"); shift 2 ;;
        --runtime) runtime=$(value "$@"); shift 2 ;;
        --worker) worker=$(value "$@"); shift 2 ;;
        -*) fail "unknown option $1" ;;
        *) take_word "$1" || break; shift ;;
    esac
done
[[ -n "$verb" ]] || fail "give a verb: create, watch, setup, run, logs, status, stop, delete"
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "give a NAME after $verb: lower-case letters, digits and hyphens; got '$name'"
[[ "$verb" == run || $# == 0 ]] || fail "$verb takes no further arguments; got $1"
need gcloud "install the Google Cloud CLI and run: gcloud auth login"
cd -- "$root"

tpus() {
    [[ -z "$zone" ]] || set -- "$@" "--zone=$zone"
    [[ -z "$project" ]] || set -- "$@" "--project=$project"
    run gcloud compute tpus "$@"
}

on_workers() { tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }

create() {
    [[ -n "$type" ]] || fail "create needs --type, such as --type v5litepod-16"
    if [[ -z "$runtime" ]]; then
        case $type in
            v4-*) runtime=tpu-ubuntu2204-base ;;
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            *) fail "--type $type: known are v4-N, v5litepod-N, v5p-N and v6e-N; give --runtime VERSION with another" ;;
        esac
    fi
    set -- "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime"
    [[ -z "$spot" ]] || set -- "$@" --spot
    tpus queued-resources create "$name" "$@"
}

state() {
    local text
    if [[ -n "$dry_run" ]]; then
        tpus queued-resources describe "$name" '--format=value(state.state)'
    elif text=$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>&1); then
        grep -E '^[A-Z_]+$' <<<"$text" || { printf '%s\n' "$text" >&2 && return 1; }
    elif [[ "$text" == *NOT_FOUND* ]]; then
        printf 'NONE\n'
    else
        printf '%s\n' "$text" >&2
        return 1
    fi
}

watch() {
    local now before=''
    if [[ -n "$dry_run" ]]; then
        state
        return
    fi
    while true; do
        now=$(state)
        [[ "$now" == "$before" ]] || say "$(date +%T) $name is $now"
        before=$now
        case $now in
            ACTIVE) return ;;
            NONE) fail "there is no queued resource $name: create it first" ;;
            FAILED | SUSPENDED)
                tpus queued-resources describe "$name" >&2
                say "$name will not come any more: delete it and create it again, or let launch/babysit.sh do so"
                return 1
                ;;
        esac
        sleep 30
    done
}

# The images' own Python is older than 3.11, hence uv.
setup() {
    local archive=build/$name.tar.gz
    run mkdir -p build
    run git archive --format=tar.gz "--output=$archive" HEAD
    tpus tpu-vm scp "$archive" "$name:jaxdraft.tar.gz" --worker=all
    on_workers all "set -e; mkdir -p jaxdraft; tar -xzf jaxdraft.tar.gz -C jaxdraft; \
python3 -m pip install --quiet --user uv; export PATH=\$HOME/.local/bin:\$PATH; uv python install --quiet 3.12; \
PYTHON=\$(uv python find 3.12) EXTRAS=tpu,gcs bash jaxdraft/launch/setup.sh"
}

case $verb in
    create | state | watch | setup) "$verb" ;;
    run)
        need_shared_workdir "$@"
        on_workers all "bash jaxdraft/launch/worker.sh start $(quote "$@")"
        ;;
    status) on_workers all 'if [ -e jaxdraft/launch/worker.sh ]; then bash jaxdraft/launch/worker.sh status; else echo none; fi' ;;
    stop) on_workers all 'bash jaxdraft/launch/worker.sh stop' ;;
    logs) on_workers "$worker" 'tail -n 100 -F jaxdraft/runs/worker/log' ;;
    delete) tpus queued-resources delete "$name" --force --quiet ;;
    *) fail "unknown verb $verb: create, watch, setup, run, logs, status, stop, delete or state" ;;
esac
