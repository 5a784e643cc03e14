"""What is asked for: `Experiment` fixes the rounds, `Recipe` what is done to the trained model.

Every field carries its label, help text, range and group; the validation messages, the widgets and the
documentation are all made from that one place.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from fedlab_kit.settings import Settings, knob

SCHEMA = 1  # raised when the meaning of a stored field changes


class Recipe(Settings):
    """What is done to the trained model before it is written as an artifact; it changes nothing in the rounds.

    Example: `Recipe(prune="channel", prune_ratio=0.5, dtype="int8", quantization="static")`.
    """

    prune: Literal["weight", "channel"] = knob(
        "weight",
        "Prune",
        "Weight pruning writes zeros and keeps every shape; channel pruning removes whole channels.",
        group="compress",
    )
    prune_ratio: float = knob(
        0.0,
        "Prune ratio",
        "Share of the weights (or channels) removed.",
        group="compress",
        ge=0,
        lt=1,
        span=(0, 0.95),
        step=0.05,
    )
    dtype: Literal["fp32", "fp16", "int8", "int4"] = knob(
        "fp32", "Dtype", "Number format of the weights in the file.", group="compress"
    )
    quantization: Literal["dynamic", "static"] = knob(
        "static",
        "Quantization",
        "int8 only. Static: every layer, activation ranges measured by the clients beforehand. "
        "Dynamic: Linear layers only, ranges measured at each prediction.",
        group="compress",
        when={"dtype": ("int8",)},
    )


class Experiment(Settings):
    """Everything that happens in the federated rounds; equal experiments give equal runs.

    Example: `Experiment(model="mlp", clients=50, partition="shards", rounds=30)`.
    """

    dataset: str = knob(
        "digits", "Data set", "What the clients' samples are drawn from.", group="data", source="dataset"
    )
    model: str = knob("cnn", "Model", "The network that every client trains.", group="training", source="model")
    clients: int = knob(
        20, "Clients", "How many clients hold data.", group="data", ge=1, le=1_000_000, step=1, span=(2, 100)
    )
    clients_per_round: int = knob(
        10,
        "Clients per round",
        "The cohort: clients sampled in one round.",
        group="data",
        ge=1,
        step=1,
        span=(1, 50),
    )
    partition: Literal["iid", "dirichlet", "shards", "site"] = knob(
        "dirichlet",
        "Partition",
        "How samples are dealt out: evenly (iid), with skewed labels (dirichlet), two labels or so per client "
        "(shards), or as the data set's own sites hold them (site).",
        group="data",
    )
    alpha: float = knob(
        0.5,
        "Alpha",
        "Dirichlet concentration: 0.1 is very skewed, 100 is nearly even.",
        group="data",
        gt=0,
        le=1000,
        span=(0.05, 100),
        log=True,
        when={"partition": ("dirichlet",)},
    )
    rounds: int = knob(
        20,
        "Rounds",
        "How often the server averages.",
        group="training",
        ge=1,
        le=100_000,
        step=1,
        span=(1, 50),
    )
    local_epochs: int = knob(
        1,
        "Local epochs",
        "Passes over a client's own samples in one round.",
        group="training",
        ge=1,
        le=1000,
        step=1,
        span=(1, 10),
    )
    batch_size: int = knob(
        10,
        "Batch size",
        "Samples in one local step.",
        group="training",
        ge=1,
        le=100_000,
        step=1,
        span=(1, 64),
    )
    lr: float = knob(
        0.05,
        "Learning rate",
        "Step size of the clients' SGD.",
        group="training",
        gt=0,
        le=10,
        span=(0.001, 1),
        log=True,
    )
    strategy: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "feddf", "median"] = knob(
        "fedavg", "Strategy", "How updates are made and combined.", group="training"
    )
    proximal_mu: float = knob(
        0.01,
        "Proximal mu",
        "FedProx: pull of the local weights towards the global ones.",
        group="training",
        ge=0,
        le=100,
        span=(0.0001, 1),
        log=True,
        when={"strategy": ("fedprox",)},
    )
    server_lr: float = knob(
        1.0,
        "Server learning rate",
        "Step along the averaged update; 1 is plain averaging.",
        group="training",
        gt=0,
        le=10,
        span=(0.1, 2),
        step=0.1,
        when={"strategy": ("fedavg", "fedprox", "fedavgm", "scaffold", "feddf", "median")},
    )
    server_momentum: float = knob(
        0.9,
        "Server momentum",
        "FedAvgM: share of the previous step that is kept.",
        group="training",
        ge=0,
        lt=1,
        span=(0, 0.99),
        step=0.01,
        when={"strategy": ("fedavgm",)},
    )
    adam_lr: float = knob(
        0.03,
        "FedAdam learning rate",
        "FedAdam: largest step of one weight in one round.",
        group="training",
        gt=0,
        le=1,
        span=(0.001, 0.3),
        log=True,
        when={"strategy": ("fedadam",)},
    )
    dropout: float = knob(
        0.0,
        "Drop-out",
        "Chance that a sampled client does not answer.",
        group="data",
        ge=0,
        lt=1,
        span=(0, 0.9),
        step=0.05,
    )
    devices: Literal["equal", "unequal", "sliced"] = knob(
        "equal",
        "Devices",
        "Unequal: from workstation to bedside monitor, each with its own speed and link. Sliced: besides, a device too "
        "small for the model trains a narrow slice of it.",
        group="data",
    )
    deadline: float = knob(
        0.0,
        "Deadline",
        "Seconds after which a round no longer waits for an answer; 0 waits for all.",
        group="data",
        ge=0,
        le=1e6,
        span=(0, 5),
        step=0.1,
        when={"devices": ("unequal", "sliced")},
    )
    mask_ratio: float = knob(
        0.0,
        "Mask ratio",
        "Share of the weights that are zero at the end, pruned while training.",
        group="rounds",
        ge=0,
        lt=1,
        span=(0, 0.95),
        step=0.05,
    )
    mask_schedule: Literal["gradual", "one-shot", "dynamic", "fixed"] = knob(
        "gradual",
        "Mask schedule",
        "Gradual: more and more small weights go, until 60 % of the rounds. One-shot: all at half time. Dynamic: "
        "a sparse start whose smallest weights are exchanged. Fixed: a random mask that never changes, for comparison.",
        group="rounds",
    )
    qat: Literal["off", "int8", "int4"] = knob(
        "off",
        "Quantization-aware training",
        "Clients compute with weights rounded to the grid of the later file, so that the model learns to live with it.",
        group="rounds",
    )
    teacher: Experiment | None = knob(
        None, "Teacher", "A finished experiment whose model the clients learn from.", group="rounds"
    )
    temperature: float = knob(
        4.0,
        "Temperature",
        "Softens the teacher's answers: 1 leaves them, 20 shows mainly which wrong answers are close.",
        group="rounds",
        gt=0,
        le=100,
        span=(1, 20),
        step=0.5,
    )
    distill_weight: float = knob(
        0.5,
        "Distill weight",
        "Share of the teacher's soft answers in the loss; the rest is the true label.",
        group="rounds",
        ge=0,
        le=1,
        span=(0, 1),
        step=0.05,
    )
    server_epochs: int = knob(
        2,
        "Server epochs",
        "FedDF: passes over the public samples after each average.",
        group="rounds",
        ge=1,
        le=1000,
        step=1,
        span=(1, 10),
        when={"strategy": ("feddf",)},
    )
    start: Experiment | None = knob(
        None,
        "Start",
        "A finished experiment whose final model is where this one begins, also on newer data.",
        group="rounds",
    )
    start_recipe: Recipe | None = knob(
        None, "Start recipe", "What is pruned from that model before round one.", group="rounds"
    )
    uplink: str = knob(
        "fp32",
        "Uplink codec",
        "How a client's update is packed on its way to the server.",
        group="wire",
        source="codec",
    )
    uplink_keep: float = knob(
        0.01,
        "Uplink keep",
        "topk and stc: the share of entries that is sent.",
        group="wire",
        gt=0,
        le=1,
        span=(0.001, 1),
        log=True,
        when={"uplink": ("topk", "stc")},
    )
    downlink: str = knob(
        "fp32",
        "Downlink codec",
        "How the server packs the model; all but fp32 send the difference to what the client was sent last.",
        group="wire",
        source="codec",
    )
    downlink_keep: float = knob(
        0.04,
        "Downlink keep",
        "topk and stc: the share of entries that is sent.",
        group="wire",
        gt=0,
        le=1,
        span=(0.001, 1),
        log=True,
        when={"downlink": ("topk", "stc")},
    )
    bucket: int = knob(
        512,
        "Bucket",
        "How many neighbouring entries share a scale in the low-bit codecs.",
        group="wire",
        ge=1,
        le=1_000_000,
        step=1,
        span=(16, 4096),
        log=True,
    )
    rounding: Literal["stochastic", "nearest"] = knob(
        "stochastic",
        "Rounding",
        "Low-bit codecs: stochastic is right on average, nearest has the smaller error.",
        group="wire",
    )
    error_feedback: bool = knob(
        True,
        "Error feedback",
        "A client keeps what its codec lost and adds it to its next update; unbiased codecs need none.",
        group="wire",
    )
    zstd: bool = knob(False, "zstd", "Squeeze every payload by zstd as well.", group="wire")
    privacy: Literal["off", "client", "record"] = knob(
        "off",
        "Differential privacy",
        "Client: the trusted server clips each update and adds noise to the sum; for 1,000 clients and more. "
        "Record: each client clips and noises the gradients of its own samples; for a few large sites.",
        group="privacy",
    )
    clip_norm: float = knob(
        1.0,
        "Clip norm",
        "Longest update (client) or gradient of one sample (record) that is let through.",
        group="privacy",
        gt=0,
        le=1000,
        span=(0.01, 10),
        log=True,
        when={"privacy": ("client", "record")},
    )
    noise_multiplier: float = knob(
        1.0,
        "Noise multiplier",
        "Standard deviation of the noise, in clip norms.",
        group="privacy",
        ge=0,
        le=100,
        span=(0, 5),
        step=0.1,
        when={"privacy": ("client", "record")},
    )
    seed: int = knob(
        7,
        "Seed",
        "Start of every random choice: weights, partition, cohorts, batches.",
        group="training",
        ge=0,
        le=2**32 - 1,
    )
    device: Literal["cpu", "cuda"] = knob("cpu", "Device", "Where the clients' steps are computed.", group="training")

    @field_validator("teacher", "start", "start_recipe", mode="before")
    @classmethod
    def _from_json(cls, value: Any, info: ValidationInfo) -> Any:
        kind = Recipe if info.field_name == "start_recipe" else Experiment
        return kind(**value) if isinstance(value, dict) else value

    @property
    def parents(self) -> tuple[Experiment, ...]:
        """The experiments whose final model this one needs."""
        return tuple(parent for parent in (self.start, self.teacher) if parent is not None)

    @model_validator(mode="after")
    def _fits_its_parents(self) -> Self:
        if self.teacher is not None and self.teacher.dataset != self.dataset:
            raise ValueError(f"teacher must be trained on dataset {self.dataset!r}, got {self.teacher.dataset!r}")
        if self.start is not None and self.start.model != self.model:
            raise ValueError(f"start must have model {self.model!r}, got {self.start.model!r}")
        if self.start_recipe is not None and (self.start is None or self.start_recipe.dtype != "fp32"):
            raise ValueError("start_recipe must come with a start and prune only (dtype fp32): training needs floats")
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> Self:
        if self.privacy == "client" and self.strategy in ("scaffold", "feddf", "median"):
            raise ValueError(f"strategy must be a plain mean for client-level privacy, got {self.strategy!r}")
        if self.privacy == "record" and (self.teacher is not None or self.qat != "off"):
            raise ValueError("privacy must be off or client together with a teacher or qat, got 'record'")
        if self.devices == "sliced" and self.strategy in ("scaffold", "feddf", "median"):
            raise ValueError(f"strategy must be a mean of updates for sliced devices, got {self.strategy!r}")
        pruned = self.start_recipe is not None and self.start_recipe.prune == "weight"
        if self.devices == "sliced" and (self.mask_ratio or self.privacy == "client" or pruned):
            raise ValueError("devices must be equal or unequal with a mask or client-level privacy, got 'sliced'")
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"clients_per_round must be at most clients ({self.clients}), got {self.clients_per_round}"
            )
        return self
