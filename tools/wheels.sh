#!/bin/sh
# Fill wheels/ with all that `make lab` and `make federation` install, for machines of this kind (system, processor, Python) without a network.
# What was there stays, so that several kinds of machines can fill one folder. TORCH_INDEX names another index for torch.
set -eu
cd "$(dirname "$0")/.."
fill() { .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$made" "$@"; }
made=$(mktemp -d ./wheels.XXXXXX)
trap 'rm -rf "$made"' EXIT
trap 'exit 1' INT TERM

. tools/torch_source.sh
echo "wheels: getting $torch"
# shellcheck disable=SC2086  # an option and its value, or nothing
fill --no-deps $source "$torch"
# Named by its full version (2.13.0+cpu), the torch that is there cannot be exchanged for one with CUDA.
torch=torch==$(cd "$made" && echo torch-*.whl | cut -d- -f2)

echo "wheels: getting the other packages, in the versions of constraints.txt"
.venv/bin/python - >"$made/needed" <<'END'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
needed = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["scale"]
print(*needed, *project["build-system"]["requires"], sep="\n")
END
fill -c constraints.txt --find-links "$made" -r "$made/needed" "$torch"
rm "$made/needed"

mkdir -p wheels
mv "$made"/* wheels/
echo "wheels: wheels/ holds $(find wheels -name '*.whl' | wc -l | tr -d ' ') files, $(du -sh wheels | cut -f1). Copy it into a clone on another machine; make lab and make federation there need no network."
