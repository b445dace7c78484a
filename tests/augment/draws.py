"""A generator that gives the largest number it may, so that a test knows what an augmentation has drawn."""

from typing import Any

import numpy as np


class Largest:
    """`uniform` gives its upper bound, `integers` the last one, `random` the value given, `permutation` no change."""

    def __init__(self, random: float = 0.0) -> None:
        self.given = random

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        return high if size is None else np.full(size, high)

    def integers(self, low: int, high: int | None = None, size: int | None = None) -> Any:
        last = (low if high is None else high) - 1
        return last if size is None else np.full(size, last)

    def random(self, size: int | None = None) -> Any:
        return self.given if size is None else np.full(size, self.given)

    def permutation(self, values: Any) -> Any:
        return np.arange(values) if isinstance(values, int) else values

    def beta(self, a: float, b: float) -> float:
        return 0.7

    def normal(self, mean: float, deviation: float, size: int) -> np.ndarray:
        return np.full(size, mean + deviation)
