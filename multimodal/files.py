"""Files that are whole or not there, also after a power cut, and never written over what somebody else put there."""

import errno
import hashlib
import io
import itertools
import os
import re
import secrets
import time
import warnings
from pathlib import Path
from typing import Any

from multimodal.shapes import ConfigError

HELD = (
    errno.EACCES,
    errno.EAGAIN,
)  # what a lock that another process holds gives; all else means that locks do not work


def flush(path: Path) -> None:
    """Make sure that a file, or which files a folder has, survives a power cut."""
    if os.name == "nt":
        return  # folders cannot be opened there, and files are flushed when they are closed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside(folder: Path, of: str | None = None) -> Path:
    """A name in a folder that nobody else uses, for a file that gets its own name once it is whole.

    of: what it is for, where the same name is wanted each time, so that what a killed process left is written over.
    """
    name = secrets.token_hex(12) if of is None else hashlib.sha256(of.encode()).hexdigest()[:24]
    return folder / f".{name}.part"


def is_aside(name: str) -> bool:
    """Whether `aside` gives such names."""
    return re.fullmatch(r"\.[0-9a-f]{24}\.part", name) is not None


def put(path: Path, data: bytes | str, part: Path | None = None) -> None:
    """Write a file under another name (`part`), then put it in the place of what was there. A link stays, and what it leads to
    is replaced."""
    path = Path(os.path.realpath(path))
    part = part or aside(path.parent)
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    flush(path.parent)


def put_figure(path: str | Path, figure: Any, dpi: float) -> None:
    """Save a matplotlib figure whole, in the format that the path's ending names."""
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=Path(path).suffix[1:] or "png")
    put(Path(path), data.getvalue())


def put_new(path: Path, data: bytes | str, part: Path | None = None) -> None:
    """Like `put`, for a file that is not there yet, or that an earlier attempt wrote with the same bytes.

    Raises:
        ConfigError: another file is there.
    """
    data = data.encode() if isinstance(data, str) else data
    if os.path.lexists(path) and not (
        path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    ):
        raise ConfigError(
            f"{path} is there already, and is not what would be written; move it away, or use another folder"
        )
    put(path, data, part)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_name(path: Path) -> Path:
    """The path, or if that is there the first of path.1, path.2, .. that is not."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def keep_copy(path: Path) -> Path:
    """Copy a file to the first free one of path.1, path.2, ..; returns that."""
    while True:
        copy = free_name(path)
        try:
            with path.open("rb") as source, copy.open("xb") as target:
                while block := source.read(2**20):
                    target.write(block)
        except FileExistsError:
            continue  # somebody else made it just now
        flush(copy)
        return copy


def lock(path: Path, patience_s: float = 15.0) -> Any:
    """Hold a file, made if there is none, as the only process, until it ends or closes what is returned.

    A disk without locks gives a warning at once, and nothing is held. This does not tell threads of one process apart.

    Raises:
        BlockingIOError: another process held it for so long.
    """
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in HELD:
                warnings.warn(
                    f"{path.parent}: files cannot be locked on this disk ({error.strerror or error}), so nothing keeps two "
                    "processes from writing here at once; going on",
                    stacklevel=3,
                )
                return file
            if time.monotonic() >= until:
                file.close()
                raise BlockingIOError(error.errno, f"another process holds {path}") from None
        time.sleep(0.05)
