"""The live side of the workbench, without a widget: runs and recipes in, points out, in a thread of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from threading import Event, Lock, Timer, main_thread

from fedlab_kit.deployment.artifact import Artifact, compress, load, recall, slug
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.setup import task
from fedlab_kit.files import StoreError, spare_folder
from fedlab_kit.lab.points import Points, said
from fedlab_kit.run import Run
from fedlab_kit.settings import complaint

DELAY = 0.08  # seconds that a recipe must stand before it is measured, so that a drag ends in one point
PARTS = ("onnx", "onnxscript", "onnxruntime.quantization", "torch._dynamo", "torch_pruning", "matplotlib.figure")
NO_RUN = "Press Run first: these controls act on a finished run."

# One thread for all benches: the exporter is not made for two at a time, and latencies want the machine to themselves.
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="compress")


class Compressor:
    """Measures the newest recipe that it was asked for; everything else may be read at any moment.

    `points` holds what was measured, `status` says what is going on in a sentence or two, `error` what went wrong last
    ("" if nothing did). `occupied` says whether a run needs the processor more urgently than a preparation does,
    `failed` is called with the words of every error. An artifact that the disk does not take is kept all the same, in
    a temporary folder, and the status says so.
    """

    def __init__(
        self,
        points: Points,
        occupied: Callable[[], bool] = lambda: False,
        failed: Callable[[str], None] = lambda error: None,
    ) -> None:
        self.points = points
        self.status, self.error = NO_RUN, ""
        self._unstored = ""
        self._occupied, self._failed = occupied, failed
        self._lock, self._news = Lock(), Event()
        self._asked: tuple[Run, Recipe] | None = None
        self._due = 0.0
        self._jobs = 0

    @property
    def busy(self) -> bool:
        """Whether something is being measured or prepared."""
        return self._jobs > 0

    @property
    def artifact(self) -> Artifact | None:
        """The artifact of the current point."""
        return self.points.current.artifact if self.points.current else None

    def ask(self, run: Run, recipe: Recipe, delay: float = 0.0) -> None:
        """Measure a recipe on a run as soon as it has stood for `delay` seconds; the latest wins.

        The uncompressed file of the run is measured first, once.
        """
        with self._lock:
            self._due = time.monotonic() + delay
            waiting, self._asked = self._asked is not None, (run, recipe)
        if not waiting:
            self._submit(self._answer)

    def choose(self, number: int) -> None:
        """Make any point the current one; one of an earlier bench is opened for that."""
        self._submit(self._choose, number)

    def do(self, doing: str, job: Callable[[], str]) -> None:
        """Do something else that takes time, after what was asked for before; the job returns what to say then."""
        self._submit(self._do, doing, job)

    def prepare(self, experiment: Experiment) -> None:
        """Load the exporter and export the experiment's model once, untrained: that takes seconds the first time."""
        self.say("Preparing the exporter, once: this takes some seconds.")
        self._submit(self._prepare, experiment)

    def say(self, text: str) -> None:
        """Put something into the status."""
        self.status = text
        self._news.set()

    def watch(self, timeout: float) -> None:
        """Wait until something has changed since the last call, at most `timeout` seconds."""
        self._news.wait(timeout)
        self._news.clear()

    def _submit(self, job: Callable[..., None], *arguments: object) -> None:
        with self._lock:
            self._jobs += 1
        _WORKER.submit(self._guard, job, *arguments)

    def _later(self, seconds: float, job: Callable[..., None], *arguments: object) -> None:
        """Do a job after what others have asked for by then: nobody waits inside the worker that all benches share."""
        with self._lock:
            self._jobs += 1
        timer = Timer(seconds, _WORKER.submit, (self._guard, job, *arguments))
        timer.daemon = True
        timer.start()

    def _guard(self, job: Callable[..., None], *arguments: object) -> None:
        try:
            job(*arguments)
        except Exception as error:
            # Whatever it was, the person at the screen must see it: a thread's traceback goes nowhere in a notebook.
            self.error = complaint(error)
            self.say(f"Error: {self.error}")
            self._failed(self.error)
        finally:
            with self._lock:
                self._jobs -= 1
            self._news.set()

    def _answer(self) -> None:
        if (left := self._due - time.monotonic()) > 0:
            return self._later(left, self._answer)
        with self._lock:
            asked, self._asked = self._asked, None
        if asked is None:
            return
        run, recipe = asked
        self.error = self._unstored = ""
        for one in dict.fromkeys((Recipe(), recipe)):
            point = self.points.find(run, one)
            if point and (known := point.artifact or self._known(run, one)):
                self.points.count(self.points.opened(point, known))
                continue
            self.say(f"Measuring {slug(one).replace('-', ' ')}.")
            self.points.add(run, one, self._made(run, one))
        if found := self.points.find(run, recipe):
            self.points.show(found)
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

    def _choose(self, number: int) -> None:
        self.error = self._unstored = ""
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
        return f"{said(self.points.row(current))} {self._unstored}".rstrip() if current else NO_RUN

    def _prepare(self, experiment: Experiment, parts: Sequence[str] = PARTS) -> None:
        # Loading and exporting hold the interpreter that a run's rounds need, and the worker that other benches need:
        # this gives way to both, part by part, and is needless once a point was asked for.
        if self.points.current:
            return None
        if self._occupied() and self._asked is None and main_thread().is_alive():
            return self._later(0.05, self._prepare, experiment, parts)
        if parts:
            import_module(parts[0])
            return self._later(0.0, self._prepare, experiment, parts[1:])
        with tempfile.TemporaryDirectory() as folder, suppress(ValueError):  # what is wrong is said when it matters
            alone = experiment.replace(teacher=None, start=None, start_recipe=None)
            job = task(alone)
            untrained = Run(alone, Path(folder), (), {}, False, job.initial, job.initial_state, job.apart())
            compress(untrained, Recipe(dtype="int8"))
        self.say(self._outcome())
