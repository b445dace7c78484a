"""Writes samples to shards: an archive is complete or absent, and interruptions do not change a byte of the result."""

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

from multimodal.data.account import Account, Tally
from multimodal.data.codecs import encoded
from multimodal.data.folders import HIDDEN, is_hidden
from multimodal.data.frames import as_samples
from multimodal.data.shards import ABSENT, FORMAT, HEADER, INDEX, MAKING, UNKNOWN, Shard, Shards, is_url, table_name
from multimodal.data.sources import is_indexed
from multimodal.files import (
    check_fields,
    file_hash,
    flush,
    is_part_path,
    parse_json,
    part_path,
    read_json,
    write_atomic,
    write_new,
)
from multimodal.media.sources import log
from multimodal.shapes import ConfigError, MediaError
from multimodal.texts import listed, shortened
from multimodal.tokenizer import describe

BAD = "bad.jsonl"
END = 2 * HEADER  # empty blocks close an archive
SHOWN = 5  # bad rows in an error


@dataclass(frozen=True, kw_only=True)
class ShardsWritten:
    """The content of a folder of shards.

    samples: their number.
    shards: the number of archives.
    bytes: the size of all archives.
    fields: the names of the fields.
    bad: rows of the source that were left out, each with its reason.
    account: counts of the source: seen, used and left out.
    already: whether the folder was complete before the call.
    """

    samples: int
    shards: int
    bytes: int
    fields: tuple[str, ...]
    bad: tuple[tuple[int, str], ...]
    account: Account
    already: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How much is written.

    rows: rows read from the source.
    shards: complete archives.
    bytes: written to archives.
    bad: rows left out.
    """

    rows: int
    shards: int
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
) -> ShardsWritten:
    """Write samples (mappings of fields) to a new folder, or resume after its last complete shard.

    samples: has a length and [index] (a DataFrame too), or `rows(start)`, or can be iterated; the same each time. Texts become txt
    members, numbers and lists json, arrays npy; a Path, bytes, an open file or a mapping of "bytes" and "path" keeps its bytes; a
    PIL image becomes a PNG, a pair (wave, rate_hz) a WAV, a list of such a tar; None is left out. A member's key is its row in the
    source.
    shard_bytes: the largest size of an archive, unless one sample is larger. max_bad: the largest number of rows that may be left
    out; they are listed in bad.jsonl. source: JSON that identifies the samples; a folder that was started with another is refused.
    progress: called after each row.

    Raises:
        ConfigError: the folder holds something else, or was started with other settings. MediaError: more than max_bad bad rows.

    Examples:
        >>> made = mm.write_shards(samples, "shape-shards", shard_bytes=20_000)
        >>> made.samples
        12
    """
    folder, samples = Path(folder), as_samples(samples)
    if isinstance(samples, (str, bytes, Mapping)) or not any(
        hasattr(samples, method) for method in ("rows", "__iter__", "__getitem__")
    ):
        raise ConfigError(
            f"write_shards: the samples are {type(samples).__name__}; wanted a list of mappings of fields, what has a length and "
            "[index], or what can be iterated"
        )
    about = source if source is not None else _about(samples)
    settings = json.loads(json.dumps({"format": FORMAT, "shard_bytes": shard_bytes, "source": about}))
    if shard_bytes < 10_000:
        raise ConfigError(f"write_shards: shard_bytes={shard_bytes} must be at least 10000")
    # complete already: check that it is the same work, and remove what an interruption left
    if (folder / INDEX).exists():
        index = _read(folder / INDEX, "shards")
        _check_same(folder, index, settings)
        Shards(folder)  # raises if it is no index
        check_fields(folder / INDEX, index, {"samples": int, "bad": list}, ConfigError)
        _check_bad(folder / INDEX, index["bad"])
        if _read(folder / MAKING) == settings:
            (folder / MAKING).unlink()
        return _result(index, samples, already=True)
    # the name of an incomplete file is always the same, so that the file of a killed process is overwritten
    part = part_path(folder, json.dumps(settings))
    entries = _shards_there(folder, settings, part)
    bad = [(row, why) for entry in entries for row, why in entry["bad"]]
    if len(bad) > max_bad:
        raise MediaError(_broken_rows(bad, max_bad))
    saved_bad, written = len(bad), sum(entry["bytes"] for entry in entries)
    start = stop = entries[-1]["read"] if entries else 0
    shard = _ArchiveWriter(folder, len(entries), part)
    try:
        for row, sample in enumerate(_rows(samples, start), start):
            try:
                members = _members(sample)
            except ConfigError:
                raise
            except Exception as error:
                bad.append((row, shortened(" ".join(str(error).split()) or type(error).__name__)))
                if len(bad) > max_bad:
                    raise MediaError(_broken_rows(bad, max_bad)) from error
                members = []
            size = sum(_padded(len(data)) for *_, data in members)
            # a sample is never split, so the archive is closed before it would get too large
            if members and shard.table.rows and shard.at + size + END > shard_bytes:
                entries.append(shard.close(row, bad[saved_bad:]))
                saved_bad, written = len(bad), written + entries[-1]["bytes"]
                shard = _ArchiveWriter(folder, len(entries), part)
            if members:
                shard.add(f"{row:09d}", members)
            stop = row + 1
            if progress is not None:
                progress(Progress(rows=stop, shards=len(entries), bytes=written + shard.at, bad=len(bad)))
        if shard.table.rows:
            entries.append(shard.close(stop, bad[saved_bad:]))
    finally:
        shard.abandon()
    if not entries:
        raise MediaError(f"write_shards: there is no sample to write{'; ' + _broken_rows(bad, max_bad) if bad else ''}")
    if bad:
        write_new(
            folder / BAD, "".join(json.dumps({"row": row, "error": why}) + "\n" for row, why in bad).encode(), part
        )
    index = _finish(folder, entries, settings, bad, part)
    (folder / MAKING).unlink()
    return _result(index, samples)


def index_archives(
    archives: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    fields: Mapping[str, str | Sequence[str]],
    folder: str | os.PathLike[str],
    *,
    storage: Mapping[str, Any] | None = None,
) -> Shards:
    """Index tar archives of other programs, by reading their headers once, and open them.

    archives: paths or URLs; they stay where they are. fields: which extension is which field, as in {"image": ("jpg", "png"),
    "label": "cls"}; neighbours KEY.EXTENSION of one KEY are one sample, and other extensions are not read. As in WebDataset, the
    key ends at the first dot of the name: the extension of a.1.jpg is 1.jpg. folder: where the index is written. storage: as of
    `Shards`. As such archives have no checksums, less damage is detected than in shards of `write_shards`.

    The result's `account` counts the members that are in samples, and those that were left out, with reasons; unusual ones are also
    logged.

    Raises:
        ConfigError: nothing to index. MediaError: an archive that is no plain tar, is damaged or cut short, or in which the members
        of a key do not lie side by side.
    """
    folder, chosen = Path(folder), {}
    archives = [archives] if isinstance(archives, (str, os.PathLike)) else archives
    for field, extensions in fields.items():
        for extension in [extensions] if isinstance(extensions, str) else extensions:
            extension = extension.lower().removeprefix(".")
            if chosen.setdefault(extension, field) != field:
                raise ConfigError(
                    f"index_archives: {extension} is the extension of {chosen[extension]!r} and of {field!r}"
                )
    if (folder / INDEX).exists():
        raise ConfigError(f"index_archives: {folder} has an {INDEX}; open it by Shards, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    entries, headers = [], _Headers(chosen)
    for archive in [os.fspath(archive) for archive in archives]:
        table = _Table()
        try:
            length = headers.read(archive, storage or {}, table)
        except (tarfile.TarError, OSError) as error:
            raise MediaError(f"index_archives: {archive} is no whole, uncompressed tar: {shortened(error)}") from error
        if table.rows:
            here = not is_url(archive) and Path(archive).resolve().parent == folder.resolve()
            name = archive if is_url(archive) else Path(archive).name if here else Path(archive).resolve().as_posix()
            entries.append(table.write(folder, len(entries), name=name, bytes=length, sha256=None))
    if not entries:
        raise ConfigError(
            f"index_archives: no member ends in {', '.join(chosen)}; there are "
            f"{listed(sorted(headers.met)) or 'no members'}"
        )
    _finish(folder, entries, {"format": FORMAT}, [], None)
    found = Shards(folder, storage=storage)
    found.account = headers.account(len(found))
    if headers.unusual:
        log.warning(f"index_archives: {found.account}")
    return found


class _Headers:
    """Reads the headers of archives, and counts the members that are used and left out.

    met: extensions that belong to no field. unusual: whether a member was left out that is probably part of a sample.
    """

    def __init__(self, chosen: Mapping[str, str]) -> None:
        self.chosen, self.tally, self.met = chosen, Tally("members"), set[str]()
        self.twice, self.endless, self.unusual = list[str](), list[str](), False

    def account(self, samples: int) -> Account:
        notes = []
        if self.twice:
            notes.append(f"{len(self.twice)} keys come again, each time as another sample: {listed(self.twice, 3)}")
        if self.endless:
            notes.append(
                f"{len(self.endless)} archives have no mark at their end and may be cut short: {listed(self.endless, 3)}"
            )
        return self.tally.account(samples, notes)

    def read(self, archive: str, storage: Mapping[str, Any], table: "_Table") -> int:
        """Add the members of an archive to the table; returns the length of the archive in bytes."""
        if is_url(archive):
            from fsspec.core import open as opened

            source: Any = opened(archive, "rb", **storage)
        else:
            source = open(archive, "rb")  # noqa: SIM115
        with source as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(0)
            if not length:
                raise tarfile.ReadError("it is empty")
            last, keys = None, dict[str, set[str]]()  # the fields of each key
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, _, extension = self._parts(member.name)
                    if reason := self._why_not(member, extension):
                        self.tally.leave(reason, f"{archive}/{member.name}")
                        continue
                    if member.offset_data + member.size > length:
                        raise tarfile.ReadError(f"it ends before {member.name} does")
                    field = self.chosen[extension]
                    if key != last or field in keys[key]:
                        self._begin(archive, key, field, keys, key == last)
                        table.rows.append([])
                        last = key
                    keys[key].add(field)
                    table.add(field, extension, member.offset_data, member.size, UNKNOWN)
                    self.tally.used += 1
                if not _is_ended(archive, file, tar.offset, length):
                    self.endless.append(archive)
                    self.unusual = True
        return length

    def _begin(self, archive: str, key: str, field: str, keys: dict[str, set[str]], beside: bool) -> None:
        """Begin a sample.

        A key may come again only with a field that it had before, as another sample; with a new field the members of one sample
        would not lie side by side.
        """
        if key in keys:
            if not beside and field not in keys[key]:
                raise MediaError(
                    f"index_archives: the members of {key!r} in {archive} do not lie side by side ({field!r} comes later than "
                    f"{', '.join(map(repr, sorted(keys[key])))}); write the archive sorted by name: tar --sort=name"
                )
            self.twice.append(f"{archive}/{key}")
            self.unusual = True
        keys[key] = set()

    @staticmethod
    def _parts(name: str) -> tuple[str, str, str]:
        folder, _, base = name.rpartition("/")
        key, dot, extension = base.partition(".")
        return f"{folder}/{key}", dot, extension.lower()

    def _why_not(self, member: tarfile.TarInfo, extension: str) -> str | None:
        """The reason why a member is in no sample; None: it is in one."""
        last = extension.rpartition(".")[2]
        if any(map(is_hidden, member.name.split("/"))):
            return HIDDEN
        if member.isdir():
            return "folders"
        if member.islnk() or member.issym():
            self.unusual |= extension in self.chosen
            return "links to other members"
        if not member.isfile() or member.issparse():
            self.unusual |= extension in self.chosen
            return "devices, and sparse files"  # a sparse file is not contiguous in the archive
        if extension in self.chosen:
            return None
        self.met.add(extension)
        if extension != last and last in self.chosen:
            self.unusual = True
            return "with a dot in the key, which ends at the first one (as in WebDataset)"
        return f"of another extension ({shortened(extension, 40)})"


def _is_ended(archive: str, file: Any, offset: int, length: int) -> bool:
    """Whether the end mark of an archive lies where tarfile stopped, which also stops at a damaged header without an error.

    Raises:
        MediaError: a damaged header, or a second archive, follows.
    """
    file.seek(offset)
    first = file.read(HEADER)
    if first.strip(bytes(1)):
        raise MediaError(
            f"index_archives: {archive} is damaged: there is no header at byte {offset} of {length}; copy or make it again"
        )
    at = offset + len(first)
    while block := file.read(2**20):
        if block.strip(bytes(1)):
            at += len(block) - len(block.lstrip(bytes(1)))
            raise MediaError(
                f"index_archives: {archive} ends at byte {offset} of {length}, and there is more at byte {at}: archives that were "
                "joined are several files, or one after tar --concatenate"
            )
        at += len(block)
    return bool(first)


class _Table:
    """Offset, size and checksum of the members of each sample of an archive.

    columns: the number of each (field, extension). rows: for each sample (column, offset, size, CRC-32) of its members.
    """

    def __init__(self) -> None:
        self.columns: dict[tuple[str, str], int] = {}
        self.rows: list[list[tuple[int, int, int, int]]] = []

    def add(self, field: str, extension: str, offset: int, size: int, crc: int) -> None:
        """A member of the last sample."""
        column = self.columns.setdefault((field, extension), len(self.columns))
        self.rows[-1].append((column, offset, size, crc))

    def write(self, folder: Path, number: int, part: Path | None = None, **about: Any) -> dict[str, Any]:
        """Write the table file of an archive, and return the entry of the archive for the index."""
        numbers = np.full((len(self.rows), len(self.columns), 3), ABSENT, "<i8")
        for row, members in enumerate(self.rows):
            for column, *where in members:
                numbers[row, column] = where
        body = numbers.tobytes()
        entry = {**about, "samples": len(self.rows), "columns": list(self.columns), "table_crc": zlib.crc32(body)}
        write_new(folder / table_name(number), json.dumps(entry).encode() + b"\n" + body, part)
        return json.loads(json.dumps(entry))


class _ArchiveWriter:
    """Writes an archive, under another name until it is complete."""

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

    def close(self, read: int, bad: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Finish and rename the archive, then write its table, which marks it as complete; returns its entry for the index."""
        self._write(bytes(END))
        assert self.file is not None
        self.file.close()
        flush(self.part)
        # an archive without a table is left from an interruption, and must have the same bytes
        place = self.folder / self.name
        if os.path.lexists(place) and (not place.is_file() or file_hash(place) != self.digest.hexdigest()):
            self.part.unlink()
            raise ConfigError(f"write_shards: {place} is there already, and is not what would be written; move it away")
        os.replace(self.part, place)
        flush(self.folder)
        about = {"name": self.name, "bytes": self.at, "sha256": self.digest.hexdigest(), "read": read, "bad": list(bad)}
        return self.table.write(self.folder, self.number, self.part, **about)

    def abandon(self) -> None:
        if self.file is not None and not self.file.closed:
            self.file.close()
            self.part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        if self.file is None:
            Path(self.part).unlink(missing_ok=True)  # of a killed process; a link of this name is not followed
            self.file = open(self.part, "xb")  # noqa: SIM115
        self.file.write(data)
        self.digest.update(data)
        self.at += len(data)


