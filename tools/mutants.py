"""Put each fault of tests/mutants.toml into a copy of the package and see the tests fail that it names.

    python tools/mutants.py [name ...]

Ends with 1 when fewer than 95 % are noticed, when a fault's `old` text is not where the list says, or when a named
test fails without any fault. A test that hangs has noticed. Every core works in a folder of its own.
"""

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests/mutants.toml"
WANTED = 0.95
LIMIT = 150  # seconds for the tests of one fault
CORES = os.cpu_count() or 1

Mutant = dict[str, Any]


def copy_tree(target: Path) -> Path:
    """Copy what the tests need to a folder; return it."""
    for name in ("fedlab_kit", "tests", "data"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "cache"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def misplaced(mutant: Mutant) -> str:
    """Say what is wrong with where a fault goes, or return ""."""
    wanted, found = mutant.get("count", 1), (ROOT / "fedlab_kit" / mutant["file"]).read_text().count(mutant["old"])
    return "" if found == wanted else f"its old text occurs {found} times in {mutant['file']}, not {wanted}"


@contextmanager
def put_in(mutant: Mutant, folder: Path) -> Iterator[None]:
    """Change the copy for as long as the block lasts."""
    path = folder / "fedlab_kit" / mutant["file"]
    sound = path.read_text()
    _write(path, sound.replace(mutant["old"], mutant["new"]))
    try:
        yield
    finally:
        _write(path, sound)


def _write(path: Path, text: str) -> None:
    """Write a module, without what was compiled of it: of the same length and second, it would be taken for new."""
    path.write_text(text)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def passes(folder: Path, tests: list[str], limit: float | None = LIMIT) -> tuple[bool, str]:
    """Run tests in a copy; say whether all pass, and what they print. A hang counts as a failure."""
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # half of the time went into plugins that no named test needs
    environment = {**os.environ, **alone, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:
        try:
            said = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False, f"it takes longer than {limit:g} s"
    return process.returncode == 0, said


def judge(mutant: Mutant, folders: "queue.Queue[Path]") -> bool:
    """Try one fault, print its line, and say whether it was noticed."""
    folder, began = folders.get(), monotonic()
    try:
        with put_in(mutant, folder):
            survived, _ = passes(folder, mutant["tests"])
    finally:
        folders.put(folder)
    print(f"{'SURVIVED' if survived else 'killed  '} {monotonic() - began:5.0f} s  {mutant['name']}", flush=True)
    return not survived


def main(names: list[str]) -> int:
    """Check the list, the tests without a fault, and then every fault; return the exit status."""
    began, listed = monotonic(), tomllib.loads(LIST.read_text())["mutant"]
    if unknown := set(names) - {mutant["name"] for mutant in listed}:
        print(f"names must be in {LIST.name}, got {', '.join(sorted(unknown))}")
        return 1
    chosen = [m for m in listed if "equivalent" not in m and (not names or m["name"] in names)]
    wrong = [f"{mutant['name']}: {why}" for mutant in chosen if (why := misplaced(mutant))]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(CORES) as workers:
        folders: queue.Queue[Path] = queue.Queue()
        for number in range(CORES):
            folders.put(copy_tree(Path(temporary, str(number))))
        tests = sorted({test for mutant in chosen for test in mutant["tests"]})
        parts = [part for number in range(CORES) if (part := tests[number::CORES])]
        for passed, said in workers.map(lambda part: passes(folders.queue[0], part, None), parts):
            wrong += [] if passed else [f"without a fault these tests fail:\n{said}"]
        if wrong:
            print(*wrong, sep="\n")
            return 1
        print(f"{len(tests)} named tests pass without a fault ({monotonic() - began:.0f} s)", flush=True)
        killed = list(workers.map(lambda mutant: judge(mutant, folders), chosen))
    return report(chosen, killed, [m for m in listed if "equivalent" in m and not names], monotonic() - began)


def report(chosen: list[Mutant], killed: list[bool], equivalent: list[Mutant], seconds: float) -> int:
    """Print who survived and the score; return the exit status."""
    outcomes = list(zip(chosen, killed, strict=True))
    blind = [dead for mutant, dead in outcomes if mutant.get("blind")]
    score = sum(killed) / max(1, len(killed))
    lines = [f"survived: {mutant['name']} ({mutant['file']}): {mutant['why']}" for mutant, dead in outcomes if not dead]
    lines += [f"equivalent: {mutant['name']}: {mutant['equivalent']}" for mutant in equivalent]
    for line in lines:
        print(line)
    print(f"{sum(killed)} of {len(killed)} faults noticed, {score:.1%}; wanted are {WANTED:.0%}")
    print(f"{sum(blind)} of the {len(blind)} that were written blind; {seconds / 60:.1f} minutes")
    return 0 if score >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
