"""The bench as a learner meets it: a real JupyterLab, a keyboard, a mouse and a screen reader's view."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, expect

from .benches import BenchPage, bench_page

CELL = """import fedlab_kit as fk
from fedlab_kit.lab.exercises import COURSE

bench = fk.Bench(COURSE, controls=["model", "alpha", "lr"])
bench"""


@pytest.fixture(scope="module")
def page(chromium, lab, tmp_path_factory) -> Iterator[BenchPage]:
    with bench_page(chromium, lab, tmp_path_factory.mktemp("train"), CELL) as page:
        yield page


@pytest.fixture
def bench(page) -> Iterator[BenchPage]:
    page.fresh()
    yield page
    page.quiet()
    assert page.errors == []


def settled(field: Locator) -> str:
    """The field's value once the last message of a drag has come through the kernel."""
    seen = [""]
    while len(seen) < 6 or len(set(seen[-5:])) > 1:
        seen.append(field.input_value())
        field.page.wait_for_timeout(200)
    return seen[-1]


def test_change_a_slider_run_and_see_the_curve_grow(bench):
    alpha = bench.output.get_by_role("spinbutton", name="Alpha")
    thumb = bench.output.locator(".fedlab-slider .noUi-handle").first
    before = float(thumb.get_attribute("aria-valuenow"))
    alpha.press("ArrowUp")
    alpha.press("ArrowUp")
    expect(alpha).to_have_value("0.7")
    bench.page.wait_for_function(
        "([e, v]) => e.getAttribute('aria-valuenow') > v", arg=[thumb.element_handle(), before]
    )
    picture = bench.curve
    expect(picture).to_have_accessible_name("Accuracy per round: no round yet.")
    bench.press("Run")
    expect(picture).to_have_accessible_name(re.compile(r"after round \d of 20"), timeout=10_000)
    expect(picture).to_have_accessible_name(re.compile(r"after round 20 of 20"), timeout=60_000)
    expect(bench.train_status).to_have_text(re.compile(r"^Finished: .* after 20 rounds in"))


def test_stop_within_a_second_and_a_second_run_behind_the_first(bench):
    bench.output.get_by_role("combobox", name="Model").select_option("mlp")
    bench.press("Show training")
    bench.type_into("Rounds", "100000")
    bench.press("Run")
    expect(bench.train_status).to_have_text(re.compile(r"Training: round \d+ of 100000, accuracy"), timeout=20_000)
    expect(bench.output.get_by_role("button", name="Run", exact=True)).to_be_disabled()
    bench.press("Stop")
    expect(bench.train_status).to_have_text(re.compile(r"^Stopped after round \d+"), timeout=1000)
    bench.type_into("Rounds", "2")
    bench.press("Run")
    behind = re.compile("round 2 of 2 .*; 1 earlier run behind it")
    expect(bench.curve).to_have_accessible_name(behind, timeout=20_000)


def test_a_wrong_value_is_answered_beside_its_control(bench):
    bench.type_into("Learning rate", "-3")
    alert = bench.output.get_by_role("alert")
    expect(alert).to_have_text("lr must be above 0 and at most 10, got -3.0")
    field, words = bench.output.get_by_role("spinbutton", name="Learning rate").bounding_box(), alert.bounding_box()
    assert 0 <= words["y"] - (field["y"] + field["height"]) < 20
    bench.press("Run")
    expect(bench.train_status).to_have_text(re.compile("Not started: lr must be above 0"))
    bench.type_into("Learning rate", "0.3")
    expect(alert).to_have_count(0)
    expect(bench.train_status).to_have_text("Ready: press Run.")


def test_the_mouse_drags_a_slider_and_a_typed_value_stays(bench):
    rate = bench.output.get_by_role("spinbutton", name="Learning rate")
    thumb = bench.output.locator(".fedlab-slider .noUi-touch-area").nth(1)
    box = thumb.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    bench.page.mouse.move(x, y)
    bench.page.mouse.down()
    bench.page.mouse.move(x - 25, y, steps=5)
    bench.page.mouse.up()
    assert 0.001 < float(settled(rate)) < 0.045
    bench.type_into("Learning rate", "0.137")
    bench.page.wait_for_timeout(500)
    expect(rate).to_have_value("0.137")


def test_an_answer_from_the_store_offers_a_new_seed(bench):
    bench.press("Show training")
    bench.type_into("Rounds", "1")
    bench.press("Run")
    expect(bench.train_status).to_have_text(re.compile("^Finished"), timeout=20_000)
    bench.press("Run")
    expect(bench.train_status).to_have_text(
        re.compile(r"Answered from the store, measured \d{4}-.* New seed"), timeout=20_000
    )
    bench.press("New seed")
    expect(bench.output.get_by_role("spinbutton", name="Seed")).to_have_value("8")


def test_a_value_typed_just_before_a_press_counts(bench):
    """The first message of a field and a later one of a button reach the kernel in two threads."""
    bench.press("Show training")
    bench.type_into("Rounds", "1")
    bench.press("Run")
    expect(bench.train_status).to_have_text(re.compile("^Finished"), timeout=20_000)
    bench.type_into("Learning rate", "0.2")
    bench.press("Run")
    expect(bench.curve).to_have_accessible_name(re.compile("round 1 of 1 .*; 1 earlier run behind it"), timeout=20_000)
    expect(bench.output.get_by_text("Changed since")).to_have_count(0)


def test_the_keyboard_reaches_every_control_and_the_accessibility_tree_names_it(bench):
    bench.output.get_by_role("combobox", name="Model").focus()
    reached = []
    for _ in range(8):
        reached.append(bench.page.evaluate("document.activeElement.innerText || document.activeElement.type"))
        bench.page.keyboard.press("Tab")
    assert [text.replace("\xa0", " ").split("\n")[-1] for text in reached] == [
        "resnet", "number", "number", "What these settings mean", "Run", "New seed", "Time of the whole run",
        "Show data and clients",
    ]  # fmt: skip
    bench.press("Show data and clients")
    bench.press("Show training")
    expect(bench.output.get_by_role("spinbutton", name="Seed")).to_be_visible()
    expect(bench.output.get_by_role("spinbutton", name="Drop-out")).to_be_visible()
    assert bench.unnamed() == []
