"""Figures are checked by what stands in them."""

import base64
import io
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedlab_kit.lab import canvas, curve, plots


def records(*accuracies: float) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(round=r, accuracy=a, low=a - 0.05, high=a + 0.04) for r, a in enumerate(accuracies, start=1)
    ]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (87_360, "87.4 kB"), (999_700, "1 MB"), (2_340_000_000, "2.34 GB")],
)
def test_bytes_are_written_for_people(count, text):
    assert canvas.human_bytes(count) == text


@pytest.mark.parametrize(
    ("ms", "text"), [(0.01184, "11.8 µs"), (0.9999, "1 ms"), (12.34, "12.3 ms"), (2500, "2500 ms")]
)
def test_milliseconds_are_written_for_people(ms, text):
    assert canvas.human_ms(ms) == text


def test_the_current_run_has_its_band_and_earlier_runs_stand_behind_it():
    figure = plots.accuracy_curve(records(0.2, 0.5, 0.8), [("alpha 0.1", records(0.1, 0.4))], rounds=20)
    axes = figure.axes[0]
    behind, current = axes.lines
    assert list(behind.get_ydata()) == [10, 40]
    assert list(current.get_ydata()) == pytest.approx([20, 50, 80])
    assert current.get_linewidth() > behind.get_linewidth() and current.get_zorder() >= behind.get_zorder()
    assert axes.collections[0].get_datalim(axes.transData).intervaly == pytest.approx([15, 84])
    assert texts(figure) == ["40.0 % alpha 0.1", "80.0 % this run"]
    assert axes.get_xlim()[1] >= 20 and axes.get_xlabel() == "Round" and "(%)" in axes.get_ylabel()


def test_a_curve_without_a_round_says_so():
    assert texts(plots.accuracy_curve([])) == ["No round yet"]
    assert plots.describe_curve([]) == "Accuracy per round: no round yet."


def test_the_description_names_the_round_the_accuracy_and_its_interval():
    words = plots.describe_curve(records(0.2, 0.5), [("", records(0.1))], rounds=20)
    assert words == (
        "Accuracy per round: 50.0 % on validation after round 2 of 20 (95 % interval 45.0 % to 54.0 %), "
        "20.0 % after round 1; 1 earlier run behind it."
    )


def pixels(tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(tag.split("base64,")[1].split('"')[0]))))


def test_a_live_curve_shows_each_state_afresh():
    live = curve.LiveCurve([("alpha 0.1", records(0.1, 0.4))], rounds=20)
    one, two = live.to_html(records(0.2), "one"), live.to_html(records(0.2, 0.5), "two")
    assert one.startswith('<img alt="one" width="560"') and pixels(one).shape == (340, 560, 4)
    assert (pixels(one) != pixels(two)).any()
    assert (pixels(live.to_html(records(0.2), "again")) == pixels(one)).all()


def test_a_live_curve_draws_what_the_figure_draws():
    rounds, earlier = records(0.2, 0.5, 0.7), [("alpha 0.1", records(0.1, 0.4))]
    figure = plots.accuracy_curve(rounds, earlier, 20)
    figure.set_dpi(100)
    whole = np.asarray(Image.open(io.BytesIO(plots.to_png(figure)))).astype(int)
    live = pixels(curve.LiveCurve(earlier, 20).to_html(rounds, "")).astype(int)
    x = slice(0, int(0.18 * 560))  # left of the current run's own label, which stands elsewhere
    assert np.abs(whole - live)[:, x].max() <= 20  # smoothed edges over the grid, which is drawn earlier here
    assert len(np.unique(whole[:, x])) > 50


def test_a_long_label_goes_on_in_a_second_line_and_the_others_make_room():
    figure = plots.accuracy_curve(
        records(0.81),
        [("alpha 0.5, temperature 4.0", records(0.8))],
        label="alpha 5.0, and more than two lines hold",
    )
    assert texts(figure) == ["80.0 % alpha 0.5,\ntemperature 4.0", "81.0 % alpha 5.0,\nand more than two..."]
    assert [text.xy[1] for text in figure.axes[0].texts] == [80, 92]


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_do_not_touch_and_stay_below_the_top(heights):
    placed = curve._apart(sorted(heights), gap=6)
    assert all(b - a >= 6 - 1e-9 for a, b in pairwise(placed))
    assert all(height <= 100 for height in placed)


def test_labels_with_room_stay_where_their_curves_end():
    assert curve._apart([10, 50, 90], gap=6) == [10, 50, 90]


