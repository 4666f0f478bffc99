#!/usr/bin/env bash
# What the launchers share: sourced by them, does nothing alone.
set -euo pipefail
unset CDPATH
# shellcheck disable=SC2034 # the scripts use it
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=

say() { printf '%s: %s\n' "$(basename -- "$0" .sh)" "$*" >&2; }

fail() {
    say "$*"
    say "bash launch/$(basename -- "$0") --help explains the rest"
    exit 2
}

# The comment at the top of the script.
show_help() { sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"; }

# The words as a shell reads them back.
quote() {
    local word text='' escaped="'\\''"
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$escaped}'"
        text+="${text:+ }$word"
    done
    printf '%s\n' "$text"
}

# Does a command, or says what it would do.
run() {
    if [[ -n "$dry_run" ]]; then quote "$@"; else "$@"; fi
}

need() { [[ -n "$dry_run" ]] || command -v "$1" >/dev/null || fail "$1 is not on PATH: $2"; }

# The value after an option: `zone=$(value "$@")`, then shift 2.
value() {
    (($# > 1)) && [[ -n "$2" ]] || fail "$1 needs a value"
    printf '%s\n' "$2"
}

# Takes one of the words before RECIPE: the verb, then the NAME. Fails at the next one.
verb='' name=''
take_word() {
    if [[ -z "$verb" ]]; then
        verb=$1
    elif [[ -z "$name" ]]; then
        name=$1
    else
        return 1
    fi
}

# Sets workdir from the arguments of `jaxdraft run`: RECIPE --workdir DIR ...
need_recipe() {
    workdir=
    (($# > 0)) || fail "give a RECIPE and --workdir DIR"
    [[ "$1" != -* ]] || fail "RECIPE comes first, then --workdir DIR and further arguments of jaxdraft run; got $1"
    while (($# > 0)); do
        case $1 in
            --workdir) workdir=$(value "$@") ;;
            --workdir=*) workdir=${1#*=} ;;
        esac
        shift
    done
    [[ -n "$workdir" ]] || fail "--workdir DIR is missing after RECIPE"
}

need_shared_workdir() {
    need_recipe "$@"
    [[ "$workdir" == gs://* ]] || fail "--workdir $workdir: give gs://BUCKET/PATH, because the machines' own disks go with them"
}
