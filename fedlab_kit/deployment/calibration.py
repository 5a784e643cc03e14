"""Calibration: the ranges of activations for static int8, measured by the clients and put together by the server.

Clients answer with extremes and, where a range is to be narrower, with counts in bins that all share, in narrower bins
again if need be. Extremes of extremes and sums of counts are those of all samples together, so it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.deployment.score import open_session
from fedlab_kit.deployment.static import TINY, Ranges, plan_int8

Histograms = dict[str, np.ndarray]

CALIBRATION = 256  # samples that calibrate an artifact, all clients together
BINS = 2048  # of a histogram, equally wide from the smallest to the largest value of all clients
PERCENTILE = 99.5  # per cent of an activation's values inside a "percentile" range
LEVELS = 128  # into which "entropy" merges the bins inside a range before it compares
_ROWS = 8  # samples run at once in calibration, always: another batch size could round a sum differently
_COARSE = 1 / 8  # share of a range below which its bins are too wide for the rest
_PASSES = 4  # enough to find what lies 10^13 times as close as the wildest value
_NOTHING = 2.0**-40  # share of a range that is left after so many where nearly all values are zero: all of it counts


def calibrate(
    graph: Any, clients: Sequence[Tensor], method: Literal["minmax", "percentile", "entropy"] = "minmax"
) -> Ranges:
    """Ranges for static int8, each client on an equal share of raw samples; of thousands of clients, some are asked.

    "minmax" holds every value, "percentile" the middle 99.5 % of them, "entropy" those whose 8-bit histogram is least
    surprising beside the float one (Migacz 2017). Raises ValueError without samples.
    """
    held = [samples for samples in clients if len(samples)]
    asked = held[:: max(1, len(held) // CALIBRATION)]
    shares = [samples[: max(1, CALIBRATION // len(asked))] for samples in asked]
    calibrator = Calibrator(graph)

    def count(within: Ranges) -> Histograms:
        """All clients' counts."""
        return merge_histograms(calibrator.histograms(samples, within) for samples in shares)

    ranges = widest = merge_ranges(calibrator.ranges(samples) for samples in shares)
    if method == "minmax":
        return widest
    for _ in range(_PASSES):
        ranges, again = percentile_ranges(count(ranges), ranges)
        if not again:
            break
    ranges = {n: span if _width(span) > _NOTHING * _width(widest[n]) else widest[n] for n, span in ranges.items()}
    if method == "percentile":
        return ranges
    # where "entropy" looks: four times as wide as what holds the middle 99.5 %, but no wider than what holds all
    within = {n: (max(4 * low, widest[n][0]), min(4 * high, widest[n][1])) for n, (low, high) in ranges.items()}
    return entropy_ranges(count(within), within)


def client_ranges(graph: Any, samples: Tensor) -> Ranges:
    """What one client returns first: the extremes of each activation on its raw samples. ValueError without any."""
    return Calibrator(graph).ranges(samples)


def merge_ranges(clients: Iterable[Ranges]) -> Ranges:
    """What the server does with them: the minimum of the minima, the maximum of the maxima."""
    answers, merged = list(clients), Ranges()
    if not answers:
        raise ValueError("calibration needs at least one client's ranges, got none")
    for ranges in answers:
        for name, (low, high) in ranges.items():
            known = merged.get(name, (low, high))
            merged[name] = (min(low, known[0]), max(high, known[1]))
    return merged


def client_histograms(graph: Any, samples: Tensor, ranges: Ranges) -> Histograms:
    """What one client returns then: how many values of each activation lie in each of 2048 bins of the merged range."""
    return Calibrator(graph).histograms(samples, ranges)


def merge_histograms(clients: Iterable[Histograms]) -> Histograms:
    """The sums of the clients' counts, which are the counts of all samples together."""
    merged: Histograms = {}
    for histograms in clients:
        for name, counts in histograms.items():
            merged[name] = merged.get(name, 0) + counts
    return merged


def percentile_ranges(counts: Histograms, ranges: Ranges) -> tuple[Ranges, bool]:
    """What the server does with counts: ranges that hold the middle 99.5 % of all values, to the edge of a bin.

    And whether a range has so few of the bins left that clients should count again, in bins of the new ranges.
    """
    outside = (100 - PERCENTILE) / 200

    def middle(counts: np.ndarray, edges: np.ndarray) -> tuple[int, int]:
        """The bins that the lower and the upper percentile fall in."""
        first, last = np.searchsorted(np.cumsum(counts) / counts.sum(), (outside, 1 - outside))
        return first, last + 1

    found = _narrowed(counts, ranges, middle)
    return found, any(_width(found[name]) < _COARSE * _width(span) for name, span in ranges.items())


