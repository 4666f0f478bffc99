#!/usr/bin/env bash
# Sets up .venv and runs the quick tests. Further arguments go to pytest: `-m slow` for the long tests, `-n0` for one process,
# `tests/losses -k tvd` for some (paths start at the top of the checkout).
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
# A program that one test process, or an earlier run, has compiled is not compiled again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-$PWD/.venv/jax-cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS-0}"
exec .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
