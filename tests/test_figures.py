"""Figures are checked by what stands in them."""

import io
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from fedlab_kit import catalog
from fedlab_kit.experiment import Recipe
from fedlab_kit.lab import figures, plot, style
from fedlab_kit.lab.plot import to_figure


def records(*accuracies: float) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(round=r, accuracy=a, low=a - 0.05, high=a + 0.04) for r, a in enumerate(accuracies, start=1)
    ]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (87_360, "87.4 kB"), (999_700, "1 MB"), (2_340_000_000, "2.34 GB")],
)
def test_bytes_are_written_for_people(count, text):
    assert style.human_bytes(count) == text


@pytest.mark.parametrize(
    ("ms", "text"), [(0.01184, "11.8 µs"), (0.9999, "1 ms"), (12.34, "12.3 ms"), (2500, "2500 ms")]
)
def test_milliseconds_are_written_for_people(ms, text):
    assert style.human_ms(ms) == text


def test_the_current_run_has_its_band_and_earlier_runs_stand_behind_it():
    figure = to_figure(figures.accuracy_curve(records(0.2, 0.5, 0.8), [("alpha 0.1", records(0.1, 0.4))], rounds=20))
    axes = figure.axes[0]
    behind, current, dots = axes.lines
    assert dots.get_marker() == "o" and list(dots.get_ydata()) == list(current.get_ydata())
    assert list(behind.get_ydata()) == [10, 40]
    assert list(current.get_ydata()) == pytest.approx([20, 50, 80])
    assert current.get_linewidth() > behind.get_linewidth() and current.get_zorder() >= behind.get_zorder()
    assert axes.collections[0].get_datalim(axes.transData).intervaly == pytest.approx([15, 84])
    assert texts(figure) == ["40.0 % alpha 0.1", "80.0 % this run"]
    assert axes.get_xlim()[1] >= 20 and axes.get_xlabel() == "Round" and "(%)" in axes.get_ylabel()


def test_a_curve_without_a_round_says_so():
    assert texts(to_figure(figures.accuracy_curve([]))) == ["No round yet"]
    assert figures.accuracy_curve([]).alt == "Accuracy per round: no round yet."


def test_the_description_names_the_round_the_accuracy_and_its_interval():
    words = figures.accuracy_curve(records(0.2, 0.5), [("", records(0.1))], rounds=20).alt
    assert words == (
        "Accuracy per round: 50.0 % on validation after round 2 of 20 (95 % interval 45.0 % to 54.0 %), "
        "20.0 % after round 1; 1 earlier run behind it."
    )


def test_a_long_label_goes_on_in_a_second_line_and_the_others_make_room():
    shown = figures.accuracy_curve(
        records(0.81),
        [("alpha 0.5, temperature 4.0", records(0.8))],
        label="alpha 5.0, and more than two lines hold",
    )
    figure = to_figure(shown)
    assert texts(figure) == ["80.0 % alpha 0.5,\ntemperature 4.0", "81.0 % alpha 5.0,\nand more than two..."]
    assert [text.xy[1] for text in figure.axes[0].texts if text.get_text()] == [80, 92]


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_do_not_touch_and_stay_below_the_top(heights):
    placed = plot._apart(sorted(heights), gap=6)
    assert all(b - a >= 6 - 1e-9 for a, b in pairwise(placed))
    assert all(height <= 100 for height in placed)


def test_labels_with_room_stay_where_their_curves_end():
    assert plot._apart([10, 50, 90], gap=6) == [10, 50, 90]


def point(size: float | None, accuracy: float, **more: object) -> dict[str, object]:
    return {"bytes": size, "accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.01, **more}


def test_accuracy_against_size_draws_the_front_the_names_and_the_current_point():
    points = [
        point(1e4, 0.8, dtype="int8", name="small"),
        point(1e5, 0.9, dtype="fp32"),
        point(2e5, 0.85, dtype="fp32"),
    ]
    figure = to_figure(figures.accuracy_against(points, current=1))
    axes = figure.axes[0]
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(zip(*front.get_data(), strict=True))[:2] == [(1e4, 80), (1e5, 90)]
    assert front.get_data()[0][2] == axes.get_xlim()[1] and front.get_data()[1][2] == 90
    ring = next(line for line in axes.lines if line.get_markersize() == 14)
    assert list(ring.get_xydata()[0]) == [1e5, 90]
    assert texts(figure) == ["small"] and legend(figure) == ["fp32", "int8", "Pareto front"]
    assert axes.get_xscale() == "log" and axes.xaxis.get_major_formatter()(2e4, 0) == "20 kB"


def test_an_interval_that_rounding_has_turned_over_is_drawn():
    for accuracy, low, high in ((1.0, 0.9, 1 - 1e-16), (0.0, 1e-17, 0.1)):
        shown = figures.accuracy_against([{"bytes": 1e4, "accuracy": accuracy, "low": low, "high": high}])
        [bar] = to_figure(shown).axes[0].collections[0].get_segments()
        assert bar[:, 1] == pytest.approx([100 * low, 100 * high])


def test_points_that_lack_the_quantity_are_left_out():
    nan, inf = float("nan"), float("inf")
    shown = figures.accuracy_against(
        [point(None, 0.8), point(1e4, 0.9), point(nan, 0.7), point(inf, 0.7), point(0, 0.7), point(1e5, nan)]
    )
    assert [(mark.key, mark.x, mark.y) for mark in shown.marks] == [("1", 1e4, 90)]
    figures.to_png(figures.accuracy_against([]))


@pytest.mark.parametrize("axis", figures.AXES)
def test_every_axis_can_be_drawn(axis):
    figure = to_figure(figures.accuracy_against([{axis: 12.5, "accuracy": 0.5, "low": 0.4, "high": 0.6}], axis))
    assert figure.axes[0].get_xlabel() == figures.AXES[axis].label
    figures.to_png(figure)


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match=r"axis must be one of bytes, .*, got 'weight'"):
        figures.accuracy_against([], "weight")


