#!/usr/bin/env bash
# N processes on this machine that form one jax.distributed job on its CPU: how a pod's run behaves, without a pod.
#
#   bash launch/local.sh [--dry-run] [--port PORT] N RECIPE --workdir DIR [arguments of jaxdraft run]
#
# Each line of output begins with its process's number. SIGTERM and Ctrl-C go to all processes, which save and stop; a second
# one kills them. When a process fails, the others get SIGTERM, and SIGKILL after GRACE seconds (default 60). The exit code is
# the worst: 2 before any other error, that before 75, that before 0. The coordinator's port is a free one unless given.
# JAX_NUM_CPU_DEVICES=4 gives each process four devices.
#
# Example: bash launch/local.sh 2 quickstart --workdir runs/two
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

port='' processes=''
while (($# > 0)); do
    case $1 in
        -h | --help) show_help && exit ;;
        --dry-run) dry_run=1 && shift ;;
        --port) port=$(value "$@"); shift 2 ;;
        -*) fail "unknown option $1" ;;
        *)
            [[ -z "$processes" ]] || break
            processes=$1 && shift
            ;;
    esac
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "give the number of processes first; got '$processes'"
need_recipe "$@"
grace=${GRACE:-60}

[[ -n "$dry_run" ]] || bash "$root/launch/setup.sh"
if [[ -z "$port" && -z "$dry_run" ]]; then
    port=$("$root/.venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
job=("JAX_PLATFORMS=cpu" "JAX_COORDINATOR_ADDRESS=127.0.0.1:${port:-PORT}" "JAX_NUM_PROCESSES=$processes")
if [[ -n "$dry_run" ]]; then
    for ((i = 0; i < processes; i++)); do
        quote env "${job[@]}" "JAX_PROCESS_ID=$i" "$root/.venv/bin/jaxdraft" run "$@"
    done
    exit
fi

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

prefix() {
    local line
    while IFS= read -r line || [[ -n "$line" ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=() readers=()
signal() {
    local pid
    for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}

asked=
# shellcheck disable=SC2329 # by the trap
stop() {
    if [[ -z "$asked" ]]; then
        asked=1
        say "stopping all processes; once more kills them"
        signal TERM
    else
        signal KILL
    fi
}
trap stop INT TERM

# Each process in a group of its own: a signal to the group reaches its workers too, and Ctrl-C comes through here alone.
set -m
for ((i = 0; i < processes; i++)); do
    mkfifo "$pipes/$i"
    prefix "$i" <"$pipes/$i" &
    readers[i]=$!
    env "${job[@]}" "JAX_PROCESS_ID=$i" "$root/.venv/bin/jaxdraft" run "$@" >"$pipes/$i" 2>&1 </dev/null &
    pids[i]=$!
done
set +m

rank() { case $1 in 0) echo 0 ;; 75) echo 1 ;; 2) echo 3 ;; *) echo 2 ;; esac; }

worst=0 deadline=
left=$processes
while ((left > 0)); do
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        code=0
        wait "${pids[i]}" || code=$?
        # What is still in the group of a process that has ended would keep its pipe open.
        kill -KILL -- "-${pids[i]}" 2>/dev/null || true
        unset "pids[i]"
        left=$((left - 1))
        # Ended by the signal that was sent from here, before it could say 75 itself.
        if [[ "$code" == 143 || "$code" == 137 || "$code" == 134 ]] && [[ -n "$asked$deadline" ]]; then code=75; fi
        (($(rank "$code") <= $(rank "$worst"))) || worst=$code
        if ((code != 0 && left > 0)) && [[ -z "$deadline" ]]; then
            deadline=$((SECONDS + grace))
            if [[ -z "$asked" ]]; then
                say "process $i ended with $code: stopping the others"
                signal TERM
            fi
        fi
    done
    if [[ -n "$deadline" ]] && ((left > 0 && SECONDS >= deadline)); then
        say "killing what has not ended after $grace s"
        signal KILL
        deadline=$((SECONDS + grace))
    fi
    ((left == 0)) || sleep 0.2 || true # Ctrl-C ends it
done
wait "${readers[@]}" || true
exit "$worst"
