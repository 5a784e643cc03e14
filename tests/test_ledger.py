"""The ledger: bytes into seconds, by hand-checked sums."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedlab_kit.wire import make, pack
from fedlab_kit.wire.links import LINKS, Link, seconds, table, until

LINE = Link("line", up=8_000, down=80_000, latency=0.5, source="made up: 1 kB/s up, 10 kB/s down")


@dataclass(frozen=True)
class Record:
    accuracy: float = 0.5
    uplink_bytes: int = 2_000
    downlink_bytes: int = 20_000
    cohort: tuple[int, ...] = (3, 5)


def test_a_link_turns_bytes_into_seconds() -> None:
    assert LINE.seconds(uplink=1_000, downlink=0) == pytest.approx(1 + 1)
    assert LINE.seconds(uplink=0, downlink=1_000) == pytest.approx(1 + 0.1)


def test_rounds_add_up_and_clients_share_a_round_evenly() -> None:
    one = 1 + 1 + 1
    assert seconds(LINE, [Record()]) == pytest.approx(one)
    assert seconds(LINE, [Record()] * 4) == pytest.approx(4 * one)
    assert seconds(LINE, [Record(cohort=())]) == pytest.approx(1 + 2 + 2)


def test_until_stops_at_the_first_round_that_reaches_the_target() -> None:
    records = [Record(accuracy) for accuracy in (0.3, 0.7, 0.6, 0.8)]
    assert len(until(records, 0.7)) == 2
    assert len(until(records, 0.3)) == 1
    assert list(until(records, 0.9)) == []


def test_the_table_has_bytes_rounds_and_seconds_apart() -> None:
    runs = {"fp32": [Record(0.5), Record(0.9)], "stc": [Record(0.5, 20, 20_000)] * 3}
    whole, reached = table(runs), table(runs, accuracy=0.9)
    assert list(whole.columns) == ["rounds", "MB up", "MB down", "hospital fibre", "4G", "rural ADSL"]
    assert whole.loc["fp32", "rounds"] == 2
    assert whole.loc["fp32", "MB up"] == pytest.approx(0.004)
    assert whole.loc["stc", "MB down"] == pytest.approx(0.06)
    assert whole.loc["stc", "4G"] == pytest.approx(seconds(LINKS["4G"], runs["stc"]))
    assert reached.loc["fp32", "rounds"] == 2
    assert reached.loc["stc"].isna().all()


def test_fewer_bytes_are_not_fewer_seconds_where_latency_rules() -> None:
    big, small = [Record(uplink_bytes=40_000)] * 10, [Record(uplink_bytes=1_000)] * 20
    fibre, adsl = LINKS["hospital fibre"], LINKS["rural ADSL"]
    assert seconds(fibre, small) > seconds(fibre, big)
    assert seconds(adsl, small) < seconds(adsl, big)


def test_links_are_ordered_from_fast_to_slow_and_name_their_source() -> None:
    times = [link.seconds(10_000, 10_000) for link in LINKS.values()]
    assert times == sorted(times)
    assert all(name == link.name and link.source for name, link in LINKS.items())


def test_the_ledger_counts_whole_payloads() -> None:
    payload = pack(make("int8", bucket=10), torch.ones(100), samples=1, rng=np.random.default_rng(0))
    record = Record(uplink_bytes=len(payload), cohort=(0,), downlink_bytes=0)
    header, scales, codes = 14, 20, 100
    assert seconds(LINE, [record]) == pytest.approx(1 + (header + scales + codes) / 1_000)
