"""A real JupyterLab in a real Chromium: `lab_page` opens notebooks in it and works them like a learner.

    def test_something(lab_page):
        lab_page.open("00_start_here.ipynb")
        lab_page.run_all()
        lab_page.page.get_by_role("button", name="Run").click()
        lab_page.screenshot("bench")
        assert lab_page.errors == []

The server works on a copy of notebooks/ and on an empty run store; its kernels end with it.
Pictures land in the folder that FEDLAB_SCREENSHOTS names, else in a temporary one.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",  # root, as in a container, has no sandbox
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it answers and the folders it works in."""

    url: str
    token: str
    root: Path
    runs: Path

    @property
    def notebooks(self) -> Path:
        """The copy of notebooks/; a test may put a notebook of its own here."""
        return self.root / "notebooks"

    def request(self, path: str, method: str = "GET") -> bytes:
        """Ask the server's own API."""
        headers = {"Authorization": f"token {self.token}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/{path}", method=method, headers=headers), timeout=5
        ) as answer:
            return answer.read()


class LabPage:
    """One browser tab with JupyterLab in it."""

    def __init__(self, page: Page, lab: Lab, screenshots: Path) -> None:
        self.page = page
        self.lab = lab
        self.errors: list[str] = []
        self._screenshots = screenshots
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def open(self, name: str) -> None:
        """Open a notebook of `lab.notebooks` in a workspace of its own and wait until its kernel is idle."""
        workspace = secrets.token_hex(4)
        self.page.goto(f"{self.lab.url}/lab/workspaces/{workspace}/tree/notebooks/{name}?token={self.lab.token}")
        self.page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for(timeout=60_000)
        self.wait_idle()

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until the kernel of the open notebook has nothing to do."""
        self.page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.kernelDisplayStatus === 'idle'",
            timeout=seconds * 1000,
        )

    def run_all(self, seconds: float = 120) -> None:
        """Run All Cells; returns when the last one has finished, fails when one of them has."""
        done = self.page.evaluate(RUN_ALL, seconds * 1000)
        assert done is True, f"Run All Cells: {done}"
        self.wait_idle()

    def screenshot(self, name: str) -> Path:
        """Save what the window shows as NAME.png; returns the file."""
        path = self._screenshots / f"{name}.png"
        self.page.screenshot(path=path)
        return path


Kind = TypeVar("Kind", bound=LabPage)

# The command behind the menu entry: its promise holds until the last cell is done, and says if all succeeded.
RUN_ALL = """timeout => Promise.race([
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(good => good || 'a cell failed'),
  new Promise(resolve => setTimeout(() => resolve(`not done after ${timeout} ms`), timeout)),
])"""


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """The system's Chromium; skips without one, and fails where CI is set."""
    program = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if program is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no Chromium for the browser tests: sudo apt install chromium, or brew install --cask chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port of this machine, with settings, run store and notebooks of its own."""
    root, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("jupyter")
    (root / "notebooks").mkdir()
    if (ROOT / "notebooks").is_dir():
        shutil.copytree(ROOT / "notebooks", root / "notebooks", dirs_exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    lab = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), root, home / "runs")
    log = home / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            _command(lab, port), stdout=output, stderr=subprocess.STDOUT, env=_environment(lab, home)
        )
    try:
        _wait_until_it_answers(lab, server, log)
        yield lab
        lab.request("api/shutdown", "POST")  # its kernels go with it
        server.wait(timeout=20)
    finally:
        server.kill()
        server.wait()


def _command(lab: Lab, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={lab.root}", f"--IdentityProvider.token={lab.token}"),
        "--LabApp.expose_app_in_browser=True",
    ]


def _environment(lab: Lab, home: Path) -> dict[str, str]:
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    own = {name: str(home / name.lower()) for name in folders}
    as_make_lab = {"JUPYTER_CONFIG_PATH": str(ROOT / "tools/jupyter"), "OMP_NUM_THREADS": "1"}
    return os.environ | own | as_make_lab | {"FEDLAB_RUNS": str(lab.runs)}


def _wait_until_it_answers(lab: Lab, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            lab.request("api/status")
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@contextmanager
def tab(chromium: Browser, lab: Lab, folder: Path, kind: type[Kind]) -> Iterator[Kind]:
    """A fresh tab, 1280 by 900, whose kernels end with it; pictures go to FEDLAB_SCREENSHOTS or the folder."""
    screenshots = Path(os.environ.get("FEDLAB_SCREENSHOTS", folder)).resolve()
    screenshots.mkdir(parents=True, exist_ok=True)
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield kind(context.new_page(), lab, screenshots)
    context.close()
    for session in json.loads(lab.request("api/sessions")):
        lab.request(f"api/sessions/{session['id']}", "DELETE")


@pytest.fixture
def lab_page(chromium: Browser, lab: Lab, tmp_path: Path) -> Iterator[LabPage]:
    """A tab for one test."""
    with tab(chromium, lab, tmp_path, LabPage) as page:
        yield page
