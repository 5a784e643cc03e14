"""What a bench knows and does, without a widget: it trains, measures, and keeps runs and points with their marks.

`Session` and `Compressor` work in threads of their own; everything else returns at once and may be read at any moment.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from threading import Event, Lock, main_thread
from time import monotonic
from typing import Any, get_args

from fedlab_kit.deployment.artifact import Artifact, compress, load, recall, slug, time_beside
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.federation.setup import task
from fedlab_kit.files import StoreError, spare_folder
from fedlab_kit.lab.bundle import export
from fedlab_kit.lab.history import ALL, Filter, Marks, Points, Row
from fedlab_kit.lab.style import percent
from fedlab_kit.lab.text import difference, outcome, role, said
from fedlab_kit.lab.worker import Worker
from fedlab_kit.run import Run, StoredRun
from fedlab_kit.runs import execute as train  # without its warning: the status says it
from fedlab_kit.runs import find, history, runs_folder
from fedlab_kit.settings import Settings, complaint

DELAY = 0.08  # seconds that a slider stands before its recipe is measured
DRAG = 1.0  # seconds between two moves of a slider that are one drag
REST = 0.3  # seconds without a question before latencies are taken
PARTS = ("onnx", "onnxscript", "onnxruntime.quantization", "torch._dynamo", "torch_pruning", "matplotlib.figure")
NO_RUN = "Press Run first: these controls act on a finished run."
STEPS, SEEDS = 7, 4  # points of a knob that is varied over its range; seeds of a repetition
BEHIND = 6  # earlier curves in a picture
PATIENCE = 0.4  # seconds that a bench waits for the points of a large store before it shows itself without them
_TRAINING: set[Session] = set()  # sessions of this process that have a run under way


def nobody(*_: object, **__: object) -> None:
    """Hear nothing of what happens."""


class Session:
    """Trains one experiment at a time; everything else may be read at any moment.

    `experiment` is the one that is under way or was the last; while what it needs is trained first, `stage` is that.
    `records` are those of the `stage`, `runs` all that ended with at least one round, `error` what went wrong
    in the last one ("" if nothing did). `earlier` are the runs of earlier benches. `finished` is called with every run
    that came to its end, `failed` with every error, `news` when there is something new to show. A run that the disk
    does not take is kept all the same, in a temporary folder, and the status says so.
    """

    def __init__(
        self,
        finished: Callable[[Run], object] = nobody,
        failed: Callable[[Exception], object] = nobody,
        earlier: Sequence[StoredRun] = (),
        news: Callable[..., object] = nobody,
    ) -> None:
        self._finished, self._failed, self._earlier, self._news = finished, failed, earlier, news
        self.runs: list[Run] = []
        self.experiment: Experiment | None = None
        self.stage: Experiment | None = None
        self.records: list[RoundRecord] = []
        self.busy = False
        self.error = ""
        self._said = "Ready: press Run."
        self._aside = self._unstored = ""
        self._place, self._stages = 1, 1
        self._lock, self._stop = Lock(), Event()
        self.worker = Worker(self._fail, daemon=True)

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

    def start(self, *experiments: Experiment) -> bool:
        """Begin to train one after the other; False, and a word in the status, while a run is under way."""
        with self._lock:
            if self.busy or self.worker.closed:
                self._aside = "Run was refused: one run at a time, press Stop or wait."
                return False
            self.busy, self.error, self._aside, self._unstored = True, "", "", ""
            self._stages, self.experiment = len(experiments[0].lineage), experiments[0]
            self._begin(experiments[0].lineage[0], 1)
            self._stop = Event()
            self.worker.ask(partial(self._work, experiments, self._stop))
        self._news()
        return True

    def stop(self) -> None:
        """Ask the worker to end before its next batch."""
        with self._lock:
            if self.busy:
                self._stop.set()
                self._aside = "Stopping."
        self._news()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no run is under way, at most `timeout` seconds; whether that is so."""
        with self._lock:  # so that a worker that is about to begin has begun
            pass
        return self.worker.wait(timeout)

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self.worker.close()
        with self._lock:
            self.busy = self.busy and self.worker.busy  # what had not begun is over

    def refuse(self, reason: str) -> None:
        """Add to the status why nothing was started; "" takes it back."""
        with self._lock:
            self._aside = reason

    @property
    def done(self) -> float:
        """The share of the run under way that is done, 0..1, with what is trained before it."""
        rounds = self.stage.rounds if self.stage else 1
        return (self._place - 1 + min(1.0, len(self.records) / rounds)) / self._stages

    def _work(self, experiments: Sequence[Experiment], stop: Event) -> None:
        _TRAINING.add(self)
        try:
            for experiment in experiments:
                with self._lock:
                    self.experiment, self._stages = experiment, len(experiment.lineage)
                for place, stage in enumerate(experiment.lineage, start=1):
                    with self._lock:
                        self._begin(stage, place)
                    run = self._train(stage, stop)
                    self._finish(run)
                    if run.status != "finished":
                        return
                self._finished(run)
        except TimeoutError:  # stopped while somebody else's run was waited for
            self._said = "Stopped before the first round ended. Run starts again."
        except Exception as error:
            # Whatever it was, the person at the screen must see it.
            self._fail(error)
        finally:
            _TRAINING.discard(self)
            with self._lock:
                self.busy, self._aside = False, ""
            self._news()

    def _train(self, stage: Experiment, stop: Event) -> Run:
        try:
            run = train(stage, stop, self._progress)
            self._unstored = f"Not stored: {run.unstored}." if run.unstored else self._unstored
            return run
        except StoreError as error:
            with self._lock:
                self._begin(stage, self._place)
                self._unstored = f"Not stored: {error}."
            return _readable(stage) or train(stage, stop, self._progress, store=self._spare)

    @cached_property
    def _spare(self) -> Path:
        """Where runs go that the store does not take, as long as the session lasts."""
        return spare_folder(self)

    def _begin(self, stage: Experiment, place: int) -> None:
        self.stage, self.records, self._place = stage, [], place
        part = self._part(stage)
        self._doing = f"Training the {part} first ({place} of {self._stages})" if part else "Training"
        self._said = f"{self._doing}: round 1 of {stage.rounds} has begun."

    def _progress(self, record: RoundRecord) -> None:
        with self._lock:
            self.records = [*self.records, record]
            rounds = self.stage.rounds if self.stage else 0
            left = sum(one.seconds for one in self.records) / len(self.records) * (rounds - record.round)
            self._said = (
                f"{self._doing}: round {record.round} of {rounds}, accuracy {percent(record.accuracy)}, "
                f"about {math.ceil(left):,} s left."
            )
        self._news(soon=len(self.records) == 1)  # the first is not kept waiting

    def _finish(self, run: Run) -> None:
        with self._lock:
            self.records = list(run.records)
            if run.records:
                self.runs = [earlier for earlier in self.runs if earlier.experiment != run.experiment] + [run]
            part = self._part(run.experiment)
            self._said = f"The {part}: {outcome(run)}" if part else outcome(run)
        self._news()

    def _part(self, stage: Experiment) -> str:
        """What is trained before the experiment that was asked for, "" for that itself."""
        return "" if stage == self.experiment else role(stage, self.experiment) or "model before"

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self.error = complaint(error)
            self._said = f"Error: {self.error}"
        self._failed(error)


