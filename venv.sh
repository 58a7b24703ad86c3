#!/usr/bin/env bash
# Prints the Python of an environment that holds this checkout, up to date: python=$(bash venv.sh [dev]). What it does
# meanwhile goes to stderr. The environment is $VENV_PATH, else the active one, else .venv; a missing one is made.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
extra=${1:-}
venv=${VENV_PATH:-${VIRTUAL_ENV:-$root/.venv}}
python=$venv/bin/python
stamp=$venv/.simpletuner-${extra:-run}
newest=3.13

fail() {
    echo "$1" >&2
    exit 1
}

# True for a Python that is recent enough; $1 is a command. A pyenv shim exists also for versions that do not run.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 to $newest is needed; python3 is $(python3 --version 2>&1 || true). Install one and run this again."
}

make_venv() {
    local base
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make environments. On Debian and Ubuntu: sudo apt install python3-venv"
    echo "making $venv with $("$base" --version)" >&2
    "$base" -m venv "$venv" >&2 || fail "$base could not make $venv (see above)"
}

# Pip's progress is for a person who waits; a log gets its errors only.
pip_install() {
    local quiet=(--quiet --quiet)
    [ ! -t 2 ] || quiet=(--progress-bar on)
    "$python" -m pip install --disable-pip-version-check "${quiet[@]}" "$@" >&2
}

# A torch for this machine, before pip takes the first that fits: on Linux that would be a CUDA build of several GB.
install_torch() {
    local arguments index
    "$python" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null && return
    read -ra arguments <<<"$("$python" "$root/setup.py" torch)"
    [ ${#arguments[@]} -gt 0 ] || exit 1
    index=${arguments[2]:-}
    if [ "${arguments[1]:-}" = --extra-index-url ] && ! "$python" - "$index/torch/" 2>/dev/null <<'PYTHON'; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=3)
PYTHON
        echo "$index does not answer: taking torch from pip's own indexes" >&2
        arguments=("${arguments[0]}")
    fi
    echo "installing ${arguments[*]}" >&2
    pip_install "${arguments[@]}"
}

fingerprint() {
    echo "$root $(cat "$root/pyproject.toml" "$root/setup.py" | cksum)"
}

is_up_to_date() {
    [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]
}

update_venv() {
    # Two commands at once (a run and the tests, say) must not install into one environment side by side.
    if command -v flock >/dev/null; then
        mkdir -p "$venv"
        exec 9>"$venv/.simpletuner-lock"
        flock 9
        ! is_up_to_date || return 0
    fi
    [ -x "$python" ] || make_venv
    is_supported "$python" ||
        fail "$venv has $("$python" --version 2>&1), not Python 3.11 to $newest: deactivate or remove it and run this again."
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >&2 ||
        fail "$venv has no pip: remove it and run this again."
    install_torch
    echo "installing simpletuner${extra:+ and its $extra tools} into $venv" >&2
    pip_install --editable "$root${extra:+[$extra]}"
    fingerprint | tee "$venv/.simpletuner-run" >"$stamp"
    echo "the environment is ready ($SECONDS s)" >&2
}

is_up_to_date || update_venv
echo "$python"
