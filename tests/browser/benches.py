"""One page and one kernel for all tests of a module; each test gets a fresh bench by running the cell again."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Browser, Locator, expect

from .conftest import Lab, LabPage, tab

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CONTROLS = {"slider", "spinbutton", "combobox", "button", "textbox", "checkbox", "radio", "image", "img"}
OUTPUT = ".jp-OutputArea-output"


class BenchPage(LabPage):
    """A notebook of one cell that shows a bench."""

    def show(self, name: str, cell: str) -> None:
        """Write the notebook and open it."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=KERNEL)
        nbformat.write(notebook, self.lab.notebooks / name)
        self.open(name)

    @property
    def output(self) -> Locator:
        """The output area with the bench in it."""
        return self.page.locator(OUTPUT)

    def fresh(self, keep_runs: bool = False) -> Locator:
        """Run the cell again on an empty store, or on one that holds runs without points; returns its output."""
        for folder in self.lab.runs.glob("*/artifacts" if keep_runs else "*"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.lab.runs / "marks.json").unlink(missing_ok=True)
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.run_all()
        self.button("Run").wait_for()
        return self.output

    def button(self, name: str) -> Locator:
        return self.output.get_by_role("button", name=name, exact=True)

    def press(self, name: str) -> None:
        self.button(name).press("Enter")

    def type_into(self, name: str, value: str) -> None:
        field = self.output.get_by_role("textbox", name=name, exact=True)
        field.fill(value)
        field.press("Enter")

    def choose(self, name: str, value: str) -> None:
        self.output.get_by_role("combobox", name=name, exact=True).select_option(value)

    @property
    def train_status(self) -> Locator:
        return self.output.locator(".fedlab-status").first

    @property
    def compress_status(self) -> Locator:
        return self.output.locator(".fedlab-status").last

    @property
    def curve(self) -> Locator:
        return self.output.get_by_role("group", name=re.compile("^Accuracy per round"))

    @property
    def scatter(self) -> Locator:
        return self.output.get_by_role("group", name=re.compile("^Accuracy against"))

    def quiet(self) -> None:
        """Leave nothing under way behind."""
        if self.button("Stop").is_enabled():
            self.press("Stop")
        expect(self.button("Stop")).to_be_disabled(timeout=20_000)

    def unnamed(self) -> list[str]:
        """The roles of the controls that a screen reader could not name; fails when it sees hardly any control."""
        session = self.page.context.new_cdp_session(self.page)
        root = session.send("Runtime.evaluate", {"expression": f"document.querySelector('{OUTPUT}')"})
        found = session.send("Accessibility.queryAXTree", {"objectId": root["result"]["objectId"]})["nodes"]
        session.detach()
        controls = [node for node in found if not node["ignored"] and node["role"]["value"] in CONTROLS]
        assert len(controls) > 10
        return [node["role"]["value"] for node in controls if not node.get("name", {}).get("value")]

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme, "Light" or "Dark"."""
        self.page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")


@contextmanager
def bench_page(chromium: Browser, lab: Lab, folder: Path, cell: str) -> Iterator[BenchPage]:
    """A tab with the cell in a notebook of its own, not run yet."""
    with tab(chromium, lab, folder, BenchPage) as page:
        page.show(f"{folder.name}.ipynb", cell)
        yield page
    (lab.notebooks / f"{folder.name}.ipynb").unlink()
