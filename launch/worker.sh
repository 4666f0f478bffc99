#!/usr/bin/env bash
# A run on this machine that outlives the shell that started it. launch/tpu_vm.sh calls this on every worker.
#
#   bash launch/worker.sh start RECIPE --workdir DIR [arguments of jaxdraft run]
#   bash launch/worker.sh status    prints none, running, lost, or "exited CODE"
#   bash launch/worker.sh stop      SIGTERM, so that the run saves; SIGKILL when it has not ended after 5 minutes
#
# Example: bash launch/worker.sh start quickstart --workdir runs/quickstart
# The log is runs/worker/log in this checkout. --dry-run before the verb prints the command.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
state=$root/runs/worker

alive() { [[ -s $state/pid ]] && [[ "$(ps -o args= -p "$(<"$state/pid")")" == *jaxdraft* ]]; }

status() {
    if alive; then
        printf 'running\n'
        return
    fi
    [[ -s $state/pid ]] || { printf 'none\n' && return; }
    [[ -s $state/exit ]] || sleep 1 # it may have ended just now
    if [[ -s $state/exit ]]; then printf 'exited %s\n' "$(<"$state/exit")"; else printf 'lost\n'; fi
}

start() {
    local command
    command=$(quote jaxdraft run "$@")
    if alive; then
        [[ "$(<"$state/command")" == "$command" ]] || fail "$(<"$state/command") is going on here: stop it first"
        say "already running"
        return
    fi
    mkdir -p "$state"
    printf '%s\n' "$command" >"$state/command"
    rm -f "$state/pid" "$state/exit"
    nohup bash "$root/launch/worker.sh" hold "$@" >>"$state/log" 2>&1 </dev/null &
    until [[ -s $state/pid ]]; do sleep 0.1; done
}

hold() {
    local code=0
    printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$(<"$state/command")"
    cd -- "$root"
    .venv/bin/jaxdraft run "$@" &
    printf '%s\n' "$!" >"$state/pid.new"
    mv "$state/pid.new" "$state/pid"
    wait "$!" || code=$?
    printf '%s\n' "$code" >"$state/exit.new"
    mv "$state/exit.new" "$state/exit"
}

stop() {
    local seconds=0
    if alive; then
        kill -TERM "$(<"$state/pid")"
        while alive && ((seconds++ < 300)); do sleep 1; done
        if alive; then
            say "did not end in 5 minutes: killing it"
            kill -KILL "$(<"$state/pid")"
        fi
    fi
    status
}

[[ "${1-}" != --dry-run ]] || { dry_run=1 && shift; }
verb=${1-}
(($# == 0)) || shift
case $verb in
    start | hold)
        need_recipe "$@"
        if [[ -n "$dry_run" ]]; then quote "$root/.venv/bin/jaxdraft" run "$@"; else "$verb" "$@"; fi
        ;;
    status | stop)
        (($# == 0)) || fail "$verb takes no arguments; got $1"
        if [[ -z "$dry_run" ]]; then "$verb"; elif [[ $verb == stop ]]; then quote pkill --signal TERM --pidfile "$state/pid"; else quote cat "$state/exit"; fi
        ;;
    -h | --help) show_help ;;
    *) fail "give start, status or stop; got ${verb:-nothing}" ;;
esac
