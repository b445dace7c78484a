"""Encodes a value as the bytes of an archive's member, and decodes it. Media stay as they are, and nothing is pickled."""

import contextlib
import io
import json
import os
import re
import struct
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.media import channels_first, check_decoder, upright
from multimodal.shapes import MediaError
from multimodal.tokenizer import describe

TEXT = ("txt", "text", "transcript", "cls")  # the last three are WebDataset's
TENSOR = "tensor.npy"
NPY = b"\x93NUMPY"  # the beginning of every .npy file
LIST = "list.tar"  # a list whose parts JSON cannot hold, such as pictures: each part is a member, in order
WAVE = {"int16": (1, 16), "int32": (1, 32), "uint8": (1, 8), "float32": (3, 32), "float64": (3, 64)}  # PCM 1, float 3


class Media(io.BytesIO):
    """The undecoded bytes of an image or a sound, with a name for error messages."""

    def __init__(self, data: bytes = b"", name: str = "") -> None:
        super().__init__(data)
        self.name = name


def decoded(extension: str, data: bytes, name: str) -> Any:
    """The value of a member: a text, JSON value, array, tensor or a list of these; for any other extension undecoded `Media`.

    Raises:
        ValueError: the bytes are not what the extension says.
    """
    kind = extension.rpartition(".")[2]
    if kind in TEXT:
        return data.decode()
    if kind == "json":
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
    if extension == LIST:
        return _unpacked(data, name)
    if kind == "npy":
        array = npy_array(data)
        return torch.from_numpy(array) if extension == TENSOR else array
    return Media(data, name)


def npy_array(data: bytes) -> np.ndarray:
    """The array of a .npy file.

    Raises:
        ValueError: the bytes are no .npy file, are cut off, or hold objects.
    """
    if not data.startswith(NPY):
        raise ValueError("it is no .npy file")  # np.load would open a zip, whatever it is called
    return np.load(io.BytesIO(data), allow_pickle=False)


def values_in(path: Path) -> Iterator[Any]:
    """The values that a .npy, .json or .txt file may hold, for a tokenizer to choose from; none of another file.

    A list of numbers may be an array too; a text is given without the line break at its end, which editors add, and as it is.

    Raises:
        MediaError: the file is damaged.
    """
    ending = path.suffix.lower()
    what = {".npy": "array", ".json": "JSON", ".txt": "text in UTF-8"}.get(ending)
    try:
        if ending == ".npy":
            yield npy_array(path.read_bytes())
        elif ending == ".json":
            yield from as_array(json.loads(path.read_text(encoding="utf-8")))
        elif ending == ".txt":
            text = path.read_bytes().decode("utf-8")
            if text.endswith("\n"):
                yield text.removesuffix("\n").removesuffix("\r")
            yield text
    except (ValueError, EOFError, OSError, MemoryError, RecursionError) as error:
        raise MediaError(f"{path} is no {what} that can be read: {error}") from error


def as_array(held: Any) -> Iterator[Any]:
    """A value of JSON, and if it is a list of numbers, that as an array."""
    yield held
    if isinstance(held, list):
        with contextlib.suppress(ValueError, TypeError, OverflowError):  # no numbers, or lists of different lengths
            yield np.array(held, dtype=np.float32)


def encoded(value: Any) -> tuple[str, bytes]:
    """Extension and bytes of a value, for `decoded`.

    Raises:
        MediaError or another ValueError, TypeError or OSError: a value that would come back as another one.
    """
    image = sys.modules.get("PIL.Image")
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:  # Hugging Face's undecoded pictures and sounds
        value = Path(value["path"]) if value["bytes"] is None else Media(value["bytes"], value["path"] or "")
    if isinstance(value, str):
        return "txt", value.encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _file("", bytes(value))
    if isinstance(value, os.PathLike):
        return _file(os.fspath(value), Path(value).read_bytes())
    if not isinstance(value, Mapping) and hasattr(value, "read"):
        value.seek(0)
        return _file(str(getattr(value, "name", "")), value.read())
    if image is not None and isinstance(value, image.Image):
        return "png", _png(value)
    if (sound := _as_sound(value)) is not None:
        return "wav", _wav(np.asarray(sound[0]), sound[1])
    if isinstance(value, (np.ndarray, Tensor)):
        data = io.BytesIO()
        np.save(data, value.detach().cpu().numpy() if isinstance(value, Tensor) else value, allow_pickle=False)
        return TENSOR if isinstance(value, Tensor) else "npy", data.getvalue()
    value = value.item() if isinstance(value, np.generic) else value
    try:
        if isinstance(value, (list, tuple)) and any(map(_is_more_than_json, value)):
            return LIST, _packed(value)
        _check_keys(value, describe(value))
        return "json", json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise MediaError(f"{type(value).__name__} is nested too deeply, or holds itself") from None


