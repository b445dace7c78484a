"""Opens the file of a value (a path, bytes, an open file, a data: URL), recognises its kind, and imports optional decoders."""

import base64
import binascii
import importlib
import io
import logging
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from multimodal.shapes import MediaError
from multimodal.texts import shortened
from multimodal.tokenizer import describe

log = logging.getLogger("multimodal")

LONGEST_URL = 2**27  # characters of a data: URL, which hold 96 MiB
HEAD = 64  # bytes that are enough to recognise a file
LONGEST_PATH = 100  # characters of a path that a message shows

_PATHS_REFUSED: ContextVar[bool] = ContextVar("_PATHS_REFUSED", default=False)

warned: set[str] = set()  # keys of the warnings that this process has logged


def warn_once(text: str, key: str | None = None) -> None:
    """Log a warning once in each process, or once for each `key`, such as for the first file of a kind."""
    key = text if key is None else key
    if key not in warned:
        warned.add(key)
        log.warning(text)


@contextmanager
def paths_refused() -> Iterator[None]:
    """Within this context no file is opened by its name, for values that a stranger sent: bytes and data: URLs are read as ever."""
    token = _PATHS_REFUSED.set(True)
    try:
        yield
    finally:
        _PATHS_REFUSED.reset(token)


def is_file_like(value: Any) -> bool:
    """Whether a value names or holds a file: a path, bytes, an open binary file, or the mapping of Hugging Face datasets."""
    return (
        isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview))
        or hasattr(value, "read")
        or (isinstance(value, Mapping) and set(value) == {"bytes", "path"})
    )


def file_source(value: Any, who: str) -> tuple[Path | BinaryIO, str]:
    """(a path, or an open file at its first byte; its name for errors), for a decoder.

    A text is a path, or a data: URL that holds the file itself (`data:image/png;base64,...`).
    """
    if isinstance(value, Mapping):
        if value["bytes"] is None and value["path"] is None:
            raise MediaError(f"{who}: both 'bytes' and 'path' are None; one of them has to hold the file")
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return io.BytesIO(value), f"{len(value)} bytes"
    if hasattr(value, "read"):
        return _open_file(value, who), shortened(str(getattr(value, "name", "an open file")), LONGEST_PATH)
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return io.BytesIO(_data_url(value, who)), f"a data: URL of {len(value)} characters"
        _check_url(value, who)
    if _PATHS_REFUSED.get():
        raise MediaError(
            f"{who}: {describe(value)} names a file, and here no file is opened by its name; give its bytes"
        )
    path = Path(value)
    shown = repr(shortened(str(path), LONGEST_PATH))
    try:
        found, folder = path.is_file(), path.is_dir()
    except OSError:  # the name is longer than a file system allows
        found, folder = False, False
    if not found:
        raise MediaError(f"{who}: there is no file {shown}{' (it is a folder)' if folder else _looks_encoded(value)}")
    return path, shown


def _open_file(file: Any, who: str) -> Any:
    if isinstance(file, io.TextIOBase):
        name = shortened(str(getattr(file, "name", "the file")), LONGEST_PATH)
        raise MediaError(f"{who}: {name} is open as text; open it as bytes, with mode 'rb'")
    if not hasattr(file, "seek") or (hasattr(file, "seekable") and not file.seekable()):
        return io.BytesIO(file.read())  # decoders go back and forth
    file.seek(0)  # so that the same file gives the same tokens each time
    return file


def _check_url(text: str, who: str) -> None:
    scheme, separator, _ = text[:40].partition("://")
    if not separator or not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]+", scheme):
        return
    shown = repr(shortened(text, LONGEST_PATH))
    if scheme.lower() == "file":
        raise MediaError(f"{who}: {shown} is a URL of a local file; give its path, without 'file://'")
    raise MediaError(
        f"{who}: {shown} is a URL, and nothing is downloaded while samples are read; download it first and give the path or "
        "the bytes, or write shards of it"
    )


def _looks_encoded(value: Any) -> str:
    """The repair for a text that is no path but looks like a file in base64; '' for any other."""
    if not isinstance(value, str) or len(value) < 100 or not re.fullmatch(r"[A-Za-z0-9+/_\-]{100}", value[:100]):
        return ""
    return (
        f"; its {len(value)} characters look like base64, so give 'data:image/png;base64,...' (or audio/wav) with them "
        "behind the comma, or base64.b64decode of them"
    )


def _data_url(text: str, who: str) -> bytes:
    """The bytes of `data:[type][;base64],...` (RFC 2397)."""
    if len(text) > LONGEST_URL:
        raise MediaError(f"{who}: a data: URL of {len(text)} characters, more than {LONGEST_URL}; give a file instead")
    head, comma, body = text.partition(",")
    if not comma:
        raise MediaError(f"{who}: {shortened(text, 60)!r} is a data: URL without a comma, behind which its data begin")
    if not head.lower().rstrip().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    body = re.sub(r"[ \t\r\n\f\v]+", "", urllib.parse.unquote(body) if "%" in body else body)
    body = body.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")  # some writers use the URL-safe alphabet
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{who}: a data: URL of {len(text)} characters is not base64: {error}") from None


