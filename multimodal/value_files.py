"""Values as files that other programs open: pictures as PNG, sounds as WAV, arrays as NPY, the rest as text or JSON; or as the
tokenizer of a kind writes it."""

import io
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from multimodal.shapes import MediaError
from multimodal.texts import shortened


class Writes(Protocol):
    """What a tokenizer has of its own: whether its kind has a `write`, and that."""

    @property
    def writes_files(self) -> bool: ...

    def write(self, value: Any, path: str | Path) -> Path: ...


def write_value(value: Any, path: str | Path, who: str) -> Path:
    """Write a value as a file; returns its path, which is `path` with the ending of the format unless it has it.

    Raises:
        MediaError: no such file can hold the value; the message begins with `who`.
    """
    file = as_file(value, texts=True, arrays=True)
    if file is None:
        raise MediaError(
            f"{who}: a {type(value).__name__} is no text, picture, sound, array or JSON value; override write, which saves it"
        )
    path = with_ending(path, file[0])
    path.write_bytes(file[1])
    return path


def with_ending(path: str | Path, *endings: str) -> Path:
    """A path, and the first of these endings behind it unless it has one of them."""
    path = Path(path)
    return path if path.suffix.lower() in endings else path.with_name(path.name + endings[0])


def file_of(
    tokenizer: "Writes | None", value: Any, *, texts: bool = False, arrays: bool = False
) -> tuple[str, bytes] | None:
    """(ending, bytes) of a value that belongs into a file: as `as_file` has it, or as the tokenizer of its kind, if
    there is one, writes it.

    Raises:
        MediaError: the tokenizer's own `write` fails, or returns no file.
    """
    if tokenizer is None or not tokenizer.writes_files:
        return as_file(value, texts=texts, arrays=arrays)
    name = f"{type(tokenizer).__name__}.write"
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = tokenizer.write(value, Path(folder) / "value")
            return Path(path).suffix, Path(path).read_bytes()
        except ValueError:
            raise
        except Exception as error:  # a user's write may fail in any way
            raise MediaError(f"{name}: {type(error).__name__}: {shortened(str(error), 200)}") from error


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
