"""What is compressed: the final model of a run, or a trained module of one's own, with the data it is measured on."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedlab_kit import data
from fedlab_kit.data import Dataset, Split
from fedlab_kit.experiment import Recipe
from fedlab_kit.files import file_name
from fedlab_kit.identity import Unknowable, fingerprint
from fedlab_kit.models import Draws, check_output
from fedlab_kit.run import Run
from fedlab_kit.runs import runs_folder
from fedlab_kit.settings import complaint
from fedlab_kit.wire.privacy import outside

CALIBRATION = 256  # of a module's training samples, spread over all of them: they may lie class by class
STRANGER = "a trained module of one's own: it comes from no federation, and how it was trained is not known"


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model on the CPU, in evaluation mode, that compressing leaves as it is.

    `held` is what files are measured on, `calibration` each client's raw samples, `stem` begins the files' names, they
    go to `home / "artifacts"`; `facts` are the card's words on where it comes from, `privacy` those on what it gives
    away. `lasting` says whether what is made of it can be found again by its facts. `memo` holds what
    is worked out once.
    """

    name: str
    model: nn.Module
    dataset: Dataset
    held: Split
    calibration: Callable[[], list[Tensor]]
    stem: str
    home: Path
    facts: dict[str, Any]
    privacy: Callable[[Recipe], dict[str, Any]]
    lasting: bool = True
    memo: dict[str, Any] = field(default_factory=dict)


def subject_of(model: Any, client: int | None = None, dataset: Dataset | str | None = None) -> Subject:
    """Return what `compress` is given, made ready. Raises ValueError in one line where it cannot be compressed."""
    if isinstance(model, Subject):
        return model
    if isinstance(model, nn.Module):
        if client is not None:
            raise ValueError(f"client must be None for a module of one's own, got {client}")
        return of_module(model, dataset)
    if not hasattr(model, "records"):
        raise ValueError(f"model must be a Run or a trained torch.nn.Module, got {type(model).__name__}")
    if dataset is not None:
        raise ValueError("dataset must be None for a run, which has its own: it is for a module of one's own")
    return of_run(model, client)


def of_run(run: Run, client: int | None) -> Subject:
    """Return a run's model, or a client's own where each keeps its normalization. ValueError for the wrong `client`."""
    model, held = _whose(run, client)
    whose = "" if client is None else f"-client{client}"
    facts = {
        "experiment": run.experiment.model_dump(mode="json"),
        "run": run.key,
        "client": client,
        "module": None,
        "weights": fingerprint(model.state_dict()),  # somebody may have put others in
        "training": {
            "rounds": len(run.records),
            "seconds": sum(record.seconds for record in run.records),
            "uplink_bytes": run.uplink_bytes,
            "downlink_bytes": run.downlink_bytes,
        },
    }

    def calibration() -> list[Tensor]:
        return [run.dataset.train.x[s] for s in (run.shards if client is None else [run.shards[client]])]

    def privacy(recipe: Recipe) -> dict[str, Any]:  # an infinite epsilon is None, with why
        worth = run.privacy()
        epsilon = None if worth.why else worth.epsilon
        return {**asdict(worth), "epsilon": epsilon, "outside": list(outside(run.experiment, recipe))}

    stem = f"{file_name(run.experiment.model)}-{run.key[:8]}{whose}"
    return Subject(run.experiment.model, model, run.dataset, held, calibration, stem, run.path, facts, privacy)


def of_module(model: nn.Module, dataset: Dataset | str | None) -> Subject:
    """Return a copy of a trained module: on the CPU, in evaluation mode; the given one is not touched.

    `dataset` is a registered name or a Dataset. Its home is named by a digest of all that the module is and of the
    data. Raises ValueError in one line with the remedy for a module that cannot be compressed as it is.
    """
    known = data.load(dataset) if isinstance(dataset, str) else dataset
    if not isinstance(known, Dataset):
        got = type(known).__name__ if known is not None else None
        raise ValueError(f"dataset must be a registered name or an fk.Dataset for a module of one's own, got {got}")
    name, held = type(model).__name__, known.filled("validation")
    own, sample = _copied(model, name), known.preprocess(held.x[:1])
    with Draws(0).inside():  # whatever it draws, the caller's random numbers stay as they are
        for rows in (2, 1):  # one alone, too: that is how it is served
            check_output(name, own, torch.cat([sample] * rows), len(known.classes))
    try:
        digest, lasting = fingerprint(own, f"model {name}"), True
    except Unknowable:
        digest, lasting = fingerprint(own.state_dict()), False
    key = hashlib.sha256(f"{digest} {known.digest}".encode()).hexdigest()[:20]

    def calibration() -> list[Tensor]:
        x = known.filled("train").x
        return [x[:: -(-len(x) // CALIBRATION)]]

    def privacy(recipe: Recipe) -> dict[str, Any]:
        return {"level": "unknown", "epsilon": None, "delta": None, "why": STRANGER, "outside": []}

    module = {"class": name, "digest": digest, "origin": STRANGER}
    facts = {"experiment": None, "run": None, "client": None, "module": module, "weights": None, "training": None}
    home = runs_folder() / "modules" / key
    return Subject(name, own, known, held, calibration, f"module-{key[:8]}", home, facts, privacy, lasting)


def _copied(model: nn.Module, name: str) -> nn.Module:
    """Copy a module that is fit for it; ValueError names the tensor that is not, and the remedy."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"model {name} must have parameters, it has none: there is nothing to compress")
    for label, tensor in {**parameters, **dict(model.named_buffers())}.items():
        if is_lazy(tensor):
            raise ValueError(f"model {name} must have run once: {label} has no shape yet, pass one batch through it")
        if tensor.is_meta:
            raise ValueError(
                f"model {name} must have values, {label} is on the meta device: load trained weights first"
            )
        if (
            label in parameters
            and tensor.dtype != torch.float32
            and (tensor.is_floating_point() or tensor.is_complex())
        ):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"model {name} must be float32, {label} is {kind}: give copy.deepcopy(model).float()")
        if tensor.isnan().any() or (label in parameters and not tensor.isfinite().all()):  # a mask may be infinite
            raise ValueError(f"model {name} must have finite weights, {label} holds NaN or infinity: train it again")
    try:
        own = copy.deepcopy(model).cpu().eval()
    except Exception as error:
        raise ValueError(f"model {name} cannot be copied, it may hold what is no leaf: {complaint(error)}") from error
    for tensor in own.parameters():  # frozen or not is no matter of the file, and pruning follows gradients
        tensor.requires_grad_(tensor.is_floating_point())
    return own


def _whose(run: Run, client: int | None) -> tuple[nn.Module, Split]:
    """Return the model that is meant and the samples it is measured on."""
    held, own = run.dataset.validation, run.experiment.normalization == "own"
    if own != (client is not None):
        raise ValueError(
            f"client must be 0 to {run.experiment.clients - 1} where each has a model of its own, got None"
            if own
            else f"client must be None where normalization is shared, got {client}"
        )
    if client is None:
        return run.model, held
    assert run.task.owner is not None  # where normalization is the clients' own
    model, mine = run.client_model(client), run.task.owner == client
    if not mine.any():
        raise ValueError(f"client {client} has no validation samples to measure a file on")
    return model, Split(held.x[mine], held.y[mine])