def _readable(experiment: Experiment) -> Run | None:
    """Return the run of a store that can be read but not written, or None."""
    with suppress(StoreError):
        return find(experiment)
    return None


def training() -> bool:
    """Whether a bench of this process has a run under way."""
    return bool(_TRAINING)


class Compressor:
    """Measures the newest recipe that it was asked for; everything else may be read at any moment.

    `points` holds what was measured, `nearest` is the known point that is shown while a recipe is being measured.
    `status` says what is going on in a sentence or two, `error` what went wrong last ("" if nothing did). `occupied`
    says whether a run needs the processor: preparing gives way to it, and latencies wait for its end. `failed` is
    called with every error, `news` when there is something new to show. An artifact that the disk does not take is kept
    all the same, in a temporary folder, and the status says so.
    """

    def __init__(
        self,
        points: Points,
        occupied: Callable[[], bool] = training,
        failed: Callable[[Exception], object] = nobody,
        news: Callable[..., object] = nobody,
    ) -> None:
        self.points = points
        self.status = self._resting = NO_RUN
        self.error = ""
        self.nearest: int | None = None
        self._unstored = ""
        self._occupied, self._failed, self._news = occupied, failed, news
        self._moved, self._gesture = 0.0, 0
        self._passed: tuple[int, int] | None = None  # the gesture that has made the last point, and its number
        self.worker = Worker(self._fail)

    @property
    def busy(self) -> bool:
        """Whether something is being measured or prepared."""
        return self.worker.busy

    @property
    def artifact(self) -> Artifact | None:
        """The artifact of the current point."""
        return self.points.current.artifact if self.points.current else None

    def ask(self, run: StoredRun, recipe: Recipe, delay: float = 0.0, drag: bool = False) -> None:
        """Measure a recipe on a finished run as soon as it has stood for `delay` seconds; the latest wins.

        The uncompressed file of the run is measured first, once. What a `drag` measures on its way it takes back.
        """
        self._gesture += not (drag and monotonic() - self._moved < DRAG)
        self._moved = monotonic() if drag else 0.0
        near = None if self.points.find(run, recipe) else self.points.nearest(run, recipe)
        self.nearest = near.number if near else None
        if near:
            self.status = f"Measuring {_named(recipe)}. The nearest known answer is {said(self.points.row(near))}"
        self.worker.ask(partial(self._answer, run, recipe, self._gesture), "answer", delay)
        self._news()

    def also(self, run: StoredRun, *recipes: Recipe) -> None:
        """Measure some recipes on a run, each of them, after what was asked for before."""
        for recipe in recipes:
            self._gesture += 1
            self.worker.ask(partial(self._answer, run, recipe, self._gesture))

    def choose(self, number: int) -> None:
        """Make any point the current one; one of an earlier bench is opened for that."""
        self.worker.ask(partial(self._choose, number), "answer")

    def do(self, doing: str, job: Callable[[], str]) -> None:
        """Do something else that takes time, after what was asked for before; the job returns what to say then."""
        self.worker.ask(partial(self._do, doing, job))

    def prepare(self, experiment: Experiment) -> None:
        """Load the exporter and export the experiment's model once, untrained: that takes seconds the first time."""
        self.say("Preparing the exporter, once: this takes some seconds.")
        self.worker.ask(partial(self._prepare, experiment, PARTS), "prepare")

    def say(self, text: str) -> None:
        """Put something into the status."""
        self.status = text
        self._news()

    def rest(self, text: str) -> None:
        """Say what the controls act on, now and whenever there is no point to speak of."""
        self._resting = text
        self.say(text)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do, at most `timeout` seconds; whether that is so."""
        return self.worker.wait(timeout)

    def _fail(self, error: Exception) -> None:
        self.nearest, self.error = None, complaint(error)
        self.say(f"Error: {self.error}")
        self._failed(error)

    def _answer(self, stored: StoredRun, recipe: Recipe, gesture: int) -> None:
        self.error = self._unstored = ""
        run = _whole(stored)
        found, passed, self._passed = self.points.find(run, recipe), self._passed, None
        if passed and passed[0] == gesture and not (found and found.number == passed[1]):
            self.points.take_back(passed[1])
        for one in dict.fromkeys((Recipe(), recipe)):
            point = self.points.find(run, one)
            if point and (known := point.artifact or self._known(run, one)):
                point = self.points.opened(point, known)
                self.points.count(point)
            else:
                self.say(f"Measuring {_named(one)}.")
                point = self.points.add(run, one, self._made(run, one))
                self._passed = (gesture, point.number) if one != Recipe() else None
            if not point.card.get("latency"):
                self.worker.ask(partial(self._time, point.key), point.key, REST, resting=True)
            self.points.show(point)
        self.nearest = None
        self.say(self._outcome())

    def _known(self, run: Run, recipe: Recipe) -> Artifact | None:
        """Return the artifact of an earlier bench; None where it is to be made again."""
        with suppress(StoreError):
            return recall(run, recipe)
        return None

    def _made(self, run: Run, recipe: Recipe) -> Artifact:
        try:
            return compress(run, recipe)
        except StoreError as error:
            self._unstored = f"Not stored: {error}."
            return compress(run, recipe, self._spare)

    @cached_property
    def _spare(self) -> Path:
        """Where artifacts go that the store does not take, as long as the bench lasts."""
        return spare_folder(self)

    def _time(self, key: str) -> None:
        """Time a point beside the fp32 file of its run, once nothing else is under way."""
        if self._occupied():
            return self.worker.ask(partial(self._time, key), key, REST, resting=True)
        point = next((one for one in self.points.all if one.key == key), None)
        plain = self.points.find(point.run, Recipe()) if point else None
        if point and point.artifact and plain and plain.artifact:
            self.points.opened(point, time_beside(point.artifact, plain.artifact))
            current = self.points.current and self.points.current.key == key and self.nearest is None
            self.say(self._outcome()) if current else self._news()
        return None

    def _choose(self, number: int) -> None:
        self.error = self._unstored = ""
        self.nearest = None
        point = self.points.all[number - 1]
        try:
            self.points.show(point if point.artifact else self.points.opened(point, load(point.path)))
        except StoreError:
            raise StoreError(
                f"{point.path} is missing or altered: press Run with its settings to make it again"
            ) from None
        self.say(self._outcome())

    def _do(self, doing: str, job: Callable[[], str]) -> None:
        self.say(doing)
        self.say(job())

    def _outcome(self) -> str:
        current = self.points.current
        return f"{said(self.points.row(current))} {self._unstored}".rstrip() if current else self._resting

    def _prepare(self, experiment: Experiment, parts: Sequence[str]) -> None:
        # Loading and exporting hold the interpreter that a run's rounds need: this gives way to them, part by part,
        # and is needless once a point was asked for.
        if self.points.current:
            return None
        if self._occupied() and not self.worker.waits("answer") and main_thread().is_alive():
            return self.worker.ask(partial(self._prepare, experiment, parts), "prepare", 0.05)
        if parts:
            import_module(parts[0])
            return self.worker.ask(partial(self._prepare, experiment, parts[1:]), "prepare")
        with tempfile.TemporaryDirectory() as folder, suppress(ValueError):  # what is wrong is said when it matters
            alone = experiment.replace(teacher=None, start=None, start_recipe=None)
            job = task(alone)
            untrained = Run(alone, Path(folder), (), {}, False, job.initial, job.initial_state, job.apart())
            compress(untrained, Recipe(dtype="int8"))
        return self.say(self._outcome())


def _named(recipe: Recipe) -> str:
    return slug(recipe).replace("-", " ")


def _whole(run: StoredRun) -> Run:
    """Return a run with its model, from the store where only its records are at hand."""
    if isinstance(run, Run):
        return run
    if run.older or (found := find(run.experiment)) is None:
        raise StoreError("this run was made by older code: press Run to train it again")
    return found


class Workbench:
    """One person's work on the store: `session` trains, `compressor` measures, `points` and `marks` keep.

    `filter` and `axis` say what of it is shown, `base` is the run that compress controls act on, `study` what a knob
    that was varied was set to. `failed` is called with every error, who listens when there is something new to show.
    """

    def __init__(self, failed: Callable[[Exception], object] = nobody) -> None:
        self.marks, (earlier, self._damaged) = Marks(runs_folder()), history()
        self.points = Points(self.marks)
        self.session = Session(self._finished, failed, earlier, self.notify)
        self.compressor = Compressor(self.points, failed=failed, news=self.notify)
        self.filter, self.axis = Filter(), "zstd_bytes"
        self.recipe = Recipe()
        self.base: StoredRun | None = None
        self.study: tuple[str, list[tuple[Any, Experiment, Recipe]]] = "", []
        self._listener: Callable[..., object] = nobody
        self.whole = Event()  # once what earlier benches left has been read
        self.compressor.worker.ask(partial(self._read, earlier))
        self.compressor.wait(PATIENCE)

    def _read(self, earlier: Sequence[StoredRun]) -> None:
        try:
            self.points.read(earlier)
        finally:
            self.whole.set()
        self.notify()

    def listen(self, listener: Callable[..., object]) -> None:
        """Call `listener(soon=...)` whenever there is something new to show."""
        self._listener = listener

    def notify(self, soon: bool = True) -> None:
        """Say that there is something new to show."""
        self._listener(soon=soon)

    @property
    def store_error(self) -> str:
        """What of the store could not be read or written, "" if nothing."""
        names = ", ".join(self._damaged[:3]) + (" and more" if len(self._damaged) > 3 else "")
        left_out = f"{len(self._damaged)} stored run(s) cannot be read and are left out: {names}" if names else ""
        return "; ".join(filter(None, (left_out, self.marks.error)))

    def train(self, *experiments: Experiment, wrong: str = "") -> None:
        """Begin to train one after the other; what is `wrong` with the settings is answered in the status."""
        if wrong:
            self.session.refuse(f"Not started: {wrong}.")
        else:
            self.session.start(*experiments)
        self.notify()

    def aim(self, experiment: Experiment) -> None:
        """Have compress controls act on the stored run of these settings, if there is one."""
        self.session.refuse("") if not self.session.busy else None
        stored = (run for run in self.session.known if run.experiment == experiment and not run.older)
        run = next((run for run in stored if run.status == "finished"), self.base)
        if run and run is not self.base:
            self.base = run
            self.compressor.rest(f"These controls act on a stored run: {difference(experiment, Experiment())}.")
        self.notify()

    def measure(self, recipe: Recipe, wrong: str = "", delay: float = 0.0, drag: bool = False) -> None:
        """Measure a recipe on the run at hand when it has stood for `delay` seconds, or say why not."""
        self.recipe = recipe
        if wrong:
            self.compressor.say(f"Not measured: {wrong}.")
        elif self.base:
            self.compressor.ask(self.base, recipe, delay, drag)
        else:
            self.compressor.say(NO_RUN)

    def vary(self, name: str, experiment: Experiment, recipe: Recipe) -> None:
        """Have one knob tried over its range, all else as it is: what does it do?"""
        owner = recipe if name in Recipe.model_fields else experiment
        tried: list[tuple[Any, Any]] = []
        for value in values_over(owner, name):
            with suppress(ValueError):  # what does not go together is left out
                tried.append((value, owner.replace(**{name: value})))
        if owner is not recipe and self.session.busy:
            self.session.start(experiment)  # says that it is refused
        elif owner is not recipe:
            self.study = name, [(value, one, recipe) for value, one in tried]
            self.train(*(one for _, one in tried))
        elif self.base:
            self.study = name, [(value, self.base.experiment, one) for value, one in tried]
            self.compressor.also(self.base, *(one for _, one in tried))
        else:
            self.compressor.say(NO_RUN)

    def studied(self) -> tuple[str, list[tuple[Any, Row | None]]]:
        """The knob that was varied last and its values, each with its point where that is known."""
        known = {(point.run.experiment, slug(point.recipe)): point for point in self.points.all}
        name, tried = self.study
        found = [(value, known.get((experiment, slug(recipe)))) for value, experiment, recipe in tried]
        return name, [(value, self.points.row(point) if point else None) for value, point in found]

    def pin(self, name: str) -> None:
        """Name the current point; pinning again renames it."""
        if self.points.current:
            self.marks.name(self.points.current.key, name)
        self.notify()

    def hide(self) -> None:
        """Take the current point out of plot and table."""
        if self.points.current:
            self.marks.hide(self.points.current.key)
        self.notify()

    def undo(self) -> None:
        """Take back the last name or hiding."""
        self.marks.undo()
        self.notify()

    def name_run(self, key: str, name: str) -> None:
        """Name a run."""
        self.marks.name(key, name)
        self.notify()

    def hide_run(self, key: str) -> None:
        """Take a run and its points out of sight, or bring them back."""
        (self.marks.show if self.marks[key].hidden else self.marks.hide)(key)
        self.notify()

    def settings(self, key: str) -> Experiment | None:
        """Return the settings of a run, by its key."""
        return next((run.experiment for run in self.session.known if run.key == key), None)

    def choose(self, number: int) -> None:
        """Make any point the current one, and its run that which compress controls act on."""
        point = self.points.all[number - 1]
        self.base, self.recipe = point.run, point.recipe
        self.compressor.choose(number)

    def export(self, folder: str | Path) -> Path:
        """Write the current point to a folder with its card, settings, table and report; return the folder's path.

        Raises ValueError without a point, StoreError when the folder cannot be written or holds other files.
        """
        current = self.points.current
        if current is None or current.artifact is None:
            raise ValueError("there is no point to export yet: press Run first")
        return export(folder, current.artifact, current.run, self.points.shown(current.run.experiment))

    def export_later(self, folder: str) -> None:
        """Export below the working folder, numbered where that exists; where to, or why not, is said in the status."""
        self.compressor.do("Exporting.", partial(self._exported, Path(folder.strip() or "my-model")))

    def _exported(self, wanted: Path) -> str:
        first = place = (Path.cwd() / wanted).resolve()
        number = 1
        if first == (here := Path.cwd().resolve()) or not first.is_relative_to(here):
            raise StoreError(f"{wanted} lies outside this notebook's folder: name a folder inside it")
        while place.exists():
            place = first.with_name(f"{first.name}-{(number := number + 1)}")
        return f"Exported to {self.export(place)}: open report.html there."

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on, at most `timeout` seconds; whether that is so. Latencies wait for runs."""
        end = monotonic() + (math.inf if timeout is None else timeout)
        workers = self.session.worker, self.compressor.worker
        while any(worker.busy or (worker.resting and not training()) for worker in workers):
            for worker in workers:
                if not worker.wait(min(end - monotonic(), 3600), resting=not training()):
                    return False
        return True

    def close(self) -> None:
        """Stop the run under way, drop what waits, and take nothing more."""
        self.listen(nobody)
        self.session.close()
        self.compressor.worker.close()
        self.whole.set()  # nobody reads what is left

    def _finished(self, run: Run) -> None:
        self.base = run
        self.compressor.also(run, self.recipe)


