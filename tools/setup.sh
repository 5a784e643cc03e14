#!/bin/sh
# Make .venv and install the project into it; running it again repairs what was interrupted.
#   tools/setup.sh              what the notebooks need
#   tools/setup.sh '[test]'     and what the tests need
# PYTHON names an interpreter, TORCH_INDEX another package index for torch.
set -eu
cd "$(dirname "$0")/.."
extras=${1:-}
say() { echo "set-up: $*"; }
stop() { echo "set-up stopped: $*" >&2; exit 1; }
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
in_venv() { .venv/bin/python -m "$@"; }

find_python() {
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if supported "$python"; then return; fi
    done
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "none")
    stop "needs Python 3.11, 3.12 or 3.13, found $found: install one of them, or name it as in make lab PYTHON=python3.12"
}

make_venv() {
    if supported .venv/bin/python && in_venv pip --version >/dev/null 2>&1; then return; fi
    find_python
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python cannot make virtual environments: sudo apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

# torch comes first and alone: the default index would bring 6 GB of CUDA to Linux. Its CPU index is tried once, shortly.
install_torch() {
    torch=$(grep '^torch==' constraints.txt)
    in_venv pip show torch 2>/dev/null | grep -q "^Version: ${torch#torch==}" && return
    cpu_index=https://download.pytorch.org/whl/cpu
    if [ -n "${TORCH_INDEX:-}" ]; then
        source="--index-url $TORCH_INDEX"
    elif [ "$(uname -s)" = Linux ] &&
        in_venv pip index versions torch --index-url $cpu_index --timeout 8 --retries 0 2>/dev/null | grep -q "${torch#torch==}+cpu"; then
        source="--index-url $cpu_index"
    else
        source=
        [ "$(uname -s)" != Linux ] || say "PyTorch's CPU index does not answer: taking torch from pip's own sources (TORCH_INDEX=... names another)"
    fi
    say "installing $torch, about 200 MB"
    # shellcheck disable=SC2086  # source is an option and its value, or nothing
    in_venv pip install --quiet --disable-pip-version-check --no-deps $source "$torch" || stop "$remedy"
}

install_project() {
    say "installing fedlab-kit$extras and what it needs, in the versions of constraints.txt: a minute or two"
    # Named by its full version (2.13.0+cpu), the torch that is there cannot be exchanged for one with CUDA.
    torch=torch==$(in_venv pip show torch 2>/dev/null | sed -n 's/^Version: //p')
    in_venv pip install --quiet --disable-pip-version-check -c constraints.txt "$torch" -e ".$extras" || stop "$remedy"
}

remedy="pip could not install (see above): check the network and run the same command again"
make_venv
install_torch
install_project
say "done"
