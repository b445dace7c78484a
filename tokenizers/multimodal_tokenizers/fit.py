"""Brings pictures to the size that trained weights expect, as transformers and timm do: 8-bit levels are equal bit for bit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.declare import Declared
from multimodal.media import read_image
from multimodal.shapes import ConfigError, MediaError

FILTERS = ("bilinear", "bicubic", "lanczos")
WAYS = ("torchvision", "pillow", "float")
LONGEST = 4096  # pixels of a side after the step of `longest`, at most


@dataclass(frozen=True)
class Fit(Declared):
    """How a picture is brought to one size: resized, then cropped to its centre. The filters are antialiased.

    size: rows and columns in pixels to which it is resized, whatever its aspect ratio; None: `shortest` says it.
    shortest: pixels of the shorter side after resizing; the aspect ratio stays; None: `size` says it, or nothing is resized.
    crop: rows and columns of the centre that is cut out after resizing; None: everything.
    longest: pixels of the longer side after a resizing that comes first (Idefics 3): the other side is rounded down and then up to
        an even number, and no side is longer than 4096; None: there is no such step.
    filter: "bilinear", "bicubic" or "lanczos".
    by: what resizes: "torchvision" in 8-bit levels (transformers 5), "pillow" likewise (timm, and processors of transformers whose
        names end in Pil), or "float": torchvision, in numbers from 0 to 1 (DINOv3).
    corner: how the crop's corner is rounded if it falls on half a pixel: "down" (transformers), or to the "even" neighbour
        (torchvision's CenterCrop, timm).
    """

    size: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    by: Literal["torchvision", "pillow", "float"] = "torchvision"
    corner: Literal["down", "even"] = "down"
    longest: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            if (sides := getattr(self, name)) is None:
                continue
            object.__setattr__(self, name, sides := tuple(sides))
            if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
                raise ConfigError(f"Fit: {name}={sides} is not rows and columns in pixels, such as (224, 224)")
        if self.shortest is not None and (type(self.shortest) is not int or self.shortest < 1):
            raise ConfigError(f"Fit: shortest={self.shortest!r} must be a number of pixels")
        if self.size is not None and self.shortest is not None:
            raise ConfigError(
                f"Fit: size={self.size} and shortest={self.shortest} exclude each other; give one of them"
            )
        if self.longest is not None and (type(self.longest) is not int or self.longest < 1 or self.size is None):
            raise ConfigError(f"Fit: longest={self.longest!r} must be a number of pixels, beside a size")
        if self.size is None and self.shortest is None and self.crop is None:
            raise ConfigError("Fit: it does nothing; give size, shortest or crop")
        for name, known in (("filter", FILTERS), ("by", WAYS), ("corner", ("down", "even"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"Fit: {name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        least = self.size or (self.shortest and (self.shortest, self.shortest))
        if self.crop is not None and least and any(a > b for a, b in zip(self.crop, least, strict=True)):
            raise ConfigError(
                f"Fit: crop={self.crop} is larger than the resized picture, {least}; resize to more, or crop less"
            )

    @property
    def sides(self) -> tuple[int, int] | None:
        """Rows and columns of every picture afterwards; None: they depend on the picture."""
        return self.crop or self.size

    def read(self, value: Any, *, channels: int, max_pixels: int, who: str) -> Tensor:
        """Any picture (`multimodal.media.read_image`) as (C, Y, X) float32 of this size, in 0..1, a little beyond for "float".

        Raises:
            MediaError: no picture, or one that is too small or too large; the message begins with `who`.
        """
        levels = self.by != "float"
        # with its alpha, since transparency is put on white in 8-bit levels too
        image_CYX = read_image(
            value, channels=4 if levels and channels == 3 else channels, max_pixels=max_pixels, who=who
        )
        if levels:
            image_CYX = (image_CYX * 255).round_().clamp_(0, 255).to(torch.uint8)
            image_CYX = _on_white(image_CYX) if channels == 3 else image_CYX
        resize = _by_pillow if self.by == "pillow" else _by_torchvision
        image_CYX = self._fitted(image_CYX, resize, max_pixels, who)
        return image_CYX.float() / 255 if levels else image_CYX

    def nearest(self, map_CYX: Tensor, *, max_pixels: int, who: str) -> Tensor:
        """Numbers of the pixels of a picture (C, Y, X), as float32, of the size that the picture gets: those of the nearest pixels.

        Raises:
            MediaError: as of `read`.
        """
        return self._fitted(map_CYX, _by_nearest, max_pixels, who)

    def _fitted(
        self, image_CYX: Tensor, resize: Callable[[Tensor, tuple[int, int], str], Tensor], max_pixels: int, who: str
    ) -> Tensor:
        """Resized and cropped."""
        given = (image_CYX.shape[1], image_CYX.shape[2])
        if self.longest is not None and (before := _by_longest(given, self.longest)) != given:
            if before[0] * before[1] > max_pixels:
                raise MediaError(
                    f"{who}: image of {given[0]}x{given[1]} pixels would be {before[0]}x{before[1]} with longest={self.longest}, "
                    f"more than max_pixels={max_pixels}"
                )
            image_CYX, given = resize(image_CYX.contiguous(), before, self.filter), before
        wanted = self._resized(given)
        if wanted[0] * wanted[1] > max_pixels:
            raise MediaError(
                f"{who}: image of {given[0]}x{given[1]} pixels would be {wanted[0]}x{wanted[1]} with shortest={self.shortest}, "
                f"more than max_pixels={max_pixels}; crop it first"
            )
        if wanted != given:
            image_CYX = resize(image_CYX.contiguous(), wanted, self.filter)
        if self.crop is not None:
            image_CYX = self._centre(image_CYX, self.crop, who)
        return image_CYX

    def _resized(self, given: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns after resizing."""
        if self.shortest is None:
            return self.size or given
        low, high = min(given), max(given)
        long = int(self.shortest * high / low)  # rounded down, as both libraries do
        return (long, self.shortest) if given[0] >= given[1] else (self.shortest, long)

    def _centre(self, image_CYX: Tensor, crop: tuple[int, int], who: str) -> Tensor:
        spare = [have - want for have, want in zip(image_CYX.shape[1:], crop, strict=True)]
        if min(spare) < 0:
            raise MediaError(
                f"{who}: image is {image_CYX.shape[1]}x{image_CYX.shape[2]} pixels, smaller than crop={crop}; enlarge it first"
            )
        # Python rounds halves to even numbers
        top, left = (round(n / 2) if self.corner == "even" else n // 2 for n in spare)
        return image_CYX[:, top : top + crop[0], left : left + crop[1]]


def _by_longest(given: tuple[int, int], longest: int) -> tuple[int, int]:
    """Rows and columns with a longer side of this many pixels."""
    # columns / rows first, as in transformers, because rounding may change a pixel
    ratio, wide = given[1] / given[0], given[1] >= given[0]
    other = int(longest / ratio) if wide else int(longest * ratio)
    other = max(other + other % 2, 1)
    if longest > LONGEST:
        rows, columns = (other, longest) if wide else (longest, other)
        other = max(int(LONGEST / (columns / rows)) if wide else int(LONGEST * (columns / rows)), 1)
        longest = LONGEST
    return (other, longest) if wide else (longest, other)


def _by_nearest(map_CYX: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    return F.interpolate(map_CYX[None], size, mode="nearest-exact")[0]


def _by_torchvision(image_CYX: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    return resize(image_CYX, list(size), interpolation=InterpolationMode(kind), antialias=True)


def _by_pillow(levels_CYX: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    from PIL.Image import Resampling

    resized = _picture(levels_CYX).resize((size[1], size[0]), Resampling[kind.upper()])
    return _levels(resized)


def _on_white(levels_CYX: Tensor) -> Tensor:
    """RGBA as RGB, with transparent pixels on white, rounded as Pillow does."""
    if int(levels_CYX[3].min()) == 255:
        return levels_CYX[:3]
    from PIL import Image

    picture = _picture(levels_CYX)
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return _levels(Image.alpha_composite(white, picture).convert("RGB"))


def _picture(levels_CYX: Tensor) -> Any:
    from PIL import Image

    array_YXC = levels_CYX.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array_YXC[:, :, 0] if array_YXC.shape[2] == 1 else array_YXC)


def _levels(picture: Any) -> Tensor:
    import numpy as np

    array = np.array(picture)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)


_SQUARE, _SHORTEST, _CROP = {"height": 224, "width": 224}, {"shortest_edge": 224}, {"height": 224, "width": 224}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": _SQUARE, "resample": 2, **_HALF},
    "DeiT": {
        "size": {"height": 256, "width": 256},
        "crop_size": _CROP,
        "do_center_crop": True,
        "resample": 3,
        **_HALF,
    },
    "Bit": {"size": _SHORTEST, "crop_size": _CROP, "do_center_crop": True, "resample": 3, **_CLIP},
    "CLIP": {"size": _SHORTEST, "crop_size": _CROP, "do_center_crop": True, "resample": 3, **_CLIP},
    "Siglip": {"size": _SQUARE, "resample": 3, **_HALF},
    "DINOv3ViT": {"size": _SQUARE, "resample": 2, **_IMAGENET},
    "Idefics3": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}, "resample": 1, **_HALF},
    "SmolVLM": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}, "resample": 1, **_HALF},
}
"""What transformers' processors do where preprocessor_config.json says nothing; by the name before ImageProcessor."""
WHOLE_OR_TILES = {"Idefics3", "SmolVLM"}  # these cut pictures into tiles unless do_image_splitting is false
SIDE_IS_SHORTEST = {"Bit", "CLIP", "Siglip"}  # one number as the size is the shortest side; elsewhere that of a square
RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
UNUSED = {
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "use_fast", "_valid_processor_keys",
    "return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "default_to_square", "do_convert_rgb",
}  # fmt: skip
"""Fields that do not change the numbers; pictures are always converted to RGB."""
_READ = {
    "size", "crop_size", "resample", "image_mean", "image_std", "do_resize", "do_center_crop", "do_rescale", "rescale_factor",
    "do_normalize",
}  # fmt: skip
_READ_OF_TILES = {"do_image_splitting", "max_image_size", "do_pad", "return_row_col_info", "video_sampling"}
"""Further fields of processors that may cut tiles; do_pad pads other pictures of a batch."""


