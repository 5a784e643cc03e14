"""`export`: an artifact to take home, as a folder with its card, its settings as code, the points and a report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlab_kit.deployment import measure
from fedlab_kit.deployment.artifact import Artifact, load, slug
from fedlab_kit.deployment.score import harmless
from fedlab_kit.experiment import Recipe
from fedlab_kit.files import StoreError, at, file_name, filling
from fedlab_kit.lab.chart import live_html
from fedlab_kit.lab.client_figures import MOST, accuracy_of_each, labels_held
from fedlab_kit.lab.figures import accuracy_against, accuracy_curve
from fedlab_kit.lab.style import human_bytes, human_ms, percent, with_interval
from fedlab_kit.lab.text import latency
from fedlab_kit.reproduce import reproduce
from fedlab_kit.run import StoredRun
from fedlab_kit.statistics import paired_loss
from fedlab_kit.wire.privacy import outside

CODE, POINTS, REPORT = "reproduce.py", "points.csv", "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
Rows = Sequence[Mapping[str, Any]]


def export(folder: str | Path, artifact: Artifact, run: StoredRun, points: Rows) -> Path:
    """Write a folder: the artifact, its model card, `reproduce.py`, `points.csv` and `report.html`; return its path.

    The test split is opened here: its accuracy is measured on the exported file and stands on the exported card.
    `points` are rows as `Bench.points` gives them. The folder appears whole or not at all, and one that holds an
    export of the same artifact is replaced. Raises StoreError when the folder holds anything else, or when the
    artifact is damaged or the folder cannot be written.
    """
    target = at(folder).absolute()
    _refuse_others(target, artifact)
    with filling(target) as made:
        _fill(made, artifact, run, points)
    return target


def _fill(folder: Path, artifact: Artifact, run: StoredRun, points: Sequence[Mapping[str, Any]]) -> None:
    """Write all files into a folder that nobody sees yet; the copy is checked against its digest as it is opened."""
    for file in _files(artifact):
        shutil.copyfile(artifact.path.with_name(file), folder / file)
    copy = load(folder / artifact.path.name)
    if copy.card["run"] != run.key:
        raise ValueError(
            f"{artifact.path.name} must be of the run it is exported with, {run.key}: it is of another one"
        )
    if copy.card["data"]["digest"] != run.dataset.digest:
        raise StoreError("the data set is another one now: press Run with this point's settings to make it again")
    copy.test()
    code = reproduce(run, Recipe(**artifact.card["recipe"]), artifact.digest)
    (folder / CODE).write_text(code, encoding="utf-8")
    _write_points(folder / POINTS, points)
    (folder / REPORT).write_text(report(copy, run, points, code), encoding="utf-8")


def _write_points(file: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with the names of their files only: folders of this machine mean nothing elsewhere.

    No spreadsheet takes text for a formula, see `harmless`.
    """
    import pandas

    table = pandas.DataFrame([{**point, "path": _file(point)} for point in points])
    table.rename(columns={"path": "file"}).map(harmless).to_csv(file, index=False)


def _files(artifact: Artifact) -> tuple[str, str]:
    return artifact.path.name, f"{artifact.path.name}.json"


def _refuse_others(target: Path, artifact: Artifact) -> None:
    """Raise StoreError, naming it, for anything in the way that is not an earlier export of the same artifact."""
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(f"{target} is a file: name a folder that does not exist yet")
    mine = {*_files(artifact), CODE, POINTS, REPORT}
    if others := sorted({path.name for path in target.iterdir()} - mine):
        raise StoreError(f"{target} holds other files ({', '.join(others[:3])}): name a folder that does not exist yet")


def report(artifact: Artifact, run: StoredRun, points: Rows, code: str) -> str:
    """Return one HTML page that needs nothing beside it: what was done, what came of it, and how to make it again.

    Both test splits are open: the artifact's and, where it is at hand, that of the fp32 file of the same run.
    """
    from jinja2 import Environment

    e, recipe = run.experiment, Recipe(**artifact.card["recipe"])
    plain = None if recipe == Recipe() else _baseline(run, points)
    current = next((i for i, row in enumerate(points) if _file(row) == artifact.path.name), None)
    drawn = [
        accuracy_curve(run.records),
        *(accuracy_against(points, x, current=current) for x in ("zstd_bytes", "bytes")),
    ]
    mine = measured(artifact, run)
    theirs = measured(plain, run) if plain else {}
    every = {**dict(e), **dict(recipe)}
    return Environment(autoescape=True).from_string(TEMPLATE.read_text("utf-8")).render(
        title=f"{e.model} trained by {e.clients:,} clients on {run.dataset.name}, as {slug(recipe).replace('-', ' ')}",
        result=_result(artifact, plain),
        rows=[(name, theirs.get(name, ""), value) for name, value in mine.items()],
        plain=plain,
        charts=live_html(*drawn),
        clients=f"{labels_held(e)}\n{accuracy_of_each(e, run.records[-1])}" if e.clients <= MOST else "",
        chosen={name: every[name] for name in every if name in {"seed", *e.changes(), *Recipe.model_fields}},
        every=every,
        code=code,
    )  # fmt: skip