def test_bubbles_have_areas_in_proportion_to_the_samples():
    figure = figures.label_counts([[10, 0], [5, 20]], ["cat", "dog"])
    bubbles = figure.axes[0].collections[0]
    assert bubbles.get_offsets().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert (bubbles.get_sizes() / bubbles.get_sizes().max()).tolist() == pytest.approx([0.5, 0.25, 1])
    assert figure.axes[0].get_title(loc="right") == "Largest bubble: 20 samples"


def test_bubbles_carry_the_names_of_clients_that_are_sites():
    figure = figures.label_counts([[10, 0], [5, 20]], ["cat", "dog"], ["north", "south"])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["north", "south"]


def test_the_worst_client_is_marked_and_the_mean_drawn():
    figure = to_figure(
        figures.client_accuracy([0.9, 0.6, 0.75], [0.8, 0.5, 0.7], [1, 0.7, 0.8], ["north", "south", "east"])
    )
    axes = figure.axes[0]
    assert legend(figure) == ["mean 75.0 %", "worst: south,\n60.0 %", "other clients"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["south", "east", "north"]
    worst, *others = [line for line in axes.lines if line.get_marker() != "None"]
    assert worst.get_marker() != others[0].get_marker() and worst.get_color() != others[0].get_color()


def test_the_picture_is_transparent_and_readable_on_white_and_on_black():
    picture = np.asarray(Image.open(io.BytesIO(figures.to_png(figures.accuracy_curve(records(0.2, 0.5))))))
    alpha = picture[..., 3]
    assert (alpha == 0).mean() > 0.5
    opaque = picture[alpha == 255][:, :3].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert opaque.min() > 50 and opaque.max() < 200


def test_the_image_tag_escapes_its_words():
    tag = figures.to_html(figures.accuracy_curve([]), 'a "quoted" <word>')
    assert tag.startswith('<img alt="a &quot;quoted&quot; &lt;word&gt;" ') and 'src="data:image/png;base64,' in tag


def test_a_notebook_cell_shows_the_same_text_for_every_picture():
    image = figures.to_image(figures.accuracy_curve([]), "nothing yet")
    assert image.alt == "nothing yet" and image.data[:4] == b"\x89PNG"
    assert repr(image) == "<IPython.core.display.Image object>"


def test_importing_the_plots_imports_no_matplotlib_and_no_torch():
    code = "import sys, fedlab_kit.lab.figures as p; print('matplotlib' in sys.modules, 'torch' in vars(p))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]


# ---- looks and names


def test_the_style_of_a_name_is_the_same_in_every_company():
    names = ["fp32", "int8", "int2", "mine", "0.5", "$$"]
    alone = {name: style.styles([name])[name] for name in names}
    for company in (names, names[::-1], names[2:5]):
        together = style.styles(company)
        assert together == {name: alone[name] for name in company}
    assert list(style.styles(["b", "2", "10", "int8", "fp32", "a"])) == ["fp32", "int8", "2", "10", "a", "b"]


def test_what_the_package_brings_along_has_a_style_of_its_own():
    known = [name for names in style.KNOWN for name in names]
    models = {name for name in catalog.MODELS if catalog.is_built_in(catalog.MODELS[name])}
    choices = (Recipe.model_fields[field].annotation.__args__ for field in ("dtype", "prune"))
    assert {*known} >= {name for names in choices for name in names} | models and models
    for names in style.KNOWN:
        assert len({*style.styles(names).values()}) == len(names) <= len(style.STYLES)


@given(st.sets(st.text(), max_size=50))
def test_no_two_kinds_look_alike(names):
    found = style.styles(names)
    assert found.keys() == names and len({*found.values()}) == len(names)


NASTY = [
    "$$",
    "$x$ $",
    "\\$",
    "_",
    "__x",
    "<b>bold</b>",
    "x" * 300,
    "😀 smile",
    "two\nlines",
    "",
    " ",
    "\x00",
    "\ud800",
    "日本",
    "%s",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_a_picture(name):
    points = [point(1e4, 0.8, dtype=name, name=name), point(2e4, 0.9, dtype="fp32", earlier=True)]
    shown = figures.accuracy_against(points, current=0)
    assert {"fp32"} < {kind.name for kind in shown.kinds} and len(legend(to_figure(shown))) == 4
    for drawn in (
        shown,
        figures.accuracy_curve(records(0.2), [(name, records(0.3)), ("this run", records(0.4))], label=name),
        figures.client_accuracy([0.5, 0.6], [0.4, 0.5], [0.6, 0.7], [name, "b"]),
        figures.label_counts([[1, 2], [3, 4]], [name, "b"], [name, "b"]),
        figures.power([0, 1], {name: [0, 1]}, name),
    ):
        assert figures.to_png(drawn)[:4] == b"\x89PNG"


def test_a_kind_may_be_called_like_what_the_figure_adds():
    names = ["Pareto front", "measured earlier", "measured earlier "]
    shown = figures.accuracy_against([point(1e4, 0.8, kind=name, earlier=True) for name in names], kind="kind")
    assert len({kind.name for kind in shown.kinds}) == len(shown.kinds) == 5
    assert [kind.hollow for kind in shown.kinds] == [False] * 4 + [True]
    assert shown.lines[0].kind == shown.kinds[3].name and len(to_figure(shown).axes[0].lines) == 4


def test_a_quantity_is_drawn_at_each_value_of_a_setting_with_the_intervals_that_there_are():
    lines = {"tuned": [(1, 0, 3), (30, 20, 45)], "lr 0.2": [(2, None, None), (0, None, None)]}
    shown = figures.by_setting([1, 16], lines, "Temperature", "Recall (%)")
    assert [(m.key, m.x, m.y, m.low, m.high) for m in shown.marks] == [
        ("tuned/1", 0, 1, 0, 3),
        ("tuned/16", 1, 30, 20, 45),
        ("lr 0.2/1", 0, 2, None, None),
        ("lr 0.2/16", 1, 0, None, None),
    ]
    assert [line.points for line in shown.lines] == [((0, 1), (1, 30)), ((0, 2), (1, 0))]
    assert shown.y.ends[0] < 0 and shown.y.ends[1] > 45
    assert shown.alt == "Recall (%) at temperature 1, 16. tuned: 1, 30; lr 0.2: 2, 0."
    figure = to_figure(shown)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "16"]
    assert set(legend(figure)) == set(lines)


def test_soft_answers_stand_beside_the_picture_and_its_label():
    figure = figures.soft_answers(np.eye(28), "7", {"T = 1": [0.1, 0.9, 0], "T = 4": [0.3, 0.4, 0.3]})
    bars, shown = figure.axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([10, 90, 0, 30, 40, 30])
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars.patches] == [0, 1, 2, 0, 1, 2]
    assert shown.get_title() == "Label: 7" and np.array_equal(shown.images[0].get_array(), np.eye(28))
    assert legend(figure) == ["T = 1", "T = 4"]