def entropy_ranges(counts: Histograms, ranges: Ranges) -> Ranges:
    """The part of each range whose histogram changes least, by Kullback and Leibler, when its bins become 128 levels.

    Parts of every 8th number of bins are tried, shrunk towards zero on both sides alike (Migacz 2017). Square roots of
    the counts are compared: a value that comes again and again, as zero does behind a Relu, would outweigh the rest.
    """
    widths = np.arange(LEVELS, BINS + 1, 8)

    def least(counts: np.ndarray, edges: np.ndarray) -> tuple[int, int]:
        """The part that changes least."""
        zero = BINS * -edges[0] / (edges[-1] - edges[0])
        firsts = np.rint(zero * (1 - widths / BINS)).astype(int)
        lost = [_divergence(np.sqrt(counts), *ends) for ends in zip(firsts, firsts + widths, strict=True)]
        best = np.argmin(lost)
        return firsts[best], firsts[best] + widths[best]

    return _narrowed(counts, ranges, least)


class Calibrator:
    """The float graph opened with every activation that gets a grid as an output."""

    def __init__(self, graph: Any) -> None:
        from onnx import TensorProto, helper

        plan = plan_int8(graph)
        self._names = list(dict.fromkeys(plan.source.values()))
        known = {value.name for value in (*graph.graph.input, *graph.graph.output)}
        new = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in self._names if n not in known]
        plan.graph.graph.output.extend(new)
        self._session = open_session(plan.graph.SerializeToString(), optimize=False)

    def ranges(self, samples: Tensor) -> Ranges:
        """The extremes on raw samples [n, ...]."""
        return merge_ranges(
            {n: (values.min(), values.max()) for n, values in run.items()} for run in self._run(samples)
        )

    def histograms(self, samples: Tensor, ranges: Ranges) -> Histograms:
        """Counts int64 [2048] on raw samples [n, ...] in bins of equal width over each range, zero included."""
        runs = self._run(samples)
        return merge_histograms({n: _counts(values, *ranges[n]) for n, values in run.items()} for run in runs)

    def _run(self, samples: Tensor) -> Iterator[dict[str, np.ndarray]]:
        if len(samples) == 0:
            raise ValueError("calibration needs at least one sample, got none")
        outputs = [name for name in self._names if name != "x"]
        for part in samples.split(_ROWS):
            filled = part.numpy()[np.arange(_ROWS) % len(part)]
            values = self._session.run(outputs, {"x": filled}) if outputs else []
            found = {"x": filled, **dict(zip(outputs, values, strict=True))}
            yield {name: found[name][: len(part)] for name in self._names}


def _ends(low: Any, high: Any) -> tuple[float, float]:
    """A range with zero inside."""
    return min(float(low), 0.0), max(float(high), 0.0)


def _width(span: tuple[Any, Any]) -> float:
    low, high = _ends(*span)
    return high - low


def _counts(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """How many values lie in each bin, int64 [2048], those outside in the outermost; none without a finite width."""
    if not TINY < _width((low, high)) < np.inf:
        return np.zeros(BINS, np.int64)
    ends = _ends(low, high)
    return torch.histc(torch.from_numpy(values.ravel()).clamp(*ends), BINS, *ends).numpy().astype(np.int64)


def _narrowed(
    counts: Histograms, ranges: Ranges, choose: Callable[[np.ndarray, np.ndarray], tuple[int, int]]
) -> Ranges:
    """Ranges from edge to edge of the bins that `choose` picks by their counts; as they were where none are counted."""
    found = Ranges()
    for name, (low, high) in ranges.items():
        found[name] = low, high
        if counts[name].any():
            edges = np.linspace(*_ends(low, high), BINS + 1)
            first, last = choose(counts[name], edges)
            found[name] = np.float32(max(low, edges[first])), np.float32(min(high, edges[last]))
    return found


def _divergence(counts: np.ndarray, first: int, last: int) -> float:
    """How much the counts of the bins [first, last) tell beyond their levels, in nats.

    What lies outside counts in the outermost bins, as clipping has it; a level's count is spread over those of its bins
    that hold anything, and a level that holds nothing has next to nothing instead.
    """
    inside = counts[first:last]
    real = inside.copy()
    real[0] += counts[:first].sum()
    real[-1] += counts[last:].sum()
    begins = len(inside) * np.arange(LEVELS) // LEVELS
    sizes = np.diff(begins, append=len(inside))
    held = np.maximum(np.add.reduceat(real > 0, begins, dtype=np.float64), 1)
    merged = np.repeat(np.maximum(np.add.reduceat(inside, begins) / held, 1e-4), sizes)[real > 0]
    real = real[real > 0]
    return float((real * np.log(real / merged)).sum() / real.sum() - np.log(real.sum() / merged.sum()))
