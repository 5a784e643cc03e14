"""Intervals for what is measured on finitely many samples."""

from __future__ import annotations

from math import sqrt

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of a share of `hits` among `total` >= 1 samples (Wilson 1927)."""
    share, z2 = hits / total, Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding must not cross the share
