"""Reads samples from tar archives on a local disk or an object store, one range of bytes a sample.

folder/index.json      each shard: name, samples, bytes, sha256, and the (field, extension) of each column of its table
folder/000000.tar      members KEY.FIELD.EXTENSION, those of a sample side by side (the layout of WebDataset)
folder/000000.index    a line of JSON, the entry of this shard, then an int64 table (samples, columns, 3): offset, size, CRC-32
"""

import hashlib
import io
import os
import tarfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.data.account import Account
from multimodal.data.codecs import decoded
from multimodal.data.sources import permutation, scattered
from multimodal.files import check_fields, parse_json, read_at
from multimodal.shapes import ConfigError, MediaError
from multimodal.texts import short_repr, shortened

FORMAT = 1
INDEX = "index.json"
MAKING = "making.json"  # instead of the index while it is being made
HEADER = 512  # bytes of a member's header, which is before its data
ABSENT = -1  # the size of a member that is not there
UNKNOWN = -1  # the CRC-32 of an archive of which only the headers were read
BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The entry of an archive in index.json.

    name: of the file, or its path or URL if it lies elsewhere.
    samples: their number.
    bytes: the size of the archive.
    sha256: of the archive; None: another program made it and only its headers were read.
    table_crc: CRC-32 of its table.
    columns: (field, extension) of each column of its table.
    """

    name: str
    samples: int
    bytes: int
    sha256: str | None
    table_crc: int
    columns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, entry: Mapping[str, Any], folder: str = "") -> "Shard":
        """A shard from its entry in an index, which is not trusted.

        Raises:
            ConfigError: a part is missing or of another type, or the archive's name leads out of the folder.
        """
        kinds = {
            "name": str,
            "samples": int,
            "bytes": int,
            "sha256": (str, type(None)),
            "table_crc": int,
            "columns": list,
        }
        check_fields(INDEX, entry, kinds, ConfigError)
        name = entry["name"]
        if not 1 <= entry["samples"] < 2**40 or not 0 <= entry["bytes"] < 2**62:
            raise ConfigError(f"{short_repr(name)} has {entry['samples']} samples in {entry['bytes']} bytes")
        if not entry["columns"] or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
            for pair in entry["columns"]
        ):
            raise ConfigError(f"{short_repr(name)}: 'columns' is {short_repr(entry['columns'])}, wanted pairs of texts")
        if is_url(folder) and os.path.isabs(name):
            raise ConfigError(f"{short_repr(name)} lies on this machine, and the index elsewhere; refused")
        if not is_url(name) and not os.path.isabs(name) and ("/" in name or "\\" in name or name in ("", ".", "..")):
            raise ConfigError(f"{short_repr(name)} does not lie in the folder; refused")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise ConfigError(f"{short_repr(name)} can be the name of no file; refused") from None
        columns = tuple((field, extension) for field, extension in entry["columns"])
        return cls(
            **{name: entry[name] for name in ("name", "samples", "bytes", "sha256", "table_crc")}, columns=columns
        )


class Shards:
    """The samples of a folder that `write_shards` or `multimodal shards` made, or that `index_archives` indexed.

    folder: a path, or the URL of any store that fsspec knows (s3://bucket/set, gs://, https://, memory://); simplecache::s3://...
    stores a copy of every shard that is read on the local disk. storage: options of that store, such as {"anon": True}.
    group: number of shards whose samples are mixed in a shuffled order, and largest number of open files.

    A field that a sample does not have is None; txt, json and npy members become texts, values and arrays, all others `Media`:
    bytes that tokenizers decode. A data worker gets the list of shards and opens its own files.

    Raises:
        ConfigError: no index, or one that cannot be read.

    Examples:
        >>> made = mm.write_shards(samples, "shape-shards")
        >>> shards = mm.Shards("shape-shards")
        >>> len(shards), shards[0]["label"]
        (12, 'circle')
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, group: int = 8, storage: Mapping[str, Any] | None = None
    ) -> None:
        if group < 1:
            raise ConfigError(f"Shards: group={group} must be at least 1")
        self.account: Account | None = None  # set by `index_archives`
        self.folder, self.group, self.storage = os.fspath(folder).removesuffix("/"), group, dict(storage or {})
        self._reset()
        try:
            index = parse_json(self._read(self.folder, INDEX))
            check_fields(INDEX, index, {"shards": list, "fields": list, "format": int}, ConfigError)
            if not all(isinstance(field, str) for field in index["fields"]):
                raise ConfigError(f"'fields' is {short_repr(index['fields'])}, wanted names")
            self.shards = tuple(Shard.of(entry, self.folder) for entry in index["shards"])
            self.fields: tuple[str, ...] = tuple(index["fields"])
            made_as = index["format"]
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"Shards: {self.folder} has no {INDEX}{_hint(self.folder)}") from None
        except (ValueError, KeyError, TypeError, ImportError, OSError) as error:
            raise ConfigError(
                f"Shards: {self.folder}/{INDEX} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if made_as != FORMAT:
            raise ConfigError(f"Shards: {self.folder} has format {made_as}; this version reads format {FORMAT}")
        self._starts = list(accumulate((shard.samples for shard in self.shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"Shards({self.folder!r}: {len(self)} samples in {len(self.shards)} shards, {', '.join(self.fields)})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`.

        Raises:
            MediaError: the shard and the member, where the archive is damaged, cut short or gone.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Shards: there is no sample {index}; there are {len(self)}")
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        return self._sample(number, index - self._starts[number])

    def shuffled(self, key: str) -> Callable[[int], int]:
        """The sample index at each place of one epoch: shards in a random order seeded by `key`, and the samples of each `group` of
        shards in another. Needs memory only for the list of shards."""
        order = permutation(len(self.shards), f"{key}/shards").tolist()
        groups = [order[i : i + self.group] for i in range(0, len(order), self.group)]
        starts = list(accumulate((sum(self.shards[n].samples for n in group) for group in groups), initial=0))

        @lru_cache(maxsize=2)
        def within(at: int) -> Callable[[int], int]:
            return scattered(starts[at + 1] - starts[at], f"{key}/{at}")

        def index(place: int) -> int:
            at = bisect_right(starts, place) - 1
            inner = within(at)(place - starts[at])
            for number in groups[at]:
                if inner < self.shards[number].samples:
                    return self._starts[number] + inner
                inner -= self.shards[number].samples
            raise AssertionError("a group is as long as its shards")

        return index

    def check(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Read all archives and describe those that have changed since they were written; an empty list if none has.

        progress: called with the number of bytes of each block that is read.
        """
        faults = []
        for number, shard in enumerate(self.shards):
            digest, at = hashlib.sha256(), 0
            try:
                self._opened(number)
                while block := self._range(number, at, at + BLOCK):
                    digest.update(block)
                    at += len(block)
                    if progress is not None:
                        progress(len(block))
            except MediaError as error:
                faults.append(str(error))
                continue
            if at != shard.bytes:
                faults.append(f"{shard.name}: it has {at} bytes, and {shard.bytes} were written")
            elif shard.sha256 is not None and digest.hexdigest() != shard.sha256:
                faults.append(f"{shard.name}: its sha256 is not the one in {INDEX}")
        return faults

    def close(self) -> None:
        """Close all files; reading a sample opens them again."""
        for _, file in self._open.values():
            if file is not None:
                file.close()
        self._open.clear()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_stores")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[int, tuple[np.ndarray, io.FileIO | None]] = OrderedDict()
        self._stores: dict[tuple[int, str], tuple[Any, str]] = {}

    def _sample(self, number: int, row: int) -> dict[str, Any]:
        shard, members = self.shards[number], self._opened(number)[0][row].tolist()
        sample: dict[str, Any] = dict.fromkeys(self.fields)
        there = [
            (*column, *member) for column, member in zip(shard.columns, members, strict=True) if member[1] != ABSENT
        ]
        begin = min(offset for _, _, offset, _, _ in there) - HEADER
        end = max(offset + size for _, _, offset, size, _ in there)
        # members that lie close together are read at once
        near = end - begin <= 2 * sum(HEADER + size for _, _, _, size, _ in there) + BLOCK
        data = self._range(number, begin, end) if near else b""
        for field, extension, offset, size, crc in there:
            if not near:
                begin = offset - HEADER
                data = self._range(number, begin, offset + size)
            header, value = data[offset - HEADER - begin : offset - begin], data[offset - begin : offset - begin + size]
            if len(value) < size:
                raise MediaError(
                    f"{shard.name}, sample {row}: the archive ends before {field!r} does; copy or make it again"
                )
            # if no member has this header, no name is shown: the file may be no archive at all
            name = _member(header, size, extension)
            if name is None or (crc != UNKNOWN and zlib.crc32(value) != crc):
                raise MediaError(
                    f"{shard.name}{'' if name is None else f'/{name}'} (sample {row} of the shard): {field!r} has changed "
                    "since the index was made; copy or make the shard again (multimodal shards FOLDER --verify lists all that "
                    "are damaged)"
                )
            name = f"{shard.name}/{name}"
            try:
                sample[field] = decoded(extension, value, name)
            except Exception as error:  # decoders fail in many ways on damaged data
                raise MediaError(f"{name}: cannot be read as {extension}: {str(error)[:300]}") from error
        return sample

    def _opened(self, number: int) -> tuple[np.ndarray, io.FileIO | None]:
        """The table of a shard, and its file if that is local; the `group` most recent ones stay open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard, name = self.shards[number], table_name(number)
        try:
            body = self._read(self.folder, name).partition(b"\n")[2]
            if zlib.crc32(body) != shard.table_crc:
                raise MediaError(f"{name} of {self.folder} is damaged; copy or make it again")
            table = _checked(body, shard, f"{name} of {self.folder}")
            folder, base = self._place(shard.name)
            # reading a device or a pipe would never end
            if not is_url(folder) and Path(folder, base).exists() and not Path(folder, base).is_file():
                raise MediaError(f"{shard.name} of {self.folder} is no file")
            file = None if is_url(folder) else io.FileIO(f"{folder}/{base}")
        except (OSError, ImportError, UnicodeError) as error:  # fsspec imports the client of a store
            raise MediaError(
                f"{shortened(shard.name, 100)} of {self.folder} cannot be opened: {shortened(error)}"
            ) from error
        while len(self._open) >= self.group:
            _, (_, old) = self._open.popitem(last=False)
            if old is not None:
                old.close()
        self._open[number] = table, file
        return table, file

    def _range(self, number: int, begin: int, end: int) -> bytes:
        """Bytes of an archive, fewer at its end."""
        file = self._opened(number)[1]
        try:
            if file is not None:
                end = min(end, os.fstat(file.fileno()).st_size)  # no memory for sizes that only a hostile table claims
                return read_at(file, begin, end - begin)
            if end <= (size := self.shards[number].bytes) or begin < size:
                return self._read(*self._place(self.shards[number].name), begin, min(end, size))
            return b""
        except OSError as error:
            raise MediaError(f"{self.shards[number].name} of {self.folder} cannot be read: {error}") from error

    def _read(self, folder: str, base: str, begin: int | None = None, end: int | None = None) -> bytes:
        if not is_url(folder):
            return Path(folder, base).read_bytes()
        at = os.getpid(), folder  # a connection does not survive a fork
        if at not in self._stores:
            from fsspec.core import url_to_fs

            self._stores[at] = url_to_fs(folder, **self.storage)
        store, root = self._stores[at]
        return store.cat_file(f"{root}/{base}", start=begin, end=end)

    def _place(self, name: str) -> tuple[str, str]:
        """Folder and name of an archive; one that another program made may lie outside our folder."""
        if is_url(name) or os.path.isabs(name):
            folder, _, base = name.rpartition("/")
            return folder, base
        return self.folder, name


def is_url(text: str) -> bool:
    return "://" in text


def table_name(number: int) -> str:
    return f"{number:06d}.index"


def _checked(body: bytes, shard: Shard, where: str) -> np.ndarray:
    """The table of a shard, after checking that its offsets and sizes lie within the archive."""
    if len(body) != shard.samples * len(shard.columns) * 3 * 8:
        raise MediaError(
            f"{where} is damaged: it has {len(body)} bytes, which are not those of {shard.samples} samples"
        )
    table = np.frombuffer(body, "<i8").reshape(shard.samples, len(shard.columns), 3)
    offset, size = table[..., 0], table[..., 1]
    there = size != ABSENT
    inside = (offset >= HEADER) & (offset <= shard.bytes) & (size >= 0) & (size <= shard.bytes - offset)
    if not (inside | ~there).all() or not there.any(1).all():
        raise MediaError(f"{where} is damaged: it names places outside of {shard.name}, or samples of nothing")
    return table


def _member(header: bytes, size: int, extension: str) -> str | None:
    """The name in a member's header; None if this is no header of a file of this size and extension."""
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
    except tarfile.TarError:
        return None
    cut = len(found.name) >= 100  # a longer name is cut in the header
    fits = found.isfile() and found.size == size and (cut or found.name.lower().endswith(f".{extension}"))
    return found.name if fits else None


def _hint(folder: str) -> str:
    if is_url(folder) or not Path(folder).is_dir():
        return "; wanted a folder that `multimodal shards` made"
    if Path(folder, MAKING).exists():
        return "; it was not finished: give the same command again, which resumes there"
    if any(Path(folder).glob("*.tar")):
        return "; archives that others made are read after index_archives(archives, fields, folder)"
    return "; wanted a folder that `multimodal shards` made"
