"""Atomic writes, locks and checked JSON: a file is complete or absent, also after a power cut, and no foreign file is replaced."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from multimodal.shapes import CheckpointError, ConfigError
from multimodal.texts import short_repr

# errors of a lock that another process has; any other error means that this disk has no locks
LOCK_HELD = (errno.EACCES, errno.EAGAIN)
# limits of a JSON file that others made: about 1 GiB of memory and two seconds in the worst case
MOST_JSON_BYTES, MOST_JSON_VALUES, MOST_JSON_DEPTH = 2**26, 2_000_000, 100

_SEEK_LOCK = threading.Lock()


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that it survives a power cut."""
    if os.name == "nt":
        return  # folders cannot be opened there, and files are flushed when they are closed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_path(folder: Path, of: str | None = None) -> Path:
    """A path for an incomplete file, which is renamed when it is complete.

    of: a text; the same text gives the same name, so that the file of a killed process is overwritten. None: a random name.
    """
    name = secrets.token_hex(12) if of is None else hashlib.sha256(of.encode()).hexdigest()[:24]
    return folder / f".{name}.part"


def is_part_path(name: str) -> bool:
    """Whether a name is one that `part_path` gives."""
    return re.fullmatch(r"\.[0-9a-f]{24}\.part", name) is not None


def write_atomic(path: Path, data: bytes | str, part: Path | None = None) -> None:
    """Write a file under another name (`part`), flush it, and rename it to `path`, where it replaces an older file. If `path` is a
    link, the file that it leads to is replaced."""
    path = Path(os.path.realpath(path))
    part = part or part_path(path.parent)
    part.unlink(missing_ok=True)  # of a killed process; a link of this name is not followed
    try:
        with part.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    flush(path.parent)


def save_figure(path: str | Path, figure: Any, dpi: float) -> None:
    """Save a matplotlib figure by `write_atomic`, in the format that the path's suffix names."""
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=Path(path).suffix[1:] or "png")
    write_atomic(Path(path), data.getvalue())


def write_new(path: Path, data: bytes | str, part: Path | None = None) -> None:
    """Like `write_atomic`, for a file that is not there yet, or that an earlier attempt wrote with the same bytes.

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
    write_atomic(path, data, part)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`with new_folder(folder) as part:`, where `part` is a folder to write to, whose files are in `folder` at the end.

    `folder` has to be new or empty; if it is a link, the folder that it leads to is meant. Whatever goes wrong, `folder` and the
    folders around it are as they were.

    Raises:
        CheckpointError: there are files, or nothing can be written there; before the block, wherever that is known before.
    """
    occupied = CheckpointError(f"{folder}: there are files here already; choose another folder")
    made: list[Path] = []
    part = None
    try:
        try:
            target = Path(os.path.realpath(folder))
        except ValueError as error:  # a NUL
            raise OSError(str(error)) from None
        there = os.path.lexists(target)
        if there and (not target.is_dir() or any(target.iterdir())):
            raise occupied
        if there:
            # inside, as it may be the current folder, or a disk; the name is always the same, so that one process alone makes it
            part = _made_folder(part_path(target, "new_folder"))
        else:
            made = [path for path in target.parents if not path.exists()]
            if made:
                target.parent.mkdir(parents=True, exist_ok=True)
            _made_folder(target).rmdir()  # its name may be too long
            part = _made_folder(part_path(target.parent))
        yield part
        if there:
            if list(target.iterdir()) != [part]:
                raise occupied
            for path in sorted(part.iterdir()):
                path.rename(target / path.name)
        else:
            part.rename(target)  # fails if files are there by now
        made = []
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise occupied from error
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder, or make room"
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # somebody else writes there by now
                path.rmdir()


