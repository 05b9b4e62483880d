#!/usr/bin/env bash
# Run the tests from any state of the checkout: scripts/test.sh [--lint] [pytest arguments, relative to the root]
# Uses the active virtual environment, else makes .venv, and installs the project there when its setup has changed.
# --lint runs the linter and the format check first. The tests run in two processes, a file in one of them; -n 0 is one.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

extra=test
if [ "${1:-}" = --lint ]; then
    extra=dev
    shift
fi
install_minillm "$extra"

status=0
if [ "$extra" = dev ]; then
    "$python" -m ruff check . || status=1
    "$python" -m ruff format --check . || status=1
fi
# Two processes have a core each for their products: more threads than cores wait for each other.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
# In the order of the files' names: by default those with the most tests come first, and a long one is left for the end.
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
exit "$status"
