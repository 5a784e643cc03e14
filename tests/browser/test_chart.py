"""The live chart under a pointer, keys and names that break things: on a page of its own, and in JupyterLab."""

import csv
import io
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from fedlab_kit.lab.chart import Chart, live_html
from fedlab_kit.lab.figures import accuracy_against, accuracy_curve
from fedlab_kit.lab.plot import Plot

from .benches import bench_page

HEAD = '<!doctype html><html lang="en"><head><title>Charts</title></head><body><main><h1>Charts</h1>'
NAMES = ["$$ $x$", "_", "<img src=x onerror=alert(1)>", "long " * 60, "😀", "two\nlines", "", "=1+1", 'a "b", c']
NAMES += ["\x00\x1f", "\ud800"]


def record(number: int, accuracy: float) -> SimpleNamespace:
    return SimpleNamespace(round=number, accuracy=accuracy, low=accuracy - 0.05, high=accuracy + 0.05, loss=1.5)


def point(number: int, size: float, accuracy: float, **more: object) -> dict[str, object]:
    return {
        "point": number,
        "bytes": size,
        "accuracy": accuracy,
        "low": accuracy - 0.02,
        "high": accuracy + 0.02,
        **more,
    }


def curve(rounds: int) -> Plot:
    records = [record(number, 0.9 - 0.8 / number) for number in range(1, rounds + 1)]
    return accuracy_curve(records, [("alpha 0.1", [record(number, 0.02 * number) for number in range(1, 21)])], 20)


POINTS = [
    point(1, 1e4, 0.80, dtype="int8", name="small", latency_ms=0.0118),
    point(2, 1e5, 0.90, dtype="fp32"),
    point(3, 3e5, 0.95, dtype="fp32", earlier=True),
]


class ChartPage:
    """A page with charts on it and no kernel."""

    def __init__(self, page: Page) -> None:
        self.page, self.errors = page, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.errors.append(request.url) if request.url.startswith("http") else None)
        page.on("dialog", lambda dialog: self.errors.append(dialog.message))

    def show(self, *plots: Plot) -> Locator:
        self.page.set_content(f"{HEAD}{live_html(*plots)}</main></body></html>")
        chart = self.page.locator(".fedlab-chart").first
        expect(chart.locator(".axes, text").first).to_be_attached()
        return chart

    def update(self, plot: Plot) -> None:
        sent = Chart()
        sent.show(plot)
        self.page.evaluate(
            "([plot, earlier]) => { const { model } = document.querySelector('[data-plot]');"
            "model.set('earlier', earlier); model.set('plot', plot) }",
            [sent.plot, sent.earlier],
        )

    @property
    def chosen(self) -> str:
        return self.page.evaluate("document.querySelector('[data-plot]').model.get('chosen')")


@pytest.fixture
def charts(chromium: Browser) -> Iterator[ChartPage]:
    context = chromium.new_context(viewport={"width": 800, "height": 700}, reduced_motion="reduce")
    page = ChartPage(context.new_page())
    yield page
    assert page.errors == []
    context.close()


def mark(chart: Locator, words: str) -> Locator:
    return chart.get_by_role("button", name=re.compile(words))


def tip(chart: Locator) -> Locator:
    return chart.locator(".fedlab-tip")


def press(chart: Locator, name: str) -> None:
    chart.get_by_role("button", name=name, exact=True).click()


def middle(node: Locator) -> tuple[float, float]:
    box = node.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


# ---- touching


def test_hovering_says_all_that_is_known_and_clicking_chooses(charts):
    chart = charts.show(accuracy_against(POINTS))
    expect(tip(chart)).to_be_hidden()
    mark(chart, "^small").hover()
    said = "small Point 1 Model file 10 kB Accuracy 80.0 % (95 % interval 78.0 % to 82.0 %) Dtype int8 " + (
        "Latency of one prediction 11.8 µs"
    )
    assert set(re.findall(r"\S+", tip(chart).inner_text())) == set(said.split())
    charts.page.mouse.down()
    charts.page.mouse.move(*(place + 2 for place in middle(mark(chart, "^small"))))
    charts.page.mouse.up()  # hands tremble
    assert charts.chosen == "1" and mark(chart, "^small").get_attribute("aria-pressed") == "true"
    expect(chart.get_by_role("status")).to_contain_text("Chosen: small")
    assert middle(chart.locator(".ring")) == pytest.approx(middle(mark(chart, "^small")), abs=1)
    charts.page.mouse.move(5, 5)
    expect(tip(chart)).to_be_hidden()


