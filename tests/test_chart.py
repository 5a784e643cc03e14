"""The kernel's half of the live chart; tests/browser/test_chart.py touches the other half in a real Chromium."""

import json
import re
from types import SimpleNamespace

import pytest

from fedlab_kit.lab import chart as module
from fedlab_kit.lab.chart import Chart, live_html
from fedlab_kit.lab.figures import accuracy_against, accuracy_curve


def point(number: int, **more: object) -> dict[str, object]:
    return {"point": number, "bytes": 1e4 * number, "accuracy": 0.8, "low": 0.7, "high": 0.9, "dtype": "int8", **more}


def test_the_picture_stands_there_until_the_chart_is_ready_and_again_without_it():
    chart = Chart()
    cover = chart.box.children[1]
    chart.show(accuracy_against([point(1)]))
    assert chart.picture.value.startswith('<img alt="Accuracy against model file: 1 point')
    assert cover.layout.display == "none"
    chart.ready = True
    assert chart.picture.value == "" and cover.layout.display == ""
    chart.show(accuracy_against([point(1), point(2)]))
    assert chart.picture.value == "" and len(json.loads(chart.plot)["marks"]) == 2
    chart.ready = False
    assert "2 points" in chart.picture.value


def test_what_was_measured_earlier_travels_once(monkeypatch):
    chart, sent = Chart(), []
    monkeypatch.setattr(chart, "send_state", lambda key=None: sent.append(set(key)))
    old = [point(number, earlier=True) for number in (1, 2, 3)]
    chart.show(accuracy_against([*old, point(4)], current=3))
    assert [mark["key"] for mark in json.loads(chart.earlier)] == ["1", "2", "3"]
    assert [mark["key"] for mark in json.loads(chart.plot)["marks"]] == ["4"]
    assert sent == [{"plot", "earlier", "chosen"}]
    chart.show(accuracy_against([*old, point(4), point(5)], current=4))
    chart.show(accuracy_against([*old, point(4), point(5)], current=4))
    assert sent[1:] == [{"plot", "chosen"}] and chart.chosen == "5"


def test_a_round_that_ends_leaves_what_was_chosen_chosen():
    chart = Chart()
    chart.chosen = "round/1"
    chart.show(accuracy_curve([SimpleNamespace(round=1, accuracy=0.5, low=0.4, high=0.6)]))
    assert chart.chosen == "round/1"


def test_a_page_without_a_kernel_holds_all_it_shows_and_no_name_is_markup():
    page = live_html(accuracy_against([point(1, name="</script><b>bold</b>")]), accuracy_against([]))
    assert page.count("<img ") == 2 and page.count("<script") == page.count("</script>") == 1
    assert "<b>bold" not in page and page.count("data-plot=") == 2


def test_nothing_is_fetched_from_anywhere():
    addresses = re.findall(r"https?://[^\s\"'`]+", module.SCRIPT + module.STYLE)
    assert addresses == ["http://www.w3.org/2000/svg"]
    words = [
        "fetch",
        "XMLHttpRequest",
        "WebSocket",
        "sendBeacon",
        "EventSource",
        "import",
        "innerHTML",
        "outerHTML",
        "eval",
    ]
    assert not set(words) & set(re.findall(r"\w+", module.SCRIPT)) and not re.search(r"@import|url\(", module.STYLE)


def test_both_halves_name_the_same_traits():
    named = set(re.findall(r'model\.(?:get|set)\("(\w+)"', module.SCRIPT))
    assert named == {"plot", "earlier", "chosen", "ready"} <= set(Chart().keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_do_not_reach_the_page(value):
    chart = Chart()
    chart.show(accuracy_against([point(1, low=value, loss=value, latency_ms=value), point(2, accuracy=value)]))
    [mark] = json.loads(chart.plot)["marks"]
    assert mark["low"] is None and mark["high"] is None
