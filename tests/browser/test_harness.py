"""The harness itself, on notebooks that need nothing of fedlab_kit: a widget shows and listens to keys."""

import nbformat
import pytest
from playwright.sync_api import expect

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CELL = """import ipywidgets as widgets
ratio = widgets.FloatSlider(value=0.5, min=0, max=0.9, step=0.1, description="prune ratio")
answer = widgets.HTML("waiting")
ratio.observe(lambda change: setattr(answer, "value", f"kept {1 - change.new:.0%}"), "value")
widgets.VBox([ratio, answer])"""


@pytest.fixture
def notebook(lab):
    """A notebook beside the project's own: one number, one slider."""
    cells = [nbformat.v4.new_code_cell("6 * 7"), nbformat.v4.new_code_cell(CELL)]
    path = lab.notebooks / "harness.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    yield path.name
    path.unlink()


def test_a_slider_moves_from_the_keyboard(lab_page, notebook):
    lab_page.open(notebook)
    lab_page.run_all()
    expect(lab_page.page.locator(".jp-OutputArea-output").first).to_have_text("42")
    slider = lab_page.page.get_by_role("slider")
    slider.press("ArrowRight")
    expect(lab_page.page.get_by_text("kept 40%")).to_be_visible()
    assert slider.get_attribute("aria-valuenow") == "0.6"
    assert lab_page.screenshot("harness").stat().st_size > 10_000
    assert lab_page.errors == []


def test_a_failing_cell_is_noticed(lab_page, lab):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata=KERNEL)
    nbformat.write(broken, lab.notebooks / "broken.ipynb")
    lab_page.open("broken.ipynb")
    with pytest.raises(AssertionError, match="a cell failed"):
        lab_page.run_all()


def test_an_error_in_the_console_is_noticed(lab_page, notebook):
    lab_page.open(notebook)
    lab_page.page.evaluate("console.error('seen')")
    assert any("seen" in error for error in lab_page.errors)


def test_no_window_asks_anything_on_the_first_visit(lab_page, notebook):
    lab_page.open(notebook)
    lab_page.page.wait_for_timeout(1000)
    assert lab_page.page.get_by_role("dialog").count() == 0
    assert lab_page.page.locator(".Toastify__toast").all_inner_texts() == []
