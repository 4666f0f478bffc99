#!/usr/bin/env bash
# From nothing to a report: sets up .venv, runs the quickstart recipe, ends with the report's path. Run again, it does only what is missing.
# Further arguments go to `jaxdraft run`; JAXDRAFT_WORKDIR chooses the run directory (default: runs/quickstart in this checkout).
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/launch/setup.sh"
exec "$root/.venv/bin/jaxdraft" run "$root/configs/quickstart.py" \
    --workdir "${JAXDRAFT_WORKDIR:-$root/runs/quickstart}" "$@"
