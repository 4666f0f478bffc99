#!/usr/bin/env bash
# Keeps a run going on a TPU slice that may be preempted: asks for the slice, installs, runs, and does so again, with the same
# run directory, until the run has exited with 0. A run already going on NAME is taken over.
#
#   bash launch/babysit.sh NAME --type TYPE [options] RECIPE --workdir gs://BUCKET/RUN [arguments of jaxdraft run]
#
#   --spot --runtime --zone --project   as for launch/tpu_vm.sh
#   --retries N    preemptions and interruptions (exit code 75) after which it gives up (default 20)
#   --backoff S    seconds before the first retry, doubled each time up to 10 minutes (default 30)
#   --poll S       seconds between looks (default 60)
#   --delete       deletes the slice at the end, however the run ended
#   --dry-run      prints the commands of one try
#
# Exit code: the run's own; 75 when the retries are used up (the run directory is whole: start again to go on). Exit codes 1
# and 2 of the run are not retried. Stopping the babysitter leaves the run as it is.
#
# Example: bash launch/babysit.sh draft --type v5litepod-16 --spot quickstart --workdir gs://my-bucket/quickstart
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

name='' type='' runtime='' zone='' project='' spot='' delete='' retries=20 backoff=30 poll=60
while (($# > 0)); do
    case $1 in
        -h | --help) show_help && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --spot) spot=1 && shift ;;
        --delete) delete=1 && shift ;;
        --type) type=$(value "$@"); shift 2 ;;
        --runtime) runtime=$(value "$@"); shift 2 ;;
        --zone) zone=$(value "$@"); shift 2 ;;
        --project) project=$(value "$@"); shift 2 ;;
        --retries) retries=$(value "$@"); shift 2 ;;
        --backoff) backoff=$(value "$@"); shift 2 ;;
        --poll) poll=$(value "$@"); shift 2 ;;
        -*) fail "unknown option $1" ;;
        *)
            [[ -z "$name" ]] || break
            name=$1 && shift
            ;;
    esac
done
[[ -n "$name" ]] || fail "give a NAME for the slice"
[[ -n "$type" ]] || fail "give --type, such as --type v5litepod-16"
[[ "$retries$backoff$poll" =~ ^[0-9]+$ ]] || fail "--retries, --backoff and --poll are whole numbers"
need_shared_workdir "$@"
recipe=("$@")

tpu() {
    local verb=$1
    shift
    [[ -z "$zone" ]] || set -- --zone "$zone" "$@"
    [[ -z "$project" ]] || set -- --project "$project" "$@"
    [[ -z "$dry_run" ]] || set -- --dry-run "$@"
    bash "$root/launch/tpu_vm.sh" "$verb" "$name" "$@"
}

create() {
    set -- --type "$type"
    [[ -z "$runtime" ]] || set -- "$@" --runtime "$runtime"
    [[ -z "$spot" ]] || set -- "$@" --spot
    tpu create "$@"
}

# Unlike sleep alone, ends at once when a signal comes.
pause() {
    sleep "$1" &
    wait "$!"
}

end() {
    say "$2"
    if [[ -n "$delete" ]]; then
        tpu delete || say "$name could not be deleted"
    else
        say "$name may still be there, and be paid for: bash launch/tpu_vm.sh delete $name"
    fi
    exit "$1"
}

tries=0
again() {
    local seconds=$((backoff * (1 << (tries < 10 ? tries : 10))))
    ((tries < retries)) || end 75 "$1, and $retries retries are used up; the run directory $workdir is whole: start again to go on"
    tries=$((tries + 1))
    ((seconds < 600)) || seconds=600
    say "$1; retry $tries of $retries in $seconds s"
    pause "$seconds"
}

recreate() {
    again "$1"
    mine=
    tpu delete || say "$name could not be deleted"
}

# Something that may pass, such as a worker that does not answer yet. Five in a row do not.
troubles=0
trouble() {
    troubles=$((troubles + 1))
    if ((troubles < 5)); then
        say "$1; looking again in $poll s"
        pause "$poll"
    else
        troubles=0
        recreate "$1, five times in a row"
    fi
}

# Set when the run has been started, or seen going on: what an earlier one left behind tells nothing about this one.
mine=
begin() {
    if tpu setup && tpu run "${recipe[@]}"; then
        troubles=0 mine=1 suspect=
        say "$name runs $(quote jaxdraft run "${recipe[@]}")"
    else
        trouble "$name: setting up or starting failed"
    fi
}

# One look at a slice that is there. `suspect`: a worker had ended with an error at the last look as well.
suspect=
attend() {
    local report code error=''
    if ! report=$(tpu status); then
        trouble "$name: a worker does not answer"
        return
    fi
    if [[ -z "$mine" ]]; then
        if ! grep -qx running <<<"$report"; then
            begin
        elif tpu run "${recipe[@]}"; then
            mine=1
        else
            delete=
            end 1 "$name is busy, as the lines above say, or does not answer"
        fi
        return
    fi
    while read -r code; do
        if ((code == 2)); then
            tpu stop >/dev/null || true
            end 2 "the run ended with exit code 2 (configuration): not tried again. bash launch/tpu_vm.sh logs $name says why"
        fi
        # Above 128: killed by a signal, which is what a machine that goes away does.
        ((code == 0 || code == 75 || code > 128)) || error=$code
    done < <(sed -n 's/^exited //p' <<<"$report")
    if [[ -n "$error" && -n "$suspect" ]]; then
        tpu stop >/dev/null || true
        end 1 "the run ended with exit code $error: not tried again. bash launch/tpu_vm.sh logs $name says why"
    elif [[ -n "$error" ]]; then
        # A worker that is preempted takes the others down with an error: the next look tells which of the two it is.
        suspect=1
        pause "$poll"
    elif grep -qx running <<<"$report" && ! grep -qvxE 'running|exited 0' <<<"$report"; then
        troubles=0
        pause "$poll"
    elif grep -qx running <<<"$report"; then
        say "some workers have stopped: stopping the others"
        tpu stop >/dev/null || trouble "$name: a worker does not answer"
    elif ! grep -qvx 'exited 0' <<<"$report"; then
        end 0 "the run is done: $workdir"
    else
        again "the run was interrupted"
        begin
    fi
}

if [[ -n "$dry_run" ]]; then
    tpu state
    create
    tpu setup
    tpu run "${recipe[@]}"
    tpu status
    [[ -z "$delete" ]] || tpu delete
    exit
fi

# shellcheck disable=SC2329 # by the trap
stopped() {
    local sleeping
    for sleeping in $(jobs -p); do kill "$sleeping" 2>/dev/null || true; done
    say "stopped looking; the run goes on. Start this again to take it over, or: bash launch/tpu_vm.sh stop $name"
    exit 75
}
trap stopped INT TERM
state='' before=''
while true; do
    if ! state=$(tpu state); then
        [[ -n "$before" ]] || fail "gcloud cannot tell the state of $name: the lines above say why"
        # Nothing is deleted for want of an answer: it is as likely to be this machine that is cut off.
        say "no answer about the state of $name; looking again in $poll s"
        pause "$poll"
        continue
    fi
    [[ "$state" == "$before" ]] || say "$name is $state"
    before=$state
    [[ "$state" == ACTIVE ]] || suspect=
    case $state in
        NONE) create || trouble "$name could not be created" ;;
        ACTIVE) attend ;;
        SUSPENDED) recreate "$name was preempted" ;;
        FAILED) recreate "the request for $name failed" ;;
        *) pause "$poll" ;;
    esac
done
