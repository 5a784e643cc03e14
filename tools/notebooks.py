"""Run notebooks and write their outputs back: python tools/notebooks.py notebooks/00_start_here.ipynb ...

Each starts from an empty run store. What changes from run to run or from machine to machine (widget state,
times, the version of Python) stays out of the file, so that running twice changes nothing.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def run(path: Path) -> None:
    """Execute the notebook in its own folder; its file changes only if every cell succeeds."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as store:
        os.environ["FEDLAB_RUNS"] = store
        NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        kept = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        cell.metadata = nbformat.from_dict(kept)
    fresh = path.with_suffix(".tmp")
    nbformat.write(notebook, fresh)
    os.replace(fresh, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"running {name}", flush=True)
        run(Path(name))
