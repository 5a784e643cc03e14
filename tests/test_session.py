"""The session without a widget: to the end, stopped, refused, from the store, diverged, failed."""

from threading import Event, Thread
from time import perf_counter

import pytest
from torch import nn

from fedlab_kit import catalog
from fedlab_kit.experiment import Experiment
from fedlab_kit.files import StoreError
from fedlab_kit.lab import workbench as module
from fedlab_kit.lab import worker
from fedlab_kit.lab.history import Marks
from fedlab_kit.lab.text import difference
from fedlab_kit.lab.workbench import Session, earlier_curves
from fedlab_kit.runs import history, train
from fedlab_kit.store import RunFolder

TINY = Experiment(dataset="digits", model="logistic", partition="dirichlet", clients=4, clients_per_round=2, rounds=3)
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


def test_what_the_store_cannot_tell_is_said_and_trained_again(session, monkeypatch, runs_folder):
    steps = iter([1])
    mine = lambda shape, classes: steps and nn.Sequential(nn.Flatten(), nn.Linear(784, classes))  # noqa: E731
    monkeypatch.setitem(catalog.MODELS, "mine", mine)
    child = TINY.replace(teacher=TINY.replace(model="mine"))
    for _ in range(2):
        finished(session, child)
        assert session.status.startswith("Finished: ")
        assert "Not stored: model 'mine' -> steps: a list_iterator has no value" in session.status
        assert [run.from_store for run in session.runs] == [False, False] and not runs_folder.exists()
    finished(session)
    assert "Not stored" not in session.status and session.runs[-1].path.parent == runs_folder


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


def test_earlier_runs_are_labelled_by_what_sets_them_apart(session, tmp_path, monkeypatch):
    marks = Marks(tmp_path)
    finished(session, TINY.replace(alpha=0.1))
    finished(session, TINY.replace(lr=0.5, alpha=0.1))
    finished(session)
    apart = ["alpha 0.1", "alpha 0.1, lr 0.5"]
    assert [label for label, _ in earlier_curves(session, marks, TINY.replace(seed=8))] == apart
    before = Session(earlier=session.runs)  # nothing was run here yet: what the controls say is the measure
    assert [label for label, _ in earlier_curves(before, marks, TINY)] == [*apart, "these settings"]
    monkeypatch.setattr(module, "BEHIND", 2)
    assert [label for label, _ in earlier_curves(before, marks, TINY)] == [apart[1], "these settings"]
    marks.name(session.runs[0].key, "skewed")
    marks.hide(session.runs[1].key)
    assert [label for label, _ in earlier_curves(session, marks, TINY)] == ["skewed"]
    assert earlier_curves(before, marks, TINY.replace(dataset="mnist")) == []


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


def test_runs_of_earlier_benches_stand_before_those_of_this_one(runs_folder):
    first = train(TINY)
    train(TINY.replace(alpha=0.1))
    session = finished(Session(earlier=history()[0]), TINY.replace(seed=8))
    assert [run.experiment.seed for run in session.known] == [7, 7, 8]
    finished(session)
    assert [run.key for run in session.known].count(first.key) == 1 and session.known[-1].from_store


def test_a_run_that_the_disk_does_not_take_is_shown_all_the_same(session, runs_folder):
    runs_folder.write_text("a file where the store should be")
    finished(session)
    (run,) = session.runs
    assert run.status == "finished" and len(session.records) == 3 and session.error == ""
    assert session.status.startswith("Finished: ") and "Not stored: cannot write" in session.status
    assert not run.path.is_relative_to(runs_folder) and run.model is not None
    assert run.records[-1].accuracy == session.records[-1].accuracy


def test_a_disk_that_fills_up_during_a_run_loses_nothing(session, monkeypatch, runs_folder):
    real = RunFolder.commit

    def full(self, state, record):
        if record.round == 2 and self.path.parent == runs_folder:
            raise StoreError(f"cannot write {self.path}: No space left on device")
        real(self, state, record)

    monkeypatch.setattr(RunFolder, "commit", full)
    finished(session)
    assert [record.round for record in session.records] == [1, 2, 3] and session.runs[0].status == "finished"
    assert "Not stored: cannot write" in session.status and "No space left" in session.status


def test_a_store_that_can_be_read_but_not_written_still_answers(session, monkeypatch):
    train(TINY)

    def locked(self, stop):
        raise StoreError(f"cannot write {self.path}: Read-only file system")

    monkeypatch.setattr(RunFolder, "locked", locked)
    finished(session)
    assert "Answered from the store" in session.status and "Read-only file system" in session.status


@pytest.mark.parametrize("name", ["state.safetensors", "records.jsonl"])
def test_a_damaged_run_is_named_and_made_again_beside_the_store(session, name):
    file = train(TINY).path / name
    file.write_bytes(file.read_bytes()[:40])
    finished(session)
    assert session.runs[0].status == "finished" and not session.runs[0].from_store
    assert "Not stored: " in session.status and "is damaged" in session.status and str(file.parent) in session.status


def test_two_sessions_on_one_store_give_one_run(session):
    other = Session()
    assert session.start(TINY) and other.start(TINY)
    assert session.wait(60) and other.wait(60)
    assert session.error == other.error == "" and session.runs[0].weights.equal(other.runs[0].weights)
    assert {session.runs[0].from_store, other.runs[0].from_store} == {True, False}


def test_a_run_may_be_waited_for_while_it_is_being_started(session, monkeypatch):
    seen = []

    class Slow(Thread):
        def start(self) -> None:
            waiting = Thread(target=lambda: seen.append(session.wait(10)))
            waiting.start()
            waiting.join(0.05)
            super().start()
            others.append(waiting)

    others: list[Thread] = []
    monkeypatch.setattr(worker, "Thread", Slow)
    session.start(TINY)
    others[0].join(20)
    assert seen == [True]
