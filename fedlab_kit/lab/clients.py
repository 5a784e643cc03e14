"""Who holds which labels, and how well the model serves each client: figures readable for 2 to 100 clients."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from fedlab_kit.lab.canvas import BLUE, GREY, VERMILLION, canvas, percent, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 30  # clients that can have a bubble or a name each


def label_counts(counts: Sequence[Sequence[int]], classes: Sequence[str], names: Sequence[str] = ()) -> Figure:
    """Draw who holds which labels: counts is [clients, classes]; clients without `names` are numbered.

    Up to 30 clients are bubbles, area by samples; more are bars in a row per label, height by samples.
    """
    figure, axes = canvas(right=0.03, left=0.22 if max(map(len, classes)) > 3 else 0.11)
    axes.set(xlabel="Client", ylabel="Label", xlim=(-0.7, len(counts) - 0.3), ylim=(-0.7, len(classes) - 0.3))
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xticks(range(len(names)), names) if names else whole_numbers(axes)
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
    return figure


def client_accuracy(
    accuracy: Sequence[float], low: Sequence[float], high: Sequence[float], names: Sequence[str] = ()
) -> Figure:
    """Draw each client's accuracy (0..1) with its interval, worst first, beside the mean over clients.

    Clients whose accuracy is NaN are counted in the title; at least one must have another.
    """
    names = names or [str(client) for client in range(len(accuracy))]
    order = _worst_first(accuracy)
    figure, axes = canvas(right=0.18)
    axes.set(ylabel="Accuracy on validation (%)", xlabel="Client, worst first", xlim=(-0.7, len(order) - 0.3))
    axes.locator_params(axis="y", integer=True)
    size = min(6.0, 250 / len(order))
    for color, marker, first, some in ((VERMILLION, "s", 0, order[:1]), (BLUE, "o", 1, order[1:])):
        x, y = range(first, first + len(some)), [100 * accuracy[client] for client in some]
        ends = [100 * low[client] for client in some], [100 * high[client] for client in some]
        axes.vlines(x, *ends, color=color, linewidth=min(1.0, size / 3))
        axes.plot(x, y, marker, color=color, markersize=max(size, 5) if first == 0 else size, zorder=3 - first)
    if len(order) <= FEW:
        axes.set_xticks(range(len(order)), [names[client] for client in order], fontsize=8 if len(order) > 12 else None)
    else:
        axes.set_xticks([])
    if missing := len(accuracy) - len(order):
        axes.set_title(
            f"not estimable: {missing} of {len(accuracy)} clients", color=GREY, fontsize=8, loc="right", pad=0
        )
    mean = sum(accuracy[client] for client in order) / len(order)
    _name_mean_and_worst(axes, 100 * mean, 100 * accuracy[order[0]], names[order[0]])
    return figure


def describe_clients(accuracy: Sequence[float], names: Sequence[str] = ()) -> str:
    """Return what `client_accuracy` shows, in words, for those who cannot see it."""
    if not (order := _worst_first(accuracy)):
        return f"Accuracy of {len(accuracy)} clients: not estimable, none of their classes was held out."
    mean, worst = sum(accuracy[client] for client in order) / len(order), order[0]
    missing = f" Not estimable: {len(accuracy) - len(order)} of them." if len(order) < len(accuracy) else ""
    return (
        f"Accuracy of each of {len(accuracy)} clients: mean {percent(mean)}, "
        f"worst client {names[worst] if names else worst} with {percent(accuracy[worst])}.{missing}"
    )


def describe_labels(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return what `label_counts` shows, in words, for those who cannot see it."""
    held = [sum(count > 0 for count in row) for row in counts]
    sizes = [sum(row) for row in counts]
    return (
        f"Samples of {len(classes)} labels at {len(counts)} clients: a client holds {min(held)} to {max(held)} labels "
        f"and {min(sizes)} to {max(sizes)} samples."
    )


def _worst_first(accuracy: Sequence[float]) -> list[int]:
    """The clients that could be measured."""
    measured = (client for client, value in enumerate(accuracy) if not isnan(value))
    return sorted(measured, key=lambda client: accuracy[client])


def _name_mean_and_worst(axes: Axes, mean: float, worst: float, name: str) -> None:
    axes.axhline(mean, color=GREY, linewidth=1, linestyle="--")
    look: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "color": GREY, "va": "center", "fontsize": 9}
    axes.annotate(f"mean {percent(mean / 100)}", (1.01, mean), **look)
    look |= {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "color": VERMILLION}
    axes.annotate(f"worst: {name}, {percent(worst / 100)}", (0, 0.03), (8, 0), **look)  # few intervals reach down there