def test_the_kernel_can_choose_as_well(charts):
    chart = charts.show(accuracy_against(POINTS, current=0))
    assert mark(chart, "^small").get_attribute("aria-pressed") == "true"
    charts.page.evaluate("document.querySelector('[data-plot]').model.set('chosen', '3')")
    assert chart.locator(".mark[aria-pressed=true]").count() == 1
    assert mark(chart, "Point 3").get_attribute("aria-pressed") == "true"


def test_an_earlier_run_is_touched_near_its_line(charts):
    chart = charts.show(curve(3))
    box = chart.locator("[data-key='earlier/0']").bounding_box()
    charts.page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"] + 3)
    assert charts.chosen == "earlier/0"
    expect(tip(chart)).to_be_hidden()  # it says itself again only when the pointer moves
    charts.page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"] + 3)
    expect(tip(chart)).to_have_text("40.0 % alpha 0.1")


def test_the_keyboard_alone_is_enough(charts):
    chart = charts.show(accuracy_against(POINTS))
    for _ in range(7):  # six tools, then the marks, of which one can be reached
        charts.page.keyboard.press("Tab")
    expect(mark(chart, "^small")).to_be_focused()
    expect(tip(chart)).to_contain_text("78.0 % to 82.0 %")
    for key, number in (
        ("ArrowRight", 2),
        ("ArrowDown", 3),
        ("ArrowRight", 3),
        ("Home", 1),
        ("End", 3),
        ("ArrowLeft", 2),
    ):
        charts.page.keyboard.press(key)
        expect(mark(chart, f"Point {number},")).to_be_focused()
    charts.page.keyboard.press("Enter")
    assert charts.chosen == "2"
    charts.page.keyboard.press("Escape")
    expect(tip(chart)).to_be_hidden()
    charts.page.keyboard.press("Tab")
    expect(chart.get_by_role("button", name="fp32", exact=True)).to_be_focused()
    charts.page.keyboard.press("Space")
    expect(mark(chart, "Point 2,")).to_be_hidden()


def test_the_legend_switches_kinds_on_and_off(charts):
    chart = charts.show(accuracy_against(POINTS))
    entries = chart.get_by_role("group", name="Shown").get_by_role("button")
    assert entries.all_inner_texts() == ["fp32", "int8", "Pareto front", "measured earlier"]
    shown = lambda: [m.get_attribute("aria-label").split(",")[0] for m in chart.locator(".mark:visible").all()]  # noqa: E731
    assert sorted(shown()) == ["fp32", "fp32", "small"]
    press(chart, "measured earlier")
    assert sorted(shown()) == ["fp32", "small"]
    press(chart, "fp32")
    assert (
        shown() == ["small"]
        and chart.get_by_role("button", name="fp32", exact=True).get_attribute("aria-pressed") == "false"
    )
    press(chart, "fp32")
    press(chart, "measured earlier")
    press(chart, "Pareto front")
    assert len(shown()) == 3 and chart.locator("[data-key=front]").count() == 0


# ---- zoom


def test_buttons_wheel_and_drag_zoom_and_pan_and_a_double_click_resets(charts):
    chart, mouse = charts.show(accuracy_against(POINTS)), charts.page.mouse
    start = middle(mark(chart, "^small"))
    far = middle(mark(chart, "Point 2,"))
    press(chart, "Zoom in")
    near = middle(mark(chart, "Point 2,"))
    assert near[1] != far[1] and middle(mark(chart, "^small")) != start
    press(chart, "Reset zoom")
    assert middle(mark(chart, "^small")) == pytest.approx(start)
    mouse.move(*far)
    mouse.wheel(0, -200)  # the chart is in use: its button has the focus
    expect(chart.get_by_role("status")).to_have_text("Zoomed in")
    assert middle(mark(chart, "Point 2,")) == pytest.approx(far, abs=1.5), "the wheel keeps what is under the pointer"
    charts.page.mouse.dblclick(*(far[0] + 60, far[1] + 90))
    assert middle(mark(chart, "^small")) == pytest.approx(start)
    mouse.move(far[0] + 60, far[1] + 90)
    mouse.down()
    mouse.move(far[0] + 90, far[1] + 70, steps=3)
    mouse.up()
    assert middle(mark(chart, "^small")) == pytest.approx((start[0] + 30, start[1] - 20), abs=1)
    assert charts.chosen == "", "a drag chooses nothing"


