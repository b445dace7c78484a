"""Any samples as shards: whole archives or none, and the same bytes however often the work is interrupted."""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from multimodal.data.members import encoded
from multimodal.data.shards import ABSENT, FORMAT, HEADER, INDEX, MAKING, UNKNOWN, Shards, is_url, table_name
from multimodal.data.sources import is_indexed
from multimodal.files import aside, file_hash, flush, is_aside, put, put_new
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import describe

BAD = "bad.jsonl"
END = 2 * HEADER  # empty blocks close an archive
SHOWN = 5  # bad rows in an error


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a folder of shards holds. already: nothing had to be done."""

    samples: int
    shards: int
    bytes: int
    fields: tuple[str, ...]
    bad: tuple[tuple[int, str], ...]  # row of the source and why it was left out
    already: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the writing is."""

    rows: int  # read from the source
    shards: int  # whole
    bytes: int
    bad: int


def write_shards(
    samples: Any,
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = 256_000_000,
    max_bad: int = 0,
    source: Any = None,
    progress: Callable[[Progress], None] | None = None,
) -> Made:
    """Write samples (mappings of fields) into a new folder, or go on behind its last whole shard.

    samples: has a length and [index], or `rows(start)`, or can be iterated; the same each time. Texts become txt members, numbers
    and lists json, arrays npy; a Path, bytes, an open file or a mapping of "bytes" and "path" keeps its bytes; a PIL image
    becomes a PNG, a pair (wave, rate_hz) a WAV; None is left out. A member's key is its row in the source.
    shard_bytes: an archive is at most so long, unless one sample is longer. max_bad: so many rows may be left out; they are listed
    in bad.jsonl. source: what the samples are, in JSON; a folder that was begun with another is refused.

    Raises:
        ConfigError: the folder holds something else, or was begun with other settings. MediaError: more than max_bad bad rows.
    """
    folder = Path(folder)
    about = source if source is not None else {"samples": len(samples) if hasattr(samples, "__len__") else None}
    settings = json.loads(json.dumps({"format": FORMAT, "shard_bytes": shard_bytes, "source": about}))
    if shard_bytes < 10_000:
        raise ConfigError(f"write_shards: shard_bytes={shard_bytes} must be at least 10000")
    if (folder / INDEX).exists():
        index = _read(folder / INDEX, "shards")
        _check_same(folder, index, settings)
        if _read(folder / MAKING) == settings:
            (folder / MAKING).unlink()
        return _made(index, already=True)
    part = aside(folder, json.dumps(settings))  # what is being written, until it is whole
    entries = _begun(folder, settings, part)
    bad = [(row, why) for entry in entries for row, why in entry["bad"]]
    if len(bad) > max_bad:
        raise MediaError(_too_many(bad, max_bad))
    told, written = len(bad), sum(entry["bytes"] for entry in entries)
    start = stop = entries[-1]["read"] if entries else 0
    shard = _Archive(folder, len(entries), part)
    try:
        for row, sample in enumerate(_rows(samples, start), start):
            try:
                members = _members(sample)
            except ConfigError:
                raise
            except Exception as error:
                bad.append((row, " ".join(str(error).split()) or type(error).__name__))
                if len(bad) > max_bad:
                    raise MediaError(_too_many(bad, max_bad)) from error
                members = []
            size = sum(_padded(len(data)) for *_, data in members)
            if members and shard.table.rows and shard.at + size + END > shard_bytes:
                entries.append(shard.whole(row, bad[told:]))
                told, written = len(bad), written + entries[-1]["bytes"]
                shard = _Archive(folder, len(entries), part)
            if members:
                shard.add(f"{row:09d}", members)
            stop = row + 1
            if progress is not None:
                progress(Progress(rows=stop, shards=len(entries), bytes=written + shard.at, bad=len(bad)))
        if shard.table.rows:
            entries.append(shard.whole(stop, bad[told:]))
    finally:
        shard.abandon()
    if not entries:
        raise MediaError(f"write_shards: there is no sample to write{'; ' + _too_many(bad, max_bad) if bad else ''}")
    if bad:
        put_new(folder / BAD, "".join(json.dumps({"row": row, "error": why}) + "\n" for row, why in bad).encode(), part)
    index = _finish(folder, entries, settings, bad, part)
    (folder / MAKING).unlink()
    return _made(index)


