"""Augmentations of texts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from multimodal.augment.base import Augmentation, check_share
from multimodal.shapes import MediaError
from multimodal.tokenizer import describe


class TextAugmentation(Augmentation):
    """A change of a text."""

    of = "text"

    @staticmethod
    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise MediaError(f"augment: wanted a text, not {describe(value)}")
        return value


@dataclass(frozen=True)
class WordDropout(TextAugmentation):
    """Some words, which white space separates, are left out; at least one stays (Iyyer et al. 2015).

    share: the probability of each word to be left out, from 0 to 1.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        check_share("WordDropout", share=self.share)

    def change(self, value: str, draw: np.random.Generator) -> str:
        words = value.split()
        if len(words) < 2:
            return value
        keep = draw.random(len(words)) >= self.share
        keep[draw.integers(len(words))] |= not keep.any()
        # white space between words stays as it was, if none of them is left out
        return value if keep.all() else " ".join(word for word, kept in zip(words, keep, strict=True) if kept)


@dataclass(frozen=True)
class TypingErrors(TextAugmentation):
    """Some characters are left out, doubled, or change places with the next one, as when somebody types fast.

    share: the probability of an error at each character, from 0 to 1.
    """

    share: float = 0.03

    def __post_init__(self) -> None:
        check_share("TypingErrors", share=self.share)

    def change(self, value: str, draw: np.random.Generator) -> str:
        made, i = [], 0
        errors, kinds = draw.random(len(value)) < self.share, draw.integers(3, size=len(value))
        while i < len(value):
            if not errors[i]:
                made.append(value[i])
            elif kinds[i] == 1:
                made.append(value[i] * 2)
            elif kinds[i] == 2 and i + 1 < len(value):
                made.append(value[i + 1] + value[i])
                i += 1
            i += 1
        return "".join(made) or value
