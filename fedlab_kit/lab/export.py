"""`export`: an artifact to take home, as a folder with its card, its settings as code, the points and a report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedlab_kit.deployment.artifact import Artifact, load
from fedlab_kit.experiment import Recipe
from fedlab_kit.files import StoreError, at, filling
from fedlab_kit.lab.report import report
from fedlab_kit.run import Run
from fedlab_kit.runs import sources

CODE, POINTS, REPORT = "reproduce.py", "points.csv", "report.html"


def export(folder: str | Path, artifact: Artifact, run: Run, points: Sequence[Mapping[str, Any]]) -> Path:
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


def reproduce(run: Run, recipe: Recipe, digest: str) -> str:
    """Return the settings as code: three lines that train and compress the same artifact again."""
    family = (*run.experiment.parents, run.experiment)
    own = dict.fromkeys(source for experiment in family for source in sources(experiment))
    head = [
        f"fedlab-kit {version('fedlab-kit')}, torch {torch.__version__}.",
        "On the same kind of processor the file's SHA-256 is",
        digest,
        *(["Register these first, as it was done in the notebook:"] if own else []),
        *(line for source in own for line in source.splitlines()),
    ]
    return (
        "\n".join(f"# {line}".rstrip() for line in head)
        + "\nfrom fedlab_kit import Experiment, Recipe, compress, train\n\n"
        + f"run = train({run.experiment!r})\nartifact = compress(run, {recipe!r})\n"
    )


def _fill(folder: Path, artifact: Artifact, run: Run, points: Sequence[Mapping[str, Any]]) -> None:
    """Write all files into a folder that nobody sees yet; the copy is checked against its digest as it is opened."""
    for file in _files(artifact):
        shutil.copyfile(artifact.path.with_name(file), folder / file)
    copy = load(folder / artifact.path.name)
    copy.test()
    code = reproduce(run, Recipe(**artifact.card["recipe"]), artifact.digest)
    (folder / CODE).write_text(code, encoding="utf-8")
    _write_points(folder / POINTS, points)
    (folder / REPORT).write_text(report(copy, run, points, code), encoding="utf-8")


def _write_points(file: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with the names of their files only: folders of this machine mean nothing elsewhere."""
    import pandas

    table = pandas.DataFrame([{**point, "path": Path(point["path"]).name} for point in points])
    table.rename(columns={"path": "file"}).to_csv(file, index=False)


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
