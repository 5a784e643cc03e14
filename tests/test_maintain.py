"""Maintenance: rounds on newer data, promotion only of what is better for everybody."""

import numpy as np
import pytest
import torch

import fedlab_kit as fk
from fedlab_kit import catalog
from fedlab_kit.data import Dataset, Split, load
from fedlab_kit.deployment.registry import Registry, better, log_loss, maintain

EXPERIMENT = fk.Experiment(
    dataset="clinics", model="logistic", partition="site", clients=3, clients_per_round=3, rounds=10, lr=0.2
)


def newer(sites: tuple[int, ...], offset: float) -> Dataset:
    """The clinics after `age` and `dose` are measured by another device at some sites."""
    old = load("clinics")

    def changed(split: Split) -> Split:
        x, here = split.x.clone(), torch.isin(split.site, torch.tensor(sites))
        x[here, :2] += offset
        return Split(x, split.y, split.site)

    parts = (changed(part) for part in (old.train, old.validation, old.public, old.test))
    return Dataset("clinics_newer", old.classes, *parts, old.preprocess, old.sites, old.features)


@pytest.fixture(autouse=True)
def _newer_data(monkeypatch):
    monkeypatch.setitem(catalog.DATASETS, "clinics_newer", lambda: newer((0, 1, 2), 3.0))


@pytest.fixture
def served(tmp_path):
    run, registry = fk.train(EXPERIMENT), Registry(tmp_path / "registry")
    registry.promote(registry.add(fk.compress(run, fk.Recipe())), "first")
    return registry, run


def test_what_is_better_on_the_newer_data_is_promoted_and_can_be_rolled_back(served):
    registry, run = served
    done = maintain(registry, run, "clinics_newer", fk.Recipe(), rounds=5)
    assert done.promoted and registry.current.number == done.version.number == 2
    assert done.why.startswith("log loss fell by ") and registry.history[-1]["why"] == done.why
    assert done.run.experiment.start == EXPERIMENT and len(done.run.records) == 5
    assert registry.rollback("to see").number == 1


def test_what_is_no_better_is_kept_but_not_promoted(served, monkeypatch):
    registry, run = served
    monkeypatch.setitem(catalog.DATASETS, "clinics_newer", lambda: newer((), 0.0))
    done = maintain(registry, run, "clinics_newer", fk.Recipe(), rounds=1)
    assert not done.promoted and registry.current.number == 1 and len(registry.versions) == 2
    assert done.why.endswith("which is not enough")


def test_nothing_in_service_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing is in service yet"):
        maintain(Registry(tmp_path / "none"), fk.train(EXPERIMENT), "clinics_newer", fk.Recipe())


class Sure:
    """An artifact that gives each patient's true class this much."""

    def __init__(self, given: np.ndarray) -> None:
        y = load("clinics").validation.y.numpy()
        self.given = np.where(y[:, None] == [0, 1], given[:, None], 1 - given[:, None])

    def predict(self, x):
        return self.given


def test_a_better_mean_does_not_excuse_a_hospital_that_is_hurt():
    site = load("clinics").validation.site.numpy()
    old, new = np.full(120, 0.6), np.full(120, 0.95)
    new[np.flatnonzero(site == 1)[:7]] = 0.4
    won, why = better(Sure(new), Sure(old), "clinics")
    assert not won and why.endswith("but it hurts south")
    assert log_loss(Sure(new), load("clinics").validation).mean() < -np.log(0.6)
    assert better(Sure(np.full(120, 0.95)), Sure(old), "clinics")[0]
    assert better(Sure(old), Sure(new), "clinics")[1].startswith("log loss rose by ")


def test_what_is_surely_worse_is_not_better():
    sure, unsure = Sure(np.full(120, 0.95)), Sure(np.full(120, 0.6))
    won, why = better(unsure, sure, "clinics")
    assert not won and why.startswith("log loss rose by ") and why.endswith("which is not enough")
