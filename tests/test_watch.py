"""The bench for drift: streams by hand, the newest wish wins, errors show, and pictures in words."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import fedlab_kit as fk
from fedlab_kit.data import load
from fedlab_kit.deployment.monitor import Stream, draw
from fedlab_kit.lab.drift_bench import TEXT, Watch
from fedlab_kit.lab.figures import alarm_table, distances, power
from fedlab_kit.lab.plot import to_figure

EXPERIMENT = fk.Experiment(
    dataset="clinics", model="logistic", partition="site", clients=3, clients_per_round=3, rounds=10, lr=0.2
)
LOUD = Stream(features=4, offset=2.0, gain=1.0, patients=300, begin=100)


@pytest.fixture(scope="module")
def artifact() -> fk.Artifact:
    return fk.compress(fk.train(EXPERIMENT), fk.Recipe())


# ---- streams


def test_a_stream_by_hand():
    known = load("clinics")
    quiet, labels = draw(known.test, 1, known.preprocess, Stream(patients=60, begin=60, features=2))
    x, y = draw(known.test, 1, known.preprocess, Stream(patients=60, begin=40, features=2, gain=2.0, offset=1.0))
    assert np.array_equal(labels, y) and np.array_equal(quiet[:40], x[:40])
    pool = {row.tobytes() for row in known.test.x[known.test.site == 1].numpy()}
    assert {row.tobytes() for row in quiet} <= pool
    moved = np.flatnonzero((x[40:] != quiet[40:]).any(axis=0))
    assert len(moved) == 2
    std = np.float32(known.preprocess.std)[moved]
    assert np.array_equal(x[40:][:, moved], 2 * quiet[40:][:, moved] + std)


def test_the_seed_decides_alone():
    known = load("clinics")
    first, again, other = (draw(known.test, 0, known.preprocess, Stream(features=2, seed=s))[0] for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_impossible_streams_are_named():
    known = load("clinics")
    with pytest.raises(ValueError, match="features must be at most 4, the columns of the table, got 9"):
        draw(known.test, 0, known.preprocess, Stream(features=9))
    with pytest.raises(ValueError, match="site 7 has none"):
        draw(known.test, 7, known.preprocess, Stream(features=1))
    with pytest.raises(ValueError, match=r"^gain must be at least 0 and at most 100, got -1"):
        Stream(gain=-1.0)


# ---- the bench


def test_a_change_is_caught_and_said(artifact):
    bench = Watch(artifact, LOUD, site="south")
    bench.ask(block=True)
    first = bench.alarms[0]
    assert first.site == "south" and 100 < first.patient <= 200
    assert f"is caught {first.patient - 100} patients later." in bench.status.value
    assert 'role="status"' in bench.status.value and "<caption>" in bench.table.value
    assert 'alt="Distance from the reference at' in bench.chart.picture.value


def test_moving_a_control_answers_and_the_newest_wish_wins(artifact):
    bench = Watch(artifact, LOUD)
    for begin in (120, 150, 300):
        bench.controls["begin"].value = begin
    assert bench.wait(30)
    assert "nothing changes, no false alarms." in bench.status.value and bench.table.value == ""
    bench.site.value = "west"
    assert bench.wait(30) and "west: nothing changes" in bench.status.value


def test_wrong_values_and_errors_show_and_the_next_wish_is_answered(artifact):
    bench = Watch(artifact, LOUD)
    bench.controls["gain"].value = -1.0
    assert bench.wait(30) and "Not watched: gain must be at least 0" in bench.status.value
    bench.controls["gain"].value = 1.0
    bench.controls["features"].value = 9
    assert bench.wait(30) and "Error: features must be at most 4" in bench.status.value
    assert "features must be at most 4" in bench.controls["features"].note.value
    bench.controls["features"].value = 4
    assert bench.wait(30) and "is caught" in bench.status.value


def test_every_control_has_a_name_and_the_text_never_changes(artifact):
    bench = Watch(artifact, LOUD)
    assert all(control.field.description for control in bench.controls.of(Stream).values())
    assert bench.site.description == "Hospital"
    shown = bench._repr_mimebundle_()
    assert shown["text/plain"] == TEXT and bench.wait(30)
    assert bench._repr_mimebundle_()["text/plain"] == TEXT


def test_what_has_no_sites_cannot_be_watched(artifact):
    with pytest.raises(ValueError, match="site must be one of north, south, west, got 'east'"):
        Watch(artifact, site="east")
    other = SimpleNamespace(dataset=load("digits"))
    with pytest.raises(ValueError, match="dataset must be a table with sites, 'digits' is none"):
        Watch(other)


# ---- pictures


def look(patients: int, distance: float) -> SimpleNamespace:
    return SimpleNamespace(patients=patients, distance=distance, limit=2.0, alarm=distance > 2)


def test_distances_in_lines_and_in_words():
    looks = [look(20, 1.0), look(30, 1.5), look(40, 2.5)]
    shown = distances(looks, begin=25)
    assert [kind.name for kind in shown.kinds] == ["limit", "distance", "alarm", "change"]
    limit, distance, change = shown.lines
    assert [y for _, y in distance.points] == [1.0, 1.5, 2.5] and {x for x, _ in change.points} == {25}
    assert limit.kind == "limit" and [mark.x for mark in shown.marks] == [40]
    assert shown.alt == (
        "Distance from the reference at 3 looks: 1 alarm, the first after 40 patients. The change begins "
        "after 25 patients."
    )
    assert distances(looks[:2]).alt.endswith("always below the limit.")
    assert len(to_figure(distances([])).axes) == 1 and len(to_figure(shown).axes[0].lines) == 4


def test_power_in_lines_and_in_words():
    caught = {"north": [0.0, 1.0], "south": [0.1, 0.5]}
    shown = power([0, 1], caught, "offset")
    assert [[y for _, y in line.points] for line in shown.lines] == [[0, 100], [10, 50]]
    assert shown.alt.endswith("(offset) from 0 to 1: north from 0.0 % to 100.0 %; south from 10.0 % to 50.0 %.")


def test_alarms_are_a_table_whose_words_are_escaped(artifact):
    bench = Watch(artifact, LOUD)
    bench.ask(block=True)
    table = alarm_table(bench.alarms)
    assert table.count("<tr>") == 1 + len(bench.alarms) and json.dumps([a.to_dict() for a in bench.alarms])
    odd = SimpleNamespace(patient=1, kind="<b>", value=1.0, limit=1.0, what="a & b")
    assert "&lt;b&gt;" in alarm_table([odd]) and "a &amp; b" in alarm_table([odd])
