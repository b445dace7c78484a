"""Files that are whole or not there, also after a power cut."""

import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# what a JSON file that others made may cost: about 1 GiB of memory and two seconds in the worst case
MOST_JSON_BYTES, MOST_JSON_VALUES, MOST_JSON_DEPTH = 2**26, 2_000_000, 100


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


def free_name(path: Path) -> Path:
    """The path, or if that is there the first of path.1, path.2, .. that is not."""
    numbered = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def read_json(path: Path, error: type[ValueError], wanted: type = dict) -> Any:
    """What a JSON file holds that anybody may have made.

    Raises:
        error: names the file: it is not there, cannot be read, is no JSON, or holds something else than `wanted`.
    """
    if not path.is_file():  # a pipe would be waited for
        raise error(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            return parse_json(file.read(MOST_JSON_BYTES + 1), wanted)
    except (OSError, ValueError) as problem:
        raise error(f"{path}: damaged: {problem}") from problem


def parse_json(data: bytes, wanted: type = dict) -> Any:
    """JSON that anybody may have written, in bounded time and memory.

    Raises:
        ValueError: no JSON, a key that comes twice in an object, too large, too deep, or something else than `wanted`.
    """
    if len(data) > MOST_JSON_BYTES or data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_JSON_VALUES:
        raise ValueError(f"more than {MOST_JSON_BYTES} bytes or {MOST_JSON_VALUES} values of JSON are not read")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
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


def shown_short(value: Any) -> str:
    """The value for an error: of a long or deep one the beginning and the end."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 160
    return short.repr(value)


_TOO_DEEP = f"it is nested more than {MOST_JSON_DEPTH} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown_short(twice)} comes twice")
    return found


def check_fields(where: Any, data: Any, kinds: Mapping[str, type | tuple[type, ...]], error: type[ValueError]) -> None:
    """Refuse an object that lacks a field or has one of another type; True and False are no numbers.

    Raises:
        error: names `where`, the field, what came and what was wanted.
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
            raise error(f"{where}: {name!r} is {shown_short(value)}, wanted {wanted}")


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
    """Refuse names of files that do not lie inside the folder that names them; nothing is opened.

    Raises:
        error: an absolute path, one with "..", one with a drive, or no text at all.
    """
    for name in names:
        parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [".."]
        if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in str(name):
            raise error(f"{where}: the file {shown_short(name)} would lie outside the folder; refused")
