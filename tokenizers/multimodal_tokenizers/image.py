"""Images as square patches with their rows and columns; any height and width, no resize to one shape."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.media import read_image
from multimodal.positions import LearnedGrid, sine_cosine
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal_tokenizers.fit import Fit
from multimodal_tokenizers.placed import grid_positions

# how pixels are resized, and numbers that must not mix
SMOOTH: dict[str, Any] = {"mode": "bilinear", "antialias": True}
NEAREST: dict[str, Any] = {"mode": "nearest-exact"}


@dataclass(frozen=True)
class ImagePatches(Tokenizer):
    """Patches of `patch` x `patch` pixels, row by row (Dosovitskiy et al. 2021), at native size (Dehghani et al. 2023).

    patch: the side of a patch in pixels.
    channels: number of channels: 1 grey, 3 RGB, 4 RGBA.
    mean: subtracted from pixels in 0..1; one number for all channels, or one for each.
    std: the divisor of the pixels after that; likewise.
    position: the encoding of row and column that is added to a patch's embedding: "sincos" (fixed, unbounded), "learned" (a grid
        that is stretched over the image), or "rotary" (none: only the core's rotary places encode them, as they always do).
    grid: number of points on a side of the learned grid.
    edge: if patch does not divide a side: "repeat" the last row or column of pixels, "cut" off what no whole patch covers (as a
        strided convolution does), or raise an "error".
    max_side: the longest side in pixels; larger images are shrunk with their aspect ratio, but no side below one patch; None: any.
    max_pixels: largest number of pixels of an image; a larger one is refused before it is decoded.
    size: rows and columns of pixels of every written image; None: images are only read.
    fit: how every image is brought to one size, as trained weights expect it; None: it stays as it is.
    bias: whether the linear map of a patch's pixels has a bias.
    """

    patch: int = 16
    channels: int = 3
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5
    position: Literal["sincos", "learned", "rotary"] = "sincos"
    grid: int = 16
    edge: Literal["repeat", "error", "cut"] = "repeat"
    max_side: int | None = None
    max_pixels: int = 2**24
    size: tuple[int, int] | None = None
    fit: Fit | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        if self.patch < 1 or self.channels not in (1, 3, 4):
            raise ConfigError(
                f"ImagePatches: patch={self.patch} must be at least 1 and channels={self.channels} 1, 3 or 4"
            )
        if self.position not in ("sincos", "learned", "rotary") or self.edge not in ("repeat", "error", "cut"):
            raise ConfigError(
                f"ImagePatches: position={self.position!r} must be 'sincos', 'learned' or 'rotary', and edge={self.edge!r} "
                "'repeat', 'error' or 'cut'"
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ConfigError(f"ImagePatches: {name} has {len(value)} numbers for channels={self.channels}")
        if min(self.std if isinstance(self.std, tuple) else (self.std,)) <= 0:
            raise ConfigError(f"ImagePatches: std={self.std} must be more than 0")
        if self.max_side is not None and self.max_side < self.patch:
            raise ConfigError(f"ImagePatches: max_side={self.max_side} is smaller than patch={self.patch}")
        if self.size is not None:
            object.__setattr__(self, "size", size := tuple(self.size))
            if len(size) != 2 or min(size) < 1 or any(side % self.patch for side in size):
                raise ConfigError(
                    f"ImagePatches: size={size} is not two multiples, rows and columns, of patch={self.patch}"
                )
            if self.max_side is not None and max(size) > self.max_side:
                raise ConfigError(f"ImagePatches: size={size} is larger than max_side={self.max_side}")
        if self.fit is not None:
            self._check_fit(self.fit)

    def _check_fit(self, fit: Fit) -> None:
        if not isinstance(fit, Fit):
            raise ConfigError(f"ImagePatches: fit={fit!r} is no Fit; give one such as Fit(size=(224, 224))")
        if self.max_side is not None:
            raise ConfigError(
                f"ImagePatches: max_side={self.max_side} beside a fit, which says the size; give one of them"
            )
        if fit.sides is None:
            return
        down = tuple(side // self.patch * self.patch for side in fit.sides)
        up = tuple(-(-side // self.patch) * self.patch for side in fit.sides)
        if min(down) == 0 or (self.edge == "error" and down != up):
            raise ConfigError(f"ImagePatches: patch={self.patch} does not divide the sides {fit.sides} of its fit")
        read = down if self.edge == "cut" else up
        if self.size not in (None, read):
            raise ConfigError(f"ImagePatches: size={self.size} of written images is not that of fitted ones, {read}")

    @property
    def lossy(self) -> bool:
        """Whether pixels are resized or cut off."""
        return self.fit is not None or self.edge == "cut"

    @property
    def pixel_features(self) -> int:
        """F of the pixels alone: channels x rows x columns of one patch."""
        return self.channels * self.patch**2

    @property
    def feature_size(self) -> int:
        """Pixels, and for "sincos" and "learned" the row and column of the patch after them."""
        return self.pixel_features + (0 if self.position == "rotary" else 2)

    @property
    def written_features(self) -> int:
        """Only pixels are written; row and column are known."""
        return self.pixel_features

    @property
    def length(self) -> int | None:
        """Patches of a written picture."""
        return None if self.size is None else self.size[0] * self.size[1] // self.patch**2

    def places(self, count: int) -> Tensor:
        rows, columns = self._written_grid
        if count > rows * columns:
            raise ConfigError(f"ImagePatches: places({count}), but a picture of size={self.size} has {rows * columns}")
        return grid_positions(1, rows, columns)[:count].clone()

    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        return self._with_places(features_NF, position_NA, self._written_grid)

    @property
    def _written_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        if self.size is None:
            raise ConfigError(
                "ImagePatches: to write pictures, give it size=(rows, columns) in pixels, which all of them have"
            )
        return self.size[0] // self.patch, self.size[1] // self.patch

    def encode(self, value: Any) -> Tokens:
        image_CYX = self.preprocess(value)
        side, rows, columns = self.patch, image_CYX.shape[1] // self.patch, image_CYX.shape[2] // self.patch
        # "c (y p) (x q) -> (y x) (c p q)", without reading a pattern for each picture
        squares = image_CYX.reshape(-1, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        patches_NF = squares.reshape(rows * columns, self.pixel_features)
        position_NA = grid_positions(1, rows, columns)
        return Tokens(self._with_places(patches_NF, position_NA, (rows, columns)), position_NA)

    def _with_places(self, pixels_NF: Tensor, position_NA: Tensor, grid: tuple[int, int]) -> Tensor:
        """The content of tokens: pixels, and row and column if `position` needs them. grid: rows and columns of patches."""
        if self.position == "rotary":
            return pixels_NF
        place_NA = position_NA[:, 1:].to(pixels_NF)
        if self.position == "learned":
            place_NA = (place_NA + 0.5) / torch.tensor(grid).to(pixels_NF)
        return torch.cat([pixels_NF, place_NA], 1)

    def preprocess(self, value: Any) -> Tensor:
        """Any picture as normalised (C, Y, X) whose sides are multiples of `patch`."""
        read = read_image if self.fit is None else self.fit.read
        image_CYX = read(value, channels=self.channels, max_pixels=self.max_pixels, who="ImagePatches.encode")
        image_CYX = self._whole(image_CYX, SMOOTH, "replicate", "ImagePatches.encode: image")
        return (image_CYX - _per_channel(self.mean)).div_(_per_channel(self.std))

    def fit_map(self, map_YX: Tensor, who: str) -> Tensor:
        """Numbers (Y, X) int64 of the pixels of a picture, brought to its patches as the picture is: those of the nearest pixels,
        and -1 where a patch reaches over the edge.

        Raises:
            MediaError: too small, or of a size that `edge` or `fit` refuses; the message begins with `who`.
        """
        map_CYX = map_YX[None].float()
        if self.fit is not None:
            map_CYX = self.fit.nearest(map_CYX, max_pixels=self.max_pixels, who=who)
        return self._whole(map_CYX, NEAREST, "constant", f"{who}: map")[0].long()

    def _whole(self, image_CYX: Tensor, filter: dict[str, Any], beyond: str, who: str) -> Tensor:
        """Shrunk to `max_side`, and cut or padded to whole patches."""
        height, width = given = tuple(image_CYX.shape[1:])
        if min(given) < self.patch:
            raise MediaError(f"{who} is {height}x{width} pixels, smaller than one patch={self.patch}; enlarge it first")
        shrunk = ""
        if self.max_side and max(height, width) > self.max_side:
            scale = self.max_side / max(height, width)
            # no side gets smaller than one patch
            height, width = (max(round(side * scale), self.patch) for side in given)
            image_CYX = F.interpolate(image_CYX[None], (height, width), **filter)[0]
            shrunk = f" ({height}x{width} after max_side={self.max_side})"
        below, beside = -height % self.patch, -width % self.patch
        if below or beside:
            if self.edge == "error":
                raise MediaError(
                    f"{who} is {given[0]}x{given[1]} pixels{shrunk}, which patch={self.patch} does not divide; resize or pad it "
                    "first, or use edge='repeat'"
                )
            if self.edge == "cut":
                rows, columns = (side // self.patch * self.patch for side in image_CYX.shape[1:])
                image_CYX = image_CYX[:, :rows, :columns]
            else:
                value = -1.0 if beyond == "constant" else None
                image_CYX = F.pad(image_CYX[None], (0, beside, 0, below), mode=beyond, value=value)[0]
        return image_CYX

    def decode(self, tokens: Tokens) -> Tensor:
        """The picture (C, Y, X) in 0..1 that these patches tile; missing patches up to the last row and column are `mean`."""
        row_N, column_N = tokens.position_NA[:, 1:].long().cpu().unbind(1)
        rows, columns = (int(x.max()) + 1 if len(x) else 0 for x in (row_N, column_N))
        pixels_NF = torch.zeros(rows * columns, self.pixel_features)
        pixels_NF[row_N * columns + column_N] = tokens.content[:, : self.pixel_features].float().cpu()
        image_CYX = rearrange(
            pixels_NF, "(y x) (c p q) -> c (y p) (x q)", y=rows, x=columns, p=self.patch, q=self.patch
        )
        return (image_CYX * _per_channel(self.std) + _per_channel(self.mean)).clamp(0, 1)

    def picture(self, tokens: Tokens) -> Tensor:
        return self.decode(tokens).permute(1, 2, 0)

    def embed(self, width: int) -> nn.Module:
        return _PatchEmbed(self, width)


@lru_cache(maxsize=64)
def _per_channel(value: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)


class _PatchEmbed(nn.Module):
    """Pixels by a linear layer, plus the position scheme's encoding of (row, column)."""

    full_precision = True  # bfloat16 would round neighbouring positions far from the corner to one number

    def __init__(self, tokenizer: ImagePatches, width: int) -> None:
        super().__init__()
        self.pixels, self.position = tokenizer.pixel_features, tokenizer.position
        self.linear = nn.Linear(self.pixels, width, bias=tokenizer.bias)
        self.learned = LearnedGrid(width, tokenizer.grid) if self.position == "learned" else None
        if self.position == "sincos":
            sine_cosine(torch.zeros(1, 2), width)  # raises for a width that does not fit now, not at the first image

    def forward(self, content_NF: Tensor) -> Tensor:
        embedded_ND = self.linear(content_NF[:, : self.pixels].to(self.linear.weight.dtype))
        place_NA = content_NF[:, self.pixels :]
        if self.learned is not None:
            return embedded_ND + self.learned(place_NA)
        return embedded_ND + sine_cosine(place_NA, embedded_ND.shape[1]) if self.position == "sincos" else embedded_ND
