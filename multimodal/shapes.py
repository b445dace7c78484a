"""The legend of axis letters, the check of shapes by argument names, and the error classes."""

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from multimodal.texts import shortened

LEGEND = {
    "B": "batch: samples side by side, only in decoding and in heads",
    "T": "tokens of a stream",
    "M": "keys and values that queries attend to",
    "D": "width of the core",
    "H": "query heads",
    "G": "key-value heads (grouped queries)",
    "K": "width of one head",
    "V": "vocabulary or classes",
    "A": "position axes: time, row, column, and further ones of a kind",
    "N": "tokens of one value, or of all values of one kind",
    "F": "features of a token",
    "L": "layers",
    "C": "channels",
    "Y": "pixel rows",
    "X": "pixel columns",
    "S": "sound samples",
}
AXES = ("time", "row", "column")
"""The position axes of every kind of data; a kind may declare further ones behind these."""


class ShapeError(ValueError):
    """A tensor's shape disagrees with the axes in its name."""


class ConfigError(ValueError):
    """A declaration (core, tokenizer, head, task, recipe) cannot be built as written."""


class TaskError(ConfigError):
    """A task pattern cannot be read, or names fields and kinds that do not exist."""


class MediaError(ValueError):
    """A value (file, picture, sound, text) cannot be turned into tokens."""


class StreamError(ValueError):
    """A sample does not fit its task, or a stream does not fit its model."""


class CheckpointError(ValueError):
    """A checkpoint folder is damaged, foreign, or needs something that is not installed."""


def check_shapes(where: str, sizes: Mapping[str, int] | None = None, /, **tensors: Tensor) -> dict[str, int]:
    """Check tensors against the axes in which their names end, and return the size of each axis.

    `check_shapes("Core", {"D": 64}, stream_TD=x, position_TA=p)` demands that x is (T, 64) and p is (T, A) with the same T.

    where: the caller's name, for errors. sizes: the sizes of axes that are known beforehand.

    Raises:
        ShapeError: a tensor has another shape; the message names it, its shape and the one that was wanted.
    """
    known = dict(sizes or {})
    for name, tensor in tensors.items():
        axes = name.rsplit("_", 1)[-1]
        if tensor.dim() != len(axes):
            raise ShapeError(
                f"{where}: {name} has {tensor.dim()} axes {tuple(tensor.shape)}, but its name promises {len(axes)} ({axes})"
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            if known.setdefault(axis, size) != size:
                raise ShapeError(
                    f"{where}: {name} is {tuple(tensor.shape)}, so {axis}={size}, but {axis}={known[axis]} was wanted "
                    f"({axis}: {LEGEND.get(axis, 'not in the legend')})"
                )
    return known


def check_whole(where: str, /, *, least: int | None = None, **values: Any) -> None:
    """Raise a ConfigError unless each value is a whole number, and at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and int(value) < least):
            bound = "" if least is None else f", {least} or more"
            raise ConfigError(f"{where}: {name}={shortened(repr(value), 60)} must be a whole number{bound}")


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy, infinity and NaN included; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(where: str, /, **values: Any) -> None:
    """Raise a ConfigError unless each value is a number; infinity and NaN are left to the caller's own bounds."""
    for name, value in values.items():
        if not is_number(value):
            raise ConfigError(f"{where}: {name}={shortened(repr(value), 60)} must be a number")


def check_seed(where: str, value: Any, /) -> None:
    """Raise a ConfigError unless torch accepts the seed: a whole number of 63 bits, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**63:
        raise ConfigError(f"{where}: seed={shortened(repr(value), 60)} must be a whole number from 0 to 2**63 - 1")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """'; did you mean 'label'?' if one of the choices is similar to the word, else ''."""
    if len(word) > 100:  # probably a value in place of a name; comparing it could take hours
        return ""
    # of few letters, half are soon the same by chance: 'stream' is not what 'extra' was meant to be
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.65 if len(word) < 8 else 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
