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
from nbformat import NotebookNode

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def drop_what_changes(notebook: NotebookNode) -> None:
    """Keep tags and outputs only; a displayed widget keeps its text, since its random id means nothing later."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)


def run(path: Path) -> None:
    """Execute the notebook in its own folder; its file changes only if every cell succeeds."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as store:
        os.environ["FEDLAB_RUNS"] = store
        NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=600,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    drop_what_changes(notebook)
    fresh = path.with_suffix(".tmp")
    nbformat.write(notebook, fresh)
    os.replace(fresh, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"running {name}", flush=True)
        run(Path(name))
