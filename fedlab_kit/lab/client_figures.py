"""Who holds which labels, and how well the model serves each client: figures readable for 2 to 100 clients."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING

from fedlab_kit import clients, partition
from fedlab_kit.data import load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.lab.plot import Axis, Kind, Line, Mark, Plot, room, to_html
from fedlab_kit.lab.style import (
    BLUE,
    GREY,
    VERMILLION,
    as_written,
    canvas,
    percent,
    plain,
    whole_numbers,
    with_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 30  # clients that can have a bubble or a name each
MOST = 100  # clients who can be told apart in a picture


def label_counts(counts: Sequence[Sequence[int]], classes: Sequence[str], names: Sequence[str] = ()) -> Figure:
    """Draw who holds which labels: counts is [clients, classes]; clients without `names` are numbered.

    Up to 30 clients are bubbles, area by samples; more are bars in a row per label, height by samples.
    """
    figure, axes = canvas(right=0.03, left=0.22 if max(map(len, classes)) > 3 else 0.11)
    axes.set(xlabel="Client", ylabel="Label", xlim=(-0.7, len(counts) - 0.3), ylim=(-0.7, len(classes) - 0.3))
    axes.set_yticks(range(len(classes)), [plain(name, 16) for name in classes])
    axes.set_xticks(range(len(names)), [plain(name, 12) for name in names]) if names else whole_numbers(axes)
    cells = [(k, c, n) for k, row in enumerate(counts) for c, n in enumerate(row) if n]
    largest = max(n for *_, n in cells)
    width, height = axes.get_position().size * figure.get_size_inches() * 72
    step = width / len(counts)
    x, y, n = zip(*cells, strict=True)
    if len(counts) <= FEW:
        cell = min(step, height / len(classes))
        areas = [(0.95 * cell) ** 2 * value / largest for value in n]
        axes.scatter(x, y, s=areas, color=BLUE, alpha=0.85, linewidth=0)
    else:
        feet = [label - 0.4 for label in y]
        tops = [foot + 0.85 * value / largest for foot, value in zip(feet, n, strict=True)]
        axes.vlines(x, feet, tops, color=BLUE, linewidth=0.75 * step)
    what = "Largest bubble" if len(counts) <= FEW else "Tallest bar"
    axes.set_title(f"{what}: {largest} samples", color=GREY, fontsize=8, loc="right", pad=0)
    return as_written(figure)


def client_accuracy(
    accuracy: Sequence[float], low: Sequence[float], high: Sequence[float], names: Sequence[str] = ()
) -> Plot:
    """Show each client's accuracy (0..1) with its interval, worst first, beside the mean over clients.

    Clients whose accuracy is NaN are counted alone.
    """
    count, names = len(accuracy), names or [str(client) for client in range(len(accuracy))]
    order = sorted((k for k, value in enumerate(accuracy) if not isnan(value)), key=lambda k: accuracy[k])
    if not order:
        alt = f"Accuracy of {count} clients: not estimable, none of their classes was held out."
        return Plot(Axis("Client"), Axis("Accuracy on validation (%)"), note="Not estimable", alt=alt)
    mean, worst, missing = sum(accuracy[k] for k in order) / len(order), order[0], count - len(order)
    kinds = (
        Kind(f"mean {percent(mean)}", dash="--"),
        Kind(f"worst: {names[worst]}, {percent(accuracy[worst])}", VERMILLION, "s"),
        *([Kind("other clients", BLUE, "o")] if order[1:] else []),
    )
    marks = []
    for place, k in enumerate(order):
        y, below, above = (100 * share[k] for share in (accuracy, low, high))
        tip = (("Client", names[k]), ("Accuracy", with_interval(accuracy[k], low[k], high[k])))
        marks.append(Mark(f"client/{k}", kinds[min(place + 1, 2)].name, place, y, below, above, tip=tip))
    right, some = len(order) - 0.3, [names[k] for k in order] if len(order) <= FEW else []
    return Plot(
        Axis(
            f"Client, worst first{f' ({missing} of {count} not estimable)' if missing else ''}",
            ends=(-0.7, right),
            names=tuple(some),
        ),
        Axis("Accuracy on validation (%)", ends=room(marks)),
        kinds,
        tuple(marks),
        (Line("mean", kinds[0].name, ((-0.7, 100 * mean), (right, 100 * mean))),),
        alt=f"Accuracy of each of {count} clients: mean {percent(mean)}, worst client {names[worst]} with "
        f"{percent(accuracy[worst])}.{f' Not estimable: {missing} of them.' if missing else ''}",
    )


def describe_labels(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return what `label_counts` shows, in words, for those who cannot see it."""
    held = [sum(count > 0 for count in row) for row in counts]
    sizes = [sum(row) for row in counts]
    return (
        f"Samples of {len(classes)} labels at {len(counts)} clients: a client holds {min(held)} to {max(held)} labels "
        f"and {min(sizes)} to {max(sizes)} samples."
    )


def labels_held(e: Experiment) -> str:
    """Draw how many samples of which label each client holds. Raises ValueError when they cannot be dealt out."""
    dataset = load(e.dataset)
    shards = partition.shards_of(e)
    counts = partition.label_counts(dataset.train.y, shards, len(dataset.classes)).tolist()
    figure = label_counts(counts, dataset.classes, clients.client_names(e))
    return to_html(figure, describe_labels(counts, dataset.classes))


def accuracy_of_each(e: Experiment, record: RoundRecord) -> str:
    """Draw how well the model of a round serves each client; words alone where none can be measured."""
    mean, low, high = (values.tolist() for values in clients.client_accuracy(e, record))
    plot = client_accuracy(mean, low, high, clients.client_names(e))
    return to_html(plot) if plot.marks else plot.alt
