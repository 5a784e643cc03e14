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

# wheels/, filled by `make wheels`, has all that the notebooks need, and Flower: then nothing else is asked. It has not what tests need.
find_wheels() {
    here=
    if [ -d wheels ]; then
        say "taking what wheels/ holds"
        here="--find-links wheels"
        case $extras in *test*) ;; *) here="--no-index $here" ;; esac
        remedy="pip could not install (see above): wheels/ is for the kind of machine and the Python that filled it; name that Python as in make lab PYTHON=python3.12, or remove wheels/ to use the network"
    fi
}

# shellcheck disable=SC2086  # options and their values, or nothing
install_torch() {
    torch=$(grep '^torch==' constraints.txt)
    in_venv pip show torch 2>/dev/null | grep -q "^Version: ${torch#torch==}" && return
    source=$here
    [ -n "$here" ] && [ -z "${TORCH_INDEX:-}" ] || . tools/torch_source.sh
    say "installing $torch, about 200 MB"
    in_venv pip install --quiet --disable-pip-version-check --no-deps $source "$torch" || stop "$remedy"
}

# shellcheck disable=SC2086
install_project() {
    say "installing fedlab-kit$extras and what it needs, in the versions of constraints.txt: a minute or two"
    # Named by its full version (2.13.0+cpu), the torch that is there cannot be exchanged for one with CUDA.
    torch=torch==$(in_venv pip show torch 2>/dev/null | sed -n 's/^Version: //p')
    in_venv pip install --quiet --disable-pip-version-check $here -c constraints.txt "$torch" -e ".$extras" || stop "$remedy"
}

remedy="pip could not install (see above): check the network and run the same command again"
make_venv
find_wheels
install_torch
install_project
say "done"