def _padded(size: int) -> int:
    return HEADER + size + -size % HEADER


def _shards_there(folder: Path, settings: Mapping[str, Any], part: Path) -> list[dict[str, Any]]:
    """The entries of the complete shards in a folder, which is created if it does not exist."""
    if not (folder / MAKING).exists():
        if os.path.lexists(folder) and (not folder.is_dir() or any(not is_part_path(x.name) for x in folder.iterdir())):
            raise ConfigError(f"write_shards: {folder} holds other things; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / MAKING, json.dumps(settings).encode(), part)
    _check_same(folder, _read(folder / MAKING, "shards that are being made"), settings)
    # a shard is complete if its table is there, because the table is written last
    entries: list[dict[str, Any]] = []
    while (table := folder / table_name(len(entries))).exists():
        try:
            entry = parse_json(table.read_bytes().partition(b"\n")[0])
            Shard.of(entry)
            check_fields(table, entry, {"read": int, "bad": list}, ConfigError)
            _check_bad(table, entry["bad"])
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"write_shards: {table} is not of shards, or damaged ({error}); move it away, or give a new folder"
            ) from error
        entries.append(entry)
        archive = folder / entries[-1]["name"]
        if not archive.is_file() or archive.stat().st_size != entries[-1]["bytes"]:
            raise ConfigError(
                f"write_shards: {archive} was changed since it was written; delete {folder} and begin again"
            )
    return entries


