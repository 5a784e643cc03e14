"""An experiment as the settings of a Flower run, which are flat, and a round in one line of its log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedlab_kit import catalog
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.runs import parts

NESTED = ("teacher", "start", "start_recipe", "missing")  # travel as JSON text, "" for none


def write(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as the flat settings of a Flower run."""
    settings = experiment.changes()
    return {name: json.dumps(value) if name in NESTED else value for name, value in settings.items()}


def read(settings: Mapping[str, Any]) -> Experiment:
    """Return the experiment that a run's settings describe. Raises ValueError naming a field that is wrong."""
    values = dict(settings)
    for name in NESTED:
        text = values.pop(name, "")
        if text:
            values[name] = json.loads(text)
    return Experiment(**values)


def line(record: RoundRecord) -> str:
    """Return one round in one line."""
    said = [
        f"round {record.round:3}",
        f"accuracy {record.accuracy:6.1%}",
        f"answered {len(record.answered)} of {len(record.cohort)}",
        f"up {record.uplink_bytes:,} B",
        f"down {record.downlink_bytes:,} B",
        f"{record.seconds:.1f} s",
        *(f"client {client}: {why}" for client, why in record.refused),
        *([record.note] if record.note else []),
    ]
    return " | ".join(said)


def modules_of(experiment: Experiment) -> list[str]:
    """Return the modules, beside the package, that hold what the experiment uses. ValueError if one is no module."""
    own = {thing.__module__: thing.__qualname__ for thing in parts(experiment) if not catalog.is_built_in(thing)}
    if name := own.get("__main__"):
        raise ValueError(
            f"{name} is defined in a notebook or script: Flower's processes need it in a module of its own"
        )
    return sorted(set(own).union(*map(modules_of, experiment.parents)))
