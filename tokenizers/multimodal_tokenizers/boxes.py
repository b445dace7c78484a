"""Bounding boxes of the objects in a picture, with their classes, read or written token by token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from multimodal.shapes import MediaError, check_whole, did_you_mean, is_number
from multimodal.texts import listed
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal_tokenizers.labels import class_names, names_a_class

SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Boxes(Tokenizer):
    """A list of {"box": (left, top, right, bottom), "label": name}, whose numbers are fractions of the picture's width or height.

    A box is five tokens: the bins of its four numbers, and its class (Chen et al. 2022, Pix2Seq). Boxes stay in the order of the
    list; sort them if their order means nothing. `NextToken` writes them, as in "image -> boxes"; written tokens that form no box
    are left out.

    names: the names of the classes.
    bins: number of bins of the width and of the height; `decode` gives the middle of a bin.

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
        object.__setattr__(self, "names", class_names("Boxes", self.names))
        check_whole("Boxes", least=2, bins=self.bins)

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
        box, label = one["box"], one["label"]
        box = box.tolist() if hasattr(box, "tolist") else box
        if (
            not isinstance(box, (list, tuple))
            or len(box) != 4
            or not all(is_number(x) and math.isfinite(x) for x in box)
        ):
            raise MediaError(f"{who} has box={describe(box)}, wanted four numbers: {', '.join(SIDES)}")
        for side, x in zip(SIDES, box, strict=True):
            if not 0 <= x <= 1:
                raise MediaError(
                    f"{who} has {side}={x:g}, wanted 0 to 1; divide pixels by the width or height of the picture, and clip what "
                    "is outside"
                )
        if box[0] > box[2] or box[1] > box[3]:
            raise MediaError(
                f"{who} has box={tuple(box)}, whose left is more than its right, or its top more than its bottom"
            )
        name = str(label) if names_a_class(label) else None
        if name not in self.names:
            raise MediaError(
                f"{who} has label={describe(label)}, not one of {listed(self.names)}{did_you_mean(str(label), self.names)}"
            )
        return [*(min(int(x * self.bins), self.bins - 1) for x in box), self.bins + self.names.index(name)]

    def decode(self, tokens: Tokens) -> list[dict[str, Any]]:
        boxes, numbers = [], []
        for i in tokens.content.tolist():
            if i < self.bins:
                numbers.append((i + 0.5) / self.bins)
                continue
            if len(numbers) == 4:
                # a model may write left and right, or top and bottom, the other way round
                (left, right), (top, bottom) = sorted(numbers[::2]), sorted(numbers[1::2])
                boxes.append({"box": (left, top, right, bottom), "label": self.names[i - self.bins]})
            numbers = []
        return boxes

    def token_names(self, tokens: Tokens) -> list[str]:
        """The side and its number, and the classes."""
        names, side = [], 0
        for i in tokens.content.tolist():
            is_class = i >= self.bins
            names.append(self.names[i - self.bins] if is_class else f"{SIDES[side % 4]} {(i + 0.5) / self.bins:.3g}")
            side = 0 if is_class else side + 1
        return names

    def examples(self) -> list[list[dict[str, Any]]]:
        """Values for the conformance checks."""
        draw, values = torch.Generator().manual_seed(0), []
        for count in (1, 2, 2, 3):
            boxes = torch.rand(count, 2, 2, generator=draw).sort(1).values.flatten(1)
            labels = torch.randint(len(self.names), (count,), generator=draw).tolist()
            values.append(
                [{"box": tuple(box), "label": self.names[i]} for box, i in zip(boxes.tolist(), labels, strict=True)]
            )
        return values