def image_settings(
    preprocessor: Mapping[str, Any], *, by: Literal["torchvision", "pillow"] = "torchvision"
) -> dict[str, Any]:
    """The arguments of ImagePatches, except `patch` and `position`, that prepare pictures as a processor of transformers does.

    preprocessor: the content of preprocessor_config.json.
    by: "torchvision", as the processors of transformers 5, or "pillow", as those whose names end in Pil and those before.

    Raises:
        ConfigError: a processor or a field that is not known here; it is named.
    """
    came = preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type")
    kind = str(came)
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in PROCESSORS:
        raise ConfigError(
            f"image_settings: image_processor_type={came!r} is not known; known are {', '.join(PROCESSORS)} before ImageProcessor"
        )
    tiles = kind in WHOLE_OR_TILES
    read = _READ | _READ_OF_TILES if tiles else _READ
    unknown = [name for name, value in preprocessor.items() if name not in UNUSED | read and value not in (None, False)]
    if unknown:
        raise ConfigError(
            f"image_settings: {', '.join(f'{name}={preprocessor[name]!r}' for name in unknown)} of {came} is not known here"
        )
    given = {name: value for name, value in preprocessor.items() if value is not None}
    said = PROCESSORS[kind] | given

    factor = said.get("rescale_factor", 1 / 255)
    if not said.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(
            f"image_settings: do_rescale={said.get('do_rescale', True)} with rescale_factor={factor} is not known here; levels are "
            "divided by 255"
        )
    if said["resample"] not in RESAMPLE:
        raise ConfigError(
            f"image_settings: resample={said['resample']!r} is not known; known are {RESAMPLE}, Pillow's numbers"
        )

    sizes: dict[str, Any] = {}
    if tiles:
        sizes |= _whole(said, str(came))
    elif said.get("do_resize", True):
        sizes |= _size("size", said["size"], one_is_shortest=kind in SIDE_IS_SHORTEST)
    if said.get("do_center_crop"):
        sizes["crop"] = _size("crop_size", said["crop_size"], one_is_shortest=False).get("size")
        if sizes["crop"] is None:
            raise ConfigError(f"image_settings: crop_size={said['crop_size']!r} is not height and width")
    way = "float" if kind == "DINOv3ViT" else by
    normalise = said.get("do_normalize", True)
    return {
        "channels": 3,
        "mean": tuple(said["image_mean"]) if normalise else 0.0,
        "std": tuple(said["image_std"]) if normalise else 1.0,
        "edge": "cut",
        "fit": Fit(**sizes, filter=RESAMPLE[said["resample"]], by=way) if sizes else None,  # type: ignore[arg-type]
    }


