"""A stranger's model in a process of its own: what it answers within limits of time and memory, or why it does not.

The process imports numpy and onnxruntime alone. It can open no file, write none, and what it says is data.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from io import BytesIO
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

SECONDS = 60.0  # for all rows of one file
MEMORY = 2 << 30  # bytes beyond the runtime's own, where the system keeps such a limit (Linux)
BATCH = 64  # rows at once: few of all, so that a row's place among the others says nothing


def answers(content: bytes, x: np.ndarray, classes: int) -> tuple[np.ndarray, float]:
    """Return what a file's bytes answer for raw rows [n, ...], a class int64 [n], and the median seconds of one row.

    A row without a number for each class has the answer -1. Raises ValueError, in one line, for whatever else the file
    does: no graph, other inputs or outputs, an error, a crash, more than `SECONDS` or `MEMORY`.
    """
    received = BytesIO()
    np.save(received, x, allow_pickle=False)
    command = [sys.executable, "-P", __file__, str(classes), str(MEMORY)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with TemporaryDirectory() as empty, subprocess.Popen(command, cwd=empty, **pipes) as process:
        try:
            said, _ = process.communicate(received.getvalue() + content, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"it does not answer {len(x)} rows within {SECONDS:g} s") from None
        finally:
            process.kill()
    if process.returncode:
        raise ValueError(f"it ended its process (code {process.returncode})")
    told = json.loads(said)
    if "error" in told:
        raise ValueError("".join(letter for letter in told["error"] if letter.isprintable()))
    return np.array(told["answers"], np.int64).reshape(len(x)), float(told["seconds"])


def _limit(memory: int) -> None:
    """Let this process open no more files, write none, and take so many bytes more than it has."""
    try:
        import resource
    except ImportError:  # Windows
        return
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            memory += int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for what, most in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))


def _answer(content: bytes, x: np.ndarray, classes: int) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # the error is raised; it need not be printed as well
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name, found, taken = session.get_inputs()[0].name, [], list[float]()
    for start in range(0, len(x), BATCH):
        rows = x[start : start + BATCH]
        logits = session.run(None, {name: rows})[0]
        if getattr(logits, "shape", None) != (len(rows), classes) or logits.dtype.kind not in "fiu":
            got = f"{getattr(logits, 'dtype', type(logits))} {np.shape(logits)}"
            raise ValueError(f"it must answer numbers [{len(rows)}, {classes}], got {got}")
        found += np.where(np.isnan(logits).any(1), -1, logits.argmax(1)).tolist()
    while len(taken) < 5 or sum(taken) < 0.03:
        began = time.perf_counter()
        session.run(None, {name: x[:1]})
        taken.append(time.perf_counter() - began)
    return {"answers": found, "seconds": statistics.median(taken)}


def main(classes: int, memory: int) -> None:
    """Read rows and a file's bytes from standard input, and write what it answers, or an error, as JSON."""
    import onnxruntime as onnxruntime  # before the limit, under which no file is opened

    received = BytesIO(sys.stdin.buffer.read())
    x, content = np.load(received, allow_pickle=False), received.read()
    _limit(memory)
    try:
        said = _answer(content, x, classes)
    except Exception as error:  # whatever a stranger's file does, it is told in one line
        said = {"error": " ".join(f"{error}".split())[:300] or type(error).__name__}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
