"""Pictures and sound from files, arrays and tensors, with units and with errors that say what is wrong."""

import io
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.shapes import MediaError
from multimodal.tokenizer import describe

log = logging.getLogger("multimodal")

CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
STREAMED = 0x7FFF0000  # writers to a pipe put this many bytes or more in the header, because they do not know yet
_LARGEST_FILTER = 2**24  # numbers; the filter grows with both rates over their common divisor


@cache
def say_once(text: str) -> None:
    """Tell the user something, the first time only (in each process)."""
    log.warning(text)


def is_file_like(value: Any) -> bool:
    """Whether a value names or holds a file: a path, bytes, an open binary file, or what Hugging Face datasets have for one."""
    return (
        isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview))
        or hasattr(value, "read")
        or (isinstance(value, Mapping) and set(value) == {"bytes", "path"})
    )


def file_source(value: Any, who: str) -> tuple[Any, str]:
    """Something that a decoder can read, and its name for errors."""
    if isinstance(value, Mapping):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return io.BytesIO(value), f"{len(value)} bytes"
    if hasattr(value, "read"):
        if hasattr(value, "seek"):
            value.seek(0)  # the same file gives the same tokens the second time
        return value, getattr(value, "name", "an open file")
    path = Path(value)
    if not path.is_file():
        raise MediaError(f"{who}: there is no file {str(path)!r}" + (" (it is a folder)" if path.is_dir() else ""))
    return path, repr(str(path))


def read_image(value: Any, *, channels: int, max_pixels: int, who: str) -> Tensor:
    """A picture as (C, Y, X) float32 in 0..1.

    value: a path, bytes, an open file; a PIL image; an array (Y, X) or (Y, X, C), or a tensor (Y, X) or (C, Y, X), of uint8,
    uint16, or floats in 0..1. Grey, RGB and RGBA are turned into `channels` (1, 3 or 4); see-through pixels lie on white.
    EXIF rotation is applied. The size is checked before anything is decoded.

    Raises:
        MediaError: `who`, what came, and what to do.
    """
    from PIL import Image

    if isinstance(value, Image.Image) or is_file_like(value):
        image_CYX = _decode_image(value, max_pixels, who)
    elif isinstance(value, (np.ndarray, Tensor)):
        image_CYX = _image_from_array(value, max_pixels, who)
    else:
        raise MediaError(f"{who}: wanted a file, a PIL image, an array or a tensor, not {describe(value)}")
    return _to_channels(image_CYX, channels)


def _check_pixels(width: int, height: int, max_pixels: int, who: str, name: str) -> None:
    if width * height > max_pixels:
        raise MediaError(
            f"{who}: {name} is {height}x{width} pixels ({width * height / 1e6:.0f} million), more than max_pixels={max_pixels}; "
            "shrink it first or raise max_pixels"
        )


def _decode_image(value: Any, max_pixels: int, who: str) -> Tensor:
    from PIL import Image, ImageOps

    name, opened = "the image", None
    try:
        if isinstance(value, Image.Image):
            image = value
        else:
            source, name = file_source(value, who)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
                image = Image.open(source)
            opened = image if isinstance(source, Path) else None  # files that came open stay open
        kind = image.format
        _check_pixels(*image.size, max_pixels, who, name)
        if "exif" in image.info or kind == "TIFF":
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # Pillow stretches PPM to 16 bits
            array = np.asarray(image).astype(np.float32) / 65535
        elif image.mode in ("I", "F"):
            return _image_from_array(np.asarray(image), max_pixels, who)
        else:
            see_through = "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa")
            if see_through or image.mode not in ("L", "RGB", "RGBA"):
                image = image.convert("RGBA" if see_through else "L" if image.mode == "1" else "RGB")
            array = np.asarray(image).astype(np.float32) / 255
    except MediaError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files
        raise MediaError(f"{who}: cannot read {name} as a picture: {error}") from error
    finally:
        if opened is not None:
            opened.close()
    array = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _image_from_array(value: np.ndarray | Tensor, max_pixels: int, who: str) -> Tensor:
    came, tensor = describe(value), _as_tensor(value, who)
    if tensor.dim() == 2:
        tensor = tensor[None]
    elif tensor.dim() == 3 and isinstance(value, np.ndarray):
        tensor = tensor.permute(2, 0, 1)
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        raise MediaError(
            f"{who}: {came} is no picture; wanted an array (Y, X) or (Y, X, C), or a tensor (Y, X) or (C, Y, X), "
            "with C of 1, 3 or 4"
        )
    _check_pixels(tensor.shape[2], tensor.shape[1], max_pixels, who, came)
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if tensor.dtype == torch.uint16:
        return tensor.float() / 65535
    if tensor.dtype == torch.bool:
        return tensor.float()
    if not tensor.is_floating_point():
        raise MediaError(f"{who}: {came} has no known range; give uint8 (0..255), uint16 (0..65535) or floats in 0..1")
    tensor = tensor.float()
    low, high = (float(x) for x in tensor.aminmax())
    if not -0.01 <= low <= high <= 1.01:
        if not torch.isfinite(tensor).all():
            raise MediaError(f"{who}: {came} has pixels that are not finite (NaN or infinity)")
        raise MediaError(
            f"{who}: {came} runs from {low:g} to {high:g}; floats are wanted in 0..1, so divide by the largest value"
        )
    return tensor


