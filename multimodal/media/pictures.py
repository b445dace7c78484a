"""Reads pictures as tensors (C, Y, X) of float32 in 0..1, and maps of numbers (Y, X), which pictures can hold too."""

import re
import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.media.sixteen_bit import BITS, PLANAR, TILE_LENGTH, TILE_WIDTH, raw_mode, sixteen_bit_pixels
from multimodal.media.sources import (
    FOREIGN,
    as_tensor,
    file_kind,
    file_source,
    first_bytes,
    is_file_like,
    optional_package,
    unreadable,
    warn_once,
    warned,
)
from multimodal.shapes import MediaError
from multimodal.tokenizer import describe

FORMATS = (
    "JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "PPM", "AVIF", "HEIF", "JPEG2000", "MPO", "ICO", "ICNS", "CUR",
    "PSD", "QOI", "DDS", "PCX", "DCX", "SGI", "SUN", "XBM", "XPM", "TGA",
)  # fmt: skip
"""The formats that Pillow may open: it decodes them by itself or with its built-in libraries.

Left out are EPS, which starts Ghostscript; WMF, which the system draws; IPTC, which holds a file of any other format; BUFR, GRIB,
HDF5 and MPEG, which need a decoder from elsewhere; and formats of science, games and faxes, since no data set has them and each
further decoder is one more for malicious files to attack.
"""
ORIENTATION = 0x0112  # of EXIF
METADATA = ("exif", "xmp", "XML:com.adobe.xmp", *(f"Raw profile type {name}" for name in ("exif", "APP1", "xmp")))
XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b")
TURNS = {2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0), 6: (1, 1, 0), 7: (1, 1, 1), 8: (1, 0, 1)}
"""{orientation: (swap rows and columns, then flip left and right, then flip top and bottom)}."""


def read_image(value: Any, *, channels: int | None, max_pixels: int, who: str) -> Tensor:
    """A picture as (C, Y, X) float32 in 0..1.

    value: a path, bytes, an open file, a data: URL; a PIL image; an array (Y, X) or (Y, X, C), or a tensor (Y, X) or (C, Y, X),
    of uint8, uint16, or floats in 0..1; a decoder of a video. Grey, RGB and RGBA are turned into `channels` (1, 3 or 4; None:
    they stay as they are); transparent pixels are put on white. The orientation of EXIF or XMP is applied. Of several frames
    only the first is read, which is logged once. The size is checked before decoding.

    Raises:
        MediaError: names `who`, the value and the repair.
    """
    from PIL import Image

    if isinstance(value, Image.Image) or is_file_like(value):
        image_CYX = _decode_image(value, max_pixels, who)
    elif isinstance(value, (np.ndarray, Tensor)):
        image_CYX = _image_from_array(value, max_pixels, who)
    # torchcodec's VideoDecoder, which datasets give
    elif hasattr(value, "get_frame_at") and hasattr(value, "metadata"):
        image_CYX = _first_of_video(value, max_pixels, who)
    else:
        raise MediaError(f"{who}: wanted a file, a PIL image, an array or a tensor, not {describe(value)}")
    return image_CYX if channels is None else _to_channels(image_CYX, channels)


def read_map(value: Any, *, max_pixels: int, who: str) -> Tensor:
    """A map of whole numbers (Y, X) int64, such as the class of each pixel.

    value: a file or a PIL image whose pixels are numbers, grey or of a palette, as programs for annotation save them; an array or
    a tensor (Y, X) of whole numbers. The orientation of EXIF or XMP is applied; nothing is scaled.

    Raises:
        MediaError: names `who`, the value and the repair.
    """
    from PIL import Image

    if isinstance(value, Image.Image) or is_file_like(value):
        return torch.from_numpy(_decode(value, max_pixels, who, _levels).astype(np.int64))
    if not isinstance(value, (np.ndarray, Tensor)):
        raise MediaError(f"{who}: wanted a file, a PIL image, an array or a tensor, not {describe(value)}")
    map_YX, came = as_tensor(value, who), describe(value)
    if map_YX.dim() != 2 or 0 in map_YX.shape:
        raise MediaError(f"{who}: {came} is no map; wanted an array or a tensor (Y, X)")
    _check_pixels(map_YX.shape[1], map_YX.shape[0], max_pixels, who, came)
    if map_YX.is_complex() or (map_YX.is_floating_point() and not bool((map_YX == map_YX.round()).all())):
        raise MediaError(f"{who}: {came} has numbers that are not whole")
    return map_YX.long()


