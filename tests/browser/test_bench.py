"""The bench as a learner meets it: a real JupyterLab, a keyboard, a mouse and a screen reader's view."""

import re
from collections.abc import Iterator

import nbformat
import pytest
from playwright.sync_api import Locator, expect

CELL = """import fedlab_kit as fk

bench = fk.Bench(fk.Experiment(), controls=["model", "alpha", "lr"])
bench"""
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CONTROLS = {"slider", "spinbutton", "combobox", "button", "textbox", "checkbox", "radio", "image", "img"}


@pytest.fixture
def bench(lab, lab_page) -> Iterator[Locator]:
    """The output area with a fresh bench in it."""
    path = lab.notebooks / "bench.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=KERNEL), path)
    lab_page.open(path.name)
    lab_page.run_all()
    output = lab_page.page.locator(".jp-OutputArea-output")
    output.get_by_role("button", name="Run", exact=True).wait_for()
    yield output
    assert lab_page.errors == []
    path.unlink()


def press(bench: Locator, name: str) -> None:
    bench.get_by_role("button", name=name, exact=True).press("Enter")


def status(bench: Locator) -> Locator:
    return bench.get_by_role("status")


def type_into(bench: Locator, name: str, value: str) -> None:
    field = bench.get_by_role("spinbutton", name=name)
    field.fill(value)
    field.press("Enter")


def settled(field: Locator) -> str:
    """The field's value once the last message of a drag has come through the kernel."""
    seen = [""]
    while len(seen) < 6 or len(set(seen[-5:])) > 1:
        seen.append(field.input_value())
        field.page.wait_for_timeout(200)
    return seen[-1]


def test_change_a_slider_run_and_see_the_curve_grow(bench, lab_page):
    alpha = bench.get_by_role("spinbutton", name="Alpha")
    thumb = bench.locator(".fedlab-slider .noUi-handle").first
    before = float(thumb.get_attribute("aria-valuenow"))
    alpha.press("ArrowUp")
    alpha.press("ArrowUp")
    expect(alpha).to_have_value("0.7")
    lab_page.page.wait_for_function(
        "([e, v]) => e.getAttribute('aria-valuenow') > v", arg=[thumb.element_handle(), before]
    )
    picture = bench.get_by_role("img")
    expect(picture).to_have_accessible_name("Accuracy per round: no round yet.")
    press(bench, "Run")
    expect(picture).to_have_accessible_name(re.compile(r"after round \d of 20"), timeout=10_000)
    expect(picture).to_have_accessible_name(re.compile(r"after round 20 of 20"), timeout=60_000)
    expect(status(bench)).to_have_text(re.compile(r"^Finished: .* after 20 rounds in"))


def test_stop_within_a_second_and_a_second_run_behind_the_first(bench, lab_page):
    bench.get_by_role("combobox", name="Model").select_option("mlp")
    press(bench, "Show training")
    type_into(bench, "Rounds", "100000")
    press(bench, "Run")
    expect(status(bench)).to_have_text(re.compile(r"Training: round \d+ of 100000, accuracy"), timeout=20_000)
    expect(bench.get_by_role("button", name="Run", exact=True)).to_be_disabled()
    press(bench, "Stop")
    expect(status(bench)).to_have_text(re.compile(r"^Stopped after round \d+"), timeout=1000)
    type_into(bench, "Rounds", "2")
    press(bench, "Run")
    expect(bench.get_by_role("img")).to_have_accessible_name(re.compile("round 2 of 2 .*; 1 earlier run behind it"))


def test_a_wrong_value_is_answered_beside_its_control(bench):
    type_into(bench, "Learning rate", "-3")
    alert = bench.get_by_role("alert")
    expect(alert).to_have_text("lr must be above 0 and at most 10, got -3.0")
    field, words = bench.get_by_role("spinbutton", name="Learning rate").bounding_box(), alert.bounding_box()
    assert 0 <= words["y"] - (field["y"] + field["height"]) < 20
    press(bench, "Run")
    expect(status(bench)).to_have_text(re.compile("Not started: lr must be above 0"))
    type_into(bench, "Learning rate", "0.3")
    expect(alert).to_have_count(0)
    expect(status(bench)).to_have_text("Ready: press Run.")


def test_the_mouse_drags_a_slider_and_a_typed_value_stays(bench, lab_page):
    rate = bench.get_by_role("spinbutton", name="Learning rate")
    thumb = bench.locator(".fedlab-slider .noUi-touch-area").nth(1)
    box = thumb.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    lab_page.page.mouse.move(x, y)
    lab_page.page.mouse.down()
    lab_page.page.mouse.move(x - 25, y, steps=5)
    lab_page.page.mouse.up()
    assert 0.01 < float(settled(rate)) < 0.09
    type_into(bench, "Learning rate", "0.137")
    lab_page.page.wait_for_timeout(500)
    expect(rate).to_have_value("0.137")


def test_an_answer_from_the_store_offers_a_new_seed(bench):
    press(bench, "Show training")
    type_into(bench, "Rounds", "1")
    press(bench, "Run")
    expect(status(bench)).to_have_text(re.compile("^Finished"), timeout=20_000)
    press(bench, "Run")
    expect(status(bench)).to_have_text(
        re.compile(r"Answered from the store, measured \d{4}-.* New seed"), timeout=20_000
    )
    press(bench, "New seed")
    expect(bench.get_by_role("spinbutton", name="Seed")).to_have_value("8")


def test_the_keyboard_reaches_every_control_and_the_accessibility_tree_names_it(bench, lab_page):
    bench.get_by_role("combobox", name="Model").focus()
    reached = []
    for _ in range(7):
        reached.append(lab_page.page.evaluate("document.activeElement.innerText || document.activeElement.type"))
        lab_page.page.keyboard.press("Tab")
    assert [text.split("\n")[-1] for text in reached] == [
        "resnet", "number", "number", "What these settings mean", "Run", "New seed", "Show data and clients",
    ]  # fmt: skip
    press(bench, "Show data and clients")
    press(bench, "Show training")
    expect(bench.get_by_role("spinbutton", name="Seed")).to_be_visible()
    expect(bench.get_by_role("spinbutton", name="Drop-out")).to_be_visible()
    session = lab_page.page.context.new_cdp_session(lab_page.page)
    root = session.send("Runtime.evaluate", {"expression": "document.querySelector('.jp-OutputArea-output')"})
    found = session.send("Accessibility.queryAXTree", {"objectId": root["result"]["objectId"]})["nodes"]
    names = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in found
        if not node["ignored"] and node["role"]["value"] in CONTROLS
    ]
    assert len(names) > 20
    assert [role for role, name in names if not name] == []


def test_nothing_is_cut_off_in_either_theme_at_800_and_1400_pixels(bench, lab_page):
    page = lab_page.page
    press(bench, "Run")
    expect(status(bench)).to_have_text(re.compile("^Finished"), timeout=60_000)
    for theme in ("Light", "Dark"):
        page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
        for width in (800, 1400):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(500)
            lab_page.screenshot(f"bench-{theme.lower()}-{width}")
            assert bench.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
