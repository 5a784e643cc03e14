"""The bench under a hand: points that are clicked, sliders that are dragged, keys alone, and what axe finds."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

import fedlab_kit as fk
from fedlab_kit.lab.bundle import export
from fedlab_kit.lab.history import Mark, Point

from .benches import OUTPUT, BenchPage, bench_page

CELL = """import fedlab_kit as fk

bench = fk.Bench(fk.Experiment(model="mlp", rounds=3), controls=["model", "prune_ratio", "dtype"])
bench"""


@pytest.fixture(scope="module")
def page(chromium, lab, tmp_path_factory) -> Iterator[BenchPage]:
    with bench_page(chromium, lab, tmp_path_factory.mktemp("touch"), CELL) as page:
        yield page


@pytest.fixture
def bench(page) -> Iterator[BenchPage]:
    """A bench with a run and two points."""
    page.fresh(keep_runs=True)
    page.press("Run")
    expect(page.train_status).to_have_text(re.compile("^Finished"), timeout=60_000)
    page.choose("Dtype", "int8")
    expect(page.scatter).to_have_accessible_name(re.compile(": 2 points, "), timeout=30_000)
    yield page
    page.quiet()
    assert page.errors == []


def current(bench: BenchPage) -> str:
    return bench.output.locator(".fedlab-current th").inner_text()


def test_a_click_on_a_point_sets_the_knobs_and_finds_its_row_and_the_list_rings_it(bench):
    assert "int8" in current(bench)
    bench.scatter.get_by_role("button", name=re.compile("fp32")).first.click()
    expect(bench.output.get_by_role("combobox", name="Dtype", exact=True)).to_have_value("fp32")
    expect(bench.output.locator(".fedlab-current th")).to_have_text(re.compile("^1: "))
    labels = bench.output.get_by_role("combobox", name="Point", exact=True).locator("option").all_inner_texts()
    bench.choose("Point", next(label for label in labels if "int8" in label))
    expect(bench.output.get_by_role("combobox", name="Dtype", exact=True)).to_have_value("int8")
    expect(bench.scatter.locator('[aria-pressed="true"]')).to_have_attribute("aria-label", re.compile("int8"))


def test_a_point_is_chosen_by_keys_alone(bench):
    bench.scatter.get_by_role("button", name=re.compile("fp32")).first.focus()
    bench.page.keyboard.press("Enter")
    expect(bench.output.get_by_role("combobox", name="Dtype", exact=True)).to_have_value("fp32")


def test_a_slow_drag_leaves_one_point(bench):
    box = bench.output.locator(".fedlab-slider .noUi-touch-area").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    bench.page.mouse.move(x, y)
    bench.page.mouse.down()
    for step in range(8):
        bench.page.mouse.move(x + 10 * step, y)
        bench.page.wait_for_timeout(250)
    bench.page.mouse.up()
    expect(bench.compress_status).to_have_text(re.compile(r"^3: .* measured now"), timeout=10_000)
    bench.page.wait_for_timeout(1000)
    expect(bench.scatter).to_have_accessible_name(re.compile(": 3 points, "))


@pytest.mark.parametrize("text", ["2.5", "1e9", "0,2"])
def test_what_is_typed_is_refused_beside_its_field_and_stays_as_it_was_typed(bench, text):
    bench.press("Show training")
    bench.type_into("Rounds", text)
    expect(bench.output.get_by_role("alert")).to_have_text(
        re.compile(f"^rounds must be a whole number, .*got '{text}'")
    )
    expect(bench.output.get_by_role("textbox", name="Rounds", exact=True)).to_have_value(text)


def test_axe_finds_nothing_on_the_bench_in_either_theme(bench):
    for group in (
        "training",
        "all runs, and compare two",
        "which points are shown",
        "what one knob does",
        "a state to share",
    ):
        bench.press(f"Show {group}")
    for theme in ("Light", "Dark"):
        bench.theme(theme)
        bench.page.wait_for_timeout(400)
        found = Axe().run(bench.page, context=OUTPUT)
        assert found.violations_count == 0, found.generate_report()
    bench.theme("Light")


def test_axe_finds_nothing_on_the_report_which_fits_a_phone_in_the_dark(chromium: Browser, tmp_path):
    run = fk.train(fk.Experiment(model="mlp", rounds=3))
    made = [(recipe, fk.compress(run, recipe)) for recipe in (fk.Recipe(), fk.Recipe(prune_ratio=0.8, dtype="int8"))]
    rows = [Point(n, run, r, a.path, a.card, False).row(Mark()) for n, (r, a) in enumerate(made, start=1)]
    folder = export(tmp_path / "mine", made[1][1], run, rows)
    for width, scheme in ((1000, "light"), (390, "dark")):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, wrong = context.new_page(), list[str]()
        page.on("console", lambda message, wrong=wrong: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.goto(f"file://{folder}/report.html")
        expect(page.get_by_role("heading", level=1)).to_have_text(
            re.compile("^mlp trained by 20 clients on mnist_5k, as")
        )
        expect(page.get_by_text(re.compile("times smaller .* points of accuracy (lost|won)"))).to_be_visible()
        expect(page.get_by_role("group", name=re.compile("^Accuracy against"))).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        page.screenshot(
            path=Path(os.environ.get("FEDLAB_SCREENSHOTS", tmp_path)) / f"report-{scheme}.png", full_page=True
        )
        context.close()
        assert wrong == []
