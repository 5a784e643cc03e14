"""What is known about one round when it is over."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class RoundRecord:
    """One round in plain numbers.

    `accuracy` in 0..1 on the validation split with its 95 % interval `low`..`high`; `loss` in nats (None when it is
    not finite); `uplink_bytes` and `downlink_bytes` are the lengths of all payloads of this round; `seconds` is wall
    time; `cohort` the clients sampled, `uplinks` and `downlinks` the bytes of each of them, `answered` those whose
    update was used; `correct` and `total` count the validation samples per class (or per site); `refused` names the
    clients whose payload could not be used or came late, with the reason; `note` says what else went wrong.
    """

    round: int
    accuracy: float
    low: float
    high: float
    loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    cohort: tuple[int, ...]
    answered: tuple[int, ...]
    correct: tuple[int, ...]
    total: tuple[int, ...]
    uplinks: tuple[int, ...] = ()
    downlinks: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dictionary that JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_json(text: bytes) -> list[RoundRecord]:
        """Rebuild records from a JSON list of what `to_dict` gave. ValueError when a type is another one."""
        return _reader().validate_json(text, strict=True)

    @property
    def diverged(self) -> bool:
        """Whether training ended here because a number was no longer finite."""
        return self.loss is None


@cache
def _reader() -> TypeAdapter[list[RoundRecord]]:
    return TypeAdapter(list[RoundRecord])