def _whole(said: Mapping[str, Any], came: str) -> dict[str, Any]:
    """The sizes of a Fit for a processor that may cut pictures into tiles."""
    if said.get("do_image_splitting", True):
        raise ConfigError(
            f"image_settings: do_image_splitting=True of {came} is not known here: tiles are not supported; "
            "do_image_splitting=False reads a picture as one"
        )
    edges = [(name, said[name]) for name in (["size"] if said.get("do_resize", True) else []) + ["max_image_size"]]
    for name, value in edges:
        if not isinstance(value, Mapping) or set(value) != {"longest_edge"}:
            raise ConfigError(f"image_settings: {name}={value!r} of {came} is not known; known is longest_edge")
    sizes = [value["longest_edge"] for _, value in edges]
    return {"size": (sizes[-1], sizes[-1]), "longest": sizes[0] if len(sizes) == 2 else None}


def _size(name: str, value: Any, *, one_is_shortest: bool) -> dict[str, Any]:
    """A size of transformers as `size` or `shortest` of a Fit."""
    if isinstance(value, int):
        return {"shortest": value} if one_is_shortest else {"size": (value, value)}
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return {"size": tuple(value)}
    sides = {side: n for side, n in value.items() if n is not None} if isinstance(value, Mapping) else {}
    if set(sides) == {"height", "width"}:
        return {"size": (sides["height"], sides["width"])}
    if set(sides) == {"shortest_edge"}:
        return {"shortest": sides["shortest_edge"]}
    raise ConfigError(f"image_settings: {name}={value!r} is not known; known are height and width, or shortest_edge")


