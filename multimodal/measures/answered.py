"""Wanted and given answers side by side, in little memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from multimodal.heads import Prediction
from multimodal.shapes import ConfigError


@dataclass
class Answered:
    """What was wanted and what was answered, sample after sample.

    names: the classes, if there are some.
    wanted: the value that each sample has.
    value: the value that was answered.
    confidence: the probability of each answer.
    right: whether each answer is exactly the wanted value.
    """

    names: Sequence[Any] = ()
    wanted: list[Any] = field(default_factory=list)
    value: list[Any] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    _rows: list[np.ndarray] = field(default_factory=list, repr=False)

    def add(self, wanted: Any, answer: Prediction, right: bool) -> None:
        """Append a sample. Its answer is kept without what only writing needs."""
        self.right.append(right)
        self.wanted.append(wanted)
        self.value.append(answer.value)
        self.confidence.append(answer.confidence)
        if self.names:
            self._rows.append(np.array([answer.probability[name] for name in self.names], dtype=np.float32))

    def __len__(self) -> int:
        return len(self.wanted)

    @property
    def probability(self) -> np.ndarray:
        """(N, C): of each sample, the probability of each class."""
        if not self.names:
            raise ConfigError("Answered: there are no classes, and so no probabilities of them")
        return np.stack(self._rows) if self._rows else np.zeros((0, len(self.names)), dtype=np.float32)

    @property
    def classes(self) -> np.ndarray:
        """(N,) the numbers of the wanted classes, where each sample has one; (N, C) of 0 and 1, where it has several."""
        number = {name: i for i, name in enumerate(self.names)}
        if self.wanted and isinstance(self.wanted[0], (list, tuple)):
            found = np.zeros((len(self), len(number)), dtype=int)
            for row, some in zip(found, self.wanted, strict=True):
                row[[number[name] for name in some]] = 1
            return found
        return np.array([number[name] for name in self.wanted], dtype=int)

    def answers(self) -> list[Prediction]:
        """The answers as the model gave them."""
        rows = [dict(zip(self.names, row.tolist(), strict=True)) for row in self._rows] or [{} for _ in self.value]
        return [Prediction(*parts) for parts in zip(self.value, self.confidence, rows, strict=True)]
