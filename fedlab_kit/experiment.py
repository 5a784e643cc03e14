"""What is asked for: `Experiment` fixes the rounds, `Recipe` what is done to the trained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from fedlab_kit.settings import Clash, Settings, knob

SCHEMA = 1  # raised when the meaning of a stored field changes
OVERLAP = frozenset({"mnist", "mnist_5k"})  # one's training set holds the other's validation and test pictures
STEPPING = ("fedavg", "fedprox", "fedavgm", "scaffold", "feddf", "median")  # strategies with a server's learning rate


class Recipe(Settings):
    """What is done to the trained model before it is written as an artifact; it changes nothing in the rounds.

    Example: `Recipe(prune="channel", prune_ratio=0.5, dtype="int8", quantization="static")`.
    """

    prune: Literal["weight", "channel"] = knob("weight", "Prune", "compress")
    """Weight pruning writes zeros and keeps every shape; channel pruning removes whole channels."""
    prune_ratio: float = knob(0.0, "Prune ratio", "compress", ge=0, lt=1, span=(0, 0.95), step=0.05)
    """Share of the weights (or channels) removed."""
    dtype: Literal["fp32", "fp16", "int8", "int4", "int2"] = knob("fp32", "Dtype", "compress")
    """Number format of the weights in the file."""
    keep: Literal["none", "ends"] = knob("none", "Keep", "compress", when={"dtype": ("int4", "int2")})
    """Ends: the first and the last layer, where few bits hurt most, are stored in int8."""
    quantization: Literal["dynamic", "static"] = knob("static", "Quantization", "compress", when={"dtype": ("int8",)})
    """int8 only: how activations are computed. Static: in int8, with ranges that the clients measure beforehand.
    Dynamic: in int8 in Linear layers, with ranges measured at each prediction, and in floats elsewhere."""
    calibration: Literal["minmax", "percentile", "entropy"] = knob(
        "minmax", "Calibration", "compress", when={"dtype": ("int8",), "quantization": ("static",)}
    )
    """Static int8 only. What the range of an activation is to hold: every value (minmax), the middle 99.5 % of them
    (percentile), or those whose histogram changes least in 8 bits (entropy); one wild value ruins minmax."""


class Experiment(Settings):
    """Everything that happens in the federated rounds; equal experiments give equal runs.

    Example: `Experiment(model="mlp", clients=50, partition="shards", rounds=30)`.
    """

    dataset: str = knob("mnist_5k", "Data set", "data", source="dataset")
    """What the clients' samples are drawn from."""
    model: str = knob("cnn", "Model", "training", source="model")
    """The network that every client trains."""
    clients: int = knob(20, "Clients", "data", ge=1, le=1_000_000, span=(2, 100))
    """How many clients hold data."""
    clients_per_round: int = knob(10, "Clients per round", "data", ge=1, span=(1, 50))
    """The cohort: clients sampled in one round."""
    partition: Literal["iid", "dirichlet", "shards", "site", "hands"] = knob("hands", "Partition", "data")
    """How samples are dealt out: evenly (iid), with skewed labels (dirichlet), two labels or so per client (shards), as
    the data set's own sites hold them (site), or evenly with every client writing its pictures in its own hand (hands):
    turned, slanted, thick or thin, pale, cluttered."""
    alpha: float = knob(
        0.5, "Alpha", "data", gt=0, le=1000, span=(0.05, 100), log=True, when={"partition": ("dirichlet",)}
    )
    """Dirichlet concentration: 0.1 is very skewed, 100 is nearly even."""
    missing: tuple[int, ...] = knob((), "Missing classes", "data")
    """Classes, by number, of which no client has a training sample; validation and test keep theirs."""
    rounds: int = knob(60, "Rounds", "training", ge=1, le=100_000, span=(1, 100))
    """How often the server averages."""
    local_epochs: int = knob(1, "Local epochs", "training", ge=1, le=1000, span=(1, 10))
    """Passes over a client's own samples in one round."""
    batch_size: int = knob(10, "Batch size", "training", ge=1, le=100_000, span=(1, 64))
    """Samples in one local step."""
    lr: float = knob(0.05, "Learning rate", "training", gt=0, le=10, span=(0.001, 1), log=True)
    """Step size of the clients' SGD."""
    strategy: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "feddf", "median"] = knob(
        "fedavg", "Strategy", "training"
    )
    """How updates are made and combined. A mean trusts its clients: whoever lies by less than 100 times the length of
    the others' updates moves it as far; the median alone limits what one client can do."""
    normalization: Literal["shared", "own"] = knob("shared", "Normalization", "training")
    """Own: each client keeps its normalization layers to itself (FedBN, Li et al. 2021); accuracy is then that of every
    client's own model on its own part of the validation samples."""
    proximal_mu: float = knob(
        0.01, "Proximal mu", "training", ge=0, le=100, span=(0.0001, 1), log=True, when={"strategy": ("fedprox",)}
    )
    """FedProx: pull of the local weights towards the global ones."""
    server_lr: float = knob(
        1.0, "Server learning rate", "training", gt=0, le=10, span=(0.1, 2), step=0.1, when={"strategy": STEPPING}
    )
    """Step along the averaged update; 1 is plain averaging."""
    server_momentum: float = knob(
        0.9, "Server momentum", "training", ge=0, lt=1, span=(0, 0.99), step=0.01, when={"strategy": ("fedavgm",)}
    )
    """FedAvgM: share of the previous step that is kept."""
    adam_lr: float = knob(
        0.03,
        "FedAdam learning rate",
        "training",
        gt=0,
        le=1,
        span=(0.001, 0.3),
        log=True,
        when={"strategy": ("fedadam",)},
    )
    """FedAdam: largest step of one weight in one round."""
    dropout: float = knob(0.0, "Drop-out", "data", ge=0, lt=1, span=(0, 0.9), step=0.05)
    """Chance that a sampled client does not answer."""
    devices: Literal["equal", "unequal", "sliced"] = knob("equal", "Devices", "data")
    """Unequal: from workstation to bedside monitor, each with its own speed and link. Sliced: besides, a device too
    small for the model trains a narrow slice of it."""
    deadline: float = knob(
        0.0, "Deadline", "data", ge=0, le=1e6, span=(0, 5), step=0.1, when={"devices": ("unequal", "sliced")}
    )
    """Seconds after which a round no longer waits for an answer; 0 waits for all."""
    mask_ratio: float = knob(0.0, "Mask ratio", "rounds", ge=0, lt=1, span=(0, 0.95), step=0.05)
    """Share of the weights that are zero at the end, pruned while training."""
    mask_schedule: Literal["gradual", "one-shot", "dynamic", "fixed"] = knob("gradual", "Mask schedule", "rounds")
    """Gradual: more and more small weights go, until 60 % of the rounds. One-shot: all at half time. Dynamic: a sparse
    start whose smallest weights are exchanged. Fixed: a random mask that never changes, for comparison."""
    qat: Literal["off", "int8", "int4", "int2"] = knob("off", "Quantization-aware training", "rounds")
    """Clients compute with weights rounded to the grid of the later file, so that the model learns to live with it."""
    qat_keep: Literal["none", "ends"] = knob("none", "Keep while training", "rounds", when={"qat": ("int4", "int2")})
    """Ends: the first and the last layer learn to live with int8, for a recipe that keeps them so."""
    teacher: Experiment | None = knob(None, "Teacher", "rounds")
    """A finished experiment whose model the clients learn from."""
    temperature: float = knob(4.0, "Temperature", "rounds", gt=0, le=100, span=(1, 20), step=0.5)
    """Softens the teacher's answers: 1 leaves them, 20 shows mainly which wrong answers are close."""
    distill_weight: float = knob(0.5, "Distill weight", "rounds", ge=0, le=1, span=(0, 1), step=0.05)
    """Share of the teacher's soft answers in the loss; the rest is the true label."""
    server_epochs: int = knob(2, "Server epochs", "rounds", ge=1, le=1000, span=(1, 10), when={"strategy": ("feddf",)})
    """FedDF: passes over the public samples after each average."""
    start: Experiment | None = knob(None, "Start", "rounds")
    """A finished experiment whose final model is where this one begins, also on newer data."""
    start_recipe: Recipe | None = knob(None, "Start recipe", "rounds")
    """What is pruned from that model before round one."""
    uplink: str = knob("fp32", "Uplink codec", "wire", source="codec")
    """How a client's update is packed on its way to the server."""
    uplink_keep: float = knob(
        0.01, "Uplink keep", "wire", gt=0, le=1, span=(0.001, 1), log=True, when={"uplink": ("topk", "stc")}
    )
    """topk and stc: the share of entries that is sent."""
    downlink: str = knob("fp32", "Downlink codec", "wire", source="codec")
    """How the server packs the model; all but fp32 send the difference to what the client was sent last."""
    downlink_keep: float = knob(
        0.04, "Downlink keep", "wire", gt=0, le=1, span=(0.001, 1), log=True, when={"downlink": ("topk", "stc")}
    )
    """topk and stc: the share of entries that is sent."""
    bucket: int = knob(512, "Bucket", "wire", ge=1, le=1_000_000, span=(16, 4096), log=True)
    """How many neighbouring entries share a scale in the low-bit codecs."""
    rounding: Literal["stochastic", "nearest"] = knob("stochastic", "Rounding", "wire")
    """Low-bit codecs: stochastic is right on average, nearest has the smaller error."""
    error_feedback: bool = knob(True, "Error feedback", "wire")
    """A client keeps what its codec lost and adds it to its next update; unbiased codecs need none."""
    zstd: bool = knob(False, "zstd", "wire")
    """Squeeze every payload by zstd as well."""
    privacy: Literal["off", "client", "record"] = knob("off", "Differential privacy", "privacy")
    """Client: the trusted server clips each update and adds noise to the sum; for 1,000 clients and more. Record: each
    client clips and noises the gradients of its own samples; for a few large sites."""
    clip_norm: float = knob(
        1.0, "Clip norm", "privacy", gt=0, le=1000, span=(0.01, 10), log=True, when={"privacy": ("client", "record")}
    )
    """Longest update (client) or gradient of one sample (record) that is let through."""
    noise_multiplier: float = knob(
        1.0, "Noise multiplier", "privacy", ge=0, le=100, span=(0, 5), step=0.1, when={"privacy": ("client", "record")}
    )
    """Standard deviation of the noise, in clip norms."""
    seed: int = knob(7, "Seed", "training", ge=0, le=2**32 - 1)
    """Start of every random choice: weights, partition, cohorts, batches."""
    device: Literal["cpu", "cuda"] = knob("cpu", "Device", "training")
    """Where the clients' steps are computed."""

    @field_validator("teacher", "start", "start_recipe", mode="before")
    @classmethod
    def _from_json(cls, value: Any, info: ValidationInfo) -> Any:
        kind = Recipe if info.field_name == "start_recipe" else Experiment
        return kind(**value) if isinstance(value, dict) else value

    @field_validator("missing", mode="before")
    @classmethod
    def _in_order(cls, value: Any) -> Any:
        """Take a list, as JSON has it, in any order: equal experiments are equal values."""
        if not isinstance(value, list | tuple) or any(type(one) is not int or one < 0 for one in value):
            raise ValueError("no classes")  # which is worded as for any field
        return tuple(sorted(set(value)))

    @property
    def parents(self) -> tuple[Experiment, ...]:
        """The experiments whose final model this one needs."""
        return tuple(parent for parent in (self.start, self.teacher) if parent is not None)

    @property
    def lineage(self) -> tuple[Experiment, ...]:
        """All that is trained for this one, each once and before what needs it; itself last."""
        return tuple(dict.fromkeys([*(one for parent in self.parents for one in parent.lineage), self]))

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        for field, why in (*self._clashes_with_parents(), *self._clashes()):
            raise Clash(field, f"must {why}")
        return self

    def _clashes_with_parents(self) -> Iterator[tuple[str, str]]:
        """Say which field does not go with what the experiment builds on, and what it must do."""
        if self.teacher is not None and self.teacher.dataset != self.dataset:
            yield "teacher", f"be trained on dataset {self.dataset!r}, got {self.teacher.dataset!r}"
        if self.start is not None and self.start.model != self.model:
            yield "start", f"have model {self.model!r}, got {self.start.model!r}"
        if self.start_recipe is not None and (self.start is None or self.start_recipe.dtype != "fp32"):
            yield "start_recipe", "come with a start and prune only (dtype fp32): training needs floats"
        if 0 < self.mask_ratio < (begun := self._pruned_of()):
            yield "mask_ratio", f"be 0 or at least {begun:g}, what its start is pruned of: got {self.mask_ratio:g}"
        for name in {one.dataset for one in self.lineage[:-1]} - {self.dataset}:
            if {name, self.dataset} <= OVERLAP:
                yield "dataset", f"not share pictures with a parent's, which is {name!r}: got {self.dataset!r}"
        if any(parent.normalization == "own" for parent in self.parents):
            yield "normalization", "be shared in a start or a teacher: each client has a model of its own"

    def _clashes(self) -> Iterator[tuple[str, str]]:
        """Say which field does not go with the others, and what it must do."""
        mean = self.strategy not in ("scaffold", "feddf", "median")
        if self.privacy == "client" and not mean:
            yield "strategy", f"be a plain mean for client-level privacy, got {self.strategy!r}"
        if self.privacy == "record" and (self.teacher is not None or self.qat != "off"):
            yield "privacy", "be off or client together with a teacher or qat, got 'record'"
        if self.privacy != "off" and self.mask_ratio and self.mask_schedule == "dynamic":
            yield "mask_schedule", "not be dynamic with privacy: it sends raw gradients, got 'dynamic'"
        if self.devices == "sliced" and not mean:
            yield "strategy", f"be a mean of updates for sliced devices, got {self.strategy!r}"
        pruned = self.start_recipe is not None and self.start_recipe.prune == "weight"
        if self.devices == "sliced" and (self.mask_ratio or self.privacy == "client" or pruned):
            yield "devices", "be equal or unequal with a mask or client-level privacy, got 'sliced'"
        if self.clients_per_round > self.clients:
            yield "clients_per_round", f"be at most clients ({self.clients}), got {self.clients_per_round}"

    def _pruned_of(self) -> float:
        """Return the share of weights that is gone before round one."""
        recipe = self.start_recipe
        mine = recipe.prune_ratio if recipe is not None and recipe.prune == "weight" else 0.0
        return 0.0 if self.start is None else max(mine, self.start.mask_ratio, self.start._pruned_of())
