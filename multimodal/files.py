"""Files that are whole or not there, also after a power cut."""

import hashlib
import io
import itertools
import os
import threading
from pathlib import Path

_SEEKING = threading.Lock()


def flush(path: Path) -> None:
    """Make sure that a file, or which files a folder has, survives a power cut."""
    if os.name == "nt":
        return  # folders cannot be opened there, and files are flushed when they are closed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(path: Path, data: bytes | str) -> None:
    """Write a file aside, then put it in the place of what was there."""
    aside = path.with_name(path.name + ".writing")
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at(file: io.FileIO, begin: int, count: int) -> bytes:
    """`count` bytes of a file from `begin` on, fewer at its end; several threads may read one file."""
    parts = []
    while count > 0:  # a call may give less than it was asked for, such as at most 2 GiB
        if hasattr(os, "pread"):
            part = os.pread(file.fileno(), count, begin)
        else:  # Windows, where no process shares a file's place with another, as after a fork
            with _SEEKING:
                file.seek(begin)
                part = file.read(count)
        if not part:
            break
        parts.append(part)
        begin, count = begin + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def free_name(path: Path) -> Path:
    """The path, or if that is there the first of path.1, path.2, .. that is not."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
