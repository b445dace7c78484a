"""Augmentations of pictures: torchvision computes them, on tensors (C, Y, X) of float32 in 0..1."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.augment.base import Augmentation, check_between, check_pair, check_share, torch_draws
from multimodal.media import read_image
from multimodal.shapes import ConfigError, MediaError, check_whole

MAX_PIXELS = 2**26  # a larger picture is refused before it is decoded; kinds have limits of their own, which are lower


class PictureAugmentation(Augmentation):
    """A change of a picture, which may be anything that `ImagePatches` reads; the result is a tensor (C, Y, X) in 0..1.

    Grey stays grey (C = 1), and transparency stays (C = 4), but for changes of colour, which leave it as it was.
    """

    of = "picture"

    @staticmethod
    def read(value: Any) -> Tensor:
        return read_image(value, channels=None, max_pixels=MAX_PIXELS, who="augment")


class ByTorchvision(PictureAugmentation):
    """A change that a transform of torchvision makes."""

    @abstractmethod
    def transform(self) -> Any:
        """The transform of `torchvision.transforms.v2`."""

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        with torch_draws(draw):
            return _built(self)(value)


@lru_cache(maxsize=64)
def _built(augmentation: ByTorchvision) -> Any:
    return augmentation.transform()


@dataclass(frozen=True)
class HorizontalFlip(PictureAugmentation):
    """Left and right change places. Not for letters and digits.

    share: the probability, from 0 to 1.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share("HorizontalFlip", share=self.share)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        return value.flip(2) if draw.random() < self.share else value