def point(size: float | None, accuracy: float, **more: object) -> dict[str, object]:
    return {"bytes": size, "accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.01, **more}


def test_accuracy_against_size_draws_the_front_the_names_and_the_current_point():
    points = [
        point(1e4, 0.8, dtype="int8", name="small"),
        point(1e5, 0.9, dtype="fp32"),
        point(2e5, 0.85, dtype="fp32"),
    ]
    figure = plots.accuracy_against(points, current=1)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    front = lines["Pareto front"]
    assert list(zip(*front.get_data(), strict=True)) == [(1e4, 80), (1e5, 90)] and front.get_drawstyle() == "steps-post"
    ring = next(line for line in axes.lines if line.get_fillstyle() == "none")
    assert list(ring.get_xydata()[0]) == [1e5, 90]
    assert texts(figure) == ["small"]
    styles = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers]
    assert len({color for color, _ in styles}) == len({marker for _, marker in styles}) == 2
    assert axes.get_xscale() == "log" and axes.xaxis.get_major_formatter()(2e4, 0) == "20 kB"


def test_an_interval_that_rounding_has_turned_over_is_drawn():
    for accuracy, low, high in ((1.0, 0.9, 1 - 1e-16), (0.0, 1e-17, 0.1)):
        figure = plots.accuracy_against([{"bytes": 1e4, "accuracy": accuracy, "low": low, "high": high}])
        [bar] = figure.axes[0].containers[0].lines[2][0].get_segments()
        assert bar[:, 1] == pytest.approx([100 * low, 100 * high])


def test_points_that_lack_the_quantity_are_left_out():
    figure = plots.accuracy_against([point(None, 0.8), point(1e4, 0.9), point(float("nan"), 0.7)])
    assert [len(container.lines[0].get_xdata()) for container in figure.axes[0].containers] == [1]
    plots.to_png(plots.accuracy_against([]))


@pytest.mark.parametrize("axis", plots.AXES)
def test_every_axis_can_be_drawn(axis):
    figure = plots.accuracy_against([{axis: 12.5, "accuracy": 0.5, "low": 0.4, "high": 0.6}], axis)
    assert figure.axes[0].get_xlabel() == plots.AXES[axis].label
    plots.to_png(figure)


def test_an_unknown_axis_is_named():
    with pytest.raises(ValueError, match=r"axis must be one of bytes, .*, got 'weight'"):
        plots.accuracy_against([], "weight")


def test_bubbles_have_areas_in_proportion_to_the_samples():
    figure = plots.label_counts([[10, 0], [5, 20]], ["cat", "dog"])
    bubbles = figure.axes[0].collections[0]
    assert bubbles.get_offsets().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert (bubbles.get_sizes() / bubbles.get_sizes().max()).tolist() == pytest.approx([0.5, 0.25, 1])
    assert figure.axes[0].get_title(loc="right") == "Largest bubble: 20 samples"


def test_bubbles_carry_the_names_of_clients_that_are_sites():
    figure = plots.label_counts([[10, 0], [5, 20]], ["cat", "dog"], ["north", "south"])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["north", "south"]


def test_the_worst_client_is_marked_and_the_mean_drawn():
    figure = plots.client_accuracy([0.9, 0.6, 0.75], [0.8, 0.5, 0.7], [1, 0.7, 0.8], ["north", "south", "east"])
    axes = figure.axes[0]
    assert texts(figure) == ["mean 75.0 %", "worst: south, 60.0 %"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["south", "east", "north"]
    worst, *others = [line for line in axes.lines if line.get_marker() != "None"]
    assert worst.get_marker() != others[0].get_marker() and worst.get_color() != others[0].get_color()


def test_the_picture_is_transparent_and_readable_on_white_and_on_black():
    picture = np.asarray(Image.open(io.BytesIO(plots.to_png(plots.accuracy_curve(records(0.2, 0.5))))))
    alpha = picture[..., 3]
    assert (alpha == 0).mean() > 0.5
    opaque = picture[alpha == 255][:, :3].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert opaque.min() > 50 and opaque.max() < 200


def test_the_image_tag_escapes_its_words():
    tag = plots.to_html(plots.accuracy_curve([]), 'a "quoted" <word>')
    assert tag.startswith('<img alt="a &quot;quoted&quot; &lt;word&gt;" ') and 'src="data:image/png;base64,' in tag


def test_a_notebook_cell_shows_the_same_text_for_every_picture():
    image = plots.to_image(plots.accuracy_curve([]), "nothing yet")
    assert image.alt == "nothing yet" and image.data[:4] == b"\x89PNG"
    assert repr(image) == "<IPython.core.display.Image object>"


def test_importing_the_plots_imports_no_matplotlib_and_no_torch():
    code = "import sys, fedlab_kit.lab.plots as p; print('matplotlib' in sys.modules, 'torch' in vars(p))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "False"]
