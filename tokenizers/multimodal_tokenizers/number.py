"""One number, such as a price or an age, to read or to answer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from multimodal.shapes import ConfigError, MediaError, check_number, is_number
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal_tokenizers.scaling import scale_of


@dataclass(frozen=True)
class Number(Tokenizer):
    """A number, as one token. Make one with `Number.of(values)`, from the values to train on; the head `Regress` answers with it.

    mean: subtracted from the number.
    std: the divisor after that.

    Examples:
        >>> price = Number.of([10.0, 20.0, 30.0])
        >>> price.mean, round(price.decode(price(25)), 4)
        (20.0, 25.0)
    """

    mean: float = 0.0
    std: float = 1.0
    feature_size = 1

    def __post_init__(self) -> None:
        check_number("Number", mean=self.mean, std=self.std)
        object.__setattr__(self, "mean", float(self.mean))
        object.__setattr__(self, "std", float(self.std))
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ConfigError(f"Number: mean={self.mean} must be finite, and std={self.std} more than 0")

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """Make one with the mean and standard deviation of these numbers.

        Raises:
            ConfigError: there are none, one is no finite number, or a few are so far away that the others would be one.
        """
        found = list(values)
        for i, value in enumerate(found):
            if not is_number(value) or not math.isfinite(value):
                raise ConfigError(f"Number.of: value {i} is {describe(value)}, wanted a finite number")
        if not found:
            raise ConfigError("Number.of: there are no values")
        return cls(*scale_of("Number.of", np.array(found, dtype=np.float64)))

    @property
    def length(self) -> int:
        return 1

    def encode(self, value: Any) -> Tokens:
        number = value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value
        if not is_number(number) or not math.isfinite(number):
            raise MediaError(f"Number.encode: wanted a finite number, not {describe(value)}")
        return Tokens(torch.tensor([[(number - self.mean) / self.std]], dtype=torch.float64).float(), self.places(1))

    def decode(self, tokens: Tokens) -> float:
        return float(tokens.content[0, 0].double()) * self.std + self.mean

    def examples(self) -> list[float]:
        """Numbers for the conformance checks."""
        return [self.mean + x * self.std for x in (0.0, 1.0, -2.5, 0.125)]
