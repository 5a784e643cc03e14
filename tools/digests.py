"""Say in one line each what experiments and recipes give, as digests: python tools/digests.py > before.txt

Run it before and after a change that is meant to move code and nothing else, on the same machine, and compare. A line
covers every number of every round but the seconds, and all tensors of the final model, or the bytes of a file.
"""

import hashlib
import json
import os
import tempfile
from threading import Event

os.environ["FEDLAB_RUNS"] = tempfile.mkdtemp(prefix="digests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from torch import nn

import fedlab_kit as fk


@fk.model
def normed(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Running statistics, dropout and a frozen layer: the general path."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 8).requires_grad_(False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(8, classes),
    )


BASE = fk.Experiment(
    dataset="digits", model="mlp", partition="dirichlet", clients=8, clients_per_round=4, rounds=4, lr=0.05
)
TEACHER = BASE.replace(model="cnn", rounds=2)
PRUNED = {"start": BASE, "start_recipe": fk.Recipe(prune_ratio=0.5), "mask_ratio": 0.7}
EXPERIMENTS = {
    "fedavg": {},
    "fedprox": {"strategy": "fedprox", "proximal_mu": 0.1, "local_epochs": 2},
    "fedavgm": {"strategy": "fedavgm", "partition": "shards"},
    "fedadam": {"strategy": "fedadam", "partition": "iid"},
    "scaffold": {"strategy": "scaffold", "uplink": "int8"},
    "feddf": {"strategy": "feddf", "model": "half_mlp"},
    "median": {"strategy": "median", "dropout": 0.3},
    "cnn": {"model": "cnn"},
    "resnet": {"model": "resnet", "rounds": 1, "clients_per_round": 2},
    "logistic, hospitals": {"dataset": "hospitals", "model": "logistic", "partition": "site", "clients": 4},
    "fp16 both ways": {"uplink": "fp16", "downlink": "fp16", "zstd": True},
    "int4, error feedback": {"uplink": "int4", "bucket": 64, "rounding": "nearest"},
    "sign up, int8 down": {"uplink": "sign", "downlink": "int8"},
    "topk both ways": {"uplink": "topk", "downlink": "topk", "uplink_keep": 0.05, "downlink_keep": 0.1},
    "stc both ways": {"uplink": "stc", "downlink": "stc"},
    "client privacy": {"privacy": "client", "uplink": "int8"},
    "record privacy": {"privacy": "record", "clip_norm": 0.5},
    "gradual mask": {"mask_ratio": 0.8},
    "dynamic mask": {"mask_ratio": 0.8, "mask_schedule": "dynamic"},
    "fixed mask, unequal devices": {"mask_ratio": 0.6, "mask_schedule": "fixed", "devices": "unequal", "deadline": 1},
    "slices": {"devices": "sliced", "strategy": "fedavgm", "model": "cnn"},
    "pruned start": PRUNED,
    "teacher": {"teacher": TEACHER, "temperature": 3.0},
    "qat": {"qat": "int8", "model": "cnn"},
    "state": {"model": "normed"},
    "own normalization": {"model": "normed", "normalization": "own", "strategy": "fedadam"},
}
RESUMED = ("scaffold", "topk both ways", "dynamic mask", "state")
RECIPES = (
    fk.Recipe(),
    fk.Recipe(dtype="fp16"),
    fk.Recipe(dtype="int8"),
    fk.Recipe(dtype="int8", quantization="dynamic"),
    fk.Recipe(dtype="int4"),
    fk.Recipe(prune_ratio=0.8),
    fk.Recipe(prune_ratio=0.8, dtype="int8"),
    fk.Recipe(prune="channel", prune_ratio=0.5),
    fk.Recipe(prune="channel", prune_ratio=0.5, dtype="int8"),
    fk.Recipe(prune="channel", prune_ratio=0.5, dtype="int4"),
)


def digest(run: fk.Run) -> str:
    """Digest a run's records, without what a clock told and recall by class, and its final model."""
    found = hashlib.sha256()
    for record in run.records:
        numbers = {name: value for name, value in record.to_dict().items() if name not in ("seconds", "recall")}
        found.update(json.dumps(numbers, sort_keys=True).encode())
    model = run.model if run.experiment.normalization == "shared" else run.client_model(0)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def resumed(experiment: fk.Experiment) -> fk.Run:
    """Stop an experiment after its second round and go on."""
    stop = Event()
    half = fk.train(experiment, stop, lambda record: stop.set() if record.round == 2 else None)
    assert half.status == "stopped"
    return fk.train(experiment)


def main() -> None:
    """Print every line."""
    for name, changes in EXPERIMENTS.items():
        print(f"{digest(fk.train(BASE.replace(**changes)))}  {name}", flush=True)
    for name in RESUMED:
        print(f"{digest(resumed(BASE.replace(**EXPERIMENTS[name], seed=8)))}  {name}, resumed", flush=True)
    for experiment in (BASE.replace(model="cnn"), BASE.replace(model="normed")):
        for recipe in RECIPES:
            try:
                said = fk.compress(fk.train(experiment), recipe).digest[:16]
            except ValueError as error:
                said = f"refused: {error}"
            print(f"{said}  {experiment.model} {recipe!r}", flush=True)


if __name__ == "__main__":
    main()
