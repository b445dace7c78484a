"""The class of each pixel of a picture, on the patches of that picture."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from multimodal.media import read_map
from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.texts import repeated, shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal_tokenizers.image import ImagePatches
from multimodal_tokenizers.placed import grid_positions

VOID = 255  # the number in files, which have 8 bits, of a pixel whose class is not known


@dataclass(frozen=True)
class Segments(Tokenizer):
    """A map (Y, X) of the classes of the pixels of a picture, as semantic segmentation has it.

    A value is an array, a tensor or lists of class numbers or of names, or a file or a PIL image whose pixels are class numbers (a
    PNG in grey or with a palette). -1 and 255, and None among names, say that the class of a pixel is not known: it is not learned
    and not measured.

    A token has the classes of the pixels of one patch, and stands where the patch stands that `image` makes of the picture, so that
    `EachRow(of="image")` answers it. As the picture is resized, cut or padded, so is its map, by the nearest pixel. An answer is an
    array of class numbers that covers the whole patches.

    names: the classes, in the order of their numbers; at most 255.
    image: how the pictures are read that these maps belong to.

    Examples:
        >>> segments = Segments(("sky", "sea"), ImagePatches(patch=2, channels=1))
        >>> tokens = segments([["sky", "sky", "sky"], ["sea", None, "sky"]])
        >>> segments.decode(tokens).tolist()
        [[0, 0, 0, -1], [1, -1, 0, -1]]
    """

    names: tuple[str, ...]
    image: ImagePatches

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not isinstance(self.names, Iterable):
            raise ConfigError(f"Segments: names={shortened(repr(self.names), 100)} is not a list of names")
        object.__setattr__(self, "names", tuple(str(name) for name in self.names))
        if not 0 < len(self.names) <= VOID or repeated(self.names):
            raise ConfigError(f"Segments: names={shortened(repr(self.names), 100)} must be 1 to {VOID} different names")
        if not isinstance(self.image, ImagePatches):
            raise ConfigError(
                f"Segments: image={shortened(repr(self.image), 100)} is no ImagePatches; give the one of the pictures"
            )

    @property
    def one_hot(self) -> int:
        return len(self.names)

    @property
    def feature_size(self) -> int:
        """A number for each pixel of a patch and each class."""
        return self.image.patch**2 * len(self.names)

    @property
    def lossy(self) -> bool:
        """Whether maps are resized or cut off."""
        return self.image.lossy

    @property
    def length(self) -> int | None:
        return self.image.length

    def places(self, count: int) -> Tensor:
        return self.image.places(count)

    def encode(self, value: Any) -> Tokens:
        map_YX = self.image.fit_map(self._numbers(value, "Segments.encode"), "Segments.encode")
        side = self.image.patch
        rows, columns = (n // side for n in map_YX.shape)
        pixels = rearrange(map_YX, "(y p) (x q) -> (y x) (p q)", p=side, q=side)
        hot = (pixels[:, :, None] == torch.arange(len(self.names))).float()
        return Tokens(hot.flatten(1), grid_positions(1, rows, columns))

    def _numbers(self, value: Any, who: str) -> Tensor:
        """The class numbers (Y, X), -1 where they are not known."""
        if isinstance(value, (list, tuple)):
            try:
                value = np.asarray(value)
            except ValueError:  # rows of different lengths
                raise MediaError(f"{who}: wanted rows of equal lengths, not {describe(value)}") from None
        if isinstance(value, np.ndarray) and value.dtype.kind in "UO":
            value = self._numbers_of_names(value, who)
        map_YX = read_map(value, max_pixels=self.image.max_pixels, who=who)
        map_YX = map_YX.masked_fill(map_YX == VOID, -1)
        low, high = (int(x) for x in map_YX.aminmax())
        if low < -1 or high >= len(self.names):
            raise MediaError(
                f"{who}: {describe(value)} has class numbers from {low} to {high}, and there are {len(self.names)} classes, from 0 "
                f"on; -1 and {VOID} say that a class is not known"
            )
        return map_YX

    def _numbers_of_names(self, names_YX: np.ndarray, who: str) -> np.ndarray:
        number: dict[Any, int] = {None: -1, **{name: i for i, name in enumerate(self.names)}}
        flat = names_YX.ravel().tolist()
        for name in dict.fromkeys(x if isinstance(x, str) or x is None else type(x) for x in flat):
            if name not in number:
                shown = ", ".join(shortened(n, 60) for n in self.names[:10]) + (", ..." if len(self.names) > 10 else "")
                raise MediaError(
                    f"{who}: {shortened(repr(name), 100)} is not one of the {len(self.names)} classes: {shown}"
                    f"{did_you_mean(str(name), self.names)}"
                )
        return np.array([number[name] for name in flat], dtype=np.int64).reshape(names_YX.shape)

    def decode(self, tokens: Tokens) -> np.ndarray:
        """The class numbers (Y, X) of the pixels that these patches tile; -1 where no number of a pixel is above 0."""
        # where class tokens stand before the patches, rows and columns may be other numbers, in the same order
        (_, row_N), (_, column_N) = (tokens.position_NA[:, i].cpu().unique(return_inverse=True) for i in (1, 2))
        rows, columns = (int(x.max()) + 1 if len(x) else 0 for x in (row_N, column_N))
        hot = tokens.content.cpu().unflatten(1, (-1, len(self.names)))
        pixels = torch.full((rows * columns, self.image.patch**2), -1)
        pixels[row_N * columns + column_N] = hot.argmax(-1).masked_fill(~(hot > 0).any(-1), -1)
        return rearrange(
            pixels, "(y x) (p q) -> (y p) (x q)", y=rows, x=columns, p=self.image.patch, q=self.image.patch
        ).numpy()

    def picture(self, tokens: Tokens) -> Tensor:
        """The classes in the colours of the files that `write` makes."""
        return torch.from_numpy(_palette()[self.decode(tokens) % 256]).float() / 255

    def write(self, value: Any, path: str | Path) -> Path:
        """Save a map as a .png with a palette, in which each class has a colour, and 255 is what is not known."""
        from PIL import Image

        path = Path(path)
        if path.suffix.lower() != ".png":
            path = path.with_name(path.name + ".png")
        image = Image.fromarray((self._numbers(value, "Segments.write").numpy() % 256).astype(np.uint8))
        image.putpalette(_palette().tobytes())
        image.save(path, format="PNG")
        return path

    def examples(self) -> list[np.ndarray]:
        """Values for the conformance checks."""
        draw, side = np.random.default_rng(0), self.image.patch
        shapes = (
            [self.image.size] * 3 if self.image.size else [(side, 2 * side), (2 * side, 2 * side), (2 * side, side)]
        )
        return [draw.integers(-1, len(self.names), shape) for shape in shapes]


def _palette() -> np.ndarray:
    """The colours (256, 3) uint8 of Pascal VOC (Everingham et al. 2010): neighbouring numbers look different.

    The bits of a number go to red, green and blue in turn, and are the highest bits there.
    """
    bit = np.arange(256)[:, None] >> np.arange(8) & 1
    colours = np.zeros((256, 3), np.uint8)
    for i in range(8):
        colours[:, i % 3] |= (bit[:, i] << 7 - i // 3).astype(np.uint8)
    return colours
