"""Who holds which samples: iid, dirichlet, shards, by site, or each client's written in its own hand."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.data import SPLITS, Dataset, Split, load
from fedlab_kit.experiment import Experiment
from fedlab_kit.hands import hands, written

OWN = ("site", "hands")  # what tells clients apart is in the samples themselves, and each sample is one client's


def data_of(experiment: Experiment) -> Dataset:
    """Return an experiment's data as its clients have them: for `hands` written by them, each a site; else as loaded.

    Every split is dealt out evenly, without regard to `missing`, and what is held out alike for every seed: runs that
    differ in their seed are measured on the same pictures. Raises ValueError for what is no picture.
    """
    found = load(experiment.dataset)
    return _by_hand(found, experiment.clients, experiment.seed) if experiment.partition == "hands" else found


def shards_of(experiment: Experiment) -> list[Tensor]:
    """Return the indices of each client into the training split of `data_of`, see `partition`."""
    e = experiment
    return partition(load(e.dataset), e.partition, e.clients, e.alpha, e.seed, e.missing)


def partition(
    dataset: Dataset, scheme: str, clients: int, alpha: float, seed: int, missing: tuple[int, ...] = ()
) -> list[Tensor]:
    """Return an int64 index tensor into `dataset.train` per client: each sample is used once, no client is empty.

    `iid`: shuffled, equal sizes. `dirichlet`: each class is shared out by proportions drawn from Dirichlet(alpha)
    (Hsu, Qi and Brown, 2019); a client that got nothing takes one sample from the largest. `shards`: sorted by label
    and cut into two shards per client (McMahan et al., 2017). `site`: a client is a site of the data set. `hands`: as
    iid, see `data_of`. Of the classes in `missing` nobody gets a sample; the others lie as they would without it. A
    function of its arguments alone. Raises ValueError when the samples cannot be shared out so.
    """
    owners = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards, "site": _site, "hands": _iid}
    if scheme not in owners:
        raise ValueError(f"partition must be one of {', '.join(owners)}, got {scheme!r}")
    kept = ~np.isin(dataset.train.y.numpy(), _checked(dataset, scheme, clients, alpha, missing))
    owner = np.where(kept, owners[scheme](dataset, clients, alpha, np.random.default_rng(seed)), clients)
    counts = np.bincount(owner, minlength=clients)[:clients]
    if scheme in OWN and not counts.all():  # nobody else's samples would do
        who = int(counts.argmin())
        name = f"site {dataset.sites[who]!r}" if scheme == "site" else f"client {who}"
        which = " of the classes that are not missing" if missing else ""
        raise ValueError(f"dataset {dataset.name!r}: {name} has no training samples{which}")
    shards = np.split(np.argsort(owner, kind="stable")[: kept.sum()], np.cumsum(counts)[:-1])
    return [torch.from_numpy(shard) for shard in _without_empty(shards)]


def held_out(dataset: Dataset, shards: list[Tensor], scheme: str, seed: int) -> Tensor:
    """Deal the validation samples out as the training samples lie: the client of each, int64 [m].

    A site's own where clients are sites or hands. Elsewhere each class goes to those who hold it, in proportion; a
    class that nobody holds goes to all alike.
    """
    held = dataset.validation
    if scheme in OWN and held.site is not None:
        return held.site
    rng, owner = np.random.default_rng([seed, len(shards)]), np.empty(len(held), np.int64)
    for label, counts in enumerate(label_counts(dataset.train.y, shards, len(dataset.classes)).numpy().T):
        members = rng.permutation(np.flatnonzero(held.y.numpy() == label))
        ends = np.cumsum(counts if counts.any() else np.ones_like(counts))
        owner[members] = np.searchsorted(ends, (np.arange(len(members)) + 0.5) / len(members) * ends[-1])
    return torch.from_numpy(owner)


def label_counts(labels: Tensor, shards: list[Tensor], classes: int) -> Tensor:
    """Count the samples of each class that each client holds: int64 [clients, classes]."""
    client = torch.arange(len(shards)).repeat_interleave(torch.tensor([len(shard) for shard in shards]))
    cells = client * classes + labels[torch.cat(shards)]
    return torch.bincount(cells, minlength=len(shards) * classes).view(len(shards), classes)


@lru_cache(maxsize=4)
def _by_hand(dataset: Dataset, clients: int, seed: int) -> Dataset:
    """Write every split in the clients' hands; `seed` deals out the training samples alone."""
    if dataset.train.x.dtype != torch.uint8 or dataset.train.x.ndim != 4 or dataset.sites:
        raise ValueError(f"partition must not be hands for dataset {dataset.name!r}: hands write bytes of pictures")
    _checked(dataset, "hands", clients, 1.0, ())
    splits, field = dict[str, Any](), hands(clients)
    for number, name in enumerate(SPLITS):
        old: Split = getattr(dataset, name)
        seeds = [clients, number] if number else seed  # what is held out is the same for every seed
        owner, x = np.random.default_rng(seeds).permutation(len(old)) % clients, old.x.clone()
        for client, hand in enumerate(field):
            mine = torch.from_numpy(owner == client)
            rng = np.random.default_rng([clients, number, client])
            x[mine] = torch.from_numpy(written(old.x[mine].numpy(), hand, rng))
        splits[name] = Split(x, old.y, torch.from_numpy(owner))
    return replace(dataset, **splits, sites=tuple(map(str, range(clients))))


