"""One class of a fixed set, or several of them at once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch

from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.texts import listed, repeated, shortened
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class Labels(Tokenizer):
    """Class names; a value is a name, or with several=True a list of names (which may be empty).

    One class is one id. Several are one token of 0s and 1s, a feature for each class.

    names: the classes, in the order of their ids.
    several: whether a value is a list of classes.
    """

    names: tuple[str, ...]
    several: bool = False
    classes = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", class_names("Labels", self.names))

    @classmethod
    def from_data(cls, values: Iterable[Any], *, several: bool = False) -> Self:
        """Make one with the classes that occur in these values, in alphabetical order, or by size if all are whole numbers.

        values: the labels of the samples to train on; with several=True a list of names for each.

        Raises:
            ConfigError: there are no values, or one is not the name of a class, such as None; the message says which.

        Examples:
            >>> Labels.from_data(sample["label"] for sample in samples).names
            ('circle', 'square')
        """
        if not _is_list(values):
            raise ConfigError(f"Labels.from_data: wanted the labels of all samples, not {shortened(repr(values), 100)}")
        found: set[str] = set()
        for i, value in enumerate(values):
            if several and not _is_list(value):
                raise ConfigError(
                    f"Labels.from_data: several=True wants lists of names, and value {i} is {shortened(repr(value), 100)}"
                )
            for name in value if several else [value]:
                if not names_a_class(name):
                    raise ConfigError(
                        f"Labels.from_data: value {i} is {shortened(repr(name), 100)}, wanted a text, a whole number or a truth "
                        "value as the name of a class; leave samples without a label out"
                    )
                found.add(str(name))
        if not found:
            raise ConfigError("Labels.from_data: there are no values")
        numbers = all(name.removeprefix("-").isdecimal() and len(name) < 1000 for name in found)
        return cls(tuple(sorted(found, key=lambda name: (int(name), name) if numbers else (0, name))), several)

    @property
    def vocab_size(self) -> int | None:
        return None if self.several else len(self.names)

    @property
    def feature_size(self) -> int | None:
        return len(self.names) if self.several else None

    def encode(self, value: Any) -> Tokens:
        if self.several and not _is_list(value):
            raise MediaError(f"Labels.encode: several=True wants a list of names, not {shortened(repr(value), 100)}")
        ids = []
        for name in value if self.several else [value]:
            if str(name) not in self.names:
                raise MediaError(self._unknown(name))
            ids.append(self.names.index(str(name)))
        if not self.several:
            return Tokens(torch.tensor(ids), torch.zeros(1, 3))
        hot = torch.zeros(1, len(self.names))
        hot[0, ids] = 1
        return Tokens(hot, torch.zeros(1, 3))

    def decode(self, tokens: Tokens) -> Any:
        if self.several:
            return [name for name, hot in zip(self.names, tokens.content[0].tolist(), strict=True) if hot > 0.5]
        return self.names[int(tokens.content[0])]

    def _unknown(self, name: Any) -> str:
        """The error for a name that is no class."""
        number = isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self.names)
        hint = "; Fields(samples, names={field: names}) turns numbers of classes into names" if number else ""
        return (
            f"Labels.encode: {shortened(repr(name), 100)} is not one of the {len(self.names)} classes: {listed(self.names)}"
            f"{did_you_mean(str(name), self.names)}{hint}"
        )


def class_names(who: str, names: Any) -> tuple[str, ...]:
    """The names of classes as texts.

    Raises:
        ConfigError: they are not a list of one or more different names.
    """
    if not _is_list(names):
        raise ConfigError(f"{who}: names={shortened(repr(names), 100)} is not a list of names")
    names = tuple(str(name) for name in names)
    twice = sorted(repeated(names))
    if twice or not names:
        raise ConfigError(f"{who}: {f'names occur twice: {listed(twice)}' if twice else 'no names were given'}")
    return names


def names_a_class(value: Any) -> bool:
    """Whether the text of a value can be the name of a class: a text, a whole number or a truth value, of Python or NumPy."""
    return isinstance(value, (str, bool, np.bool_, Integral))


def _is_list(value: Any) -> bool:
    """Whether a value has elements; of a mapping, such as {"cat": 0, "dog": 1}, one would read the keys, whatever they map to."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping))
