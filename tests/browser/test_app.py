"""The bench as an app, started as `make app` does it: one page, behind a token, that trains and measures."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"(http://127\.0\.0\.1:\d+/)\?token=([0-9a-f]{32,})")


def ignore_interrupts() -> None:
    """Begin as a script's background job does: whoever wants to hear of Ctrl-C must ask for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def started(home: Path, end: signal.Signals) -> Iterator[tuple[str, str]]:
    """Run the app and tell where it answers, and its token; afterwards it must end in order at the signal."""
    folders = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    own = {"FEDLAB_RUNS": str(home / "runs"), "BROWSER": "none", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PORT"} | folders | own
    with (
        (home / "app.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "tools/app.py"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=ignore_interrupts,
        ) as server,
    ):
        try:
            said = ADDRESS.search(server.stdout.readline())
            assert said, (home / "app.log").read_text()[-2000:]
            yield said[1], said[2]
            server.send_signal(end)
            assert server.wait(timeout=20) == 0
        finally:
            server.kill()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Where an app answers, and its token; Ctrl-C ends it, with the kernel of its page."""
    with started(tmp_path_factory.mktemp("app"), signal.SIGINT) as where:
        yield where


def test_kill_ends_it_in_order(tmp_path):
    with started(tmp_path, signal.SIGTERM) as (address, _), urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("path", ["", "?token=wrong", "api/kernels", "api/kernels?token="])
def test_without_the_right_token_there_is_nothing_but_a_login(app, path):
    with urllib.request.urlopen(app[0] + path, timeout=10) as answer:
        assert "/login?next=" in answer.url and b"fedlab" not in answer.read()


def test_no_kernel_is_started_or_ended_from_outside(app):
    request = urllib.request.Request(f"{app[0]}voila/api/shutdown/{'0' * 8}", data=b"", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


def test_the_page_is_the_bench_and_run_draws_a_point(app, chromium: Browser, tmp_path):
    address, token = app
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page, errors, fetched = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(f"{address}?token={token}", timeout=60_000)
    run = page.get_by_role("button", name="Run", exact=True)
    expect(run).to_be_visible(timeout=60_000)
    expect(page.get_by_text("import fedlab_kit")).to_have_count(0)
    run.click()
    expect(page.get_by_role("group", name=re.compile("^Accuracy against .*: 1 point,"))).to_be_visible(timeout=60_000)
    expect(page.get_by_role("group", name=re.compile(r"^Accuracy per round: \d"))).to_be_visible()
    pictures = Path(os.environ.get("FEDLAB_SCREENSHOTS", tmp_path)).resolve()
    page.screenshot(path=pictures / "app.png", full_page=True)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    expect(page.get_by_role("main")).to_have_count(1)
    context.close()
    assert errors == []
    assert [url for url in fetched if not url.startswith((address, "data:", "blob:"))] == []


def kernels() -> list[int]:
    """The kernels of the app, by their process ids."""
    found = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    servers = {one.pid for one in found if "tools/app.py" in one.cmdline()}
    return [one.pid for one in found if one.ppid() in servers and "ipykernel_launcher" in one.cmdline()]


def gone(those: list[int]) -> bool:
    """Whether processes end within some seconds."""
    deadline = time.monotonic() + 20
    while set(those) & set(kernels()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not set(those) & set(kernels())


def test_a_page_that_is_closed_or_loaded_again_ends_its_kernel(app, chromium: Browser):
    address, token = app
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{address}?token={token}", timeout=60_000)
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_visible(timeout=60_000)
    first = kernels()
    page.reload(timeout=60_000)
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_visible(timeout=60_000)
    assert len(first) == 1 and gone(first)
    second = kernels()
    page.close()
    assert len(second) == 1 and gone(second) and kernels() == []
    context.close()


@pytest.mark.parametrize("port", ["99999", "voila"])
def test_an_impossible_port_is_answered_in_one_line(port):
    arguments = [sys.executable, "tools/app.py"]
    done = subprocess.run(arguments, cwd=ROOT, env=os.environ | {"PORT": port}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"port {port} is taken or not allowed: name another one as in make app PORT=8890, or none at all\n"
    )
