"""Compressing on the bench in a real JupyterLab: a knob moves, a file is made and measured, a point appears."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from .benches import BenchPage, bench_page

CELL = """import fedlab_kit as fk
from fedlab_kit.lab.exercises import COURSE

bench = fk.Bench(COURSE.replace(model="half_mlp", teacher=COURSE))
bench"""


@pytest.fixture(scope="module")
def page(chromium, lab, tmp_path_factory) -> Iterator[BenchPage]:
    with bench_page(chromium, lab, tmp_path_factory.mktemp("compress"), CELL) as page:
        yield page


@pytest.fixture
def bench(page) -> Iterator[BenchPage]:
    """A bench whose run, answered from the store for all but the first, has been measured."""
    page.fresh(keep_runs=True)
    expect(page.compress_status).to_have_text(re.compile("^Press Run first"), timeout=30_000)
    page.press("Run")
    expect(page.train_status).to_have_text(re.compile("^Finished"), timeout=60_000)
    expect(page.scatter).to_have_accessible_name(re.compile(": 1 point, "), timeout=20_000)
    yield page
    page.quiet()
    assert page.errors == []


def newest(bench: BenchPage) -> str:
    return bench.output.locator(".fedlab-points tbody tr").first.inner_text()


def test_before_a_run_the_knobs_say_what_is_missing(page):
    page.fresh(keep_runs=True)
    expect(page.scatter).to_have_accessible_name(re.compile("no point yet"))
    page.type_into("Prune ratio", "0.5")
    expect(page.compress_status).to_have_text(re.compile("^Press Run first"), timeout=30_000)


def test_a_knob_that_moves_brings_a_point(bench):
    assert "fp32" in newest(bench)
    bench.output.get_by_role("spinbutton", name="Prune ratio").press("ArrowUp")
    expect(bench.scatter).to_have_accessible_name(re.compile(r": 2 points, .* the current one has "))
    expect(bench.compress_status).to_have_text(re.compile(r"^2: \w+, weight 0.05 fp32: "))
    bench.choose("Dtype", "int8")
    expect(bench.scatter).to_have_accessible_name(re.compile(": 3 points, "))
    assert "weight 0.05 int8 static" in newest(bench)


def test_what_cannot_be_made_is_said_beside_its_knob(bench):
    bench.press("Show compression of the trained model")
    bench.choose("Prune", "channel")
    bench.type_into("Prune ratio", "0.99")
    alert = bench.output.get_by_role("alert")
    expect(alert).to_have_text(re.compile(r"^prune_ratio 0\.99 would remove"))
    expect(bench.compress_status).to_have_text(re.compile(r"^Error: prune_ratio 0\.99"))
    field = bench.output.get_by_role("spinbutton", name="Prune ratio").bounding_box()
    assert 0 <= alert.bounding_box()["y"] - (field["y"] + field["height"]) < 20
    bench.type_into("Prune ratio", "1.5")
    expect(alert).to_have_text("prune_ratio must be at least 0 and below 1, got 1.5")
    bench.type_into("Prune ratio", "0.5")
    expect(alert).to_have_count(0)
    expect(bench.scatter).to_have_accessible_name(re.compile(": 2 points, "))


def test_a_train_knob_asks_for_run(bench):
    bench.type_into("Temperature", "8")
    expect(bench.output.get_by_text("temperature 8.0. Press Run.")).to_be_visible()


def test_the_axis_is_switched_and_a_point_is_named_hidden_and_brought_back(bench):
    bench.output.get_by_role("textbox", name="Name").fill("the start")
    bench.press("Pin")
    expect(bench.output.get_by_role("rowheader", name=re.compile("1: the start, "))).to_be_visible()
    bench.choose("Accuracy against", "Latency of one prediction")
    expect(bench.scatter).to_have_accessible_name(re.compile("^Accuracy against latency .* at .* (ms|µs)[.]$"))
    bench.press("Hide")
    expect(bench.scatter).to_have_accessible_name(re.compile("no point yet"))
    bench.press("Undo")
    expect(bench.scatter).to_have_accessible_name(re.compile(": 1 point, "))


def test_runs_are_compared_and_the_point_is_exported(bench):
    bench.type_into("Temperature", "1")
    bench.press("Run")
    bench.press("Show all runs, and compare two")
    for name, text in (("Run", "temperature 1.0"), ("compare with", "cnn:")):
        field = bench.output.get_by_role("combobox", name=name, exact=True)
        expect(field).to_contain_text("temperature 1.0", timeout=60_000)
        labels = [label for label in field.locator("option").all_inner_texts() if text in label.replace("\xa0", " ")]
        field.select_option(label=labels[-1])
    expect(bench.output.get_by_role("rowheader", name="Worst client")).to_be_visible()
    expect(bench.output.get_by_role("rowheader", name="Temperature", exact=True)).to_be_visible()
    bench.press("Export")
    expect(bench.compress_status).to_have_text(re.compile("^Exported to .*my-model: open report.html"), timeout=20_000)
    assert (bench.lab.notebooks / "my-model" / "report.html").exists()


def test_every_control_has_a_name(bench):
    for group in (
        "compression of the trained model", "the wire", "compression while training", "data and clients", "privacy",
        "what each client holds and gets", "all runs, and compare two",
    ):  # fmt: skip
        bench.press(f"Show {group}")
    expect(bench.output.get_by_role("combobox", name="Error feedback")).to_be_visible()
    expect(bench.output.get_by_role("img", name=re.compile("^Accuracy of each of 20 clients"))).to_be_visible()
    assert bench.unnamed() == []


def test_nothing_is_cut_off_in_either_theme_at_800_and_1400_pixels(bench):
    for ratio, dtype in [(0.5, "fp32"), (0.8, "fp32"), (0.8, "fp16"), (0.9, "int8"), (0.95, "int8"), (0.95, "int4")]:
        bench.choose("Dtype", dtype)
        bench.type_into("Prune ratio", str(ratio))
        expect(bench.compress_status).to_have_text(re.compile(rf"^\d+: \w+, weight {ratio} {dtype}"))
    bench.output.get_by_role("textbox", name="Name").fill("tiny")
    bench.press("Pin")
    expect(bench.output.get_by_role("rowheader", name=re.compile("tiny"))).to_be_visible()
    for theme in ("Light", "Dark"):
        bench.theme(theme)
        for width in (800, 1400):
            bench.page.set_viewport_size({"width": width, "height": {800: 1300, 1400: 900}[width]})
            bench.page.wait_for_timeout(400)
            bench.screenshot(f"compress-{theme.lower()}-{width}")
            assert bench.output.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    bench.theme("Light")
