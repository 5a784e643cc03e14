"""Nobody phones home: what processes write in a home of their own, and whom they call when a proxy answers for all."""

import json
import os
import selectors
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
BARE = "import onnxruntime; session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
OURS = "from fedlab_kit.deployment import measure; session = measure.open_session(open(sys.argv[1], 'rb').read())"
ALONE = f"import runpy; runpy.run_path({str(ROOT / 'fedlab_kit/deployment/score.py')!r}); {BARE}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "same.onnx"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def start(code: str, model: Path, home: Path, **more: str) -> subprocess.Popen:
    """Run code in a process with an empty home, none of this machine's settings, and nothing that says it is a test."""
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, sys; {code}", str(model)],
        env=environment | {"FEDLAB_RUNS": str(home.parent / "runs"), "PYTHONDONTWRITEBYTECODE": "1", **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(home: Path) -> list[str]:
    return [file.name for file in home.rglob("*") if file.is_file() and "matplotlib" not in file.parts]


@pytest.mark.parametrize(("code", "silent"), [(BARE, False), (OURS, True), (ALONE, True)])
def test_opening_a_file_leaves_nothing_at_home(code, silent, model, tmp_path):
    assert start(code, model, tmp_path / "home").communicate() == ("", "")
    assert bool(left_behind(tmp_path / "home")) is not silent


@pytest.mark.slow
def test_nobody_is_called_while_the_runtime_alone_calls(model, tmp_path):
    """Three processes wait side by side, each with a proxy that counts who comes, until the last one has called."""
    codes, calls = {"ours": OURS, "alone": ALONE, "bare": BARE}, dict.fromkeys(("ours", "alone", "bare"), 0)
    with ExitStack() as stack:
        doors = stack.enter_context(selectors.DefaultSelector())
        for name, code in codes.items():
            door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            doors.register(door, selectors.EVENT_READ, name)
            proxy = f"http://127.0.0.1:{door.getsockname()[1]}"
            proxies = {f"{kind}_proxy": proxy for kind in ("http", "https", "all", "HTTPS", "ALL")}
            process = start(f"{code}; print('open', flush=True); sys.stdin.read()", model, tmp_path / name, **proxies)
            stack.callback(process.communicate)  # ends what it reads, and so the process
            assert process.stdout.readline() == "open\n"
        while not calls["bare"]:
            for key, _ in doors.select(timeout=60):
                calls[key.data] += 1
                key.fileobj.accept()[0].close()
        assert {key.data for key, _ in doors.select(timeout=5)} <= {"bare"}
    assert calls["ours"] == calls["alone"] == 0
    assert left_behind(tmp_path / "bare") and not left_behind(tmp_path / "ours") and not left_behind(tmp_path / "alone")


@pytest.mark.parametrize(("value", "late"), [("", True), ("0", True), ("1", False), ("True", False)])
def test_who_comes_too_late_says_so(value, late, model, tmp_path):
    _, errors = start(f"{BARE}; {ALONE}", model, tmp_path / "home", ORT_DISABLE_TELEMETRY=value).communicate()
    told = "onnxruntime was imported first and reports to its maker: set ORT_DISABLE_TELEMETRY=1 and restart"
    assert (told in errors) is late is bool(left_behind(tmp_path / "home"))


def test_flower_and_ray_are_told_before_they_are_imported(model, tmp_path):
    pytest.importorskip("flwr", reason='needs Flower: pip install -c constraints.txt -e ".[scale]"')
    code = (
        "import fedlab_kit.scale.flower; from flwr.supercore import telemetry; "
        "from ray._common.usage.usage_lib import usage_stats_enabled; "
        "print(telemetry.FLWR_TELEMETRY_ENABLED, usage_stats_enabled(), os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    said, errors = start(code, model, tmp_path / "home").communicate()
    assert said == "0 False 1\n", errors
    assert left_behind(tmp_path / "home") == []


def test_jupyterlab_asks_for_no_news_and_no_newer_version():
    config = json.loads((ROOT / "tools/jupyter/labconfig/page_config.json").read_text())
    assert config["disabledExtensions"]["@jupyterlab/apputils-extension:announcements"] is True
    assert "tools/jupyter" in (ROOT / "tools/lab.sh").read_text()
