"""Models of strangers, built by hand: whatever they do, it is told in one line and within the limits."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedlab_kit.deployment import stranger

WEIGHTS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
X = np.random.default_rng(2).normal(size=(150, 6)).astype(np.float32)
SCORES = helper.make_node("MatMul", ["x", "w"], ["scores"])


def graph(*nodes: onnx.NodeProto, out: int = TensorProto.FLOAT, **stored: object) -> bytes:
    """A file from x float [n, 6] to y, with stored values; "w" are `WEIGHTS`."""
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in {"w": WEIGHTS, **stored}.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])
    made = helper.make_graph(nodes, "g", [x], [helper.make_tensor_value_info("y", out, None)], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def same(a: str, b: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [a], [b])


def loop() -> bytes:
    """Goes round for as long as a condition says that stays true."""
    value = helper.make_tensor_value_info
    goes_in = [
        value("i", TensorProto.INT64, []),
        value("on", TensorProto.BOOL, []),
        value("v", TensorProto.FLOAT, None),
    ]
    comes_out = [value("still", TensorProto.BOOL, []), value("u", TensorProto.FLOAT, None)]
    body = helper.make_graph([same("on", "still"), same("v", "u")], "body", goes_in, comes_out)
    return graph(SCORES, helper.make_node("Loop", ["", "true", "scores"], ["y"], body=body), true=True)


def huge(shape: list[int]) -> bytes:
    """Fills a tensor of that many floats, which the answer needs."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=one),
        helper.make_node("ReduceMax", ["filled"], ["most"], keepdims=0),
        helper.make_node("Add", ["scores", "most"], ["y"]),
    ]
    return graph(SCORES, *nodes, shape=np.array(shape, np.int64))


def elsewhere(location: str, length: int = 72) -> bytes:
    """Has its weights in another file."""
    model = onnx.load_from_string(graph(SCORES, same("scores", "y")))
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "length": str(length)}.items():
        weights.external_data.add(key=key, value=value)
    return model.SerializeToString()


def test_an_honest_file_answers_what_numpy_computes():
    found, seconds = stranger.answers(graph(SCORES, same("scores", "y")), X, 3)
    assert found.tolist() == (X @ WEIGHTS).argmax(1).tolist() and 0 < seconds < 1


def test_a_row_without_numbers_is_answered_by_no_class():
    rows = X.copy()
    rows[[3, 70]] = np.nan
    found, _ = stranger.answers(graph(SCORES, same("scores", "y")), rows, 3)
    assert np.flatnonzero(found < 0).tolist() == [3, 70]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "ONNXRuntimeError"),
        (b"no graph at all", "INVALID_PROTOBUF"),
        (graph(SCORES, same("scores", "y"))[:-20], "ONNXRuntimeError"),
        (graph(same("x", "y")), r"must answer numbers \[64, 3\], got float32 \(64, 6\)"),
        (graph(SCORES, helper.make_node("ReduceMax", ["scores"], ["y"], keepdims=0)), r"\[64, 3\], got float32 \(\)"),
        (graph(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING), out=TensorProto.STRING), "must answer"),
        (graph(helper.make_node("MatMul", ["x", "v"], ["y"]), v=WEIGHTS[:5]), "ONNXRuntimeError"),
        (elsewhere("/etc/passwd"), "data"),
        (elsewhere("../../../../../../etc/passwd"), "data"),
        (elsewhere("weights.bin"), "data"),
    ],
)
def test_what_is_no_answer_is_told_in_one_line(content, told):
    with pytest.raises(ValueError, match=told) as raised:
        stranger.answers(content, X, 3)
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable() and "root:" not in str(raised.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit")
@pytest.mark.parametrize("shape", [[1 << 31], [1 << 20, 1 << 11], [1 << 40]])
def test_a_tensor_of_eight_gigabytes_is_not_made(shape):
    with pytest.raises(ValueError, match=r"ONNXRuntimeError|ended its process"):
        stranger.answers(huge(shape), X, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit")
def test_the_limit_of_memory_is_what_stops_a_large_tensor(monkeypatch):
    file = huge([16 << 20])  # 64 MB
    assert len(stranger.answers(file, X, 3)[0]) == len(X)
    monkeypatch.setattr(stranger, "MEMORY", 32 << 20)
    with pytest.raises(ValueError, match=r"allocate memory|ended its process"):
        stranger.answers(file, X, 3)


def test_an_endless_loop_is_ended(monkeypatch):
    monkeypatch.setattr(stranger, "SECONDS", 2.0)
    started = []
    monkeypatch.setattr(stranger.subprocess, "Popen", Remembering(stranger.subprocess.Popen, started))
    with pytest.raises(ValueError, match=r"^it does not answer 150 rows within 2 s$"):
        stranger.answers(loop(), X, 3)
    assert [process.poll() is not None for process in started] == [True]


class Remembering:
    """A class that keeps what it makes."""

    def __init__(self, kind: type, made: list) -> None:
        self.kind, self.made = kind, made

    def __call__(self, *arguments: object, **named: object) -> object:
        self.made.append(self.kind(*arguments, **named))
        return self.made[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "import sys; sys.exit(3)",
        "print('no JSON')",
        "print('{}')",
        'print(\'{"answers": [1], "seconds": 1}\')',
        'print(\'{"answers": ["a"], "seconds": 1}\')',
    ],
)
def test_a_process_that_dies_or_says_something_else_is_an_error_here(code, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(stranger, "__file__", str(tmp_path / "child.py"))
    with pytest.raises((ValueError, LookupError)):
        stranger.answers(b"", X, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux words")
def test_the_process_opens_and_writes_no_file(tmp_path):
    code = (
        "import sys, runpy; kept = open(sys.argv[2], 'w'); runpy.run_path(sys.argv[1])['_limit'](1 << 30)\n"
        "for what in (lambda: open('/etc/passwd'), lambda: print('x' * 100_000, file=kept, flush=True)):\n"
        "    try: what(); print('done')\n"
        "    except OSError as error: print(error.strerror)\n"
    )
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{code}"]
    ran = stranger.subprocess.run([*command, stranger.__file__, str(tmp_path / "x")], capture_output=True, text=True)
    assert ran.stdout == "Too many open files\nFile too large\n", ran.stderr


def test_the_process_imports_little():
    code = (
        "import io, json, sys, runpy, numpy as np\n"
        "rows = io.BytesIO(); np.save(rows, np.zeros((1, 6), 'f')); rows.seek(0)\n"
        "sys.stdin = type('stdin', (), {'buffer': rows}); runpy.run_path(sys.argv[1])['main'](3, 1 << 30)\n"
        "print(sorted({'torch', 'fedlab_kit', 'pandas', 'onnx', 'scipy'} & set(sys.modules)))"
    )
    ran = stranger.subprocess.run([sys.executable, "-P", "-c", code, stranger.__file__], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "[]", ran.stderr
