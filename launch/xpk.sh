#!/usr/bin/env bash
# A run on a TPU cluster that XPK made (`xpk cluster create`). It restarts after a preemption, with the same run directory.
#
#   bash launch/xpk.sh run NAME --cluster CLUSTER --type TYPE --image IMAGE [options] \
#                               RECIPE --workdir gs://BUCKET/RUN [arguments of jaxdraft run]
#   bash launch/xpk.sh watch|logs NAME --cluster CLUSTER
#   bash launch/xpk.sh delete     NAME --cluster CLUSTER    SIGTERM, so that the run saves; `run` again goes on
#
#   --slices N (default 1)   --restarts N (default 20)   --zone, --project (default: those of gcloud)   --dry-run
#
# TYPE is what XPK calls a slice, such as v5litepod-16 or v6e-16. IMAGE is made with launch/Dockerfile.
#
# Example: bash launch/xpk.sh run draft --cluster mine --type v5litepod-16 --image IMAGE quickstart --workdir gs://my-bucket/q
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

cluster='' type='' image='' slices=1 restarts=20 zone='' project=''
while (($# > 0)); do
    case $1 in
        -h | --help) show_help && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --cluster) cluster=$(value "$@"); shift 2 ;;
        --type) type=$(value "$@"); shift 2 ;;
        --image) image=$(value "$@"); shift 2 ;;
        --slices) slices=$(value "$@"); shift 2 ;;
        --restarts) restarts=$(value "$@"); shift 2 ;;
        --zone) zone=$(value "$@"); shift 2 ;;
        --project) project=$(value "$@"); shift 2 ;;
        -*) fail "unknown option $1" ;;
        *) take_word "$1" || break; shift ;;
    esac
done
[[ -n "$verb" ]] || fail "give a verb: run, watch, logs or delete"
[[ -n "$name" ]] || fail "give a NAME after $verb"
[[ -n "$cluster" ]] || fail "give --cluster, as in: xpk cluster list"
[[ "$verb" == run || $# == 0 ]] || fail "$verb takes no further arguments; got $1"

workload() {
    [[ -z "$zone" ]] || set -- "$@" "--zone=$zone"
    [[ -z "$project" ]] || set -- "$@" "--project=$project"
    need xpk "install it in an environment of its own: pip install xpk"
    run xpk workload "$@"
}

case $verb in
    run)
        [[ -n "$type" && -n "$image" ]] || fail "give --type, such as v5litepod-16, and --image"
        need_shared_workdir "$@"
        # 1 as well as 75: a process whose peer was preempted fails. 2 (configuration) is not tried again.
        workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" \
            "--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=1,75 \
            --termination-grace-period-seconds=300 "--command=$(quote jaxdraft run "$@")"
        ;;
    watch) workload list "--cluster=$cluster" "--filter-by-job=$name" ;;
    logs)
        need kubectl "XPK needs it too"
        run kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$name" --follow --prefix --tail=100 --max-log-requests=100
        ;;
    delete) workload delete "--cluster=$cluster" "--workload=$name" ;;
    *) fail "unknown verb $verb: run, watch, logs or delete" ;;
esac
