"""Exercises of notebooks/09_scaling_out.ipynb."""

from __future__ import annotations

from typing import Any

from fedlab_kit.lab.exercises import Hint, call, exercise, number
from fedlab_kit.wire.frame import HEADER

CLIENTS, PARAMETERS = 100_000, 7_850  # of 09-2
HISTORIES: tuple[tuple[list[bool], int], ...] = (
    ([True, True, True], 3),
    ([True, False, True, False], 3),
    ([True, False, False], 1),
    ([False, False], 0),
    ([], 0),
)


@exercise("09-2")
def uplink_of_a_city(answer: Any) -> str:
    """The bytes that 100,000 clients send in a round with 7,850 parameters as fp32."""
    given = number(answer, "one whole number of bytes")
    frame = HEADER.size + 4 * PARAMETERS
    truth = CLIENTS * frame
    if given == truth:
        return f"{truth / 1e9:.2f} GB: {frame:,} bytes from each of {CLIENTS:,} clients."
    hints = {
        frame: "That is one client's payload. How many send one?",
        CLIENTS * 4 * PARAMETERS: f"Every payload begins with a header of {HEADER.size} bytes.",
        CLIENTS * PARAMETERS: "fp32 takes four bytes a number, and a header comes first.",
        CLIENTS * (frame + 1): "The byte that says what is inside belongs to a broadcast, not to a payload.",
        8 * truth: "That is in bits.",
        2 * truth: "That is both directions; the question is the uplink.",
    }
    raise Hint(hints.get(int(given), "A payload is a header and four bytes a number; then count the clients."))


@exercise("09-1")
def last_answer_that_arrived(answer: Any) -> str:
    """A function: from a list of whether each round's answer arrived, the round whose memory counts, 0 if none."""
    for arrived, truth in HISTORIES:
        found = number(call(answer, list(arrived)), "a function that returns a whole number")
        if found == truth:
            continue
        if found == sum(arrived):
            raise Hint(f"For {arrived} your function counts the answers; asked is the last round that has one.")
        if found == truth - 1:
            raise Hint(f"For {arrived} your function gives {found:g}. Rounds are counted from 1.")
        if found == len(arrived):
            raise Hint(f"For {arrived} the last answer is not that of the last round: it was lost on its way.")
        raise Hint(f"For {arrived} it should be {truth}, not {found:g}.")
    return "A lost answer leaves the client where the server believes it to be."
