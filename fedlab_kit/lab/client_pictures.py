"""What each client of an experiment holds, and how a round serves it, as pictures on a page with words beside them."""

from __future__ import annotations

from math import isnan

from fedlab_kit.clients import client_accuracy, client_names
from fedlab_kit.data import load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.lab import clients
from fedlab_kit.lab.canvas import to_html
from fedlab_kit.partition import label_counts, shards_of

MOST = 100  # clients who can be told apart in a picture


def labels_held(e: Experiment) -> str:
    """Draw how many samples of which label each client holds. Raises ValueError when they cannot be dealt out."""
    dataset = load(e.dataset)
    counts = label_counts(dataset.train.y, shards_of(e), len(dataset.classes)).tolist()
    figure = clients.label_counts(counts, dataset.classes, client_names(e))
    return to_html(figure, clients.describe_labels(counts, dataset.classes))


def accuracy_of_each(e: Experiment, record: RoundRecord) -> str:
    """Draw how well the model of a round serves each client; words alone where none can be measured."""
    mean, low, high = (values.tolist() for values in client_accuracy(e, record))
    names = client_names(e)
    words = clients.describe_clients(mean, names)
    return words if all(map(isnan, mean)) else to_html(clients.client_accuracy(mean, low, high, names), words)
