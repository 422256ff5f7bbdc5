#!/usr/bin/env bash
# Makes or renews the virtual environment that the Makefile works in: setup_environment.sh DIRECTORY
# PYTHON names the interpreter to build it from, CXX the C++ compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'make setup: %s\n' "$@" >&2
    exit 1
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if recent_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, and found $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Install one (Debian, Ubuntu: apt install python3 python3-venv python3-dev) or name it: make setup PYTHON=/path/to/python3.12"
}

find_compiler() {
    local candidate
    for candidate in ${CXX:-c++ g++ clang++}; do
        if command -v "$candidate"; then
            return
        fi
    done
    fail "needs a C++ compiler, and found none of: ${CXX:-c++ g++ clang++}." \
        "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name it: CXX=/path/to/g++ make setup"
}

[ $# -eq 1 ] || fail "usage: tools/setup_environment.sh DIRECTORY"
venv=$1

if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null || echo a file)" ]; then
    fail "$venv exists and is no virtual environment; name another: make setup VENV=DIRECTORY"
fi
if [ ! -f "$venv/pyvenv.cfg" ]; then
    python=$(find_python)
elif recent_enough "$venv/bin/python"; then
    python=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)')
else
    fail "the interpreter of $venv is gone or older than Python 3.11; remove that directory and try again"
fi
CXX=$(find_compiler)
export CXX
header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))')
[ -f "$header" ] || fail "needs Python's C headers, and $header is missing." \
    "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"

# Debian keeps ensurepip in a package of its own; without it the pip of the interpreter fills the environment.
if [ ! -f "$venv/pyvenv.cfg" ]; then
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --without-pip "$venv"
    else
        fail "$python has neither ensurepip nor pip. Install them (Debian, Ubuntu: apt install python3-venv)"
    fi
    echo '*' >"$venv/.gitignore"
fi
if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    pip=("$venv/bin/python" -m pip)
else
    pip=("$python" -m pip --python "$venv/bin/python")
fi

echo "Installing into $venv (torch is large: the first time may take minutes) ..."
quiet=()
[ -t 1 ] || quiet=(-qq)
"${pip[@]}" install "${quiet[@]}" --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
"$venv/bin/python" - <<'PY'
import platform
from importlib.metadata import version

import torch

import megatron_lite.corpus._text
import megatron_lite.data._index

devices = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no GPU: CPU and gloo"
print(f"Ready: Python {platform.python_version()}, torch {torch.__version__}, deepspeed {version('deepspeed')}, {devices}")
PY