def _levels(image: Any, max_pixels: int, who: str, name: str) -> np.ndarray:
    """(Y, X) of a PIL image: the numbers that its file has for the pixels."""
    raw, kind = raw_mode(image), image.format
    _check_sizes(image, max_pixels, who, name)
    if kind in ("JPEG", "MPO"):
        raise MediaError(f"{who}: {name} is a JPEG, which changes the numbers of pixels; save the map as PNG")
    image = upright(image)
    _check_pixels(image.width, image.height, max_pixels, who, name)
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise MediaError(
            f"{who}: {name} has colours ({image.mode}), and a map has one number for each pixel; save it as a PNG in grey or with "
            "a palette, whose numbers are the classes"
        )
    # grey of 2 or 4 bits, which Pillow has scaled to 8
    return np.asarray(image).astype(np.int64) // {"L;2": 85, "L;4": 17}.get(raw, 1)


def check_decoder(image: Any, who: str) -> None:
    """Refuse a PIL image that is not decoded yet and whose decoder may start another program."""
    from PIL import ImageFile

    late = isinstance(image, ImageFile.StubImageFile) or (isinstance(image, ImageFile.ImageFile) and bool(image.tile))
    if late and image.format not in FORMATS:
        raise MediaError(
            f"{who}: the PIL image is {image.format} and not decoded yet; that format is not read here, so call its load() "
            "first if you trust the file, or save it as PNG"
        )


def upright(image: Any) -> Any:
    """A PIL image, turned as its EXIF or XMP says."""
    turn = TURNS.get(_orientation_left(image))
    if turn is None:
        return image
    from PIL.Image import Transpose

    swapped, left_right, top_bottom = turn
    for wanted, method in (
        (swapped, Transpose.TRANSPOSE),
        (left_right, Transpose.FLIP_LEFT_RIGHT),
        (top_bottom, Transpose.FLIP_TOP_BOTTOM),
    ):
        image = image.transpose(method) if wanted else image
    return image


def _orientation_left(image: Any) -> int:
    """Decode a PIL image; returns the orientation, 1 to 8, that is still to be applied."""
    if not getattr(image, "tile", None) or image.format != "TIFF":
        image.load()  # a PNG may have its EXIF behind the pixels
        return _orientation(image)
    before, known_to_pillow = _orientation(image), ORIENTATION in image.getexif()
    image.load()  # Pillow turns a TIFF here
    return 1 if known_to_pillow else before


def _orientation(image: Any) -> int:
    """The orientation, 1 to 8, by EXIF, else by XMP. PNGs may hold either in a text of ImageMagick."""
    from PIL import Image

    info = image.info
    if image.format != "TIFF" and info.keys().isdisjoint(METADATA):
        return 1
    try:
        exif = image.getexif()
        found = exif.get(ORIENTATION)
        for name in ("Raw profile type APP1", "Raw profile type exif"):
            if found is None and (profile := _raw_profile(info.get(name))).startswith(b"Exif\0\0"):
                (again := Image.Exif()).load(profile)
                found = again.get(ORIENTATION)
    except Exception as error:  # damaged EXIF raises errors of many classes
        text = f"the EXIF of a {image.format} file is damaged ({type(error).__name__}); its orientation is taken for upright"
        warn_once(text, key="damaged EXIF")
        found = None
    if found is None:
        packets = (
            info.get("xmp"),
            info.get("XML:com.adobe.xmp"),
            *(_raw_profile(info.get(f"Raw profile type {name}")) for name in ("xmp", "APP1")),
        )
        for packet in packets:
            data = packet.encode("utf-8", "replace") if isinstance(packet, str) else packet
            if isinstance(data, bytes) and (match := XMP_ORIENTATION.search(data)):
                return int(match[1])
    return found if isinstance(found, int) and found in TURNS else 1


