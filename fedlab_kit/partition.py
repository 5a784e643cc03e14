"""Who holds which training samples: iid, dirichlet, shards, or by site."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.data import Dataset
from fedlab_kit.settings import FieldError


def partition(dataset: Dataset, scheme: str, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Return an int64 index tensor into `dataset.train` per client: each sample is used once, no client is empty.

    `iid`: shuffled, equal sizes. `dirichlet`: each class is shared out by proportions drawn from Dirichlet(alpha)
    (Hsu, Qi and Brown, 2019); a client that got nothing takes one sample from the largest. `shards`: sorted by label
    and cut into two shards per client (McMahan et al., 2017). `site`: a client is a site of the data set. A function
    of its arguments alone. Raises ValueError when the samples cannot be shared out so.
    """
    owners = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards, "site": _site}
    if scheme not in owners:
        raise FieldError("partition", f"must be one of {', '.join(owners)}, got {scheme!r}")
    _check(dataset, scheme, clients, alpha)
    owner = owners[scheme](dataset, clients, alpha, np.random.default_rng(seed))
    counts = np.bincount(owner, minlength=clients)
    shards = np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])
    return [torch.from_numpy(shard) for shard in _without_empty(shards)]


def held_out(dataset: Dataset, shards: list[Tensor], scheme: str, seed: int) -> Tensor:
    """Deal the validation samples out as the training samples lie: the client of each, int64 [m].

    A site's own where clients are sites. Elsewhere each class goes to those who hold it, in proportion; a class that
    nobody holds goes to all alike.
    """
    held = dataset.validation
    if scheme == "site" and held.site is not None:
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


def _check(dataset: Dataset, scheme: str, clients: int, alpha: float) -> None:
    dataset.filled("train")
    most = len(dataset.train) // 2 if scheme == "shards" else len(dataset.train)
    if not 1 <= clients <= most:
        raise FieldError(
            "clients", f"must be 1 to {most} for the {scheme} partition of {len(dataset.train)} samples, got {clients}"
        )
    if scheme == "dirichlet" and not alpha > 0:
        raise FieldError("alpha", f"must be above 0, got {alpha}")
    if scheme == "site" and not dataset.sites:
        raise FieldError("partition", f"'site' needs a dataset with sites; {dataset.name!r} has none")
    if scheme == "site" and clients != len(dataset.sites):
        sites = f"{len(dataset.sites)}, the number of sites of dataset {dataset.name!r}"
        raise FieldError("clients", f"must be {sites}, got {clients}")


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
    owner = dataset.train.site.numpy()
    for client, size in enumerate(np.bincount(owner, minlength=clients)):
        if size == 0:
            raise ValueError(f"dataset {dataset.name!r}: site {dataset.sites[client]!r} has no training samples")
    return owner


def _without_empty(shards: list[np.ndarray]) -> list[np.ndarray]:
    """Give every empty client the last sample of whoever then has the most."""
    sizes = np.array([len(shard) for shard in shards])
    for client in np.flatnonzero(sizes == 0):
        donor = int(sizes.argmax())
        shards[client], shards[donor] = shards[donor][-1:], shards[donor][:-1]
        sizes[client] += 1
        sizes[donor] -= 1
    return shards
