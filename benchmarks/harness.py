"""What all benchmarks share: the result files, the printed tables, and fresh processes to measure in."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
os.environ.setdefault("FEDLAB_RUNS", str(Path(__file__).parent / "runs"))  # what was trained is not trained again


class DataMissing(Exception):
    """The benchmark needs real data that are not here."""


def mnist() -> Any:
    """Return the MNIST data set, or raise DataMissing with the remedy."""
    from fedlab_kit.data import load

    try:
        return load("mnist")
    except (OSError, ValueError) as error:
        raise DataMissing(f"It needs MNIST: set FEDLAB_DATA to a folder that holds mnist/. ({error})") from error


def stored(name: str) -> dict[str, Any] | None:
    """Return the result of an earlier run of this benchmark, if any."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def keep(name: str, benchmark: Callable[[], list[Row]], began: float) -> dict[str, Any]:
    """Run a benchmark and write its result with the machine and the versions."""
    rows = benchmark()
    result = {
        "rows": rows,
        "about": (benchmark.__doc__ or "").strip(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "versions": {package: version(package) for package in ("fedlab-kit", "torch", "onnxruntime")},
        "seconds": round(time.perf_counter() - began, 1),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(name: str, result: dict[str, Any], from_store: bool) -> str:
    """Return the rows as a Markdown table under a heading."""
    columns = list(dict.fromkeys(column for row in result["rows"] for column in row))
    cells = [columns, ["---"] * len(columns)]
    cells += [[str(row.get(column, "")) for column in columns] for row in result["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    origin = "stored result of" if from_store else "measured"
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    foot = f"{origin} {result['when']} in {result['seconds']} s on {result['machine']}; {versions}"
    return "\n".join(["", f"## {name}", "", result["about"], "", *lines, "", foot])


def report(names: Iterable[str]) -> None:
    """Write the tables of all stored results to one file."""
    results = ((name, stored(name)) for name in names)
    tables = [table(name, result, from_store=True) for name, result in results if result]
    (RESULTS / "report.md").write_text("\n".join(["# Figures", *tables]) + "\n")


def fresh(call: str, **arguments: Any) -> Any:
    """Call `module:function` with JSON arguments in a process of its own and return its JSON answer."""
    module, function = call.split(":")
    code = (
        f"import json, sys; from {module} import {function} as f; "
        "print(json.dumps(f(**json.loads(sys.argv[1]))), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{call} failed:\n{done.stderr}")
    return json.loads(done.stderr.strip().splitlines()[-1])


def parallel(jobs: Sequence[tuple[str, dict[str, Any]]], workers: int = 2) -> list[Any]:
    """Do `fresh` calls on both cores, for what is not timed; the answers come in the order of the jobs."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: fresh(job[0], **job[1]), jobs))


def peak_mb() -> float:
    """Return this process's peak memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
