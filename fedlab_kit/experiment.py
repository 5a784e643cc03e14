"""What is asked for: `Experiment` fixes the rounds, `Recipe` what is done to the trained model.

Every field carries its label, help text, range and group; the validation messages, the widgets and the
documentation are all made from that one place.
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA = 1  # raised when the meaning of a stored field changes


def knob(
    default: Any,
    label: str,
    help: str,
    *,
    group: str,
    step: float | None = None,
    span: tuple[float, float] | None = None,
    log: bool = False,
    source: str | None = None,
    when: dict[str, tuple[str, ...]] | None = None,
    **bounds: Any,
) -> Any:
    """Declare a field together with everything that a control needs to know about it.

    `bounds` are pydantic's ge, gt, le, lt. `step`, `span` (the useful range) and `log` shape a slider, `source`
    names a catalog to choose from ("model", "dataset"), `when` says for which other settings the field matters.
    """
    extra: dict[str, Any] = {"group": group, "step": step, "span": span, "log": log, "source": source, "when": when}
    return Field(default, title=label, description=help, json_schema_extra=extra, **bounds)


class Settings(BaseModel):
    """A frozen, validated value whose errors are one line: the field, what is allowed, and what came.

    Raises ValueError on an unknown field, a wrong type, or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self), error)) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated like a new value."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON-ready values (nested settings likewise)."""
        return {name: _plain(value) for name, value in self.__repr_args__()}

    def __str__(self) -> str:
        return repr(self)

    def __repr_args__(self) -> list[tuple[str, Any]]:
        fields = type(self).model_fields
        return [(name, getattr(self, name)) for name in fields if getattr(self, name) != fields[name].default]


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
        0.1,
        "Learning rate",
        "Step size of the clients' SGD.",
        group="training",
        gt=0,
        le=10,
        span=(0.001, 1),
        log=True,
    )
    strategy: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold"] = knob(
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
        when={"strategy": ("fedavg", "fedprox", "fedavgm", "scaffold")},
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
    seed: int = knob(
        7,
        "Seed",
        "Start of every random choice: weights, partition, cohorts, batches.",
        group="training",
        ge=0,
        le=2**32 - 1,
    )
    device: Literal["cpu", "cuda"] = knob("cpu", "Device", "Where the clients' steps are computed.", group="training")

    @model_validator(mode="after")
    def _cohort_fits(self) -> Self:
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"clients_per_round must be at most clients ({self.clients}), got {self.clients_per_round}"
            )
        return self


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


def _plain(value: Any) -> Any:
    return value.changes() if isinstance(value, Settings) else value


_LIMITS = {"Ge": ("at least", "ge"), "Gt": ("above", "gt"), "Le": ("at most", "le"), "Lt": ("below", "lt")}
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _sentence(owner: type[Settings], error: ValidationError) -> str:
    """Word the first validation error as one line that names the field, what is allowed and what came."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{name} is not a field of {owner.__name__}; its fields are {', '.join(owner.model_fields)}"
    return f"{name} must be {allowed(owner, name)}, got {first['input']!r}"


def allowed(owner: type[Settings], name: str) -> str:
    """Say in words which values a field takes, e.g. "at least 0 and below 1" or "one of fp32, fp16"."""
    field = owner.model_fields[name]
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(get_args(field.annotation))
    rules = [(_LIMITS.get(type(rule).__name__), rule) for rule in field.metadata]
    limits = [f"{words[0]} {getattr(rule, words[1])}" for words, rule in rules if words]
    kind = _KINDS.get(field.annotation, "valid")  # type: ignore[arg-type]
    whole = [kind] if not limits or field.annotation is int else []
    return ", ".join([*whole, *([" and ".join(limits)] if limits else [])])