def test_names_at_one_place_are_written_apart():
    points = [point(1e4 + i, 0.8, name=f"point {i}") for i in range(12)]
    figure = to_figure(figures.accuracy_against(points))
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_a_front_of_one_point_can_be_seen():
    axes = to_figure(figures.accuracy_against([point(1e4, 0.8)])).axes[0]
    [front] = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert list(front.get_xdata()) == [1e4, axes.get_xlim()[1]] and list(front.get_ydata()) == [80, 80]


# ---- what a plot says


def test_any_column_can_be_the_kind_and_the_key_is_the_points_number():
    points = [point(1e4, 0.8, seed=3, point=17), point(2e4, 0.9, seed=12, point=5, earlier=True), point(3e4, 0.7)]
    shown = figures.accuracy_against(points, kind="seed", current=1)
    assert [kind.name for kind in shown.kinds] == ["point", "3", "12", "Pareto front", "measured earlier"]
    assert [mark.key for mark in shown.marks] == ["17", "5", "2"] and shown.current == "5"
    assert [mark.low is None for mark in shown.marks] == [False, True, False]


def test_points_lost_are_drawn_with_their_own_interval_and_fewer_are_better():
    points = [
        point(1e4, 0.8, lost=5.0, lost_low=3.0, lost_high=7.0),
        point(2e4, 0.7, lost=6.0, lost_low=1.0, lost_high=10.0),
        point(4e4, 0.9, lost=-1.0, lost_low=-2.0, lost_high=0.0),
        point(5e4, 0.9),
    ]
    shown = figures.accuracy_against(points, y="lost")
    assert [(m.y, m.low, m.high) for m in shown.marks] == [
        pytest.approx((5, 3, 7)), pytest.approx((6, 1, 10)), pytest.approx((-1, -2, 0)),
    ]  # fmt: skip
    assert dict(shown.marks[0].tip)["Lost"] == "5.0 points"
    assert [x for x, _ in shown.lines[0].points] == [1e4, 4e4] and shown.lines[0].points[1][1] == pytest.approx(-1)
    with pytest.raises(ValueError, match="y must be one of accuracy, lost, got 'won'"):
        figures.accuracy_against(points, y="won")