def _read(path: Path, what: str = "") -> dict[str, Any]:
    """A JSON object that `write_shards` wrote; for any other file {}, or with `what`, its description, a ConfigError."""
    try:
        found = read_json(path, ConfigError)
    except ConfigError:
        found = {}
    if "format" in found:
        return found
    if what:
        raise ConfigError(f"write_shards: {path} is not of {what}: the folder holds other things; give a new folder")
    return {}


def _check_bad(where: Path, bad: Any) -> None:
    for entry in bad:
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not int or not isinstance(entry[1], str):
            raise ConfigError(f"{where}: 'bad' holds {describe(entry)}, wanted a row and why it was left out")


def _about(samples: Any) -> dict[str, Any]:
    """JSON that identifies the samples: their number, and a checksum of the first one if it can be read by index."""
    about: dict[str, Any] = {"samples": len(samples) if hasattr(samples, "__len__") else None}
    if is_indexed(samples) and len(samples):
        try:
            first = {str(field): encoded(value) for field, value in samples[0].items() if value is not None}
            about["first"] = zlib.crc32(repr(sorted(first.items())).encode("utf-8", "backslashreplace"))
        except Exception:  # writing reports a broken row
            about["first"] = None
    return about


def _check_same(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if (old := before.get(name)) != value:
            if isinstance(old, dict) and isinstance(value, dict):
                differ = [key for key in {**old, **value} if old.get(key) != value.get(key)]
                if differ == ["first"] and "first" not in old:
                    continue  # earlier versions did not note the first sample
                old, value = ({key: part.get(key) for key in differ} for part in (old, value))
            raise ConfigError(
                f"write_shards: {folder} was made with {name} {shortened(repr(old))}, and now it is {shortened(repr(value))}; "
                "give the same again, or another folder"
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
    write_new(folder / INDEX, json.dumps(index, indent=1).encode(), part)
    return index


def _result(index: Mapping[str, Any], samples: Any, already: bool = False) -> ShardsWritten:
    bad = [(row, why) for row, why in index["bad"]]
    rows = index["samples"] + len(bad)
    seen = samples.seen() if hasattr(samples, "seen") else Account(unit="rows", saw=rows, yields=rows)
    return ShardsWritten(
        samples=index["samples"],
        shards=len(index["shards"]),
        bytes=sum(entry["bytes"] for entry in index["shards"]),
        fields=tuple(index["fields"]),
        bad=tuple(bad),
        account=seen.without("broken rows", (f"row {row}" for row, _ in bad)),
        already=already,
    )


def _broken_rows(bad: Sequence[tuple[int, str]], max_bad: int) -> str:
    shown = "".join(f"\n  row {row}: {why}" for row, why in bad[:SHOWN])
    more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"broken rows: {len(bad)}, and max_bad={max_bad}; put them right, or allow more:{shown}{more}"


def _rows(samples: Any, start: int) -> Iterator[Any]:
    """Yields the rows from `start` on, and the exception in place of a row that cannot be read.

    Raises:
        MediaError: a source that can only be iterated failed, and gives no further rows.
    """
    if is_indexed(samples) and not callable(getattr(samples, "rows", None)):
        for index in range(start, len(samples)):
            try:
                yield samples[index]
            except Exception as error:
                yield error
        return
    has_rows = callable(getattr(samples, "rows", None))
    rows, at = iter(samples.rows(start) if has_rows else islice(samples, start, None)), start
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (ConfigError, MediaError):
            raise
        except Exception as error:
            raise MediaError(
                f"write_shards: the source failed at row {at}: {type(error).__name__}: {shortened(error)}; what is iterated does "
                "not continue after an error, so max_bad cannot skip it; what is written stays, and the same call resumes there"
            ) from error
        yield row
        at += 1


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
        if not isinstance(field, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", field):
            raise ConfigError(
                f"write_shards: field {shortened(repr(field))} must be a name of letters, digits, _ and -; rename it"
            )
        if value is not None:
            try:
                members.append((field, *encoded(value)))
            except Exception as error:
                raise MediaError(f"{field}: {error}") from error
    if not members:
        raise MediaError("it has no value")
    return members
