# Sourced by setup.sh and wheels.sh: sets `source`, pip's option that says where torch comes from; nothing means pip's own
# sources. torch comes first and alone: the default index would bring 6 GB of CUDA to Linux. Its CPU index is tried once, shortly.
torch=$(grep '^torch==' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu
if [ -n "${TORCH_INDEX:-}" ]; then
    source="--index-url $TORCH_INDEX"
elif [ "$(uname -s)" = Linux ] &&
    .venv/bin/python -m pip index versions torch --index-url $cpu_index --timeout 8 --retries 0 2>/dev/null | grep -q "${torch#torch==}+cpu"; then
    source="--index-url $cpu_index"
else
    source=
    [ "$(uname -s)" != Linux ] || echo "PyTorch's CPU index does not answer: taking torch from pip's own sources (TORCH_INDEX=... names another)"
fi
