"""Intervals for what is measured on finitely many samples or seeds, and what they say about a claim."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"
FEWEST_SEEDS = 8  # for seeds and pictures crossed
Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of a share of `hits` among `total` >= 1 samples (Wilson 1927)."""
    share, z2 = hits / total, Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding must not cross the share


def recall(right: np.ndarray, labels: np.ndarray, classes: int) -> tuple[float | None, ...]:
    """Return the share of each class that was answered right, bool [n]; None for a class without a sample."""
    import numpy as np

    found = (np.bincount(which, minlength=classes).tolist() for which in (labels[right], labels))
    return tuple(hits / total if total else None for hits, total in zip(*found, strict=True))


def auc_interval(auc: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of an area under the ROC curve measured on so many of each class, >= 1.

    Newcombe's score interval (2006, part 2, method 5): the areas whose own spread, by Hanley and McNeil's formula,
    would still give the one that was measured. It keeps a width at an area of 1, where DeLong's has none.
    """
    from scipy.optimize import brentq

    extra = (positives + negatives) / 2 - 1

    def spread(area: float) -> float:
        rise = extra * ((1 - area) / (2 - area) + area / (1 + area))
        return Z95 * sqrt(area * (1 - area) * (1 + rise) / (positives * negatives))

    edge = 1e-9  # at 0 and 1 the spread is zero, a root that is not meant
    low = brentq(lambda area: auc - area - spread(area), 0, min(auc, 1 - edge)) if auc > edge else 0.0
    high = brentq(lambda area: area - auc - spread(area), max(auc, edge), 1) if auc < 1 - edge else 1.0
    return min(auc, float(low)), max(auc, float(high))


def mean_interval(values: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of the mean of values [n], n >= 1, that lie between `least` and `most`.

    Student's, after one value more at either end of the range, as Agresti and Coull (1998) add successes and failures:
    a few skewed values that happen to lie together no longer look certain. From ten values on it holds 95 %, where the
    bootstrap's percentiles and Student's interval alone fall below 85 %; a test simulates it.
    """
    import numpy as np
    from scipy.special import stdtrit

    wide = np.append(values, (least, most))
    half = stdtrit(len(wide) - 1, 0.975) * wide.std(ddof=1) / sqrt(len(wide))
    low, high, mean = wide.mean() - half, wide.mean() + half, values.mean()
    return max(least, float(min(low, mean))), min(most, float(max(high, mean)))


def paired_loss(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float, float]:
    """Compare answers right (True) or wrong, bool [n], of two models on the same n >= 1 samples.

    Returns the share that got lost, its 95 % interval (low, high; Tango's score interval, 1998, which promises no more
    where no or few answers changed), and McNemar's exact one-sided p against "nothing got lost".
    """
    from scipy.optimize import brentq
    from scipy.stats import binomtest

    worse, better, total = int((before & ~after).sum()), int((~before & after).sum()), len(before)
    p = binomtest(worse, worse + better, alternative="greater").pvalue if worse + better else 1.0
    share, edge = (worse - better) / total, 1e-9

    def highest(lost: int, won: int) -> float:
        """The largest share whose own spread, with the likeliest changes that give it, would still show this."""

        def excess(share: float) -> float:
            b = (2 * total - lost + won) * share - lost - won
            changed = (sqrt(max(0.0, b**2 + 8 * total * won * share * (1 - share))) - b) / (2 * total)
            return lost - won - total * share + Z95 * sqrt(max(0.0, total * (changed + share * (1 - share))))

        start = (lost - won) / total + edge
        return float(brentq(excess, start, 1)) if start < 1 and excess(1) < 0 else 1.0

    return share, -highest(better, worse), highest(worse, better), float(p)


def mean_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of first - second, paired, n >= 2 of each, and its 95 % interval (low, high; Student's t).

    A difference that is not finite leaves every mean possible, which is where Student's interval goes as one grows.
    """
    import numpy as np
    from scipy.special import stdtrit

    with np.errstate(invalid="ignore"):  # both infinite
        differences = np.asarray(first, float) - np.asarray(second, float)
        mean = float(differences.mean())
    if not np.isfinite(differences).all():
        return mean, -np.inf, np.inf
    half = float(stdtrit(len(differences) - 1, 0.975) * differences.std(ddof=1)) / sqrt(len(differences))
    return mean, mean - half, mean + half


def crossed_loss(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Compare answers right (True) or wrong, bool [seeds, samples], of models trained twice with each of the seeds.

    Returns the share that got lost and its 95 % interval (low, high) over other seeds and other samples: Student's,
    with the variance components of two crossed factors as readers and cases have them (Hillis 2007) and Satterthwaite's
    degrees of freedom (1946). As in `mean_interval`, one sample more is lost and one won with every seed. ValueError
    below 8 seeds.
    """
    import numpy as np
    from scipy.special import stdtrit

    if len(before) < FEWEST_SEEDS:
        raise ValueError(f"seeds must be at least {FEWEST_SEEDS} to say what holds for others, got {len(before)}")
    lost = before.astype(float) - after
    wide = np.column_stack([lost, np.ones(len(lost)), -np.ones(len(lost))])
    (seeds, samples), rows, columns = wide.shape, wide.mean(1), wide.mean(0)
    of_seeds, of_samples = samples * rows.var(ddof=1), seeds * columns.var(ddof=1)  # mean squares
    rest = wide - rows[:, None] - columns + wide.mean()
    both = (rest**2).sum() / ((seeds - 1) * (samples - 1))
    spread = max(of_seeds + of_samples - both, of_seeds, of_samples)  # no component is below zero
    freedom = spread**2 / (
        of_seeds**2 / (seeds - 1) + of_samples**2 / (samples - 1) + both**2 / ((seeds - 1) * (samples - 1))
    )
    half = stdtrit(freedom, 0.975) * sqrt(spread / (seeds * samples))
    share, middle = float(lost.mean()), float(wide.mean())
    return share, max(-1.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def holm(p: Sequence[float]) -> list[float]:
    """Correct the p values of several tests (Holm 1979): those at most 0.05 hold together at 5 %. NaN is no test."""
    order = sorted((value, number) for number, value in enumerate(p) if value == value)
    corrected, largest = list(p), 0.0
    for rank, (value, number) in enumerate(order):
        corrected[number] = largest = max(largest, min(1.0, (len(order) - rank) * value))
    return corrected


def verdict(low: float, high: float, margin: float = 0.0) -> str:
    """Say what a 95 % interval says of the claim that a difference is above `margin`.

    "supported" when all of the interval is, "not supported" when none of it is, else "undecided". A margin below zero
    makes it a claim of not being worse by that much (non-inferiority, ICH E9).
    """
    return SUPPORTED if low > margin else NOT_SUPPORTED if high < margin else UNDECIDED


def not_hurt(before: np.ndarray, after: np.ndarray, margin: float) -> str:
    """Give the `verdict` on the claim that less than `margin` > 0 of the answers got lost, see `paired_loss`."""
    if not margin > 0:
        raise ValueError(f"margin must be above 0, the loss that still counts as none, got {margin}")
    _, low, high, _ = paired_loss(before, after)
    return verdict(-high, -low, -margin)