def _check_keys(value: Any, whole: str) -> None:
    """Refuse keys that are no str, at any depth: JSON would turn them into str."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise MediaError(
                    f"{whole} has keys that are not texts, such as {describe(key)}, which JSON cannot keep"
                )
    if isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            if isinstance(inner, (Mapping, list, tuple)):
                _check_keys(inner, whole)


def _as_sound(value: Any) -> tuple[Any, Any] | None:
    """(wave, rate) of a tuple pair, or of a mapping as Hugging Face has them; None of all others.

    A pair of two arrays, and a list of an array and a number, are lists.
    """
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= set(value) <= {"array", "sampling_rate", "path"}:
        wave, rate_hz = value["array"], value["sampling_rate"]
    elif isinstance(value, tuple) and len(value) == 2:
        wave, rate_hz = value
    else:
        return None
    arrays = (np.ndarray, Tensor)
    return (wave, rate_hz) if isinstance(wave, arrays) and not isinstance(rate_hz, arrays) else None


def _is_more_than_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_more_than_json, value))  # of a sound in a tuple, too: its wave is an array
    if isinstance(value, Mapping):
        return set(value) == {"bytes", "path"} or _as_sound(value) is not None
    return not isinstance(value, (str, int, float, np.generic, type(None)))


def _packed(values: Sequence[Any]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, value in enumerate(values):
            extension, body = encoded(value)
            # without time and user, so that the bytes are always the same
            header = tarfile.TarInfo(f"{number:06d}.{extension}")
            header.size = len(body)
            tar.addfile(header, io.BytesIO(body))
    return data.getvalue()


def _unpacked(data: bytes, name: str) -> list[Any]:
    values = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if not member.isreg() or member.issparse() or end > len(data):
                    raise ValueError(f"the list is damaged at {member.name}")
                body = data[member.offset_data : end]
                values.append(decoded(member.name.partition(".")[2], body, f"{name}/{member.name}"))
            if data[tar.offset :].strip(bytes(1)):  # tarfile stops at a damaged header without an error
                raise ValueError("the list is damaged")
    except (tarfile.TarError, RecursionError) as error:
        raise ValueError(f"the list is damaged: {error}") from error
    return values


def _file(name: str, data: bytes) -> tuple[str, bytes]:
    extension = Path(name).suffix.lower()[1:]
    extension = extension if re.fullmatch("[a-z0-9]{1,8}", extension) else "bin"
    if not data:
        raise MediaError(f"{name or 'the value'} is empty")
    if extension in (*TEXT, "json", "npy"):
        decoded(extension, data, name)  # an error now, not when it is read
    return extension, data


def _png(image: Any) -> bytes:
    check_decoder(image, "a sample")
    data = io.BytesIO()
    upright(image).save(data, "PNG")
    return data.getvalue()


def _wav(wave: np.ndarray, rate_hz: Any) -> bytes:
    """A RIFF WAVE file without the time stamp that libsndfile would put into it. wave: as `channels_first` takes it."""
    if wave.ndim not in (1, 2) or wave.dtype.name not in WAVE or not wave.size or rate_hz != int(rate_hz):
        raise MediaError(
            f"{describe(wave)} at {rate_hz} Hz is no sound; wanted (S,) or (channels, S) of {', '.join(WAVE)}"
        )
    wave = channels_first(wave, describe(wave), "a sample")
    channels = len(wave)
    data = np.ascontiguousarray(wave.T, wave.dtype.newbyteorder("<")).tobytes()
    kind, bits = WAVE[wave.dtype.name]
    frame = channels * bits // 8
    chunk = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, int(rate_hz), int(rate_hz) * frame, frame, bits)
    size = struct.pack("<4sI", b"data", len(data))
    body = b"WAVE" + chunk + size + data + bytes(len(data) % 2)
    return struct.pack("<4sI", b"RIFF", len(body)) + body
