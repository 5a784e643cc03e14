"""Clients that write differently: one set of pictures, each picture in the hand of the client that it belongs to.

Feature skew made from one data set: a hand turns, slants, thickens or thins, pales, and strews strokes over a picture.
All arithmetic on pixels is in integers, so the bytes are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TURN, SLANT, THICK, INK, STROKES = 20.0, 0.35, 0.7, 0.35, 2
"""How far hands differ: rotation to either side in degrees, shear to either side, the share of the way to a stroke a
pixel wider or narrower, the palest ink among 0..1, and the most strokes of clutter in a picture."""
FINE, WHOLE = 32, 256  # parts of a pixel in which pictures are read, parts of the way between two values
POINTS = 64  # of a stroke of clutter


@dataclass(frozen=True)
class Hand:
    """How one client writes: `turn` in degrees, `slant` as shear, `thickness` -1..1, `ink` 0..1, `strokes` at most."""

    turn: float
    slant: float
    thickness: float
    ink: float
    strokes: int


def hands(clients: int) -> list[Hand]:
    """Return the hand of each of so many clients: the same ones in every federation of that size.

    Each trait is spread evenly over its range, and which of them meet in a client is left to chance once and for all
    (a Latin hypercube, McKay et al. 1979). A client alone is in the middle of all.
    """
    rng = np.random.default_rng(clients)
    turn, slant, thickness, ink, strokes = ((rng.permutation(clients) + 0.5) / clients for _ in range(5))
    traits = [TURN * (2 * turn - 1), SLANT * (2 * slant - 1), THICK * (2 * thickness - 1), 1 - (1 - INK) * ink]
    traits.append((strokes * (STROKES + 1)).astype(int))
    return [Hand(*one) for one in zip(*(trait.tolist() for trait in traits), strict=True)]


def written(pictures: np.ndarray, hand: Hand, rng: np.random.Generator) -> np.ndarray:
    """Return pictures uint8 [n, channels, h, w], light on dark, in a hand; `rng` draws the clutter."""
    drawn = _thickened(_turned(pictures, hand.turn, hand.slant), hand.thickness)
    drawn = np.maximum(drawn, _clutter(pictures.shape, hand.strokes, rng))
    return (drawn.astype(np.int32) * round(hand.ink * WHOLE) // WHOLE).astype(np.uint8)


def _turned(pictures: np.ndarray, turn: float, slant: float) -> np.ndarray:
    """Turn and shear about the middle, between pixels bilinearly, dark outside: what pixel shows is looked up."""
    height, width = pictures.shape[-2:]
    sine, cosine = np.sin(np.radians(turn)), np.cos(np.radians(turn))
    inverse = np.linalg.inv(np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1, 0], [-slant, 1]]))
    matrix = np.rint(inverse * FINE * WHOLE).astype(np.int64)  # coarse enough for all machines to agree on it
    middle = np.array([height - 1, width - 1])
    place = 2 * np.indices((height, width)).reshape(2, -1) - middle[:, None]  # doubled: the middle lies between pixels
    found = (matrix @ place // WHOLE + FINE * middle[:, None]) // 2
    (row, down), (column, right) = (np.divmod(axis, FINE) for axis in found)
    padded = np.pad(pictures, [(0, 0), (0, 0), (1, 1), (1, 1)]).astype(np.int32)
    total = np.zeros((*pictures.shape[:2], height * width), np.int32)
    for below, beside in np.ndindex(2, 2):
        weight = np.where(below, down, FINE - down) * np.where(beside, right, FINE - right)
        rows, columns = (row + below + 1).clip(0, height + 1), (column + beside + 1).clip(0, width + 1)
        total += padded[..., rows, columns] * weight.astype(np.int32)
    return (total // FINE**2).astype(np.uint8).reshape(pictures.shape)


def _thickened(pictures: np.ndarray, thickness: float) -> np.ndarray:
    """Go some of the way to what is lightest (below zero: darkest) among a pixel and its four neighbours."""
    edge = np.pad(pictures, [(0, 0), (0, 0), (1, 1), (1, 1)], "edge")
    near = [pictures, edge[..., :-2, 1:-1], edge[..., 2:, 1:-1], edge[..., 1:-1, :-2], edge[..., 1:-1, 2:]]
    end = (np.maximum if thickness > 0 else np.minimum).reduce(near).astype(np.int32)
    way = round(abs(thickness) * WHOLE)
    return ((pictures * np.int32(WHOLE - way) + end * way) // WHOLE).astype(np.uint8)


def _clutter(shape: tuple[int, ...], most: int, rng: np.random.Generator) -> np.ndarray:
    """Draw straight strokes a pixel wide, 0 to `most` in each picture as chance has it."""
    count, _, height, width = shape
    canvas = np.zeros((count, 1, height, width), np.uint8)
    picture = np.repeat(np.arange(count), rng.integers(0, most + 1, count))
    begin, end = rng.integers(0, [height, width], (2, len(picture), 1, 2))
    on = np.arange(POINTS)[:, None]
    row, column = np.moveaxis((begin * (POINTS - 1 - on) + end * on) // (POINTS - 1), -1, 0)
    canvas[picture[:, None], 0, row, column] = 255
    return np.broadcast_to(canvas, shape)
