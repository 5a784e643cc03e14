"""fedlab-kit: compress and accelerate models in federated learning, and measure everything on real files."""

from fedlab_kit.catalog import dataset, model
from fedlab_kit.data import Dataset, Preprocess, Split
from fedlab_kit.deployment.artifact import Artifact, compress
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.rounds import rounds
from fedlab_kit.runs import Run, find, history, train
from fedlab_kit.wire import Codec, codec

__all__ = [
    "Artifact",
    "Codec",
    "Dataset",
    "Experiment",
    "Preprocess",
    "Recipe",
    "RoundRecord",
    "Run",
    "Split",
    "codec",
    "compress",
    "dataset",
    "find",
    "history",
    "model",
    "rounds",
    "train",
]