def test_the_wheel_scrolls_the_page_until_the_chart_is_in_use(charts):
    chart = charts.show(*[accuracy_against(POINTS)] * 4)
    charts.page.mouse.move(*middle(chart.locator(".fedlab-svg")))
    charts.page.mouse.wheel(0, 200)
    charts.page.wait_for_function("scrollY > 100")
    assert chart.get_by_role("status").inner_text() == ""


# ---- a run under way


def test_a_round_that_ends_moves_one_dot_in_and_leaves_the_others_alone(charts):
    chart = charts.show(curve(3))
    charts.page.evaluate("document.querySelectorAll('.mark').forEach(node => node.kept = true)")
    press(chart, "Zoom in")
    zoomed = middle(mark(chart, "Round 2,"))
    charts.update(curve(4))
    expect(chart.locator(".mark")).to_have_count(4)
    assert charts.page.evaluate("[...document.querySelectorAll('.mark')].filter(node => node.kept).length") == 3
    assert middle(mark(chart, "Round 2,")) == pytest.approx(zoomed), "who has zoomed in stays there"
    charts.update(curve(2))
    expect(chart.locator(".mark")).to_have_count(2)


def test_the_chart_grows_with_its_points_unless_someone_has_zoomed_in(charts):
    chart = charts.show(accuracy_against(POINTS))
    before = middle(mark(chart, "Point 3,"))
    charts.update(accuracy_against([*POINTS, point(4, 1e9, 0.99)]))
    last, frame = middle(mark(chart, "Point 4,")), chart.locator(".frame").bounding_box()
    assert frame["x"] < last[0] < frame["x"] + frame["width"] and frame["y"] < last[1] < frame["y"] + frame["height"]
    assert middle(mark(chart, "Point 3,"))[0] < before[0] - 100


COUNT_MOVES = """window.moves = 0; const own = Element.prototype.animate;
Element.prototype.animate = function (...how) { window.moves++; return own.apply(this, how) }; 0"""


@pytest.mark.parametrize(("motion", "moves"), [("reduce", 0), ("no-preference", 1)])
def test_a_dot_glides_only_for_those_who_like_motion(chromium, motion, moves):
    context = chromium.new_context(reduced_motion=motion)
    charts = ChartPage(context.new_page())
    charts.show(curve(3))
    charts.page.evaluate(COUNT_MOVES)
    charts.update(curve(4))
    assert charts.page.evaluate("window.moves") == moves and charts.errors == []
    context.close()


def test_among_many_points_only_the_new_one_glides(chromium):
    context = chromium.new_context(reduced_motion="no-preference")
    charts, many = ChartPage(context.new_page()), [point(i, 1e4 + i, 0.5, dtype="int8") for i in range(400)]
    charts.show(accuracy_against(many))
    charts.page.evaluate(COUNT_MOVES)
    charts.update(accuracy_against([*many, point(400, 1e7, 0.9, dtype="int8")]))
    assert charts.page.evaluate("window.moves") == 1 and charts.errors == []
    context.close()


# ---- names and many points


def test_no_name_breaks_the_chart_or_becomes_markup(charts):
    points = [point(i, 1e4 * (i + 1), 0.5 + 0.05 * i, dtype=name, name=name) for i, name in enumerate(NAMES)]
    chart = charts.show(accuracy_against(points))
    assert chart.locator(".mark").count() == len(NAMES) and chart.locator("img").count() == 0
    for node in chart.locator(".mark").all():
        node.hover(force=True)
        expect(tip(chart)).to_be_visible()
    assert chart.get_by_role("group", name="Shown").get_by_role("button").count() == len(NAMES) + 1
    assert charts.page.evaluate("document.documentElement.scrollWidth") <= 800
    assert Image.open(io.BytesIO(saved(charts, chart, "Save as PNG")[1])).width > 1400
    labels = [text for text in chart.locator(".names text").all_inner_texts() if text]
    assert all(len(text) <= 30 for text in labels)


def test_five_thousand_points_can_be_touched(charts):
    many = [point(i, 1e3 * 1.001**i, (i * 37 % 1000) / 1000, dtype="int8", earlier=i < 4990) for i in range(5000)]
    chart = charts.show(accuracy_against(many))
    assert chart.locator(".mark").count() == 5000
    last = mark(chart, "Point 4999,")
    last.hover(force=True)
    expect(tip(chart)).to_contain_text("4999")


# ---- saving


