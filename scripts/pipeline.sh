#!/usr/bin/env bash
# From a fresh clone to an aligned model: scripts/pipeline.sh [options of scripts/pipeline.py]
# Uses the active virtual environment, else makes .venv, and installs there what the pipeline needs.
set -euo pipefail
here="$PWD"
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root="$PWD"
source scripts/environment.sh
install_minillm data,plot
cd -- "$here" # the options may name files from where the user stands
exec "$python" "$root/scripts/pipeline.py" "$@"