def _file(row: Mapping[str, Any]) -> str:
    """Return the name of a point's file, "" where it could not be had."""
    return Path(row["path"]).name if row["path"] else ""


def _baseline(run: StoredRun, points: Rows) -> Artifact | None:
    """Return the fp32 file of the run among the points, with its test split opened; None if it is not whole."""
    name = f"{file_name(run.experiment.model)}-{run.key[:8]}-{slug(Recipe())}.onnx"  # rows of a sweep name no run
    for row in points:
        if _file(row) == name:
            try:
                found = load(row["path"])
            except StoreError:
                return None
            accuracy, interval = measure.accuracy(found.session, found.dataset.filled("test"))
            return replace(found, card={**found.card, "test": {"accuracy": accuracy, "interval": list(interval)}})
    return None


def _result(artifact: Artifact, plain: Artifact | None) -> str:
    """Say in a sentence what came of it: how much smaller, and what that cost on the test split."""
    test = artifact.card["test"]
    if plain is None:
        size = f"{human_bytes(artifact.bytes)}, {human_bytes(artifact.zstd_bytes)} with zstd"
        return f"{size}; {with_interval(test['accuracy'], *test['interval'])} on the test split."
    split = artifact.dataset.filled("test")
    right = [measure.logits(one.session, split.x).argmax(1) == split.y.numpy() for one in (plain, artifact)]
    lost, low, high, _ = (100 * value for value in paired_loss(*right))
    times = [getattr(plain, name) / getattr(artifact, name) for name in ("bytes", "zstd_bytes")]
    return (
        f"{times[0]:.1f} times smaller than its fp32 file ({times[1]:.1f} times with zstd), "
        f"{abs(lost):.1f} points of accuracy {'lost' if lost >= 0 else 'won'} on the test split "
        f"(95 % interval of the loss {low:.1f} to {high:.1f})."
    )


def measured(artifact: Artifact, run: StoredRun) -> dict[str, str]:
    """Say what the artifact's file and its run measured, with units."""
    test, about = artifact.card["test"], run.measured
    note = {"Note": artifact.note} if artifact.note else {}
    if run.experiment.privacy != "off":
        recipe = Recipe(**artifact.card["recipe"])
        note["Privacy"] = str(replace(run.privacy(), outside=outside(run.experiment, recipe)))
    return {
        "Accuracy on test": with_interval(test["accuracy"], *test["interval"]),
        "Accuracy on validation": with_interval(artifact.accuracy, *artifact.interval),
        "File": f"{human_bytes(artifact.bytes)} ({artifact.bytes:,} bytes)",
        "File, compressed with zstd": f"{human_bytes(artifact.zstd_bytes)} ({artifact.zstd_bytes:,} bytes)",
        "Latency of one prediction": f"{_latency(artifact)}, {artifact.threads} thread",
        "Parameters": f"{artifact.parameters:,}, {percent(artifact.sparsity)} of the stored weights are zero",
        "Uplink, all rounds": human_bytes(run.uplink_bytes),
        "Downlink, all rounds": human_bytes(run.downlink_bytes),
        "Trained": f"{len(run.records)} rounds in {about['seconds']:.1f} s, {about['when']}, {about['machine']}",
        "SHA-256": artifact.digest,
        **note,
    }


def _latency(artifact: Artifact) -> str:
    """Say how long one prediction takes, with its interval and its ratio to fp32 where it was timed beside that."""
    if not (about := artifact.card.get("latency")):
        return human_ms(artifact.latency_ms)
    timed = latency(about["low"], artifact.latency_ms, about["high"])
    return f"{timed}, {about['ratio']:.2f} of its fp32 file's"