def index_archives(
    archives: Sequence[str | os.PathLike[str]],
    fields: Mapping[str, str | Sequence[str]],
    folder: str | os.PathLike[str],
    *,
    storage: Mapping[str, Any] | None = None,
) -> Shards:
    """Index tar archives that others made, by reading their headers once, and open them.

    archives: paths or URLs; they stay where they are. fields: which extension is which field, as in {"image": ("jpg", "png"),
    "label": "cls"}; neighbours KEY.EXTENSION of one KEY are one sample, and other extensions are not read. folder: where the index
    is put. Damage is seen less well than in shards of our own, as such archives have no checksums.

    Raises:
        ConfigError: nothing to index. MediaError: an archive that is no plain tar, or is cut short.
    """
    folder, chosen = Path(folder), {}
    for field, extensions in fields.items():
        chosen |= dict.fromkeys([extensions] if isinstance(extensions, str) else extensions, field)
    if (folder / INDEX).exists():
        raise ConfigError(f"index_archives: {folder} has an {INDEX}; open it by Shards, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    entries, met = [], set()
    for archive in [os.fspath(archive) for archive in archives]:
        table = _Table()
        try:
            length = _read_headers(archive, storage or {}, chosen, table, met)
        except (tarfile.TarError, OSError) as error:
            raise MediaError(f"index_archives: {archive} is no whole, uncompressed tar: {error}") from error
        if table.rows:
            here = not is_url(archive) and Path(archive).resolve().parent == folder.resolve()
            name = archive if is_url(archive) else Path(archive).name if here else str(Path(archive).resolve())
            entries.append(table.put(folder, len(entries), name=name, bytes=length, sha256=None))
    if not entries:
        raise ConfigError(
            f"index_archives: no member ends in {', '.join(chosen)}; there are {', '.join(sorted(met)) or 'no members'}"
        )
    _finish(folder, entries, {"format": FORMAT}, [], None)
    return Shards(folder, storage=storage)


def _read_headers(
    archive: str, storage: Mapping[str, Any], chosen: Mapping[str, str], table: "_Table", met: set[str]
) -> int:
    """Put the members of an archive into the table, other extensions into `met`, and give the archive's length."""
    if is_url(archive):
        from fsspec.core import open as opened

        source: Any = opened(archive, "rb", **storage)
    else:
        source = open(archive, "rb")  # noqa: SIM115
    with source as file:
        key, length = None, file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                name, _, extension = base.partition(".")
                if not member.isfile() or (extension := extension.lower()) not in chosen:
                    met.add(extension)
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends before {member.name} does")
                if (folder, name) != key:
                    key = folder, name
                    table.rows.append([])
                table.add(chosen[extension], extension, member.offset_data, member.size, UNKNOWN)
    return length


class _Table:
    """Where the members of each sample of an archive are."""

    def __init__(self) -> None:
        self.columns: dict[tuple[str, str], int] = {}
        self.rows: list[list[tuple[int, int, int, int]]] = []

    def add(self, field: str, extension: str, offset: int, size: int, crc: int) -> None:
        """A member of the last sample."""
        column = self.columns.setdefault((field, extension), len(self.columns))
        self.rows[-1].append((column, offset, size, crc))

    def put(self, folder: Path, number: int, part: Path | None = None, **about: Any) -> dict[str, Any]:
        """Write it, and give what the index says of the archive."""
        numbers = np.full((len(self.rows), len(self.columns), 3), ABSENT, "<i8")
        for row, members in enumerate(self.rows):
            for column, *where in members:
                numbers[row, column] = where
        body = numbers.tobytes()
        entry = {**about, "samples": len(self.rows), "columns": list(self.columns), "table_crc": zlib.crc32(body)}
        put_new(folder / table_name(number), json.dumps(entry).encode() + b"\n" + body, part)
        return json.loads(json.dumps(entry))


class _Archive:
    """The archive that is being written, under another name until it is whole."""

    def __init__(self, folder: Path, number: int, part: Path) -> None:
        self.folder, self.number, self.name = folder, number, f"{number:06d}.tar"
        self.part = part
        self.file: BinaryIO | None = None
        self.at, self.digest, self.table = 0, hashlib.sha256(), _Table()

    def add(self, key: str, members: Sequence[tuple[str, str, bytes]]) -> None:
        self.table.rows.append([])
        for field, extension, data in members:
            header = tarfile.TarInfo(f"{key}.{field}.{extension}")  # of no time and of no user
            header.size = len(data)
            self._write(header.tobuf(tarfile.GNU_FORMAT))
            self.table.add(field, extension, self.at, len(data), zlib.crc32(data))
            self._write(data + bytes(-len(data) % HEADER))

    def whole(self, read: int, bad: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Close it and give it its name; its table, which comes last, says that it is whole."""
        self._write(bytes(END))
        assert self.file is not None
        self.file.close()
        flush(self.part)
        place = self.folder / self.name  # one that is there without a table is the same, from before an interruption
        if os.path.lexists(place) and (not place.is_file() or file_hash(place) != self.digest.hexdigest()):
            self.part.unlink()
            raise ConfigError(f"write_shards: {place} is there already, and is not what would be written; move it away")
        os.replace(self.part, place)
        flush(self.folder)
        about = {"name": self.name, "bytes": self.at, "sha256": self.digest.hexdigest(), "read": read, "bad": list(bad)}
        return self.table.put(self.folder, self.number, self.part, **about)

    def abandon(self) -> None:
        if self.file is not None and not self.file.closed:
            self.file.close()
            self.part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file = self.file or open(self.part, "wb")  # noqa: SIM115
        self.file.write(data)
        self.digest.update(data)
        self.at += len(data)


def _padded(size: int) -> int:
    return HEADER + size + -size % HEADER


def _begun(folder: Path, settings: Mapping[str, Any], part: Path) -> list[dict[str, Any]]:
    """What whole shards there are, in a folder that is made if there is none."""
    if not (folder / MAKING).exists():
        if os.path.lexists(folder) and (not folder.is_dir() or any(not is_aside(x.name) for x in folder.iterdir())):
            raise ConfigError(f"write_shards: {folder} holds other things; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        put(folder / MAKING, json.dumps(settings).encode(), part)
    _check_same(folder, _read(folder / MAKING, "shards that are being made"), settings)
    entries: list[dict[str, Any]] = []
    while (table := folder / table_name(len(entries))).exists():
        try:
            entries.append(json.loads(table.read_bytes().partition(b"\n")[0]))
        except ValueError:
            entries.append({})
        if not {"name", "bytes", "read", "bad", "samples", "columns"} <= set(entries[-1]):
            raise ConfigError(f"write_shards: {table} is not of shards; move it away, or give a new folder")
        archive = folder / entries[-1]["name"]
        if not archive.is_file() or archive.stat().st_size != entries[-1]["bytes"]:
            raise ConfigError(
                f"write_shards: {archive} was changed since it was written; delete {folder} and begin again"
            )
    return entries


def _read(path: Path, what: str = "") -> dict[str, Any]:
    """A JSON object of ours; anything else raises a ConfigError if `what` says what was wanted, and is empty if not."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and "format" in found:
        return found
    if what:
        raise ConfigError(f"write_shards: {path} is not of {what}: the folder holds other things; give a new folder")
    return {}


def _check_same(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if (old := before.get(name)) != value:
            if isinstance(old, dict) and isinstance(value, dict):
                value = {key: part for key, part in value.items() if old.get(key) != part}
                old = {key: old.get(key) for key in value}
            raise ConfigError(
                f"write_shards: {folder} was made with {name} {old!r}, and now it is {value!r}; give the same again, or another "
                "folder"
            )


def _finish(
    folder: Path,
    entries: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    bad: Sequence[tuple[int, str]],
    part: Path | None,
) -> dict[str, Any]:
    fields = list(dict.fromkeys(field for entry in entries for field, _ in entry["columns"]))
    shards = [{name: value for name, value in entry.items() if name != "bad"} for entry in entries]
    total = sum(entry["samples"] for entry in entries)
    index = {**settings, "samples": total, "fields": fields, "bad": list(bad), "shards": shards}
    put_new(folder / INDEX, json.dumps(index, indent=1).encode(), part)
    return index


def _made(index: Mapping[str, Any], already: bool = False) -> Made:
    return Made(
        samples=index["samples"],
        shards=len(index["shards"]),
        bytes=sum(entry["bytes"] for entry in index["shards"]),
        fields=tuple(index["fields"]),
        bad=tuple((row, why) for row, why in index["bad"]),
        already=already,
    )


def _too_many(bad: Sequence[tuple[int, str]], max_bad: int) -> str:
    shown = "".join(f"\n  row {row}: {why}" for row, why in bad[:SHOWN])
    more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"broken rows: {len(bad)}, and max_bad={max_bad}; put them right, or allow more:{shown}{more}"


def _rows(samples: Any, start: int) -> Iterator[Any]:
    """The rows from `start` on; an exception in place of one that could not be had."""
    if callable(getattr(samples, "rows", None)):
        yield from samples.rows(start)
    elif is_indexed(samples):
        for index in range(start, len(samples)):
            try:
                yield samples[index]
            except Exception as error:
                yield error
    else:
        yield from islice(samples, start, None)


def _members(sample: Any) -> list[tuple[str, str, bytes]]:
    """(field, extension, bytes) of what a sample has."""
    if isinstance(sample, Exception):
        raise sample
    if not isinstance(sample, Mapping):
        raise ConfigError(
            f"write_shards: a sample is {describe(sample)}; wanted a mapping of fields. Fields(samples, 'image', 'label') names "
            "the parts of a tuple"
        )
    members = []
    for field, value in sample.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", field):
            raise ConfigError(f"write_shards: field {field!r} must be a name of letters, digits, _ and -; rename it")
        if value is not None:
            try:
                members.append((field, *encoded(value)))
            except Exception as error:
                raise MediaError(f"{field}: {error}") from error
    if not members:
        raise MediaError("it has no value")
    return members
