"""Small data sets and models that tests share; everything is made here and can be checked by hand."""

import torch
from torch import nn

from fedlab_kit import catalog
from fedlab_kit.data import Dataset, Preprocess, Split

SITES = ("north", "south", "west")


def _split(n: int, seed: int, sites: bool = False) -> Split:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    x = torch.randn(n, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6)
    return Split(x, y, torch.arange(n) % len(SITES) if sites else None)


def blobs() -> Dataset:
    """Three Gaussian classes in six dimensions; 120 / 60 / 30 / 60 samples."""
    splits = [_split(n, seed) for seed, n in enumerate((120, 60, 30, 60))]
    return Dataset("blobs", ("a", "b", "c"), *splits, Preprocess(0.5, 2.0))


def blobs_at_sites() -> Dataset:
    """The same, spread over three sites."""
    splits = [_split(n, seed, sites=True) for seed, n in enumerate((120, 60, 30, 60))]
    return Dataset("blobs_at_sites", ("a", "b", "c"), *splits, Preprocess(0.5, 2.0), sites=SITES)


def clinics() -> Dataset:
    """Healthy or sick by four named measurements, at three sites; the last has two sick patients in each split."""
    splits = []
    for seed, n in enumerate((240, 120, 30, 120)):
        generator = torch.Generator().manual_seed(seed)
        site = torch.arange(n) % len(SITES)
        y = torch.randint(0, 2, (n,), generator=generator)
        y[site == 2] = 0
        y[torch.nonzero(site == 2)[:2]] = 1
        x = torch.randn(n, 4, generator=generator) * torch.tensor([1.0, 2.0, 5.0, 0.1])
        splits.append(Split(x + y[:, None] * torch.tensor([1.5, 2.0, 0.0, 0.0]), y, site))
    recipe = Preprocess((0.75, 1.0, 0.0, 0.0), (1.2, 2.2, 5.0, 0.1))
    names = ("age", "dose", "size", "grain")
    return Dataset("clinics", ("healthy", "sick"), *splits, recipe, sites=SITES, features=names)


def tiny_images() -> Dataset:
    """Random 1x12x12 bytes in two classes that differ in brightness."""
    splits = []
    for seed, n in enumerate((80, 40, 20, 40)):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % 2
        x = torch.randint(0, 120, (n, 1, 12, 12), generator=generator) + 100 * y.view(-1, 1, 1, 1)
        splits.append(Split(x.to(torch.uint8), y))
    return Dataset("tiny_images", ("dark", "light"), *splits, Preprocess(110.0, 60.0))


def norm_net(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Has BatchNorm buffers and Dropout, so it takes the general path."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, classes)
    )


def wrapped(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The built-in mlp inside another module: the same numbers, but on the general path."""
    return nn.Sequential(catalog.lookup("model", "mlp")(shape, classes), nn.Identity())


def tiny_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A convolution that the fast path knows."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(100, classes))


def wrapped_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """`tiny_cnn` on the general path."""
    return nn.Sequential(tiny_cnn(shape, classes), nn.Identity())


def register() -> None:
    """Put all of these into the catalog; called once by the tests' conftest."""
    for maker in (blobs, blobs_at_sites, clinics, tiny_images):
        catalog.dataset(maker)
    for maker in (norm_net, wrapped, tiny_cnn, wrapped_cnn):
        catalog.model(maker)
