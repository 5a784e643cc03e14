"""Intervals for what is measured on finitely many samples."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

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
