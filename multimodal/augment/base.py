"""The contract of augmentations: declarations that change one value at random."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from multimodal.declare import Declared, check_part
from multimodal.shapes import ConfigError, is_number
from multimodal.texts import shortened
from multimodal.tokenizer import AfterEncoding, Tokenizer, Tokens


class Augmentation(Declared, ABC):
    """A random change of one value: a frozen dataclass of its strengths.

    of: what it changes: "picture", "sound", "text", or "tokens", which is the value after its kind has encoded it.
    """

    of: ClassVar[str]

    def __call__(self, value: Any, draw: np.random.Generator | None = None) -> Any:
        """The changed value; None stays None.

        draw: the generator of all random numbers; None: one that is seeded from numpy's global generator, which `mm.fit` seeds
            for each sample.

        Raises:
            MediaError: the value is of another sort, or cannot be changed so.
        """
        if value is None:
            return None
        return self.change(self.read(value), generator() if draw is None else draw)

    @staticmethod
    @abstractmethod
    def read(value: Any) -> Any:
        """A value in the one form that `change` takes and returns, so that several changes read a file once."""

    @abstractmethod
    def change(self, value: Any, draw: np.random.Generator) -> Any:
        """The changed value."""


class TokenAugmentation(Augmentation):
    """A random change of the tokens of a value. It acts in `mm.fit`, after the kind has encoded the value."""

    of = "tokens"

    def __call__(self, value: Any, draw: np.random.Generator | None = None) -> Any:
        """The value together with this change of its tokens, for a sample; None stays None."""
        return (
            None
            if value is None
            else AfterEncoding(value, (self.change_tokens,), new_seed(generator() if draw is None else draw))
        )

    @staticmethod
    def read(value: Any) -> Any:
        return value

    def change(self, value: Tokens, draw: np.random.Generator) -> Tokens:
        raise NotImplementedError("tokens are changed by `change_tokens`, which knows their kind")

    @abstractmethod
    def change_tokens(self, tokens: Tokens, tokenizer: Tokenizer, draw: np.random.Generator) -> Tokens:
        """The changed tokens of a value of this kind.

        Raises:
            ConfigError: the tokens of this kind cannot be changed so.
        """


@dataclass(frozen=True)
class Sometimes(Augmentation):
    """An augmentation of a share of the values; the others stay as they are.

    augmentation: the change.
    share: the probability of the change, from 0 to 1.

    Examples:
        >>> from multimodal import augment
        >>> blurred = augment.Sometimes(augment.Blur(2.0), share=0.3)
    """

    augmentation: Augmentation
    share: float = 0.5

    def __post_init__(self) -> None:
        check_part("Sometimes: augmentation", self.augmentation, Augmentation, "HorizontalFlip()")
        check_share("Sometimes", share=self.share)

    @property
    def of(self) -> str:  # type: ignore[override]
        """What the augmentation changes."""
        return self.augmentation.of

    def read(self, value: Any) -> Any:  # type: ignore[override]
        return self.augmentation.read(value)

    def change(self, value: Any, draw: np.random.Generator) -> Any:
        return self.augmentation.change(value, draw) if draw.random() < self.share else value

    def change_tokens(self, tokens: Tokens, tokenizer: Tokenizer, draw: np.random.Generator) -> Tokens:
        """As that of a `TokenAugmentation`."""
        inner: Any = self.augmentation
        return inner.change_tokens(tokens, tokenizer, draw) if draw.random() < self.share else tokens

    def __call__(self, value: Any, draw: np.random.Generator | None = None) -> Any:
        if self.of != "tokens":
            return super().__call__(value, draw)
        return (
            None
            if value is None
            else AfterEncoding(value, (self.change_tokens,), new_seed(generator() if draw is None else draw))
        )  # type: ignore[arg-type]


def generator() -> np.random.Generator:
    """A generator that is seeded from numpy's global one."""
    return np.random.default_rng(np.random.randint(0, 2**32, 4, np.uint32))


def new_seed(draw: np.random.Generator) -> int:
    return int(draw.integers(2**63))


@contextmanager
def torch_draws(draw: np.random.Generator) -> Iterator[None]:
    """Seeds torch's global generator from `draw`, for libraries that draw from it, and restores it afterwards."""
    before = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(new_seed(draw))
    try:
        yield
    finally:
        torch.random.set_rng_state(before)


def check_share(where: str, /, **values: Any) -> None:
    """Raise a ConfigError unless each value is a number from 0 to 1."""
    for name, value in values.items():
        if not is_number(value) or not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name}={shortened(repr(value), 60)} must be a number from 0 to 1")


def check_between(where: str, low: float, high: float, /, **values: Any) -> None:
    """Raise a ConfigError unless each value is a number from `low` to `high`."""
    for name, value in values.items():
        if not is_number(value) or not low <= value <= high:
            raise ConfigError(f"{where}: {name}={shortened(repr(value), 60)} must be a number from {low:g} to {high:g}")


def check_pair(where: str, low: float, high: float, /, **values: Any) -> None:
    """Raise a ConfigError unless each value is a pair (least, largest) of numbers from `low` to `high`."""
    for name, value in values.items():
        pair = isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))
        if not pair or not all(map(math.isfinite, value)) or not low <= value[0] <= value[1] <= high:
            raise ConfigError(
                f"{where}: {name}={shortened(repr(value), 60)} must be a pair (least, largest) of numbers from {low:g} to {high:g}"
            )