def test_a_tip_says_all_that_is_known_as_people_write_it():
    [mark] = figures.accuracy_against(
        [
            point(
                87_360, 0.8, latency_ms=0.0118, dtype="int8", note="", path="/x", run="ab", sizes=[1], loss=float("nan")
            )
        ]
    ).marks
    assert dict(mark.tip) == {
        "Model file": "87.4 kB",
        "Accuracy": "80.0 % (95 % interval 78.0 % to 81.0 %)",
        "Latency of one prediction": "11.8 µs",
        "Dtype": "int8",
    }


def test_a_curve_has_a_mark_a_round_and_a_line_a_run():
    shown = figures.accuracy_curve(records(0.2, 0.5), [("a", records(0.1)), ("b", [])], rounds=10)
    assert [mark.key for mark in shown.marks] == ["round/1", "round/2"]
    assert [(line.key, line.bold) for line in shown.lines] == [("earlier/0", False), ("this", True)]
    assert dict(shown.marks[1].tip)["Accuracy"] == "50.0 % (95 % interval 45.0 % to 54.0 %)"


def test_a_run_that_is_called_like_an_earlier_one_keeps_its_own_colour():
    shown = figures.accuracy_curve(records(0.2), [("mine", records(0.1))], label="mine")
    assert [kind.color for kind in shown.kinds] == [style.GREY, style.BLUE]


# ---- weights


def test_a_histogram_counts_weights_between_its_edges_and_zeros_in_the_legend_alone():
    before, after = [[-1.0, -0.5], [0.25, 1.0]], [-1.0, 0.0, 0.0, 1.0]
    shown = figures.histogram({"before": before, "after": after})
    assert [kind.name for kind in shown.kinds] == ["before, 0 are 0", "after, 2 are 0"]
    assert [sum(count for _, count in line.points) for line in shown.lines] == [4, 2]
    edges = [edge for edge, _ in shown.lines[0].points]
    assert (edges[0], edges[-1]) == shown.x.ends == pytest.approx((-1, 1), abs=0.01)
    [place] = [edge for edge, count in shown.lines[0].points if count and -0.1 < edge < 0.5]
    assert place <= 0.25 < place + 2 * shown.x.ends[1] / 60
    assert "2 are 0" in shown.alt and len({(kind.color, kind.dash) for kind in shown.kinds}) == 2


def test_filters_that_go_are_crossed_out_and_no_other():
    weights = np.zeros((7, 2, 3))
    weights[4, 0, 2], weights[6, 1, 0] = 2.0, -1.0
    axes = figures.filters(weights, {4}).axes[0]
    assert [picture.get_array().tolist() for picture in axes.images] == weights.tolist()
    assert {picture.get_clim() for picture in axes.images} == {(-2, 2)}
    left, right, bottom, top = axes.images[4].get_extent()
    assert [text.get_text() for text in axes.texts] == [str(number) for number in range(7)]
    crosses = sorted([*zip(*line.get_data(), strict=True)] for line in axes.lines)
    assert crosses == [[(left, top), (right, bottom)], [(left, bottom), (right, top)]]


def test_lines_of_any_quantity_are_told_apart_by_more_than_colour():
    curves = {f"run {i}": [(1, i), (2, i + 0.5)] for i in range(6)}
    shown = figures.lines(curves, "Round", "Accuracy (%)")
    assert [line.points for line in shown.lines] == [tuple(points) for points in curves.values()]
    assert len({(kind.color, kind.dash) for kind in shown.kinds}) == 6 and len({kind.dash for kind in shown.kinds}) == 3
    assert shown.x.ends == (1, 2) and shown.x.whole and shown.y.ends[0] < 0 and shown.y.ends[1] > 5.5
    assert shown.alt.startswith("Accuracy (%) against round: run 0 from 0 to 0.5; ")
    assert not figures.lines({"a": [(0.5, 1), (1, 1)]}, "x", "y").x.whole and figures.to_png(shown)[:4] == b"\x89PNG"