FOREIGN = {
    "EPS": "it is EPS or PostScript, which only another program could draw, and none is started; save it as PNG",
    "PDF": "it is a PDF document; save its pages as PNG",
    "SVG": "it is SVG or other XML; save it as PNG",
    "HTML": "it is an HTML page, perhaps what a server answered instead of the file",
    "LFS": "it is a pointer of Git LFS, not the file; run 'git lfs pull'",
    "JXL": "it is JPEG XL; save it as PNG or JPEG",
    "AVIF": "it is AVIF, which Pillow 11.3 and newer read: pip install --upgrade pillow",
    "GZIP": "it is compressed by gzip; unpack it first",
    "ZIP": "it is a ZIP archive; unpack it first",
}
"""The reason in the error for each kind of file that is neither a picture nor a sound that is read."""


def file_kind(head: bytes) -> str:
    """The kind of a file that Pillow or libsndfile may not know, by its first bytes; '' for any other."""
    if head[4:8] == b"ftyp":  # ISO base media: MP4, M4A, QuickTime, HEIF, AVIF
        brands = head[8:HEAD]
        if head[8:12] in (b"avif", b"avis") or (head[8:12] in (b"mif1", b"msf1") and b"avif" in brands):
            return "AVIF"
        heif = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
        return "HEIC" if head[8:12] in heif else "MP4"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC"  # ADTS: its layer bits are 0, which they are not in MP3
    for kind, magics in _MAGIC.items():
        if head.startswith(magics):
            return kind
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    return "SVG" if start.startswith((b"<svg", b"<?xml")) else ""


_MAGIC: dict[str, tuple[bytes, ...]] = {
    "WebM": (b"\x1a\x45\xdf\xa3",),
    "WMA": (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",),
    "AMR": (b"#!AMR",),
    "WavPack": (b"wvpk",),
    "EPS": (b"%!", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%PDF",),
    "LFS": (b"version https://git-lfs",),
    "JXL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "GZIP": (b"\x1f\x8b",),
    "ZIP": (b"PK\3\4",),
}


def first_bytes(file: BinaryIO) -> bytes:
    """The first bytes of a file, which is left at its start."""
    file.seek(0)
    head = file.read(HEAD)
    file.seek(0)
    return head


def optional_package(name: str, extra: str, need: str) -> Any:
    """Import a package that only an extra of this project installs.

    Raises:
        MediaError: it is not installed; the message is what needs it, and what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MediaError(f"{need}: pip install 'multimodal-stream[{extra}]'") from None


def unreadable(name: str, what: str, error: BaseException | str, who: str) -> MediaError:
    """The error for a file that a decoder refuses; what: 'a picture', 'a video' or 'sound'."""
    # libsndfile's errors name the object that it reads
    words = re.sub(r"(Error opening )?<[^<>]* at 0x[0-9a-f]+>:?", "", str(error))
    text = shortened(" ".join(words.split()), 200) or type(error).__name__
    return MediaError(f"{who}: cannot read {name} as {what}: {text}")


def as_tensor(value: np.ndarray | Tensor, who: str) -> Tensor:
    """An array or tensor as a tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if np.ma.is_masked(value):
        raise MediaError(f"{who}: {describe(value)} has masked numbers; put numbers there first, as value.filled(0)")
    try:  # PyTorch takes neither read-only arrays nor those of another byte order
        return torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError as error:
        raise MediaError(f"{who}: {describe(value)} does not hold numbers") from error


def as_numbers(value: Any, who: str, wanted: str, kinds: str = "fiu") -> np.ndarray:
    """A new array of float64, of an array, a tensor of any layout and type, or lists of numbers; None and what is masked are NaN.

    wanted: for the error, as "an array (steps, 2)". kinds: those of numpy's types that are numbers.

    Raises:
        MediaError: it holds something else, such as texts, also where they look like numbers.
    """
    array: Any = value
    if isinstance(value, Tensor):
        value_N = value.detach().cpu()
        value_N = value_N if value_N.layout == torch.strided else value_N.to_dense()
        array = (value_N.float() if value_N.is_floating_point() and value_N.itemsize < 4 else value_N).numpy()
    try:
        array = np.array(array, subok=True)
    except (ValueError, TypeError):  # lists of different lengths
        array = np.zeros(0, dtype=object)
    if array.dtype == object and not isinstance(value, (str, bytes)):
        array = _without_none(array)
    if array.dtype.kind not in kinds:
        raise MediaError(f"{who}: wanted {wanted} of numbers, not {describe(value)}")
    found = array.astype(np.float64)
    return np.asarray(found.filled(np.nan) if isinstance(found, np.ma.MaskedArray) else found)


def _without_none(array: np.ndarray) -> np.ndarray:
    """Numbers among None, or pandas' missing values, as float64; the array itself where it holds something else."""
    flat = [None if type(x).__name__ == "NAType" else x for x in array.ravel().tolist()]
    if not flat or not all(x is None or (isinstance(x, Real) and not isinstance(x, bool)) for x in flat):
        return array
    try:
        return np.array([np.nan if x is None else float(x) for x in flat]).reshape(array.shape)
    except OverflowError:
        return array


def as_floats(array: np.ndarray, who: str) -> Tensor:
    """Numbers of float64 as a tensor of float32; what that cannot hold becomes infinite, which tokenizers refuse.

    Raises:
        MediaError: whole numbers that would become others, as ids and times in seconds are.
    """
    with np.errstate(over="ignore"):
        found = array.astype(np.float32)
    size = np.abs(array)
    # larger ones may be measured, since float64 has no fractions there
    changed = (found != array) & (size > 2**24) & (size <= 2**53) & (array == np.rint(array))
    if changed.any():
        raise MediaError(
            f"{who}: {array[changed][0]:.0f} would become {found[changed][0]:.0f} in float32, which tokens hold; subtract what "
            "all have in common, scale the numbers, or read ids as categories"
        )
    return torch.from_numpy(found)