def timm_image_settings(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ImagePatches, except `patch` and `position`, that prepare pictures as timm's evaluation transform does.

    data_config: what `timm.data.resolve_model_data_config(model)` gives.

    Raises:
        ConfigError: a field or a value that is not known here; it is named.
    """
    known = {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}
    for name, value in data_config.items():
        if name not in known and value is not None:
            raise ConfigError(f"timm_image_settings: {name}={value!r} is not known here")
    if missing := known - set(data_config):
        raise ConfigError(f"timm_image_settings: {', '.join(sorted(missing))} missing; give all of timm's data config")
    (channels, height, width), share = data_config["input_size"], data_config["crop_pct"]
    mode, kind = data_config["crop_mode"], data_config["interpolation"]
    if kind not in FILTERS:
        raise ConfigError(f"timm_image_settings: interpolation={kind!r} is not one of {', '.join(FILTERS)}")
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise ConfigError(
            f"timm_image_settings: crop_mode={mode!r} of input_size={(channels, height, width)} is not known; known are "
            "squash, and center for squares"
        )
    resized = (floor(height / share), floor(width / share))
    sizes: dict[str, Any] = {"size": resized} if mode == "squash" else {"shortest": resized[0]}
    return {
        "channels": channels,
        "mean": tuple(data_config["mean"]),
        "std": tuple(data_config["std"]),
        "edge": "cut",
        "fit": Fit(**sizes, crop=(height, width), filter=kind, by="pillow", corner="even"),
    }