def _checked(dataset: Dataset, scheme: str, clients: int, alpha: float, missing: tuple[int, ...]) -> tuple[int, ...]:
    """Return `missing`. ValueError when the samples of the other classes cannot be shared out so."""
    labels = dataset.filled("train").y
    if any(label >= len(dataset.classes) for label in missing):
        raise ValueError(
            f"missing must be classes 0 to {len(dataset.classes) - 1} of dataset {dataset.name!r}, got {missing}"
        )
    count = int((~torch.isin(labels, torch.tensor(missing, dtype=labels.dtype))).sum())
    most = count // 2 if scheme == "shards" else count
    if not count:
        raise ValueError(f"missing must leave a class that somebody has a sample of, got {missing}")
    if not 1 <= clients <= most:
        raise ValueError(f"clients must be 1 to {most} for the {scheme} partition of {count} samples, got {clients}")
    if scheme == "dirichlet" and not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    if scheme == "site" and clients != len(dataset.sites):
        raise ValueError(
            f"clients must be {len(dataset.sites)}, the number of sites of dataset {dataset.name!r}, got {clients}"
            if dataset.sites
            else f"partition 'site' needs a dataset with sites; {dataset.name!r} has none"
        )
    return missing


def _iid(dataset: Dataset, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(len(dataset.train)) % clients


def _dirichlet(dataset: Dataset, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    labels = dataset.train.y.numpy()
    owner = np.empty(len(labels), np.int64)
    for label in range(len(dataset.classes)):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(rng.dirichlet(np.full(clients, alpha))) * len(members)
        owner[members] = np.searchsorted(ends, np.arange(len(members)) + 0.5).clip(max=clients - 1)
    return owner


def _shards(dataset: Dataset, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    by_label = np.argsort(dataset.train.y.numpy(), kind="stable")
    holder = rng.permutation(2 * clients) % clients
    owner = np.empty(len(by_label), np.int64)
    owner[by_label] = holder[np.arange(len(by_label)) * 2 * clients // len(by_label)]
    return owner


def _site(dataset: Dataset, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    assert dataset.train.site is not None  # a Dataset with sites has them
    return dataset.train.site.numpy()


def _without_empty(shards: list[np.ndarray]) -> list[np.ndarray]:
    """Give every empty client the last sample of whoever then has the most."""
    sizes = np.array([len(shard) for shard in shards])
    for client in np.flatnonzero(sizes == 0):
        donor = int(sizes.argmax())
        shards[client], shards[donor] = shards[donor][-1:], shards[donor][:-1]
        sizes[client] += 1
        sizes[donor] -= 1
    return shards
