"""Digits as a pen draws them: lines through points that are disturbed, for the drawings that scans are too few to cover."""

from typing import Any

import numpy as np

Points = tuple[tuple[float, float], ...]
SHAPES: tuple[tuple[tuple[Points, ...], ...], ...] = (
    ((((0.5, 0), (0.15, 0.2), (0.1, 0.6), (0.4, 1), (0.8, 0.8), (0.88, 0.35), (0.55, 0)),),),
    (
        (((0.5, 0), (0.5, 1)),),
        (((0.25, 0.3), (0.55, 0), (0.55, 1)),),
        (((0.25, 0.3), (0.5, 0), (0.5, 1)), ((0.2, 1), (0.8, 1))),
    ),
    (
        (((0.15, 0.25), (0.35, 0), (0.75, 0.05), (0.8, 0.35), (0.15, 1), (0.9, 1)),),
        (((0.15, 0.2), (0.5, 0), (0.8, 0.25), (0.3, 0.85), (0.15, 0.95), (0.25, 0.75), (0.55, 0.95), (0.9, 0.95)),),
    ),
    (
        (((0.15, 0.1), (0.6, 0), (0.8, 0.25), (0.4, 0.48), (0.85, 0.7), (0.6, 1), (0.1, 0.9)),),
        (((0.1, 0), (0.85, 0), (0.4, 0.4), (0.85, 0.65), (0.6, 1), (0.1, 0.9)),),
    ),
    (
        (((0.6, 0), (0.1, 0.65), (0.9, 0.65)), ((0.65, 0.3), (0.65, 1))),
        (((0.2, 0), (0.15, 0.5), (0.85, 0.5)), ((0.8, 0), (0.75, 1))),
    ),
    (
        (((0.85, 0), (0.25, 0), (0.2, 0.45), (0.65, 0.4), (0.85, 0.7), (0.6, 1), (0.1, 0.9)),),
        (((0.25, 0), (0.2, 0.45), (0.65, 0.4), (0.85, 0.7), (0.6, 1), (0.1, 0.9)), ((0.25, 0), (0.85, 0.02))),
    ),
    ((((0.7, 0), (0.25, 0.35), (0.15, 0.75), (0.5, 1), (0.85, 0.75), (0.55, 0.5), (0.2, 0.7)),),),
    (
        (((0.1, 0), (0.9, 0), (0.4, 1)),),
        (((0.1, 0), (0.9, 0), (0.45, 1)), ((0.25, 0.5), (0.8, 0.5))),
    ),
    (
        (
            (
                (0.5, 0.48),
                (0.15, 0.25),
                (0.5, 0),
                (0.85, 0.25),
                (0.5, 0.48),
                (0.1, 0.75),
                (0.5, 1),
                (0.9, 0.75),
                (0.5, 0.48),
            ),
        ),
        (((0.8, 0.15), (0.4, 0), (0.2, 0.25), (0.8, 0.7), (0.5, 1), (0.15, 0.75), (0.75, 0.3), (0.8, 0.15)),),
    ),
    (
        (((0.85, 0.3), (0.5, 0), (0.15, 0.28), (0.5, 0.55), (0.85, 0.3), (0.8, 1)),),
        (((0.85, 0.25), (0.5, 0), (0.15, 0.28), (0.5, 0.5), (0.85, 0.25), (0.75, 0.8), (0.3, 1)),),
    ),
)
"""By digit, ways to write it; each is some lines through points (column, row), from 0 to 1."""
LARGE = 64  # pixels of the sheet's side while it is drawn


def written(digit: int, side: int) -> Any:
    """A picture of side x side pixels with the digit in white on black, written in another way each time."""
    from PIL import Image, ImageDraw

    ways = SHAPES[digit]
    sheet = Image.new("L", (LARGE, LARGE))
    pen, width, stroke = ImageDraw.Draw(sheet), np.random.uniform(0.5, 0.95), int(np.random.randint(4, 11))
    size = (LARGE - 2 * stroke) * np.array([width, 1.0])
    for points in ways[np.random.randint(len(ways))]:
        line = _rounded(np.array(points) + np.random.normal(0, 0.04, (len(points), 2)))
        places = (line - 0.5) * size + LARGE / 2
        pen.line([tuple(place) for place in places.tolist()], fill=255, width=stroke, joint="curve")
    return sheet.resize((side, side), Image.Resampling.BOX)


def _rounded(line: np.ndarray) -> np.ndarray:
    """The same line with its corners cut twice, each at a quarter of its sides (Chaikin 1974)."""
    for _ in range(2):
        first, second = line[:-1], line[1:]
        cut = np.stack([0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second], 1).reshape(-1, 2)
        line = np.concatenate([line[:1], cut[1:-1], line[-1:]]) if len(line) > 2 else line
    return line
