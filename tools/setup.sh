#!/bin/sh
# Make a virtual environment with hf_dino (editable) and its `dev` extra in it, if it is not there already.
#
#     tools/setup.sh VENV [REQUIREMENT ...]          for example: tools/setup.sh .venv-floor 'torch==2.10.*'
#
# PYTHON in the environment names the interpreter; otherwise it is the first of PYTHONS that is Python 3.10 or newer.
# uv is used where it works, and pip where it does not. Two files in VENV say how far an earlier run came:
#     .hf_dino-made     this script made the directory and may therefore make it again from nothing
#     .hf_dino-ready    what was installed; written last, so that a killed run is repaired by the next one
set -eu
cd "$(dirname "$0")/.."

venv=$1
shift
made=$venv/.hf_dino-made
ready=$venv/.hf_dino-ready
key="$(pwd) $(cksum <pyproject.toml) $*"

fail() {
    printf '\n%s\n' "hf_dino could not be set up. $*" | fold -s -w 100 >&2
    exit 1
}

# Two interpreters are the same one when this line is.
identity() {
    "$1" -c 'import sys; print(sys.base_prefix, sys.version_info[:2])' 2>/dev/null
}

# A name on the PATH may be a shim that starts nothing, so each candidate is run.
is_suitable() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

has_uv() {
    uv --version >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON does not start Python 3.10 or newer (with its venv module)." \
            "Name another interpreter, or leave PYTHON out to have one looked for."
        echo "$PYTHON"
        return
    fi
    for candidate in ${PYTHONS:-python3.13 python3.12 python3.11 python3.10 python3 python}; do
        if is_suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    has_uv || fail "There is no Python 3.10 or newer (with its venv module) on the PATH. Install one" \
        "(Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python) or install uv, which" \
        "fetches one itself, or name one: make test PYTHON=/path/to/python3. Then run the same command again."
    echo 3.12 # uv fetches it
}

install_with_uv() {
    has_uv &&
        { [ -x "$venv/bin/python" ] || uv venv --quiet --allow-existing --python "$python" "$venv"; } &&
        uv pip install --python "$venv/bin/python" --editable '.[dev]' "$@"
}

install_with_pip() {
    { [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"; } &&
        { "$venv/bin/python" -m pip --version || "$venv/bin/python" -m ensurepip; } >/dev/null 2>&1 &&
        "$venv/bin/python" -m pip install --editable '.[dev]' "$@"
}

# The interpreter of VENV works and is the one asked for, if one was.
has_right_python() {
    is_suitable "$venv/bin/python" &&
        { [ -z "${PYTHON:-}" ] || [ "$(identity "$PYTHON")" = "$(identity "$venv/bin/python")" ]; }
}

if [ "$(cat "$ready" 2>/dev/null)" = "$key" ] && has_right_python; then
    exit 0
fi
python=$(find_python)

if [ -e "$venv" ] && [ ! -e "$made" ]; then
    has_right_python || fail "The directory $venv is there, but without the Python to use (${PYTHON:-3.10 or newer})." \
        "It was not made by this command, so it is left alone: rename or remove it, then run the same command again."
elif [ -e "$venv" ] && { [ ! -e "$ready" ] || ! has_right_python; }; then
    mv "$venv" "$venv.old-$$" # in one step, so that being killed here leaves no directory without its marker
    rm -rf "$venv.old-$$"
fi
if [ ! -e "$venv" ]; then
    mkdir "$venv"
    touch "$made"
fi
rm -f "$ready"

echo "hf_dino: installing into $venv (once; it takes about 8 GB of disk, most of it PyTorch, and a few minutes)"
if ! install_with_uv "$@"; then
    echo "hf_dino: using pip, because uv is not there or failed"
    install_with_pip "$@" || fail "Installing its dependencies into $venv failed; the lines above say where." \
        "Most often the network is the reason: check that this machine reaches the Python package index, directly" \
        "or through HTTPS_PROXY or a mirror that pip knows (PIP_INDEX_URL), and that there are about 8 GB of free" \
        "disk. Then run the same command again: it starts afresh and keeps what was downloaded."
fi
printf '%s' "$key" >"$ready.part"
mv "$ready.part" "$ready"