@dataclass(frozen=True)
class VerticalFlip(PictureAugmentation):
    """Top and bottom change places, as in pictures from above or through a microscope.

    share: the probability, from 0 to 1.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share("VerticalFlip", share=self.share)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        return value.flip(1) if draw.random() < self.share else value


@dataclass(frozen=True)
class LongestSide(PictureAugmentation):
    """A larger picture is shrunk with its aspect ratio; others stay as they are. Nothing of it is random.

    It comes first, so that the changes behind it take less time, and noise is not averaged away where a kind shrinks the picture.

    pixels: the longest side.
    smallest: no side is made smaller than this many pixels: the patch of the model, or more.
    """

    pixels: int
    smallest: int = 1

    def __post_init__(self) -> None:
        check_whole("LongestSide", least=1, pixels=self.pixels, smallest=self.smallest)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        sides = value.shape[1:]
        factor = min(1.0, self.pixels / max(sides))
        return resized(value, tuple(max(round(side * factor), min(side, self.smallest)) for side in sides))


@dataclass(frozen=True)
class RandomScale(PictureAugmentation):
    """The picture at another size with the same aspect ratio, so that a model learns to read any size.

    Smaller pictures are fewer tokens, so that a step takes less time.

    least, largest: factors of both sides; the logarithm of the factor is uniform.
    smallest: no side is made smaller than this many pixels: the patch of the model, or more. A picture that is smaller already
        is not shrunk.
    """

    least: float = 0.5
    largest: float = 2.0
    smallest: int = 16

    def __post_init__(self) -> None:
        check_pair("RandomScale", 1 / 64, 64, factors=(self.least, self.largest))
        check_whole("RandomScale", least=1, smallest=self.smallest)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        factor = log_uniform((self.least, self.largest), draw)
        sides = value.shape[1:]
        factor = max(factor, min(1.0, self.smallest / min(sides)))
        return resized(value, tuple(max(1, round(side * factor)) for side in sides))


@dataclass(frozen=True)
class RandomCrop(PictureAugmentation):
    """A part of the picture of fixed size (Krizhevsky et al. 2012, section 4.1).

    rows, columns: of the part, in pixels.
    pad: pixels that are put around the picture first.
    edge: what they are: "reflect" or "edge" repeat pixels, "constant" is black (transparent, if there is transparency).
    """

    rows: int
    columns: int
    pad: int = 0
    edge: Literal["reflect", "edge", "constant"] = "reflect"

    def __post_init__(self) -> None:
        check_whole("RandomCrop", least=1, rows=self.rows, columns=self.columns)
        check_whole("RandomCrop", least=0, pad=self.pad)
        if self.edge not in ("reflect", "edge", "constant"):
            raise ConfigError(f"RandomCrop: edge={self.edge!r} must be 'reflect', 'edge' or 'constant'")

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        height, width = value.shape[1:]
        if height + 2 * self.pad < self.rows or width + 2 * self.pad < self.columns:
            raise MediaError(
                f"RandomCrop: the picture is {height}x{width} pixels{f' and pad={self.pad}' if self.pad else ''}, smaller than the "
                f"part of {self.rows}x{self.columns}; make the part smaller, or use RandomPart, which takes a share of any picture"
            )
        if self.pad:
            if self.edge == "reflect" and self.pad >= min(height, width):
                raise MediaError(
                    f"RandomCrop: a picture of {height}x{width} pixels cannot be reflected by pad={self.pad}; use edge='edge'"
                )
            mode = {"edge": "replicate"}.get(self.edge, self.edge)
            value = F.pad(value[None], (self.pad,) * 4, mode=mode)[0]
        top = int(draw.integers(value.shape[1] - self.rows + 1))
        left = int(draw.integers(value.shape[2] - self.columns + 1))
        return value[:, top : top + self.rows, left : left + self.columns]


@dataclass(frozen=True)
class RandomPart(PictureAugmentation):
    """A part of the picture at its own size: the crop of Szegedy et al. 2015 without its resizing.

    area: least and largest share of the area.
    ratio: least and largest change of the aspect ratio; its logarithm is uniform.
    smallest: no side is cut below this many pixels: the patch of the model, or more.
    """

    area: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    smallest: int = 16

    def __post_init__(self) -> None:
        check_pair("RandomPart", 1e-3, 1, area=self.area)
        check_pair("RandomPart", 1 / 64, 64, ratio=self.ratio)
        check_whole("RandomPart", least=1, smallest=self.smallest)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        area = draw.uniform(*self.area)
        wider = log_uniform(self.ratio, draw) ** 0.5
        height, width = value.shape[1:]
        rows, columns = (
            min(side, max(round(side * share), self.smallest))
            for side, share in ((height, area**0.5 / wider), (width, area**0.5 * wider))
        )
        top, left = int(draw.integers(height - rows + 1)), int(draw.integers(width - columns + 1))
        return value[:, top : top + rows, left : left + columns]


@dataclass(frozen=True)
class RandomAffine(PictureAugmentation):
    """Turned, moved, scaled and sheared within the same frame.

    degrees: the largest angle of the rotation, to either side.
    shift: the largest shift, as a share of a side.
    scale: least and largest factor; its logarithm is uniform.
    shear: the largest angle of the shear, in degrees.
    outside: what comes in from outside: the brightness, from 0 to 1, or "edge", which repeats the pixels of the edge.
    """

    degrees: float = 15.0
    shift: float = 0.1
    scale: tuple[float, float] = (0.85, 1.15)
    shear: float = 0.0
    outside: float | Literal["edge"] = 0.0

    def __post_init__(self) -> None:
        check_between("RandomAffine", 0, 180, degrees=self.degrees)
        check_between("RandomAffine", 0, 89, shear=self.shear)
        check_share("RandomAffine", shift=self.shift)
        check_pair("RandomAffine", 1 / 64, 64, scale=self.scale)
        if self.outside != "edge":
            check_share("RandomAffine", outside=self.outside)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        height, width = value.shape[1:]
        angle = math.radians(draw.uniform(-self.degrees, self.degrees))
        slope = math.tan(math.radians(draw.uniform(-self.shear, self.shear)))
        factor = log_uniform(self.scale, draw)
        # from a place in the result back to the one in the picture, both in pixels from the middle
        cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
        xx, xy, yx, yy = cosine - slope * sine, sine + slope * cosine, -sine, cosine
        x, y = draw.uniform(-self.shift, self.shift, 2) * (width, height)
        # affine_grid counts both sides from -1 to 1
        theta = [
            [xx, xy * height / width, -2 * (xx * x + xy * y) / width],
            [yx * width / height, yy, -2 * (yx * x + yy * y) / height],
        ]
        grid = F.affine_grid(torch.tensor([theta], dtype=torch.float32), [1, 1, height, width], align_corners=False)
        if self.outside == "edge":
            return F.grid_sample(value[None], grid, padding_mode="border", align_corners=False)[0]
        return F.grid_sample(value[None] - self.outside, grid, align_corners=False)[0] + self.outside


@dataclass(frozen=True)
class ColorJitter(PictureAugmentation):
    """Other brightness, contrast, saturation and hue, in random order, as torchvision's ColorJitter makes them.

    Of grey pictures brightness and contrast change.

    brightness, contrast, saturation: the largest change of each factor from 1, or a pair of its least and largest value.
    hue: the largest turn of the colour circle, from 0 to 0.5.
    """

    brightness: float | tuple[float, float] = 0.3
    contrast: float | tuple[float, float] = 0.3
    saturation: float | tuple[float, float] = 0.3
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if isinstance(value := getattr(self, name), tuple):
                check_pair("ColorJitter", 0, 64, **{name: value})
            else:
                check_between("ColorJitter", 0, 64, **{name: value})
        check_between("ColorJitter", 0, 0.5, hue=self.hue)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        from torchvision.transforms.v2 import functional

        colour_CYX = value[:3]
        for name in draw.permutation(["brightness", "contrast", "saturation", "hue"]):
            given = getattr(self, name)
            around = 0.0 if name == "hue" else 1.0
            low, high = given if isinstance(given, tuple) else (around - given, around + given)
            factor = draw.uniform(low if name == "hue" else max(low, 0.0), high)
            if factor != around and (len(colour_CYX) == 3 or name in ("brightness", "contrast")):
                colour_CYX = getattr(functional, f"adjust_{name}_image")(colour_CYX, factor)
        return torch.cat([colour_CYX, value[3:]]) if len(value) == 4 else colour_CYX


@dataclass(frozen=True)
class PictureNoise(PictureAugmentation):
    """Gaussian noise on every pixel, as of a small sensor in bad light.

    least, largest: of the standard deviation, on the scale of pixels in 0..1.
    """

    least: float = 0.0
    largest: float = 0.1

    def __post_init__(self) -> None:
        check_pair("PictureNoise", 0, 1, deviation=(self.least, self.largest))

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        deviation = np.float32(draw.uniform(self.least, self.largest))
        noise_CYX = torch.from_numpy(draw.standard_normal(tuple(value[:3].shape), dtype=np.float32) * deviation)
        return torch.cat([(value[:3] + noise_CYX).clamp_(0, 1), value[3:]])


@dataclass(frozen=True)
class Blur(PictureAugmentation):
    """Blurred by a Gaussian of random width (`torchvision.transforms.v2.functional.gaussian_blur`).

    largest: of its standard deviation, in pixels; the least is 0.1.
    """

    largest: float = 1.0

    def __post_init__(self) -> None:
        check_between("Blur", 0.1, 100, largest=self.largest)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        from torchvision.transforms.v2 import functional

        sigma = draw.uniform(0.1, self.largest)
        # three deviations to each side, and no more than can be reflected at the edge
        reach = max(1, min(math.ceil(3 * sigma), min(value.shape[1:]) - 1))
        return value if min(value.shape[1:]) < 2 else functional.gaussian_blur(value, [2 * reach + 1] * 2, [sigma] * 2)


@dataclass(frozen=True)
class RandomErasing(ByTorchvision):
    """A rectangle is replaced by one brightness (Zhong et al. 2020), by `torchvision.transforms.v2.RandomErasing`.

    share: the probability, from 0 to 1.
    area: least and largest share of the area of the picture.
    ratio: least and largest aspect ratio of the rectangle.
    fill: its brightness, from 0 to 1.
    """

    share: float = 0.25
    area: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: float = 0.5

    def __post_init__(self) -> None:
        check_share("RandomErasing", share=self.share, fill=self.fill)
        check_pair("RandomErasing", 0, 1, area=self.area)
        check_pair("RandomErasing", 1 / 64, 64, ratio=self.ratio)

    def transform(self) -> Any:
        from torchvision.transforms import v2

        return v2.RandomErasing(self.share, self.area, self.ratio, self.fill)


@dataclass(frozen=True)
class RandAugment(ByTorchvision):
    """Some of fourteen changes of place and colour, at one strength (Cubuk et al. 2020), by torchvision.

    Transparent pixels are put on white first.

    number: of changes, one after the other.
    magnitude: their strength, from 0 to 30.
    """

    number: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        check_whole("RandAugment", least=1, number=self.number)
        check_whole("RandAugment", least=0, magnitude=self.magnitude)
        check_between("RandAugment", 0, 30, magnitude=self.magnitude)

    def transform(self) -> Any:
        from torchvision.transforms import InterpolationMode, v2

        return v2.RandAugment(self.number, self.magnitude, interpolation=InterpolationMode.BILINEAR)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        return super().change(_opaque(value), draw)


@dataclass(frozen=True)
class TrivialAugmentWide(ByTorchvision):
    """One change of place or colour at a random strength (Müller and Hutter 2021), by torchvision; it has no settings.

    Transparent pixels are put on white first.
    """

    def transform(self) -> Any:
        from torchvision.transforms import InterpolationMode, v2

        return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)

    def change(self, value: Tensor, draw: np.random.Generator) -> Tensor:
        return super().change(_opaque(value), draw)


def log_uniform(bounds: tuple[float, float], draw: np.random.Generator) -> float:
    """A number between these bounds whose logarithm is uniform."""
    return math.exp(draw.uniform(math.log(bounds[0]), math.log(bounds[1])))


def resized(image_CYX: Tensor, size: tuple[int, ...]) -> Tensor:
    """A picture at another size (rows, columns), by triangles as wide as the step, so that shrinking does not alias."""
    if tuple(image_CYX.shape[1:]) == tuple(size):
        return image_CYX
    return F.interpolate(image_CYX[None], size, mode="bilinear", antialias=True)[0]


def _opaque(image_CYX: Tensor) -> Tensor:
    return read_image(image_CYX, channels=3, max_pixels=MAX_PIXELS, who="augment") if len(image_CYX) == 4 else image_CYX
