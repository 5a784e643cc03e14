"""fedlab-kit: compress and accelerate models in federated learning, and measure everything on real files."""

from typing import TYPE_CHECKING, Any

from fedlab_kit.deployment import score as score  # first of all: it silences onnxruntime before any import of that

# isort: split
from fedlab_kit import patients as patients  # registers its data sets
from fedlab_kit.catalog import dataset, model
from fedlab_kit.data import Dataset, Preprocess, Split
from fedlab_kit.deployment.artifact import Artifact, compress
from fedlab_kit.deployment.selection import choose
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.lab.exercises import check
from fedlab_kit.lab.leaderboard import leaderboard
from fedlab_kit.own_data import from_csv, from_folder, from_npz
from fedlab_kit.run import Run
from fedlab_kit.runs import find, rounds, train
from fedlab_kit.study import Study
from fedlab_kit.sweep import sweep
from fedlab_kit.wire import Codec, codec

if TYPE_CHECKING:
    from fedlab_kit.lab.bench import Bench

__all__ = [
    "Artifact",
    "Bench",
    "Codec",
    "Dataset",
    "Experiment",
    "Preprocess",
    "Recipe",
    "RoundRecord",
    "Run",
    "Split",
    "Study",
    "check",
    "choose",
    "codec",
    "compress",
    "dataset",
    "find",
    "from_csv",
    "from_folder",
    "from_npz",
    "leaderboard",
    "model",
    "rounds",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the workbench, and the widgets with it, when it is first asked for."""
    if name == "Bench":
        from fedlab_kit.lab.bench import Bench

        return Bench
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