def _raw_profile(text: Any) -> bytes:
    """The bytes in a text of ImageMagick, which holds a name, a length and hexadecimal digits."""
    if not isinstance(text, str) or not (match := re.match(r"\s*\S+\s+\d+\s+([0-9A-Fa-f\s]*)$", text)):
        return b""
    digits = "".join(match[1].split())
    return bytes.fromhex(digits[: len(digits) // 2 * 2])


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array (Y, X, ..), turned as `upright` turns a PIL image."""
    swapped, left_right, top_bottom = TURNS.get(orientation, (0, 0, 0))
    array = array.swapaxes(0, 1) if swapped else array
    array = array[:, ::-1] if left_right else array
    return array[::-1] if top_bottom else array


def _check_pixels(width: int, height: int, max_pixels: int, who: str, name: str) -> None:
    if width * height > max_pixels:
        raise MediaError(
            f"{who}: {name} is {height}x{width} pixels ({width * height / 1e6:.0f} million), more than max_pixels={max_pixels}; "
            "shrink it first or raise max_pixels"
        )


def _decode_image(value: Any, max_pixels: int, who: str) -> Tensor:
    array = _decode(value, max_pixels, who, _pixels)
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _decode(value: Any, max_pixels: int, who: str, pixels: Callable[[Any, int, str, str], np.ndarray]) -> np.ndarray:
    """What `pixels` makes of the PIL image that this is, or that is in this file."""
    from PIL import Image

    name, opened = "the image", None
    try:
        if isinstance(value, Image.Image):
            check_decoder(value, who)
            array = pixels(value, max_pixels, who, name)
        else:
            source, name = file_source(value, who)
            opened = source.open("rb") if isinstance(source, Path) else None  # files that the caller opened stay open
            file: Any = opened or source
            head = first_bytes(file)
            if head[4:8] == b"ftyp" and file_kind(head) == "HEIC" and pixels is _pixels:
                array = _heif(file, max_pixels, who, name)
            else:
                _check_inside(file, head, max_pixels, who, name)
                array = pixels(_opened(file, head, who, name), max_pixels, who, name)
    except MediaError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files
        raise unreadable(name, "a picture", error, who) from error
    finally:
        if opened is not None:
            opened.close()
    return array


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _opened(file: Any, head: bytes, who: str, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            if head.startswith(b"\0\0\1\0"):
                # icons: `_check_inside` checks their sizes
                warnings.filterwarnings("ignore", "Image was not the expected size")
            return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        kind = file_kind(head)
        why = FOREIGN.get(kind) or f"it is {kind}" if kind else "it is no picture of a format that is read here"
        raise unreadable(name, "a picture", why if head else "it is empty", who) from None


def _check_inside(file: Any, head: bytes, max_pixels: int, who: str, name: str) -> None:
    """Check the pictures within an icon: Pillow decodes them at their own sizes, whatever the table of contents says."""
    at = []
    if head.startswith(b"\0\0\1\0"):  # ICO: entries of 16 bytes
        file.seek(6)
        entries = file.read(16 * struct.unpack_from("<H", head, 4)[0])
        at = [struct.unpack_from("<L", entries, i + 12)[0] for i in range(0, len(entries) - 15, 16)]
    elif head.startswith(b"icns"):  # blocks of 8 bytes and their data
        end, start = file.seek(0, 2), 8
        while start + 8 < end:
            file.seek(start + 4)
            at.append(start + 8)
            start += max(int.from_bytes(file.read(4), "big"), 8)
    for start in at:
        file.seek(start)
        _check_pixels(*_size_inside(file.read(128)), max_pixels, who, name)
    file.seek(0)


def _size_inside(data: bytes) -> tuple[int, int]:
    """(columns, rows) of a PNG, JPEG 2000 or bitmap, by its first 128 bytes."""
    if data.startswith(b"\x89PNG") and len(data) >= 24:
        width, height = struct.unpack_from(">LL", data, 16)
    elif (box := data.find(b"ihdr")) > 0 and len(data) >= box + 12:
        height, width = struct.unpack_from(">LL", data, box + 4)
    elif data.startswith(b"\xff\x4f\xff\x51") and len(data) >= 16:
        width, height = struct.unpack_from(">LL", data, 8)
    elif data[:4] == b"\x28\0\0\0" and len(data) >= 12:
        width, height = struct.unpack_from("<ll", data, 4)
        height //= 2  # the height counts both the colours and the mask
    else:
        width, height = 0, 0
    return abs(width), abs(height)


def _pixels(image: Any, max_pixels: int, who: str, name: str) -> np.ndarray:
    """(Y, X) or (Y, X, C) float32 in 0..1 of a PIL image, decoded and upright."""
    kind, raw = image.format, raw_mode(image)
    tags = getattr(image, "tag_v2", {})
    _check_sizes(image, max_pixels, who, name)
    levels_YXC = sixteen_bit_pixels(image) if raw or kind == "PPM" else None
    if levels_YXC is not None:
        orientation = _orientation(image) if kind == "TIFF" else _orientation_left(image)
        return _turned(levels_YXC, orientation)
    if kind == "TIFF" and tags.get(PLANAR) == 2 and set(tags.get(BITS, ())) == {16} and image.mode == "CMYK":
        raise MediaError(f"{who}: {name} is a TIFF of 16 bits in separate planes, which is not read; save it as PNG")
    if ";16" in raw and image.mode in ("RGB", "RGBA", "CMYK", "LA"):
        warn_once(
            f"{who}: {name} has 16 bits a channel; of {kind} files with colours 8 are read", key=f"8 of 16 bits {kind}"
        )
    image = upright(image)
    # decoding may have changed the size, as of icons
    _check_pixels(image.width, image.height, max_pixels, who, name)
    return _floats(image, kind, raw, tags, max_pixels, who)


def _check_sizes(image: Any, max_pixels: int, who: str, name: str) -> None:
    """Check the sizes of a PIL image that is not decoded yet, and warn if only a part of it is read."""
    tags = getattr(image, "tag_v2", {})
    _check_pixels(image.width, image.height, max_pixels, who, name)
    # a tile is decoded whole, however small the picture is that it belongs to
    _check_pixels(
        tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0), max(4 * max_pixels, 2**20), who, f"a tile of {name}"
    )
    _warn_of_frames(image, who, name)


def _floats(image: Any, kind: str | None, raw: str, tags: Any, max_pixels: int, who: str) -> np.ndarray:
    """(Y, X) or (Y, X, C) float32 in 0..1 of a decoded PIL image, by its mode."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # Pillow scales PPM to 16 bits
        largest = 4095 if raw == "I;12" else 65535
        levels = np.asarray(image)
        array = levels.astype(np.float32) / largest
        array = 1 - array if tags.get(262) == 0 else array  # a TIFF whose 0 is white
        return _with_alpha(array, levels, transparent) if isinstance(transparent, int) else array
    if image.mode in ("I", "F"):
        image_CYX = _image_from_array(np.asarray(image), max_pixels, who)
        return image_CYX.permute(1, 2, 0).numpy()
    if isinstance(transparent, int) and image.mode in ("1", "L"):
        # the file counts in 1, 2 or 4 bits, which Pillow has scaled to 8
        level = bool(transparent) * 255 if image.mode == "1" else transparent * {"L;2": 85, "L;4": 17}.get(raw, 1)
        levels = np.asarray(image.convert("L"))
        return _with_alpha(levels.astype(np.float32) / 255, levels, level)
    has_alpha = transparent is not None or image.mode in ("LA", "PA", "La", "RGBa")
    if has_alpha or image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if has_alpha else "L" if image.mode == "1" else "RGB")
    return np.asarray(image).astype(np.float32) / 255


def _with_alpha(grey_YX: np.ndarray, levels_YX: np.ndarray, transparent: int) -> np.ndarray:
    """Grey as RGBA, in which the one transparent level has alpha 0."""
    return np.stack([grey_YX] * 3 + [(levels_YX != transparent).astype(np.float32)], 2)


def _warn_of_frames(image: Any, who: str, name: str) -> None:
    kind = image.format
    # the frames of a PSD are the layers of one picture
    if kind == "PSD" or f"frames of {kind}" in warned:
        return
    if kind in ("ICO", "ICNS"):
        count, of_them, read = len(image.info.get("sizes", ())), "pictures", "largest"
    elif getattr(image, "is_animated", False) and image.tell() == 0:
        count, of_them, read = image.n_frames, "frames", "first"
    else:
        return
    if count > 1:
        warn_once(
            f"{who}: {name} holds {count} {of_them}; only the {read} is read, as of every {kind} file with several",
            key=f"frames of {kind}",
        )


def _heif(file: Any, max_pixels: int, who: str, name: str) -> np.ndarray:
    """Decode HEIC, the format of many telephones; pillow-heif has already turned it upright."""
    need = f"{who}: {name} is HEIC, which the package pillow-heif reads"
    pictures = optional_package("pillow_heif", "media", need).open_heif(file, convert_hdr_to_8bit=False)
    width, height = pictures.size
    _check_pixels(width, height, max_pixels, who, name)
    if len(pictures) > 1:
        text = f"{who}: {name} holds {len(pictures)} pictures; only the main one is read, as of every HEIC file with several"
        warn_once(text, key="frames of HEIC")
    array = np.asarray(pictures)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    bits = pictures.info.get("bit_depth", 16)
    return array.astype(np.float32) / ((2**bits - 1) * 2 ** (16 - bits))


def _first_of_video(video: Any, max_pixels: int, who: str) -> Tensor:
    metadata = video.metadata
    _check_pixels(getattr(metadata, "width", 0) or 0, getattr(metadata, "height", 0) or 0, max_pixels, who, "the video")
    count = getattr(metadata, "num_frames", None)
    if count != 1:
        text = f"{who}: a video of {count or 'many'} frames; only the first is read, as of every video"
        warn_once(text + ". Give one frame, video[i], to choose another", key="frames of video")
    try:
        frame = video.get_frame_at(0)
    except Exception as error:
        raise unreadable("the video", "a picture", error, who) from error
    frame_CYX = torch.as_tensor(getattr(frame, "data", frame))
    if frame_CYX.dim() == 3 and frame_CYX.shape[0] not in (1, 3, 4):
        frame_CYX = frame_CYX.permute(2, 0, 1)
    return _image_from_array(frame_CYX, max_pixels, who)


def _image_from_array(value: np.ndarray | Tensor, max_pixels: int, who: str) -> Tensor:
    """(C, Y, X) float32 in 0..1 of an array (Y, X) or (Y, X, C), or of a tensor (Y, X) or (C, Y, X)."""
    tensor = as_tensor(value, who)
    if tensor.dim() == 2:
        tensor = tensor[None]
    elif tensor.dim() == 3 and isinstance(value, np.ndarray):
        tensor = tensor.permute(2, 0, 1)
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        raise MediaError(
            f"{who}: {describe(value)} is no picture; wanted an array (Y, X) or (Y, X, C), or a tensor (Y, X) or (C, Y, X), "
            "with C of 1, 3 or 4"
        )
    if tensor.shape[1] * tensor.shape[2] > max_pixels:
        _check_pixels(tensor.shape[2], tensor.shape[1], max_pixels, who, describe(value))  # raises
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if tensor.dtype == torch.uint16:
        return tensor.float() / 65535
    if tensor.dtype == torch.bool:
        return tensor.float()
    if not tensor.is_floating_point():
        came = describe(value)
        raise MediaError(f"{who}: {came} has no known range; give uint8 (0..255), uint16 (0..65535) or floats in 0..1")
    tensor = tensor.float()
    low, high = (float(x) for x in tensor.aminmax())
    if not -0.01 <= low <= high <= 1.01:
        came = describe(value)
        if not torch.isfinite(tensor).all():
            raise MediaError(f"{who}: {came} has pixels that are not finite (NaN or infinity)")
        raise MediaError(
            f"{who}: {came} runs from {low:g} to {high:g}; floats are wanted in 0..1, so divide by the largest value"
        )
    return tensor


def _to_channels(image_CYX: Tensor, channels: int) -> Tensor:
    """A picture with `channels` channels: transparent pixels become white, colours become luma where one channel is wanted."""
    have = image_CYX.shape[0]
    if have == channels:
        return image_CYX
    if have == 4:
        colour, alpha = image_CYX[:3], image_CYX[3:]
        image_CYX = colour * alpha + (1 - alpha)
    elif channels == 4:
        colour = image_CYX.expand(3, -1, -1)
        return torch.cat([colour, torch.ones_like(colour[:1])])
    if channels == 1 and image_CYX.shape[0] == 3:
        luma = image_CYX.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
        return (image_CYX * luma).sum(0, keepdim=True)
    return image_CYX.expand(channels, -1, -1) if image_CYX.shape[0] == 1 else image_CYX
