"""Every notebook, run from an empty store, gives the outputs that were committed with it: strict nbval.

Strict means that text, HTML, warnings and errors must be equal; pictures are not compared, and neither are the figures
right behind the sign "≈", which come from training, nor a cell tagged nbval-ignore-output. `make notebooks` writes the
outputs anew.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZE = Path(__file__).with_name("sanitize.cfg")
BYTE_COUNT = re.compile(r"(\d[\d,]*)(?= (?:bytes|B|kB|KB|MB)\b)")


def compare(notebook: Path, runs: Path) -> subprocess.CompletedProcess[str]:
    """Run one notebook in its own folder and compare; a process of its own, without this suite's settings."""
    options = ["--nbval", "--nbval-cell-timeout=120", "-p", "nbval.plugin", "-p", "no:cacheprovider"]
    options += [f"--nbval-sanitize-with={SANITIZE}"]
    environment = os.environ | {
        "FEDLAB_RUNS": str(runs),
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", *options, notebook.name],
        cwd=notebook.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def change_one_byte_count(notebook: NotebookNode) -> NotebookNode:
    """The notebook up to the first compared cell that printed a size in bytes, with that size made one larger."""
    for index, cell in enumerate(notebook.cells):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            continue
        for output in cell.get("outputs", []):
            holder = output if output.output_type == "stream" else output.get("data", {})
            for key in ("text", "text/plain"):
                if changed := raise_by_one(holder.get(key, "")):
                    holder[key] = changed
                    return nbformat.v4.new_notebook(cells=notebook.cells[: index + 1], metadata=notebook.metadata)
    pytest.fail("no compared cell prints a size in bytes")


def raise_by_one(text: str) -> str | None:
    """The text with its first size in bytes made one larger; None where there is no size."""
    size = BYTE_COUNT.search(text)
    if size is None:
        return None
    return f"{text[: size.start()]}{int(size[0].replace(',', '')) + 1:,}{text[size.end() :]}"


@pytest.fixture
def small_notebook(tmp_path: Path) -> Path:
    """A notebook of two cells as `make notebooks` would leave it."""
    cells = [nbformat.v4.new_code_cell(source) for source in ("size = 2 * 21_840", "print(f'{size:,} bytes')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3").execute()
    path = tmp_path / "small.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_come_out_again(path, tmp_path, runs_folder):
    folder = shutil.copytree(path.parent, tmp_path / "notebooks")
    result = compare(folder / path.name, runs_folder)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_unchanged_notebook_passes(small_notebook, runs_folder):
    result = compare(small_notebook, runs_folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout


def test_one_changed_byte_count_fails(small_notebook, runs_folder):
    nbformat.write(change_one_byte_count(nbformat.read(small_notebook, as_version=4)), small_notebook)
    assert "43,681 bytes" in json.dumps(nbformat.read(small_notebook, as_version=4).cells[1].outputs)
    result = compare(small_notebook, runs_folder)
    assert result.returncode == 1
    assert "1 failed, 1 passed" in result.stdout


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("≈ 87.5 % right, 2 wrong", True),
        ("≈-1,234.5 % right, 2 wrong", True),
        ("≈ 88.8 % right, 3 wrong", False),
        ("88.8 % right, 2 wrong", False),
        ("≈ 88.8 % of 2 right, 2 wrong", False),
    ],
)
def test_the_one_figure_behind_the_sign_may_change_and_nothing_else(text, same, tmp_path, runs_folder):
    cell = nbformat.v4.new_code_cell("print('≈ 88.8 % right, 2 wrong')")
    notebook, path = nbformat.v4.new_notebook(cells=[cell]), tmp_path / "small.ipynb"
    NotebookClient(notebook, kernel_name="python3").execute()
    cell.outputs[0].text = f"{text}\n"
    nbformat.write(notebook, path)
    result = compare(path, runs_folder)
    assert (result.returncode == 0) == same, result.stdout + result.stderr


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem.startswith("01")], ids=lambda path: path.stem)
def test_one_changed_byte_count_fails_in_a_real_notebook(path, tmp_path, runs_folder):
    changed = change_one_byte_count(nbformat.read(path, as_version=4))
    nbformat.write(changed, tmp_path / path.name)
    result = compare(tmp_path / path.name, runs_folder)
    assert result.returncode == 1
    assert re.search(r"\b1 failed", result.stdout), result.stdout + result.stderr
