"""What a client gets alone, what pooling gives, and the table of both beside the federation."""

from __future__ import annotations

import pytest
import torch

from fedlab_kit import Experiment, train
from fedlab_kit.deployment.evaluate import alone, pooled, side_by_side
from fedlab_kit.federation.setup import task

SITES = Experiment(
    dataset="blobs_at_sites", model="mlp", clients=3, clients_per_round=3, partition="site", rounds=3, lr=0.05
)


def test_alone_is_a_federation_of_one() -> None:
    """Played by hand: each round the client trains on from its own last weights, by plain SGD on the same batches."""
    from fedlab_kit.federation.client import plan

    job, model = task(SITES), task(SITES).model
    model.weights.copy_(job.initial)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=SITES.lr)
    for round in (1, 2, 3):
        for batch in plan(job, round, 1):
            index = torch.from_numpy(batch[batch >= 0])
            model.gradient.zero_()
            torch.nn.functional.cross_entropy(model.module(job.inputs(index)), job.y[index]).backward()
            optimizer.step()
    expected = model.weights.clone()
    assert torch.allclose(alone(SITES, 1)[0], expected, atol=1e-6)


def test_fine_tuning_goes_on_from_the_weights_it_is_given() -> None:
    model = train(SITES).tensors()
    assert torch.equal(alone(SITES, 0, model, rounds=0)[0], model[0])
    tuned = alone(SITES, 0, model, rounds=2)[0]
    assert torch.equal(tuned, alone(SITES, 0, model, rounds=2)[0])
    assert not torch.equal(tuned, model[0]) and not torch.equal(tuned, alone(SITES, 1, model, rounds=2)[0])


def test_pooled_is_one_client_with_everything() -> None:
    job = task(pooled(SITES.replace(devices="sliced", deadline=1.0)))
    assert job.samples(0) == 120 and job.experiment.devices == "equal"


def test_the_table_measures_each_site_on_its_own_patients() -> None:
    table = side_by_side(SITES, tuning=1)
    assert list(table.index) == ["north", "south", "west", "all"]
    assert list(table.columns) == ["patients", "alone", "federated", "tuned", "pooled"]
    assert table["patients"].tolist() == [20, 20, 20, 60]
    job = task(SITES)
    south = job.evaluate(alone(SITES, 1)[0], job.dataset.validation).correct[1] / 20
    assert table.loc["south", "alone"] == pytest.approx(south)
    assert table.loc["all", "federated"] == pytest.approx(train(SITES).accuracy)
    assert table.loc["all", "alone"] == pytest.approx(table["alone"][:3].mean())


def test_the_table_needs_sites() -> None:
    with pytest.raises(ValueError, match="partition must be site to compare the sites, got 'iid'"):
        side_by_side(SITES.replace(partition="iid"))
