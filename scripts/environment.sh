# Sourced by the other shell scripts, from the root of the checkout: install_minillm EXTRA sets $python.
# It is that of the active virtual environment, else of .venv, which is made; the project is installed there with this
# extra where its setup has changed since.

fail() {
    echo "$(basename -- "$0"): $1" >&2
    exit 1
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

install_minillm() {
    local extra="$1" venv="${VIRTUAL_ENV:-$PWD/.venv}" base stamp state
    python="$venv/bin/python"
    if [ ! -x "$python" ]; then
        [ -z "${VIRTUAL_ENV:-}" ] || fail "the active virtual environment $VIRTUAL_ENV has no bin/python"
        base="$(find_python)" || fail "needs Python 3.11, 3.12 or 3.13 with its venv module, and found none"
        "$base" -m venv --clear "$venv"
    fi

    # The folder is part of the stamp: an environment that serves two checkouts has an editable install of one of them.
    stamp="$venv/minillm-installed-$extra"
    state="$(cat setup.py pyproject.toml | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$state" ]; then
        # An environment may come without pip: from another tool, or from a creation that was interrupted.
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
        "$python" -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
        echo "$state" >"$stamp"
    fi
}
