"""The small steps that codecs are made of: packing bits, coding positions, and the error they raise."""

from __future__ import annotations


class PayloadError(ValueError):
    """A payload is refused; the message is the reason, in a few words."""
