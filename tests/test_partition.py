from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab_kit.data import Dataset, Preprocess, Split
from fedlab_kit.partition import _without_empty, held_out, label_counts, partition


def toy(labels: list[int], classes: int, sites: list[int] | None = None) -> Dataset:
    y = torch.tensor(labels)
    site = torch.tensor(sites) if sites is not None else None
    split = Split(torch.zeros(len(labels), 2), y, site)
    names = tuple("abc"[: max(sites) + 1]) if sites else ()
    return Dataset("toy", tuple(map(str, range(classes))), split, split, split, split, Preprocess(0.0, 1.0), names)


def owned(shards: list[torch.Tensor]) -> list[int]:
    return sorted(torch.cat(shards).tolist())


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(["iid", "dirichlet", "shards"]),
    clients=st.integers(1, 40),
    extra=st.integers(0, 60),
    alpha=st.sampled_from([0.01, 0.1, 0.5, 10.0, 1000.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_is_used_once_and_nobody_is_empty(
    scheme: str, clients: int, extra: int, alpha: float, seed: int
) -> None:
    size = 2 * clients + extra
    labels = np.random.default_rng(seed).integers(0, 4, size).tolist()
    shards = partition(toy(labels, 4), scheme, clients, alpha, seed)
    assert len(shards) == clients
    assert all(len(shard) > 0 and shard.dtype == torch.int64 for shard in shards)
    assert owned(shards) == list(range(size))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
def test_the_seed_alone_decides(scheme: str) -> None:
    data = toy([i % 4 for i in range(200)], 4)
    np.random.seed(0)  # noqa: NPY002
    first = partition(data, scheme, 10, 0.5, seed=3)
    np.random.seed(99)  # noqa: NPY002
    again = partition(data, scheme, 10, 0.5, seed=3)
    other = partition(data, scheme, 10, 0.5, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(shard) for shard in partition(toy([0] * 23, 1), "iid", 5, 1.0, 0)]
    assert sorted(sizes) == [4, 4, 5, 5, 5]


def test_two_shards_a_client_hold_at_most_two_labels_when_shards_divide_the_classes() -> None:
    data = toy([i % 10 for i in range(1000)], 10)
    shards = partition(data, "shards", 50, 1.0, 7)
    counts = label_counts(data.train.y, shards, 10)
    assert [len(shard) for shard in shards] == [20] * 50
    assert int((counts > 0).sum(1).max()) == 2
    assert set(counts[counts > 0].tolist()) <= {10, 20}


def test_dirichlet_is_skewed_for_a_small_alpha_and_even_for_a_large_one() -> None:
    data = toy([i % 10 for i in range(5000)], 10)

    def dominance(alpha: float) -> float:
        counts = label_counts(data.train.y, partition(data, "dirichlet", 10, alpha, 0), 10).double()
        return float((counts.max(1).values / counts.sum(1)).mean())

    assert dominance(1000.0) < 0.13 < dominance(0.5) < dominance(0.05)
    assert dominance(0.05) > 0.5


def test_dirichlet_fills_empty_clients_from_the_largest() -> None:
    data = toy([0] * 30, 1)
    shards = partition(data, "dirichlet", 30, 0.01, 0)
    assert [len(shard) for shard in shards] == [1] * 30
    assert owned(shards) == list(range(30))
    parts = [np.array(part, dtype=int) for part in ([0, 1], [], [2, 3, 4, 5], [])]
    assert [part.tolist() for part in _without_empty(parts)] == [[0, 1], [5], [2, 3], [4]]


def test_a_client_is_a_site() -> None:
    data = toy([0, 1, 0, 1, 1], 2, sites=[2, 0, 1, 0, 2])
    assert [shard.tolist() for shard in partition(data, "site", 3, 1.0, 0)] == [[1, 3], [2], [0, 4]]


@pytest.mark.parametrize(
    ("scheme", "clients", "alpha", "message"),
    [
        ("iid", 7, 1.0, "clients must be 1 to 6 for the iid partition of 6 samples, got 7"),
        ("iid", 0, 1.0, "clients must be 1 to 6 for the iid partition of 6 samples, got 0"),
        ("shards", 4, 1.0, "clients must be 1 to 3 for the shards partition of 6 samples, got 4"),
        ("dirichlet", 2, 0.0, "alpha must be above 0, got 0.0"),
        ("dirichlet", 2, float("nan"), "alpha must be above 0, got nan"),
        ("site", 2, 1.0, "partition must not be site for dataset 'toy', which has none"),
        ("random", 2, 1.0, "partition must be one of iid, dirichlet, shards, site, hands, got 'random'"),
    ],
)
def test_what_cannot_be_shared_out_is_one_clear_line(scheme: str, clients: int, alpha: float, message: str) -> None:
    with pytest.raises(ValueError) as error:
        partition(toy([0, 1, 2, 0, 1, 2], 3), scheme, clients, alpha, 0)
    assert str(error.value) == message


def test_the_number_of_clients_must_be_the_number_of_sites() -> None:
    with pytest.raises(ValueError, match="clients must be 3, the number of sites of dataset 'toy', got 2"):
        partition(toy([0, 1, 0], 2, sites=[0, 1, 2]), "site", 2, 1.0, 0)


def test_a_site_without_training_samples_is_named() -> None:
    with pytest.raises(ValueError, match="site 'b' has no training samples"):
        partition(toy([0, 1, 0], 2, sites=[0, 2, 2]), "site", 3, 1.0, 0)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "shards"])
@pytest.mark.parametrize("seed", range(5))
def test_validation_is_dealt_out_as_training_is(scheme: str, seed: int) -> None:
    """Of each class everybody gets their share, to within one sample, and nobody who never trained on it gets any."""
    data = toy([i % 5 for i in range(300)], 5)
    held = replace(data, validation=Split(torch.zeros(130, 2), torch.arange(130) % 5))
    shards = partition(data, scheme, 8, 0.3, seed)
    owner = held_out(held, shards, scheme, seed)
    assert owner.shape == (130,) and torch.equal(owner, held_out(held, shards, scheme, seed))
    assert not torch.equal(owner, held_out(held, shards, scheme, seed + 1))  # which of them is left to chance
    for label in range(5):
        trained = np.array([int((data.train.y[shard] == label).sum()) for shard in shards])
        given = np.bincount(owner[held.validation.y == label], minlength=8)
        assert given.sum() == 26 and not given[trained == 0].any()
        ends = 26 * trained.cumsum() / trained.sum()
        assert (abs(given.cumsum() - ends) <= 0.5 + 1e-9).all()  # who comes first gets no more


def test_a_class_that_nobody_holds_is_dealt_out_evenly_and_a_site_keeps_its_own() -> None:
    data = toy([0] * 12, 2)
    held = replace(data, validation=Split(torch.zeros(10, 2), torch.ones(10, dtype=torch.int64)))
    shards = partition(data, "iid", 4, 1.0, 0)
    assert sorted(np.bincount(held_out(held, shards, "iid", 0)).tolist()) == [2, 2, 3, 3]
    sites = toy([0, 1, 0, 1], 2, sites=[1, 0, 0, 1])
    assert held_out(sites, partition(sites, "site", 2, 1.0, 0), "site", 0).tolist() == [1, 0, 0, 1]


def test_label_counts_by_hand() -> None:
    labels = torch.tensor([0, 2, 2, 1, 0])
    counts = label_counts(labels, [torch.tensor([0, 1, 2]), torch.tensor([4, 3])], 4)
    assert counts.tolist() == [[1, 0, 2, 0], [1, 1, 0, 0]]
    assert counts.dtype == torch.int64