def saved(charts: ChartPage, chart: Locator, name: str) -> tuple[str, bytes]:
    with charts.page.expect_download() as download:
        press(chart, name)
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_the_data_come_out_as_they_are(charts):
    points = [*POINTS, point(4, 2e5, 0.7, dtype="int8", name='=1+1,"x"')]
    name, content = saved(charts, charts.show(accuracy_against(points)), "Save data as CSV")
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert name == "accuracy-against-model-file.csv"
    assert [float(row["Accuracy on validation (%)"]) for row in rows] == pytest.approx([95, 80, 90, 70])
    assert [row["name"] for row in rows] == ["", "small", "", '\'=1+1,"x"']
    assert rows[1]["Latency of one prediction"] == "11.8 µs" and rows[1]["kind"] == "int8"
    rows = list(csv.DictReader(io.StringIO(saved(charts, charts.show(curve(3)), "Save data as CSV")[1].decode())))
    assert [row["kind"] for row in rows] == ["this run"] * 3 + ["alpha 0.1"] * 20
    assert float(rows[-1]["Accuracy on validation (%)"]) == pytest.approx(40)


def test_the_pictures_come_out_with_their_legend(charts):
    chart = charts.show(accuracy_against(POINTS))
    press(chart, "int8")
    name, content = saved(charts, chart, "Save as SVG")
    text = content.decode()
    assert name.endswith(".svg") and "var(--jp" not in text
    charts.page.set_content(text)
    written = charts.page.locator("text").all_text_contents()
    assert {"fp32", "Pareto front", "measured earlier", "Model file", "100 kB"} <= set(
        written
    ) and "int8" not in written
    chart = charts.show(accuracy_against(POINTS))
    picture = Image.open(io.BytesIO(saved(charts, chart, "Save as PNG")[1])).convert("RGB")
    assert picture.width > 1400 and picture.getpixel((2, 2)) == (255, 255, 255)
    assert {(0, 114, 178), (213, 94, 0)} <= {colour for _, colour in picture.getcolors(1_000_000)}


# ---- for everyone


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 800, 1400])
def test_no_rule_of_accessibility_is_broken_at_any_width(chromium, scheme, width, tmp_path):
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    charts = ChartPage(context.new_page())
    chart = charts.show(curve(3), accuracy_against(POINTS, current=1), accuracy_against([]))
    charts.page.add_style_tag(content=":root { color-scheme: light dark }")
    mark(chart, "Round 2,").hover()
    expect(tip(chart)).to_be_visible()
    found = Axe().run(charts.page)
    assert found.violations_count == 0, found.generate_report()
    assert charts.page.evaluate("document.documentElement.scrollWidth") <= width and charts.errors == []
    assert chart.get_by_role("group", name=re.compile("Accuracy per round: .* after round 3")).count() == 1
    context.close()


def test_print_keeps_the_pictures(charts):
    chart = charts.show(curve(3))
    expect(chart).to_be_visible()
    charts.page.emulate_media(media="print")
    expect(chart).to_be_hidden()
    expect(charts.page.locator("[data-plot] > img")).to_be_visible()


CELL = """import ipywidgets as widgets
from types import SimpleNamespace
from fedlab_kit.lab.chart import Chart
from fedlab_kit.lab.figures import accuracy_against
def point(i, bytes):
    return {"point": i, "bytes": bytes, "accuracy": 0.5, "low": 0.4, "high": 0.6, "name": f"p{i}"}
points = [point(1, 1e4), point(2, 3e4), point(3, 9e4)]
chart, said = Chart(), widgets.Label("nothing")
chart.show(accuracy_against(points))
chart.observe(lambda change: setattr(said, "value", f"chose {change.new}"), "chosen")
more = widgets.Button(description="More")
def add(button):
    points.append(point(4, 2e5))
    chart.show(accuracy_against(points, current=3))
more.on_click(add)
widgets.VBox([chart.box, said, more])"""


def test_in_jupyterlab_the_chart_takes_the_place_of_its_picture_and_speaks_with_the_kernel(chromium, lab, tmp_path):
    with bench_page(chromium, lab, tmp_path, CELL) as page:
        page.run_all()
        chart = page.output.locator(".fedlab-chart")
        expect(chart).to_be_visible()
        expect(page.output.locator("img")).to_have_count(0)
        mark(chart, "^p2").click()
        expect(page.output.get_by_text("chose 2")).to_be_visible()
        page.press("More")
        expect(page.output.get_by_text("chose 4")).to_be_visible()
        assert mark(chart, "^p4").get_attribute("aria-pressed") == "true"
        mark(chart, "^p4").press("ArrowLeft")
        expect(mark(chart, "^p3")).to_be_focused()
        for theme in ("Dark", "Light"):
            page.theme(theme)
            page.page.wait_for_timeout(500)
            page.screenshot(f"chart-{theme.lower()}")
        assert page.errors == []