def _as_tensor(value: np.ndarray | Tensor, who: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:  # PyTorch takes neither read-only arrays nor those of another byte order
        return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError as error:
        raise MediaError(f"{who}: {describe(value)} does not hold numbers") from error


def _to_channels(image_CYX: Tensor, channels: int) -> Tensor:
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
        return (image_CYX * image_CYX.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(
            0, keepdim=True
        )  # ITU-R BT.601
    return image_CYX.expand(channels, -1, -1) if image_CYX.shape[0] == 1 else image_CYX


def read_sound(value: Any, *, rate_hz: int, who: str) -> Tensor:
    """A sound as one channel (S,) of float32 at `rate_hz`; channels are averaged, other rates are resampled and that is said once.

    value: a path, bytes or an open file; a pair (wave, rate in Hz); or a mapping with "array" and "sampling_rate". The wave
    is an array or tensor (S,) or (channels, S), of floats in -1..1 or of int8, uint8, int16 or int32.

    Raises:
        MediaError: `who`, what came, and what to do.
    """
    if is_file_like(value):
        wave_CS, rate = _decode_sound(value, who)
    else:
        if isinstance(value, dict) and {"array", "sampling_rate"} <= set(value):
            wave, rate = value["array"], value["sampling_rate"]
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            wave, rate = value
        else:
            raise MediaError(
                f"{who}: wanted a file or a pair (wave, rate_hz), not {describe(value)}; an array alone does not say its rate"
            )
        wave_CS = _wave_from_array(wave, who)
    if (
        isinstance(rate, bool)
        or not isinstance(rate, (int, float, np.integer, np.floating))
        or not 1 <= rate <= 10_000_000
        or rate != int(rate)
    ):
        raise MediaError(f"{who}: the rate {rate!r} is not a whole number of samples a second (Hz), such as 16000")
    if wave_CS.numel() == 0:
        raise MediaError(f"{who}: the sound has no samples")
    if not torch.isfinite(wave_CS).all():
        raise MediaError(f"{who}: the sound has samples that are not finite (NaN or infinity)")
    wave_S = wave_CS.mean(0)
    return wave_S if rate == rate_hz else resampled(wave_S, int(rate), rate_hz, who)


def resampled(wave_S: Tensor, rate: int, rate_hz: int, who: str) -> Tensor:
    from torchaudio.functional import resample

    common = math.gcd(rate, rate_hz)
    if (rate // common) * (rate_hz // common) > _LARGEST_FILTER:
        raise MediaError(
            f"{who}: {rate} Hz and {rate_hz} Hz have only {common} as a common divisor, which takes too large a filter; "
            "resample it first to a usual rate such as 16000, 22050, 44100 or 48000 Hz"
        )
    say_once(f"{who}: resampling {rate} Hz to {rate_hz} Hz")
    return resample(wave_S, rate, rate_hz)


def _decode_sound(value: Any, who: str) -> tuple[Tensor, int]:
    import soundfile

    name = "the sound"
    try:
        source, name = file_source(value, who)
        with soundfile.SoundFile(source) as file:
            promised, rate = file.frames, file.samplerate
            cut = CUT_SHORT.search(file.extra_info)
            wave = file.read(dtype="float32", always_2d=True)
    except MediaError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files
        raise MediaError(f"{who}: cannot read {name} as sound: {error}") from error
    # libsndfile does not complain about files that were cut short: it lowers `frames` and notes that in its log, or reads less
    unit, promised, came = ("bytes", int(cut[1]), int(cut[2])) if cut else ("samples", promised, len(wave))
    if came < promised and not (cut and promised >= STREAMED):
        raise MediaError(
            f"{who}: {name} holds {came} {unit} of the {promised} that its header promises; it was cut short"
        )
    return torch.from_numpy(np.ascontiguousarray(wave.T)), rate


def _wave_from_array(wave: Any, who: str) -> Tensor:
    came = describe(wave)
    if not isinstance(wave, (np.ndarray, Tensor)):
        raise MediaError(f"{who}: the wave is {came}; wanted an array or a tensor, (S,) or (channels, S)")
    tensor = _as_tensor(wave, who)
    if tensor.dim() == 1:
        tensor = tensor[None]
    if tensor.dim() != 2 or (tensor.shape[0] > 16 and tensor.shape[1] > 0):
        raise MediaError(f"{who}: the wave is {came}; wanted (S,) or (channels, S) with at most 16 channels")
    if tensor.dtype == torch.uint8:
        return (tensor.float() - 128) / 128
    if tensor.dtype in (torch.int8, torch.int16, torch.int32):
        return tensor.float() / -torch.iinfo(tensor.dtype).min
    if not tensor.is_floating_point():
        raise MediaError(f"{who}: the wave is {came}, which has no known range; give int16, int32 or floats in -1..1")
    return tensor.float()
