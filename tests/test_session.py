"""The session without a widget: to the end, stopped, refused, from the store, diverged, failed."""

from threading import Event
from time import perf_counter

import pytest

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab import session as module
from fedlab_kit.lab.session import Session, difference

TINY = Experiment(model="logistic", clients=4, clients_per_round=2, rounds=3)
LONG = TINY.replace(rounds=100_000)


@pytest.fixture
def session():
    made = Session()
    yield made
    made.stop()
    assert made.wait(20)


def finished(session: Session, experiment: Experiment = TINY) -> Session:
    assert session.start(experiment)
    assert session.wait(60)
    return session


def under_way(session: Session, rounds: int = 2) -> Session:
    """A long run that has made some rounds."""
    assert session.start(LONG)
    deadline = perf_counter() + 60
    while len(session.records) < rounds and perf_counter() < deadline:
        session.wait(0.01)
    assert session.busy
    return session


def test_a_run_to_its_end(session):
    assert session.status == "Ready: press Run." and not session.busy
    finished(session)
    assert [record.round for record in session.records] == [1, 2, 3]
    (run,) = session.runs
    assert run.records == tuple(session.records) and run.status == "finished"
    assert session.status.startswith(f"Finished: {100 * run.accuracy:.1f} % (95 % interval ")
    assert "after 3 rounds" in session.status and "store" not in session.status and session.error == ""


def test_progress_is_said_in_words(session):
    under_way(session)
    assert session.status.startswith("Training: round ") and "of 100000, accuracy " in session.status


def test_stop_ends_a_run_and_run_goes_on_from_there(session):
    under_way(session).stop()
    assert session.wait(5)
    rounds = len(session.records)
    assert session.status.startswith(f"Stopped after round {rounds} of 100000 at ")
    assert session.runs[0].status == "stopped" and len(session.runs[0].records) == rounds
    under_way(session, rounds + 1)
    assert [record.round for record in session.records[: rounds + 1]] == list(range(1, rounds + 2))


def test_stop_before_the_first_round_has_ended(session, monkeypatch):
    real = module.train

    def late(experiment, stop, progress):
        stop.wait(10)
        return real(experiment, stop, progress)

    monkeypatch.setattr(module, "train", late)
    session.start(TINY)
    session.stop()
    assert session.status.endswith("Stopping.")
    assert session.wait(10)
    assert session.status == "Stopped before the first round ended. Run starts again."
    assert session.runs == []


def test_stop_without_a_run_does_nothing(session):
    session.stop()
    assert session.status == "Ready: press Run."


def test_a_second_run_is_refused_in_words(session):
    under_way(session)
    assert not session.start(TINY)
    assert session.status.endswith("Run was refused: one run at a time, press Stop or wait.")
    assert session.experiment == LONG and session.busy


def test_a_run_from_the_store_says_when_and_where_it_was_measured(session):
    finished(session)
    finished(session)
    assert "Answered from the store, measured " in session.status and "New seed" in session.status
    assert session.runs[0].measured["machine"] in session.status
    assert len(session.runs) == 1 and len(session.records) == 3


def test_a_run_that_diverges_says_so_and_keeps_its_records(session):
    finished(session, TINY.replace(model="2nn", lr=10.0, rounds=30, batch_size=10))
    assert session.status.startswith("Diverged in round ") and "smaller learning rate" in session.status
    assert session.runs[0].status == "diverged" and session.records[-1].loss is None


def test_an_impossible_experiment_is_answered_with_its_one_line(session):
    finished(session, TINY.replace(partition="site"))
    assert session.status == f"Error: {session.error}" and "site" in session.error
    assert session.runs == [] and not session.busy
    assert finished(session).error == ""


def test_an_unforeseen_failure_is_shown_and_frees_the_session(session, monkeypatch):
    def broken(*_):
        raise KeyError("oops")

    monkeypatch.setattr(module, "train", broken)
    finished(session)
    assert session.status == "Error: KeyError: 'oops'"
    assert not session.busy


def test_a_refusal_is_added_to_the_status_and_taken_back(session):
    session.refuse("Not started: lr is wrong.")
    assert session.status == "Ready: press Run. Not started: lr is wrong."
    session.refuse("")
    assert session.status == "Ready: press Run."


def test_earlier_runs_are_labelled_by_what_sets_them_apart(session):
    finished(session, TINY.replace(alpha=0.1))
    finished(session, TINY.replace(lr=0.5, alpha=0.1))
    finished(session)
    assert [label for label, _ in session.curves()] == ["alpha 0.1", "alpha 0.1, lr 0.5"]
    assert [label for label, _ in session.curves(most=1)] == ["alpha 0.1, lr 0.5"]


def test_difference_between_settings():
    assert difference(TINY, TINY) == "" and difference(TINY, None) == ""
    assert difference(TINY.replace(seed=8), TINY) == "seed 8"


def test_an_event_of_an_earlier_run_cannot_stop_a_later_one(session, monkeypatch):
    stops: list[Event] = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda e, stop, progress: (stops.append(stop), real(e, stop, progress))[1])
    finished(session)
    stops[0].set()
    finished(session, TINY.replace(seed=8))
    assert session.runs[-1].status == "finished"
