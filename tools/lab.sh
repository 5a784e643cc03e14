#!/bin/sh
# Open JupyterLab on the first notebook, on this machine only.
# PORT names the port, BROWSER=none keeps the browser closed.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python

if [ -n "${PORT:-}" ]; then
    "$python" -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1]))).close()' "$PORT" 2>/dev/null || {
        echo "port $PORT is taken or not allowed: name another one as in make lab PORT=8890, or none at all" >&2
        exit 1
    }
    set -- --ServerApp.port="$PORT" --ServerApp.port_retries=0
fi
if [ "$(id -u)" = 0 ]; then set -- "$@" --allow-root; fi
# Without a screen the browser module would start a text browser in this very terminal.
if [ "${BROWSER:-}" = none ] || { [ "$(uname -s)" = Linux ] && [ -z "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; }; then
    set -- "$@" --no-browser
fi
echo "Starting JupyterLab on notebooks/00_start_here.ipynb; its URL follows. Ctrl-C, twice, stops it."
# tools/jupyter holds the settings: no pop-up asks for news.
export JUPYTER_CONFIG_PATH="$PWD/tools/jupyter${JUPYTER_CONFIG_PATH:+:$JUPYTER_CONFIG_PATH}"
exec "$python" -m jupyterlab "$@" --log-level=WARN --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$PWD" \
    --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb
