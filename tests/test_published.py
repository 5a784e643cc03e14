"""Published figures on real data: `make test-slow` with FEDLAB_DATA, or after MNIST was downloaded."""

import pytest

import fedlab_kit as fk
from fedlab_kit.data import SPLITS, load
from fedlab_kit.federation.rounds import play
from fedlab_kit.federation.server import start
from fedlab_kit.federation.setup import task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def _mnist():
    try:
        load("mnist")
    except (OSError, ValueError) as error:
        pytest.skip(f"MNIST is missing: set FEDLAB_DATA to a folder that holds mnist/ ({error})")


@pytest.mark.usefixtures("_mnist")
def test_2nn_reaches_97_percent_within_the_87_rounds_of_mcmahan_2017():
    """Table 1: 2NN, 100 IID clients, C = 0.1, E = 1, B = 10; here at learning rate 0.1."""
    experiment = fk.Experiment(dataset="mnist", model="2nn", clients=100, partition="iid", lr=0.1, rounds=87)
    job = task(experiment)
    for state, _ in play(start(experiment), {}):
        accuracy, *_ = job.evaluate(state.weights, job.dataset.test).accuracy()
        if accuracy >= 0.97:
            break
    assert accuracy >= 0.97, f"after {state.round} rounds"


@pytest.mark.usefixtures("_mnist")
def test_mnist_5k_is_part_of_mnist() -> None:
    whole, part = load("mnist"), load("mnist_5k")
    known = {x.numpy().tobytes() for name in SPLITS for x in getattr(whole, name).x}
    assert all(x.numpy().tobytes() in known for name in SPLITS for x in getattr(part, name).x)
