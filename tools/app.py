"""Show the bench as an app: one page without code, on this machine only, opened by a token. `make app` calls this.

PORT names the port, BROWSER=none keeps the browser closed.
"""

import os
import signal
import socket
import sys
import webbrowser
from pathlib import Path

import psutil
from voila.app import Voila

PAGE = 500e6  # bytes of a kernel with a bench that has trained and exported
UNSEEN = 600  # seconds after which a kernel ends whose page went away without a word, with a laptop's lid say
APP = Path(__file__).with_name("app")  # the notebook, and a page for it that fetches nothing from the internet


class App(Voila):
    """Voila, which would leave the token out of the page that it opens."""

    def launch_browser(self) -> None:
        """Say where the page is, token included, and open it where there is a screen; called when the port is known."""
        address = f"{self.connection_url}?token={self.identity_provider.token}"
        pages = max(1, int(psutil.virtual_memory().available // PAGE))
        room = f"Each open page takes {PAGE / 1e6:.0f} MB: this machine has room for about {pages}."
        print(f"The bench is at {address}\n{room} Ctrl-C stops it.", flush=True)
        screen = sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        if screen and os.environ.get("BROWSER") != "none":
            webbrowser.open(address)


def port_options(port: str) -> list[str]:
    """Return Voila's options for one port; it ends the program when that is taken or not allowed."""
    try:
        socket.create_server(("127.0.0.1", int(port))).close()
    except (ValueError, OverflowError, OSError):
        sys.exit(f"port {port} is taken or not allowed: name another one as in make app PORT=8890, or none at all")
    return [f"--Voila.port={port}", "--Voila.port_retries=0"]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a script's background jobs ignore Ctrl-C unless they say otherwise
        signal.signal(number, signal.default_int_handler)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(APP), os.environ.get("JUPYTER_PATH")]))
    options = ["--Voila.ip=127.0.0.1", "--Voila.auto_token=True", "--Voila.log_level=ERROR", "--template=bench"]
    options += [f"--MappingKernelManager.cull_idle_timeout={UNSEEN}", "--MappingKernelManager.cull_interval=60"]
    port = os.environ.get("PORT")
    App.launch_instance([str(APP / "bench.ipynb"), *options, *(port_options(port) if port else [])])
