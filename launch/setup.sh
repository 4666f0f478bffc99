#!/usr/bin/env bash
# Makes .venv at the top of this checkout: the pinned, hash-checked packages of requirements.lock, and jaxdraft itself, editable.
# Run it as often as you like: it returns at once when nothing has changed. PYTHON=/path/to/python3 chooses the interpreter;
# EXTRAS=tpu, cuda, k8s, gcs or s3 (several: tpu,gcs) adds what is needed there, as pyproject.toml lists it, and is remembered.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*"; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# .venv's own interpreter first, when .venv is whole: one made with PYTHON=... stays as it is.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        if new_enough "$PYTHON"; then
            printf '%s\n' "$PYTHON"
            return
        fi
        printf 'setup: PYTHON=%s is not Python 3.11 or newer (it says: %s).\n' \
            "$PYTHON" "$("$PYTHON" --version 2>&1 || true)" >&2
        return 2
    fi
    if new_enough .venv/bin/python && .venv/bin/python -c 'import pip' 2>/dev/null; then
        printf '.venv/bin/python\n'
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    printf '%s\n' 'setup: no Python 3.11 or newer was found.' \
        '  Install one (Debian and Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12),' \
        '  or name yours: PYTHON=/path/to/python3.12 bash launch/setup.sh' >&2
    return 2
}

# What .venv was made of: the interpreter, the place (console scripts hold absolute paths), the pins, the package's own metadata.
fingerprint() {
    "$1" - launch/requirements.lock pyproject.toml <<'PY'
import hashlib, os, pathlib, sys
parts = [sys.version.encode(), os.getcwd().encode(), *(pathlib.Path(name).read_bytes() for name in sys.argv[1:])]
print("python%d.%d" % sys.version_info[:2], hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

python=$(find_python)
stamp=.venv/jaxdraft-setup
remembered=
[[ ! -f $stamp ]] || read -r _ _ remembered <"$stamp" || true
extras=${EXTRAS-$remembered}
if [[ -n "$extras" && ! "$extras," =~ ^((tpu|cuda|k8s|gcs|s3),)+$ ]]; then
    printf 'setup: EXTRAS=%s: give tpu, cuda, k8s, gcs or s3, several with commas: EXTRAS=tpu,gcs\n' "$extras" >&2
    exit 2
fi
wanted="$(fingerprint "$python")${extras:+ $extras}"
if [[ -x .venv/bin/python && -f $stamp && "$(<"$stamp")" == "$wanted" ]]; then
    exit 0
fi

SECONDS=0
if [[ "$python" != .venv/bin/python ]]; then
    say "making $PWD/.venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
rm -f "$stamp"
say "installing the pinned packages (a minute or two the first time)"
pip_install() { .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input "$@"; }
# promise, which tensorflow-datasets needs, is published as source alone.
pip_install --require-hashes --only-binary :all: --no-binary promise -r launch/requirements.lock
pip_install --no-deps --no-build-isolation --editable .
if [[ -n "$extras" ]]; then
    jax=$(.venv/bin/python -c 'import importlib.metadata; print(importlib.metadata.version("jax"))')
    say "adding [$extras] for jax $jax"
    pip_install --only-binary :all: --no-build-isolation --editable ".[$extras]" "jax==$jax"
fi
printf '%s\n' "$wanted" >"$stamp"
say "done in $SECONDS s"
