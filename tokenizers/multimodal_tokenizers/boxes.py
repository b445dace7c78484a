"""What is where in a picture: boxes with their classes, read or written token by token."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from multimodal.shapes import ConfigError, MediaError, check_whole, did_you_mean
from multimodal.texts import repeated, shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe

CORNERS = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Boxes(Tokenizer):
    """A list of {"box": (left, top, right, bottom), "label": name}, in fractions of the width and height of a picture.

    A box is five tokens, its corners in bins and its class (Chen et al. 2022, Pix2Seq), in the order of the list; sort the list
    if the order of your boxes means nothing. Write it with `NextToken`, as in "image -> boxes". Where a model writes something
    that is no box, that is left out.

    names: the classes.
    bins: number of bins of the width and of the height; a corner comes back as the middle of its bin.

    Examples:
        >>> boxes = Boxes(("cat", "dog"), bins=100)
        >>> tokens = boxes([{"box": (0.1, 0.2, 0.5, 1.0), "label": "dog"}])
        >>> tokens.content.tolist(), boxes.decode(tokens)
        ([10, 20, 50, 99, 101], [{'box': (0.105, 0.205, 0.505, 0.995), 'label': 'dog'}])
    """

    names: tuple[str, ...]
    bins: int = 256
    lossy = True

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not isinstance(self.names, Iterable):
            raise ConfigError(f"Boxes: names={shortened(repr(self.names), 100)} is not a list of names")
        object.__setattr__(self, "names", tuple(str(name) for name in self.names))
        check_whole("Boxes", least=2, bins=self.bins)
        if not self.names or repeated(self.names):
            raise ConfigError(f"Boxes: names={shortened(repr(self.names), 100)} must be one or more different names")

    @property
    def vocab_size(self) -> int:
        """The bins, then the classes."""
        return self.bins + len(self.names)

    def encode(self, value: Any) -> Tokens:
        if not isinstance(value, (list, tuple)):
            raise MediaError(f"Boxes.encode: wanted a list of boxes, not {describe(value)}")
        ids = [i for number, one in enumerate(value) for i in self._ids(one, f"Boxes.encode: box {number}")]
        return Tokens(torch.tensor(ids, dtype=torch.long), self.places(len(ids)))

    def _ids(self, one: Any, who: str) -> list[int]:
        if not isinstance(one, Mapping) or set(one) != {"box", "label"}:
            raise MediaError(f'{who} is {describe(one)}, wanted {{"box": (left, top, right, bottom), "label": name}}')
        corners, label = one["box"], one["label"]
        corners = corners.tolist() if hasattr(corners, "tolist") else corners
        if not isinstance(corners, (list, tuple)) or len(corners) != 4 or not all(map(_is_number, corners)):
            raise MediaError(f"{who} has box={describe(corners)}, wanted four numbers: {', '.join(CORNERS)}")
        for name, x in zip(CORNERS, corners, strict=True):
            if not 0 <= x <= 1:
                raise MediaError(
                    f"{who} has {name}={x:g}, wanted 0 to 1; divide pixels by the width or height of the picture, and cut off what "
                    "is outside"
                )
        if corners[0] > corners[2] or corners[1] > corners[3]:
            raise MediaError(f"{who} has box={tuple(corners)}, whose left or top is behind its right or bottom")
        name = str(label) if isinstance(label, (str, Integral)) else None
        if name not in self.names:
            shown = ", ".join(shortened(n, 60) for n in self.names[:10]) + (", ..." if len(self.names) > 10 else "")
            raise MediaError(
                f"{who} has label={describe(label)}, not one of {shown}{did_you_mean(str(label), self.names)}"
            )
        return [*(min(int(x * self.bins), self.bins - 1) for x in corners), self.bins + self.names.index(name)]

    def decode(self, tokens: Tokens) -> list[dict[str, Any]]:
        found, corners = [], []
        for i in tokens.content.tolist():
            if i < self.bins:
                corners.append((i + 0.5) / self.bins)
                continue
            if len(corners) == 4:
                (left, right), (top, bottom) = sorted(corners[::2]), sorted(corners[1::2])
                found.append({"box": (left, top, right, bottom), "label": self.names[i - self.bins]})
            corners = []
        return found

    def token_names(self, tokens: Tokens) -> list[str]:
        """The corners by name, and the classes."""
        names, since = [], 0
        for i in tokens.content.tolist():
            is_class = i >= self.bins
            names.append(self.names[i - self.bins] if is_class else f"{CORNERS[since % 4]} {(i + 0.5) / self.bins:.3g}")
            since = 0 if is_class else since + 1
        return names

    def examples(self) -> list[list[dict[str, Any]]]:
        """Values for the conformance checks."""
        draw, values = torch.Generator().manual_seed(0), []
        for count in (1, 2, 2, 3):
            corners = torch.rand(count, 2, 2, generator=draw).sort(1).values.flatten(1)
            labels = torch.randint(len(self.names), (count,), generator=draw).tolist()
            values.append(
                [{"box": tuple(c), "label": self.names[i]} for c, i in zip(corners.tolist(), labels, strict=True)]
            )
        return values


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)
