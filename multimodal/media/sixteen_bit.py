"""Reads colour pictures of more than 8 bits a channel exactly (PNG, TIFF, PPM of 16); Pillow cuts them to 8."""

import io
import struct
import warnings
from typing import Any

import numpy as np

# Tags of TIFF 6.0
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS, PLANAR = (
    256, 257, 258, 259, 262, 273, 277, 278, 279, 284,
)  # fmt: skip
PREDICTOR, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_COUNTS, EXTRA = 317, 322, 323, 324, 325, 338


def raw_mode(image: Any) -> str:
    """Pillow's raw mode of a picture that is opened and not yet decoded, such as 'RGB;16B'; '' if unknown."""
    tile = getattr(image, "tile", None)
    if not tile:
        return ""
    args = tile[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def sixteen_bit_pixels(image: Any) -> np.ndarray | None:
    """(Y, X, C) float32 in 0..1 with C of 3 or 4, not yet upright; None: the picture has no colours of 16 bits.

    image: opened by Pillow and not yet decoded.
    """
    mode, file = raw_mode(image), getattr(image, "fp", None)
    if file is None or not hasattr(file, "read"):
        return None
    at = file.tell()
    try:
        if image.format == "PNG" and mode in ("RGB;16B", "RGBA;16B", "LA;16B") and image.tell() == 0:
            return _png(image, file)
        # the tags decide: Pillow takes channels in separate planes for 8 bits
        if image.format == "TIFF" and set(image.tag_v2.get(BITS, ())) == {16} and image.mode in ("RGB", "RGBA"):
            return _tiff(image.tag_v2, file)
        if image.format == "PPM" and image.mode == "RGB" and image.tile[0][0] == "ppm":
            return _ppm(image, file)
    finally:
        file.seek(at)
    return None


def _png(image: Any, file: Any) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_image

    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # torchvision 0.29 announces that its decoders move to torchcodec
            warnings.simplefilter("ignore", DeprecationWarning)
            levels_YXC = decode_image(data, mode=ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    except RuntimeError:
        raise ValueError("its data are damaged or cut short") from None
    transparent = image.info.get("transparency")
    pixels = levels_YXC.astype(np.float32) / 65535
    if transparent is not None and levels_YXC.shape[2] == 3:  # the one transparent colour
        seen = (levels_YXC != np.asarray(transparent)).any(2, keepdims=True)
        pixels = np.concatenate([pixels, seen.astype(np.float32)], 2)
    return pixels if pixels.shape[2] > 2 else pixels[:, :, [0, 0, 0, 1]]


def _ppm(image: Any, file: Any) -> np.ndarray | None:
    _, (_, _, width, height), offset, args = image.tile[0]
    largest = args[-1] if isinstance(args, tuple) else args
    if not isinstance(largest, int) or largest < 256:
        return None
    file.seek(offset)
    data = file.read(width * height * 6)
    if len(data) < width * height * 6:
        raise ValueError(f"it holds {len(data)} bytes of pixels, wanted {width * height * 6}; it was cut short")
    values = np.frombuffer(data, ">u2").reshape(height, width, 3)
    return (values.astype(np.float32) / largest).clip(max=1)


def _tiff(tags: Any, file: Any) -> np.ndarray:
    """Pillow reads grey pictures of 16 bits exactly, so the bytes are read as a grey one with the channels side by side."""
    width, height, count = tags[WIDTH], tags[LENGTH], tags[SAMPLES]
    together = tags.get(PLANAR, 1) == 1
    where, sizes = (tags[TILE_OFFSETS], tags[TILE_COUNTS]) if TILE_OFFSETS in tags else (tags[OFFSETS], tags[COUNTS])
    parts = []
    for offset, size in zip(where, sizes, strict=True):
        file.seek(offset)
        parts.append(file.read(size))
    # each plane, or all channels together, is read as one grey picture
    planes = [parts] if together else np.array_split(np.arange(len(parts)), count)
    side_by_side = count if together else 1
    read = []
    for plane in planes:
        strips = parts if together else [parts[i] for i in plane]
        grey_YX = _grey(tags, strips, width * side_by_side, side_by_side)
        read.append(grey_YX.reshape(height, width, side_by_side))
    levels_YXC = np.concatenate(read, 2)
    extra = tags.get(EXTRA, ())
    pixels = levels_YXC[:, :, : 3 if extra == (0,) else count].astype(np.float32) / 65535
    if extra == (1,):  # colours are premultiplied by alpha
        alpha = pixels[:, :, 3:]
        pixels[:, :, :3] = np.divide(
            pixels[:, :, :3], alpha, out=np.zeros_like(pixels[:, :, :3]), where=alpha > 0
        ).clip(max=1)
    return pixels


def _grey(tags: Any, parts: list[bytes], width: int, channels: int) -> np.ndarray:
    """The levels (Y, width) of compressed parts, decoded by Pillow from a grey TIFF that is written around them."""
    from PIL import Image

    order = "<" if tags.prefix == b"II" else ">"
    height, differences = tags[LENGTH], tags.get(PREDICTOR, 1) == 2 and tags[COMPRESSION] != 1
    tiled = TILE_WIDTH in tags
    entries = {WIDTH: [width], LENGTH: [height], BITS: [16], COMPRESSION: [tags[COMPRESSION]], PHOTOMETRIC: [1],
               SAMPLES: [1]}  # fmt: skip
    if tiled:
        entries |= {TILE_WIDTH: [tags[TILE_WIDTH] * channels], TILE_LENGTH: [tags[TILE_LENGTH]]}
    else:
        entries |= {ROWS: [min(tags.get(ROWS, height), height)]}
    table = 8 + 2 + 12 * (len(entries) + 2) + 4
    lists = 4 * len(parts) if len(parts) > 1 else 0  # an entry holds a single number itself
    starts = np.cumsum([table + 2 * lists, *map(len, parts)])[:-1].tolist()
    entries |= {
        TILE_OFFSETS if tiled else OFFSETS: starts,
        TILE_COUNTS if tiled else COUNTS: [len(part) for part in parts],
    }
    directory, outside = struct.pack(order + "H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}L", *values)
        if len(values) > 1:
            outside += packed
            packed = struct.pack(order + "L", table + len(outside) - len(packed))
        directory += struct.pack(order + "HHL", tag, 4, len(values)) + packed
    magic = struct.pack(order + "2sHL", tags.prefix, 42, 8)
    data = magic + directory + bytes(4) + outside + b"".join(parts)
    grey_YX = np.asarray(Image.open(io.BytesIO(data), formats=("TIFF",))).astype(np.uint16)
    if not differences:
        return grey_YX
    # each number is the difference to the same channel of the pixel on its left, within each tile
    step = tags[TILE_WIDTH] * channels if tiled else width
    for left in range(0, width, step):
        block = grey_YX[:, left : left + step]
        sums = block.reshape(height, -1, channels).cumsum(1, dtype=np.uint16)
        grey_YX[:, left : left + step] = sums.reshape(block.shape)
    return grey_YX