def _made_folder(path: Path) -> Path:
    path.mkdir()
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at(file: io.FileIO, begin: int, count: int) -> bytes:
    """`count` bytes of a file from `begin` on, fewer at its end; several threads may read one file."""
    parts = []
    while count > 0:  # one call may return less, such as at most 2 GiB
        if hasattr(os, "pread"):
            part = os.pread(file.fileno(), count, begin)
        else:  # Windows has no pread, and no fork that would share the position of an open file
            with _SEEK_LOCK:
                file.seek(begin)
                part = file.read(count)
        if not part:
            break
        parts.append(part)
        begin, count = begin + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unused_path(path: Path) -> Path:
    """The path if nothing is there, else the first of path.1, path.2, .. that does not exist."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def back_up(path: Path) -> Path:
    """Copy a file to the first of path.1, path.2, .. that does not exist; returns that path."""
    while True:
        copy = unused_path(path)
        try:
            with path.open("rb") as source, copy.open("xb") as target:
                while block := source.read(2**20):
                    target.write(block)
        except FileExistsError:
            continue  # another process has just made it
        flush(copy)
        return copy


def lock(path: Path, patience_s: float = 15.0) -> Any:
    """Lock a file, which is created if needed, for this process until it ends or closes the returned file.

    On a disk without locks it warns at once and locks nothing. Threads of one process do not exclude each other.

    Raises:
        BlockingIOError: another process still holds the lock after `patience_s` seconds.
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
            if error.errno not in LOCK_HELD:
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


def read_json(path: Path, error: type[ValueError], wanted: type = dict) -> Any:
    """The value of a JSON file, which is not trusted.

    Raises:
        error: the file is missing, cannot be read, is no JSON, or does not hold a `wanted`; the message names it.
    """
    if not path.is_file():  # reading a pipe would wait
        raise error(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            return parse_json(file.read(MOST_JSON_BYTES + 1), wanted)
    except (OSError, ValueError) as problem:
        raise error(f"{path}: damaged: {problem}") from problem


def parse_json(data: bytes, wanted: type = dict) -> Any:
    """The value of a JSON text, which is not trusted; time and memory are bounded.

    Raises:
        ValueError: no JSON, a key that comes twice in an object, too large, too deeply nested, or no `wanted`.
    """
    if len(data) > MOST_JSON_BYTES or data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_JSON_VALUES:
        raise ValueError(f"more than {MOST_JSON_BYTES} bytes or {MOST_JSON_VALUES} values of JSON are not read")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [found]
    for _ in range(MOST_JSON_DEPTH):
        if not level:
            break
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = list(itertools.chain.from_iterable(inner))
    if level:
        raise ValueError(_TOO_DEEP)
    if not isinstance(found, wanted):
        raise ValueError(f"holds a {type(found).__name__}, wanted {'an object' if wanted is dict else 'a list'}")
    return found


_TOO_DEEP = f"it is nested more than {MOST_JSON_DEPTH} deep"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(.., object_pairs_hook=unique_keys)`: a ValueError for a key that comes twice in an object."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short_repr(twice)} comes twice")
    return found


def check_fields(where: Any, data: Any, kinds: Mapping[str, type | tuple[type, ...]], error: type[ValueError]) -> None:
    """Refuse an object that lacks a field or has one of another type; True and False are no numbers.

    Raises:
        error: the message names `where`, the field, the value and the wanted type.
    """
    if not isinstance(data, dict):
        raise error(f"{where}: holds a {type(data).__name__}, wanted an object")
    for name, kind in kinds.items():
        some = kind if isinstance(kind, tuple) else (kind,)
        if name not in data:
            raise error(f"{where}: the part {name!r} is missing")
        value = data[name]
        if not isinstance(value, some) or (isinstance(value, bool) and bool not in some):
            wanted = " or ".join(_NAMES.get(one, one.__name__) for one in some)
            raise error(f"{where}: {name!r} is {short_repr(value)}, wanted {wanted}")


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def check_inside(where: Any, names: Iterable[Any], error: type[ValueError]) -> None:
    """Refuse names of files that lie outside the folder whose file lists them; nothing is opened.

    Raises:
        error: an absolute path, a path with "..", a path with a drive, or no text.
    """
    for name in names:
        parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [".."]
        if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in str(name):
            raise error(f"{where}: the file {short_repr(name)} would lie outside the folder; refused")
