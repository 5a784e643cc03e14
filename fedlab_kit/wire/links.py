"""Links, and how long the bytes of the records take on them: bytes, rounds and seconds are three axes.

Bytes come from the records, where they are lengths of payloads with headers, scales and positions. Time here is
transfer alone; computing comes on top. `records` are `RoundRecord`s, or whatever has their fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Link:
    """A client's connection: `up` and `down` in bit/s, `latency` one way in seconds, and the figures' `source`."""

    name: str
    up: float
    down: float
    latency: float
    source: str

    def seconds(self, uplink: float, downlink: float) -> float:
        """How long one client takes to receive `downlink` bytes and then send `uplink` bytes."""
        return 2 * self.latency + 8 * downlink / self.down + 8 * uplink / self.up


_FIBRE = "the symmetric 100 Mbit/s leased line that health networks commonly offer a hospital site"
_LTE = "the order that telecom regulators' drive tests report for LTE; its ceiling is far higher"
_ADSL = "a line of about 4 km; the standard, ITU-T G.992.5, allows 24 Mbit/s down and 1.4 up next door"
LINKS: dict[str, Link] = {
    "hospital fibre": Link("hospital fibre", up=100e6, down=100e6, latency=0.005, source=_FIBRE),
    "4G": Link("4G", up=10e6, down=30e6, latency=0.025, source=_LTE),
    "rural ADSL": Link("rural ADSL", up=0.6e6, down=5e6, latency=0.02, source=_ADSL),
}
"""Typical links, rounded: examples to reason with, not promises."""


def seconds(link: Link, records: Iterable[Any]) -> float:
    """How long the transfers of all rounds take when a round's clients share its bytes evenly."""
    total = 0.0
    for record in records:
        share = max(len(record.cohort), 1)
        total += link.seconds(record.uplink_bytes / share, record.downlink_bytes / share)
    return total


def until(records: Sequence[Any], accuracy: float) -> Sequence[Any]:
    """The records up to the first that reaches `accuracy` (0..1); none if no record does."""
    for position, record in enumerate(records):
        if record.accuracy >= accuracy:
            return records[: position + 1]
    return []


def table(runs: Mapping[str, Sequence[Any]], accuracy: float | None = None) -> DataFrame:
    """One row for each named sequence of records: rounds, megabytes each way, seconds on each link.

    With `accuracy` (0..1) the rows stop at the round that first reaches it, and are empty (NaN) if none does.
    A megabyte is 10**6 bytes.
    """
    import pandas

    rows = {name: _row(records if accuracy is None else until(records, accuracy)) for name, records in runs.items()}
    return pandas.DataFrame.from_dict(rows, orient="index", columns=["rounds", "MB up", "MB down", *LINKS])


def _row(records: Sequence[Any]) -> list[Any]:
    if not records:
        return [None] * (3 + len(LINKS))
    up, down = sum(r.uplink_bytes for r in records), sum(r.downlink_bytes for r in records)
    return [len(records), up / 1e6, down / 1e6, *(seconds(link, records) for link in LINKS.values())]
