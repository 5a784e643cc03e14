"""What the workbench knows and does, without a widget: one worker, the runs so far, and a status in words."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event, Lock, Thread

from fedlab_kit.experiment import Experiment, Settings
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.lab.canvas import percent
from fedlab_kit.lab.curve import Curve
from fedlab_kit.runs import Run, train


class Session:
    """Trains one experiment at a time in a thread of its own; everything else may be read at any moment.

    `experiment` and `records` are those of the run that is under way or was the last, `runs` all that ended with
    at least one round, `error` what went wrong in the last one ("" if nothing did).
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.experiment: Experiment | None = None
        self.records: list[RoundRecord] = []
        self.busy = False
        self.error = ""
        self._said = "Ready: press Run."
        self._aside = ""
        self._lock = Lock()
        self._stop = Event()
        self._worker: Thread | None = None

    @property
    def status(self) -> str:
        """What is going on, in a sentence or two."""
        return f"{self._said} {self._aside}".rstrip()

    def start(self, experiment: Experiment) -> bool:
        """Begin to train; False, and a word in the status, while another run is under way."""
        with self._lock:
            if self.busy:
                self._aside = "Run was refused: one run at a time, press Stop or wait."
                return False
            self.busy, self.experiment, self.records, self.error = True, experiment, [], ""
            self._said, self._aside = f"Training: round 1 of {experiment.rounds} has begun.", ""
            self._stop = Event()
            self._worker = Thread(target=self._work, args=(experiment, self._stop), daemon=True)
            self._worker.start()
            return True

    def stop(self) -> None:
        """Ask the worker to end before its next batch."""
        with self._lock:
            if self.busy:
                self._stop.set()
                self._aside = "Stopping."

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker has ended, at most `timeout` seconds; whether it has."""
        if self._worker is not None:
            self._worker.join(timeout)
        return not self.busy

    def refuse(self, reason: str) -> None:
        """Add to the status why nothing was started; "" takes it back."""
        with self._lock:
            self._aside = reason

    def curves(self, most: int = 6) -> list[Curve]:
        """Return the latest runs besides the current one, each labelled by what sets it apart from that."""
        with self._lock:
            others = [run for run in self.runs if run.experiment != self.experiment]
        return [(difference(run.experiment, self.experiment), run.records) for run in others[-most:]]

    def _work(self, experiment: Experiment, stop: Event) -> None:
        try:
            run = train(experiment, stop, self._progress)
            self._finish(run)
        except Exception as error:
            # Whatever it was, the person at the screen must see it: a thread's traceback goes nowhere in a notebook.
            self._fail(error)
        finally:
            with self._lock:
                self.busy, self._aside = False, ""

    def _progress(self, record: RoundRecord) -> None:
        with self._lock:
            self.records = [*self.records, record]
            rounds = self.experiment.rounds if self.experiment else 0
            self._said = f"Training: round {record.round} of {rounds}, accuracy {percent(record.accuracy)}."

    def _finish(self, run: Run) -> None:
        with self._lock:
            if run.records:
                self.runs = [earlier for earlier in self.runs if earlier.experiment != run.experiment] + [run]
            self._said = outcome(run)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            expected = isinstance(error, ValueError | OSError)
            self.error = str(error) if expected else f"{type(error).__name__}: {error}"
            self._said = f"Error: {self.error}"


def outcome(run: Run) -> str:
    """Say how a run ended, what it reached, and when and where that was measured."""
    rounds, asked = len(run.records), run.experiment.rounds
    if not rounds:
        return "Stopped before the first round ended. Run starts again."
    reached = f"{percent(run.accuracy)} (95 % interval {percent(run.interval[0])} to {percent(run.interval[1])})"
    seconds = f"{run.measured['seconds']:.1f} s"
    if run.status == "diverged":
        reason = run.note or "the loss is no longer a number"
        said = f"Diverged in round {rounds} of {asked}: {reason}. Try a smaller learning rate."
    elif run.status == "stopped":
        return f"Stopped after round {rounds} of {asked} at {reached}. Run goes on from there."
    else:
        said = f"Finished: {reached} after {rounds} rounds in {seconds}."
    if run.from_store:
        when = run.measured["when"][:16].replace("T", " ")
        measured = f"measured {when} UTC on {run.measured['machine']}"
        said += f" Answered from the store, {measured}. New seed repeats it with other random choices."
    return said


def difference(settings: Settings, other: Settings | None) -> str:
    """Name the fields, with their values in `settings`, that set it apart from `other`, e.g. "alpha 0.1, lr 0.03"."""
    names: Sequence[str] = list(type(settings).model_fields)
    if other is None:
        return ""
    return ", ".join(f"{n} {getattr(settings, n)}" for n in names if getattr(settings, n) != getattr(other, n))
