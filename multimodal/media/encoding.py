"""Encodes answers as files that other programs open: pictures as PNG, sounds as WAV, arrays as NPY, the rest as text or JSON."""

import io
import json
from contextlib import suppress
from typing import Any

import numpy as np


def as_file(value: Any, *, texts: bool, arrays: bool) -> tuple[str, bytes] | None:
    """(ending, bytes) of a value that belongs into a file, as tokenizers decode it: a sound (wave_S, rate_hz), a picture (C, Y, X)
    in 0..1, any other array, a text; with `texts` also lists and numbers, as JSON."""
    if isinstance(value, str):
        return (".txt", value.encode()) if texts else None
    data = io.BytesIO()
    if isinstance(value, tuple) and len(value) == 2 and getattr(value[0], "ndim", None) == 1:
        import soundfile

        wave_S = np.clip(np.asarray(value[0], dtype=np.float32), -1, 1)
        soundfile.write(data, wave_S, int(value[1]), format="WAV")
        return ".wav", data.getvalue()
    if not hasattr(value, "shape"):
        with suppress(TypeError):  # an object that JSON cannot hold
            return (".json", json.dumps(value, ensure_ascii=False, default=_lists).encode()) if texts else None
        return None
    array = np.asarray(value)
    if _is_picture(array):
        from PIL import Image

        image_YXC = np.rint(array * 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(image_YXC[:, :, 0] if len(array) == 1 else image_YXC).save(data, format="PNG")
        return ".png", data.getvalue()
    if not arrays:
        return None
    np.save(data, array, allow_pickle=False)
    return ".npy", data.getvalue()


def _is_picture(array: Any) -> bool:
    """Whether this is (C, Y, X) in 0..1; what is not finite is none."""
    shaped = array.ndim == 3 and len(array) in (1, 3, 4) and array.size and array.dtype.kind == "f"
    return bool(shaped and array.min() >= 0 and array.max() <= 1)


def _lists(value: Any) -> Any:
    """An array as lists; a TypeError for any other type."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")