def earlier_curves(
    session: Session, marks: Marks, asked: Experiment, wanted: Filter = ALL
) -> list[tuple[str, StoredRun]]:
    """Return the latest runs that a filter takes, besides the current one and hidden ones, each with a label.

    That is its name, or what sets it apart from the current run; before the first, from what is `asked`.
    """
    current, here = session.experiment or asked, session.runs
    others = [
        run
        for run in session.known
        if run.experiment != session.stage
        and not marks[run.key].hidden
        and wanted.takes(run.experiment, current, marks[run.key].name, run.measured["when"], run in here)
    ]
    return [(marks[run.key].name or _label(run.experiment, current), run) for run in others[-BEHIND:]]


def _label(earlier: Experiment, current: Experiment) -> str:
    part = role(earlier, current)
    return f"{part} {earlier.model}" if part else difference(earlier, current) or "these settings"


def values_over(settings: Settings, name: str) -> list[Any]:
    """Return what a knob can be set to: all its choices, or `STEPS` numbers over its useful span."""
    info = type(settings).model_fields[name]
    extra: Any = info.json_schema_extra
    if name == "seed":
        return [getattr(settings, name) + step for step in range(SEEDS)]
    if extra["span"] is None:
        return list(get_args(info.annotation)) or [getattr(settings, name)]
    (low, high), log = extra["span"], extra["log"]
    ends = [math.log(low), math.log(high)] if log else [low, high]
    steps = [ends[0] + (ends[1] - ends[0]) * step / (STEPS - 1) for step in range(STEPS)]
    found = [float(f"{math.exp(one) if log else one:.2g}") for one in steps]
    return list(dict.fromkeys(round(one) if info.annotation is int else one for one in found))
