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
from torch.nn.utils.weight_norm import WeightNorm

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

    `held` is what files are measured on, `calibration` each client's raw samples; files go to `home / "artifacts"` and
    their names begin with `stem`. `facts` are the card's words on where it comes from, `privacy` those on what it gives
    away, `lasting` whether what is made of it can be found again by its facts; `memo` holds what is worked out once.
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

    def about(self, recipe: Recipe) -> dict[str, Any]:
        """The part of the card that says where a file comes from, what it is and what to feed it."""
        known = self.dataset
        described = {"name": known.name, "digest": known.digest}
        return {
            **self.facts,
            "recipe": recipe.model_dump(mode="json"),
            "data": {**described, "classes": list(known.classes), "sites": list(known.sites)},
            "privacy": self.privacy(recipe),
            "preprocess": known.preprocess.to_dict(),
            "input": {
                "name": "x",
                "dtype": str(known.train.x.dtype).removeprefix("torch."),
                "batch": "any",
                "shape": list(known.shape),
                "features": list(known.features),
                "meaning": "a batch of raw values as stored; the graph preprocesses them",
            },
            "output": {"name": "logits", "shape": [len(known.classes)]},
        }


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
    held, own, asked = run.dataset.validation, run.experiment.normalization == "own", run.experiment
    if own != (client is not None):
        each = f"0 to {asked.clients - 1} where each has a model of its own, got None"
        raise ValueError(f"client must be {each if own else f'None where normalization is shared, got {client}'}")
    model, shards, whose = run.model if client is None else run.client_model(client), run.shards, ""
    if client is not None:
        assert run.task.owner is not None  # where normalization is the clients' own
        mine, shards, whose = run.task.owner == client, [run.shards[client]], f"-client{client}"
        if not mine.any():
            raise ValueError(f"client {client} has no validation samples to measure a file on")
        held = Split(held.x[mine], held.y[mine])
    training = {
        "rounds": len(run.records),
        "seconds": sum(record.seconds for record in run.records),
        "uplink_bytes": run.uplink_bytes,
        "downlink_bytes": run.downlink_bytes,
    }
    parent = {"experiment": asked.model_dump(mode="json"), "run": run.key, "client": client, "module": None}
    weights = fingerprint(model.state_dict())  # somebody may have put others in

    def privacy(recipe: Recipe) -> dict[str, Any]:
        """What the run's privacy is worth; an infinite epsilon is None, with why."""
        worth = run.privacy()
        epsilon = None if worth.why else worth.epsilon
        return {**asdict(worth), "epsilon": epsilon, "outside": list(outside(asked, recipe))}

    return Subject(
        asked.model,
        model,
        run.dataset,
        held,
        calibration=lambda: [run.dataset.train.x[shard] for shard in shards],
        stem=f"{file_name(asked.model)}-{run.key[:8]}{whose}",
        home=run.path,
        facts={**parent, "weights": weights, "training": training},
        privacy=privacy,
    )


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
    module = {"class": name, "digest": digest, "origin": STRANGER}
    return Subject(
        name,
        own,
        known,
        held,
        calibration=lambda: [_spread(known.filled("train").x)],
        stem=f"module-{key[:8]}",
        home=runs_folder() / "modules" / key,
        facts={**dict.fromkeys(("experiment", "run", "client", "weights", "training")), "module": module},
        privacy=lambda recipe: {"level": "unknown", "epsilon": None, "delta": None, "why": STRANGER, "outside": []},
        lasting=lasting,
    )


def _spread(x: Tensor) -> Tensor:
    return x[:: -(-len(x) // CALIBRATION)]


def _copied(model: nn.Module, name: str) -> nn.Module:
    """Copy a module that is fit for it; ValueError names the tensor that is not, and the remedy."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"model {name} must have parameters, it has none: there is nothing to compress")
    for label, tensor in {**parameters, **dict(model.named_buffers())}.items():
        trained, kind = label in parameters, str(tensor.dtype).removeprefix("torch.")
        number = tensor.is_floating_point() or tensor.is_complex()
        if is_lazy(tensor):
            raise ValueError(f"model {name} must have run once: {label} has no shape yet, pass one batch through it")
        if tensor.is_meta:
            raise ValueError(
                f"model {name} must have values, {label} is on the meta device: load trained weights first"
            )
        if trained and number and tensor.dtype != torch.float32:
            raise ValueError(f"model {name} must be float32, {label} is {kind}: give copy.deepcopy(model).float()")
        if tensor.isnan().any() or (trained and not tensor.isfinite().all()):  # a mask may be infinite
            raise ValueError(f"model {name} must have finite weights, {label} holds NaN or infinity: train it again")
    try:
        own = copy.deepcopy(model).cpu().eval()
    except Exception as error:  # torch, or whatever the module holds, refuses in its own way
        why = remedy(model) or f", it may hold what is no leaf: {complaint(error)}"
        raise ValueError(f"model {name} cannot be copied{why}") from error
    for tensor in own.parameters():  # frozen or not is no matter of the file, and pruning follows gradients
        tensor.requires_grad_(tensor.is_floating_point())
    return own


def remedy(model: nn.Module) -> str:
    """Name a layer that copying or exporting is known to stumble over, and what to do; "" where there is none."""
    for name, layer in model.named_modules():
        known = (
            (isinstance(layer, torch.jit.ScriptModule), "is scripted: put the module itself in its place"),
            (isinstance(layer, nn.EmbeddingBag), "is an EmbeddingBag: put an nn.Embedding and a mean there"),
            (isinstance(layer, nn.LSTM) and layer.proj_size > 0, "has a proj_size: leave that out"),
            (isinstance(layer, nn.TransformerEncoder), "may take a mask: call it with is_causal= beside mask="),
            (
                any(isinstance(hook, WeightNorm) for hook in layer._forward_pre_hooks.values()),
                "has torch's old weight_norm: use torch.nn.utils.parametrizations.weight_norm",
            ),
        )
        for is_so, advice in known:
            if is_so:
                return f"; {name or 'it'} {advice}"
    return ""
