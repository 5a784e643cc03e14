"""What the workbench knows and does, without a widget: one worker, the runs so far, and a status in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Event, Lock, Thread

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.files import StoreError, spare_folder
from fedlab_kit.lab.canvas import percent
from fedlab_kit.lab.wording import outcome, role
from fedlab_kit.run import Run, StoredRun
from fedlab_kit.runs import execute as train  # without its warning: the status says it
from fedlab_kit.runs import find
from fedlab_kit.settings import complaint


class Session:
    """Trains one experiment at a time in a thread of its own; everything else may be read at any moment.

    `experiment` is the one that is under way or was the last; while its teacher is trained first, `stage` is the
    teacher. `records` are those of the `stage`, `runs` all that ended with at least one round, `error` what went wrong
    in the last one ("" if nothing did). `earlier` are the runs of earlier benches. `finished` is called with every run
    that came to its end, `failed` with the words of every error. A run that the disk does not take is kept all the
    same, in a temporary folder, and the status says so.
    """

    def __init__(
        self,
        finished: Callable[[Run], None] = lambda run: None,
        failed: Callable[[str], None] = lambda error: None,
        earlier: Sequence[StoredRun] = (),
    ) -> None:
        self._finished, self._failed, self._earlier = finished, failed, earlier
        self.runs: list[Run] = []
        self.experiment: Experiment | None = None
        self.stage: Experiment | None = None
        self.records: list[RoundRecord] = []
        self.busy = False
        self.error = ""
        self._said = "Ready: press Run."
        self._aside = ""
        self._unstored = ""
        self._lock = Lock()
        self._stop = Event()
        self._worker: Thread | None = None

    @property
    def status(self) -> str:
        """What is going on, in a sentence or two."""
        return " ".join(filter(None, (self._said, self._unstored, self._aside)))

    @property
    def known(self) -> Sequence[StoredRun]:
        """The runs of earlier benches that were not asked for here, then those of this one, oldest first."""
        with self._lock:
            here = list(self.runs)
        keys = {run.key for run in here}
        return [*(run for run in self._earlier if run.key not in keys), *here]

    def start(self, experiment: Experiment) -> bool:
        """Begin to train; False, and a word in the status, while another run is under way."""
        with self._lock:
            if self.busy:
                self._aside = "Run was refused: one run at a time, press Stop or wait."
                return False
            self.busy, self.experiment, self.error, self._aside, self._unstored = True, experiment, "", "", ""
            self._begin((*experiment.parents, experiment)[0])
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
        with self._lock:  # so that a worker that is about to begin has begun
            worker = self._worker
        if worker is not None:
            worker.join(timeout)
        return not self.busy

    def refuse(self, reason: str) -> None:
        """Add to the status why nothing was started; "" takes it back."""
        with self._lock:
            self._aside = reason

    def _work(self, experiment: Experiment, stop: Event) -> None:
        try:
            for stage in (*experiment.parents, experiment):
                with self._lock:
                    self._begin(stage)
                run = self._train(stage, stop)
                self._finish(run)
                if run.status != "finished":
                    return
            self._finished(run)
        except TimeoutError:  # stopped while somebody else's run, or a grandparent, was waited for
            with self._lock:
                self._said = "Stopped before the first round ended. Run starts again."
        except Exception as error:
            # Whatever it was, the person at the screen must see it: a thread's traceback goes nowhere in a notebook.
            self._fail(error)
        finally:
            with self._lock:
                self.busy, self._aside = False, ""

    def _train(self, stage: Experiment, stop: Event) -> Run:
        try:
            run = train(stage, stop, self._progress)
            with self._lock:
                self._unstored = f"Not stored: {run.unstored}." if run.unstored else self._unstored
            return run
        except StoreError as error:
            with self._lock:
                self._begin(stage)
                self._unstored = f"Not stored: {error}."
            return _readable(stage) or train(stage, stop, self._progress, store=self._spare)

    @cached_property
    def _spare(self) -> Path:
        """Where runs go that the store does not take, as long as the session lasts."""
        return spare_folder(self)

    def _begin(self, stage: Experiment) -> None:
        self.stage, self.records = stage, []
        part = role(stage, self.experiment)
        self._doing = f"Training the {part} first" if part else "Training"
        self._said = f"{self._doing}: round 1 of {stage.rounds} has begun."

    def _progress(self, record: RoundRecord) -> None:
        with self._lock:
            self.records = [*self.records, record]
            rounds = self.stage.rounds if self.stage else 0
            self._said = f"{self._doing}: round {record.round} of {rounds}, accuracy {percent(record.accuracy)}."

    def _finish(self, run: Run) -> None:
        with self._lock:
            self.records = list(run.records)
            if run.records:
                self.runs = [earlier for earlier in self.runs if earlier.experiment != run.experiment] + [run]
            part = role(run.experiment, self.experiment)
            self._said = f"The {part}: {outcome(run)}" if part else outcome(run)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self.error = complaint(error)
            self._said = f"Error: {self.error}"
        self._failed(self.error)


def _readable(experiment: Experiment) -> Run | None:
    """Return the run of a store that can be read but not written, or None."""
    try:
        return find(experiment)
    except StoreError:
        return None
