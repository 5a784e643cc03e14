"""The report of an export: one HTML page that needs nothing beside it, with the plots as pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.experiment import Recipe
from fedlab_kit.lab.client_figures import MOST, accuracy_of_each, labels_held
from fedlab_kit.lab.figures import accuracy_against, accuracy_curve, to_html
from fedlab_kit.lab.style import human_bytes, human_ms, percent, with_interval
from fedlab_kit.run import StoredRun
from fedlab_kit.wire.privacy import outside

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 2px 1.5rem 2px 0; border-bottom: 1px solid #80808055; }
th { font-weight: 400; }
pre { overflow-x: auto; padding: 0.7rem; border: 1px solid #80808055; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #181818; } }
"""


def report(artifact: Artifact, run: StoredRun, points: Sequence[Mapping[str, Any]], code: str) -> str:
    """Return the page: what was measured on the artifact (its test split is open), plots, settings and `code`."""
    title = f"{run.experiment.model} on {run.dataset.name}: {artifact.path.name}"
    sections = [
        ("Measured on the file", _table(measured(artifact, run))),
        ("Accuracy per round", _curve(run)),
        ("Accuracy against size", _scatter(artifact, points)),
        *([("Clients", _clients(run))] if run.experiment.clients <= MOST else []),
        ("Settings", _settings(run, artifact)),
        ("Make it again", f"<pre>{escape(code)}</pre>"),
    ]
    body = "\n".join(f"<section><h2>{heading}</h2>\n{content}</section>" for heading, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
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
        "Latency of one prediction": f"{human_ms(artifact.latency_ms)}, {artifact.threads} thread",
        "Parameters": f"{artifact.parameters:,}, {percent(artifact.sparsity)} of the stored weights are zero",
        "Uplink, all rounds": human_bytes(run.uplink_bytes),
        "Downlink, all rounds": human_bytes(run.downlink_bytes),
        "Trained": f"{len(run.records)} rounds in {about['seconds']:.1f} s, {about['when']}, {about['machine']}",
        "SHA-256": artifact.digest,
        **note,
    }


def _curve(run: StoredRun) -> str:
    return to_html(accuracy_curve(run.records))


def _scatter(artifact: Artifact, points: Sequence[Mapping[str, Any]]) -> str:
    """Draw the points by both sizes, the exported one ringed."""
    current = next((i for i, point in enumerate(points) if Path(point["path"]).name == artifact.path.name), None)
    return "\n".join(to_html(accuracy_against(points, axis, current=current)) for axis in ("bytes", "zstd_bytes"))


def _clients(run: StoredRun) -> str:
    """Draw who held which labels, and how the final model fares for each client."""
    return f"{labels_held(run.experiment)}\n{accuracy_of_each(run.experiment, run.records[-1])}"


def _settings(run: StoredRun, artifact: Artifact) -> str:
    """Return the settings that differ from the defaults, and all of them folded below."""
    changed, every = run.experiment.changes(), dict(run.experiment)
    recipe = Recipe(**artifact.card["recipe"])
    chosen = {name: value for name, value in every.items() if name in changed} | dict(recipe)
    return f"{_table(chosen)}\n<details><summary>All settings</summary>{_table({**every, **dict(recipe)})}</details>"


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(value))}</td></tr>' for k, value in rows.items())
    return f"<table>{''.join(lines)}</table>"
