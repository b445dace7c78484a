"""The sources of `multimodal shards`: folders, CSV, JSON lines, Parquet and Hugging Face data sets, read from any row on."""

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from multimodal.data.account import Account, Tally
from multimodal.data.folders import read_folder
from multimodal.data.frames import check_columns, class_features, named
from multimodal.files import unique_keys
from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.texts import listed, repeated, shortened

HUB = "hf:"
LONGEST_CELL = 2**27  # characters; the csv module's own limit is 131,072
BROKEN, EMPTY = "broken rows", "empty lines"
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}
UNREADABLE = re.compile("[\udc80-\udcff]")  # surrogates, which stand for bytes that the encoding cannot decode


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows (mappings) of a source. An exception in place of a row says why that row cannot be used.

    about: JSON values that identify the source, compared when the work is resumed.
    columns: their names; None: not known before reading.
    total: the number of rows, exact or nearly so.
    read: yields the rows from a row number on.
    seen: returns the account of the source, in which broken rows count as used.
    beside: the folder that paths in the rows are relative to.
    files: the fields whose values are paths of files.
    fields: {field: column} of the columns to read; empty: all, under their own names.
    """

    about: Mapping[str, Any]
    columns: Sequence[str] | None
    total: int
    read: Callable[[int], Iterator[Any]]
    seen: Callable[[], Account]
    beside: Path = Path()
    files: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)

    def rows(self, start: int) -> Iterator[Any]:
        """Yields the rows from number `start` on, as mappings of fields."""
        return (sample for _, sample in self.pairs(start))

    def pairs(self, start: int) -> Iterator[tuple[Any, Any]]:
        """Yields (the row with all of its columns, the mapping of fields that is made of it) from row number `start` on."""
        for row in self.read(start):
            try:
                sample = row if isinstance(row, Exception) else self._fields(row)
            except TypeError as error:
                sample = error
            yield row, sample

    def account(self) -> Account:
        """Counts the rows that are used and left out, with reasons; reads the whole source."""
        rows = enumerate(self.rows(0))
        return self.seen().without(BROKEN, (f"row {at}: {row}" for at, row in rows if isinstance(row, Exception)))

    def select(self, fields: Mapping[str, str], files: Sequence[str]) -> "Table":
        """A table of these columns only. fields: {field: column}; empty: all columns. files: fields with paths of files as values.

        Raises:
            ConfigError: a column that is not there.
        """
        there = list(fields) or list(self.columns or files)
        for name, wanted in (("--fields", fields.values()), ("--files", files)):
            known = there if name == "--files" else list(self.columns or wanted)
            for column in wanted:
                if column not in known:
                    raise ConfigError(
                        f"{name}: there is no {column!r}; there are {listed(known)}{did_you_mean(column, known)}"
                    )
        about = {**self.about, "fields": dict(fields), "files": list(files)}
        return replace(self, about=about, fields=dict(fields), files=tuple(files))

    def _fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {name: row.get(column) for name, column in self.fields.items()} if self.fields else dict(row)
        for name in self.files:
            if (file := chosen.get(name)) is not None:
                many = isinstance(file, (list, tuple))  # of a field that takes a list
                chosen[name] = [self.beside / each for each in file] if many else self.beside / file
        return chosen


def open_table(
    name: str,
    split: str | None = None,
    *,
    encoding: str | None = None,
    quotes: bool | None = None,
    delimiter: str | None = None,
) -> Table:
    """The rows of a folder, file or data set.

    name: a folder of files in class folders, or one that Hugging Face saved; a .csv, .tsv, .jsonl or .parquet file; hf:NAME or
    hf:NAME:CONFIGURATION, a data set of the hub. encoding: of a text file; None: by its byte order mark, else UTF-8.
    quotes: whether quotation marks enclose cells that hold separators; None: in a .csv, but not in a .tsv. delimiter: what
    separates the cells of a .csv or .tsv; None: a comma, in a .tsv a tab.

    Raises:
        ConfigError: none of these, a file that is not what its suffix says, or a library that is not installed.
    """
    try:
        return _open(name, split, encoding, quotes, delimiter)
    except OSError as error:
        raise ConfigError(f"{shortened(name)} cannot be read: {shortened(error)}") from error


def _open(name: str, split: str | None, encoding: str | None, quotes: bool | None, delimiter: str | None) -> Table:
    path = Path(name)
    if name.startswith(HUB):
        hub, _, configuration = name.removeprefix(HUB).partition(":")
        datasets = _library("datasets", name)
        return _of_dataset(_loaded(name, datasets.load_dataset, hub, configuration or None, split=split), name, split)
    if path.is_dir():
        if any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            return _of_dataset(_loaded(name, _library("datasets", name).load_from_disk, name), path.name, split)
        return _of_folder(path, split)
    if not path.is_file():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"there is no file or folder {name}{did_you_mean(path.name, near)} (a data set of the Hugging Face hub is hf:NAME)"
        )
    text = (".csv", ".tsv", ".jsonl", ".ndjson")
    suffix = path.suffix.lower()
    if suffix not in (*text, ".parquet"):
        raise ConfigError(f"{name}: wanted a folder or a file that ends in {', '.join((*text, '.parquet'))}")
    if split is not None:
        raise ConfigError(f"{name} is one file, which has no split {split!r}")
    if suffix == ".parquet":
        return _of_parquet(path)
    encoding = encoding or _encoding_of_mark(path) or "utf-8"
    try:
        "".encode(encoding)
    except LookupError:
        raise ConfigError(
            f"--encoding: Python knows no {encoding!r}; give one such as utf-8, utf-16, latin-1"
        ) from None
    if suffix in (".jsonl", ".ndjson"):
        return _of_json(path, encoding)
    separator = delimiter or ("\t" if suffix == ".tsv" else ",")
    return _of_cells(path, encoding, separator, suffix == ".csv" if quotes is None else quotes)


def _library(name: str, for_what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{for_what} is read by {name}; install it: pip install 'multimodal-stream[data]'") from None


def _loaded(name: str, load: Callable[..., Any], *names: Any, **options: Any) -> Any:
    """Load a data set of Hugging Face; its errors, of a dozen classes, become ConfigErrors."""
    try:
        return load(*names, **options)
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be read as a data set of Hugging Face: {type(error).__name__}: {shortened(error)}"
        ) from error


def _of_folder(folder: Path, split: str | None) -> Table:
    """Files in class folders: the first folder below is the label, the kind of file the field."""
    found, digest = read_folder(folder, split=split), hashlib.sha256()
    for member in found.members:
        size = (folder / member.name).stat().st_size
        digest.update(f"{member.name.as_posix()}\0{size}\n".encode(errors="surrogateescape"))

    def read(start: int) -> Iterator[Any]:
        for member in found.members[start:]:
            yield {member.field: folder / member.name, "label": member.label}

    fields = [*dict.fromkeys(member.field for member in found.members), "label"]
    about = {"folder": folder.name, "sha256 of names and sizes": digest.hexdigest()}
    return Table(about=about, columns=fields, total=len(found.members), read=read, seen=lambda: found.account)


def _encoding_of_mark(path: Path) -> str | None:
    """The encoding that a byte order mark at the beginning of a file names, or None."""
    with open(path, "rb") as file:
        begin = file.read(3)
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if begin.startswith(mark)), None)


def _lines(path: Path, encoding: str, newline: str) -> Iterator[str]:
    with open(path, encoding=encoding, errors="surrogateescape", newline=newline) as file:
        try:
            yield from file
        except UnicodeError as error:
            raise MediaError(f"{path} is not text in {encoding}: {error}; give its own by --encoding") from error


def _text_error(text: str, encoding: str) -> str | None:
    """Why a line is no valid text; None if it is."""
    if "\0" in text:
        return "it holds a NUL byte; a text in UTF-16 is read by --encoding utf-16"
    if not text.isascii() and UNREADABLE.search(text):
        return f"it is not {encoding}; give the encoding of the file, such as --encoding latin-1"
    return None


def _of_cells(path: Path, encoding: str, delimiter: str, quotes: bool) -> Table:
    """A CSV file by RFC 4180; without quotes, one row a line, as in corpora of speech and translations."""

    def cells() -> Iterator[tuple[int, int, list[str] | str]]:
        """(first line, last line, cells or the error of the row), with lines counted from 1."""
        if quotes:
            yield from _quoted(_lines(path, encoding, ""), delimiter, path)
            return
        for number, line in enumerate(_lines(path, encoding, ""), 1):
            line = line.rstrip("\r\n")
            yield number, number, line.split(delimiter) if line else []

    _, _, header = next(cells(), (0, 0, []))
    if isinstance(header, str) or not header or len(set(header)) < len(header):
        twice = listed(repeated(header)) if not isinstance(header, str) else ""
        shown = header if isinstance(header, str) else listed(header) or "nothing"
        raise ConfigError(
            f"{path}: wanted a first line that names the columns, each once, not {shown}{twice and f'; {twice} comes twice'}"
        )
    if why := next(filter(None, (_text_error(name, encoding) for name in header)), None):
        raise ConfigError(f"{path}: the first line, {listed(header)}, is no text: {why}")

    def rows() -> Iterator[tuple[int, int, list[str] | str]]:
        return ((first, last, row) for first, last, row in islice(cells(), 1, None) if row != [])

    def read(start: int) -> Iterator[Any]:
        for first, last, row in islice(rows(), start, None):
            where = f"line {first}" if first == last else f"lines {first} to {last}"
            if isinstance(row, str):
                yield MediaError(f"{where}: {row}")
            elif len(row) != len(header):
                hint = "; is a quotation mark missing?" if first != last else ""
                yield MediaError(
                    f"{where}: it has {len(row)} columns, and the first line names {len(header)}{hint}: "
                    f"{shortened(delimiter.join(row), 80)}"
                )
            elif why := next(filter(None, (_text_error(cell, encoding) for cell in row)), None):
                yield MediaError(f"{where}: {why}")
            else:
                yield {name: cell or None for name, cell in zip(header, row, strict=True)}

    def seen() -> Account:
        tally, long, marks = Tally("rows"), [], 0
        for first, last, row in islice(cells(), 1, None):
            if row == []:
                tally.leave(EMPTY, f"line {first}")
                continue
            tally.used += 1
            if first != last:
                long.append(f"{first} to {last}")
            marks += not quotes and any(cell.startswith('"') for cell in row)
        notes = []
        if long:
            notes.append(
                f"{len(long)} rows run over several lines, held together by quotation marks: {listed(long, 3)}"
            )
        if marks:
            notes.append(
                f'{marks} rows have cells that begin with a quotation mark, which is taken as it is (--quotes reads "a ""b""")'
            )
        return tally.account(notes=notes)

    about, count = _digest(path)
    # an earlier version read .tsv with quotes, so its unfinished shards must not be resumed
    about |= {} if quotes and delimiter == "," else {"quotes": quotes}
    return Table(
        about=about | _about_encoding(encoding),
        columns=header,
        total=max(0, count - 1),
        read=read,
        seen=seen,
        beside=path.parent,
    )


def _quoted(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[tuple[int, int, list[str] | str]]:
    """The rows of a CSV.

    Raises:
        MediaError: a quotation mark is never closed, so that the rest of the file would be one cell.
    """
    ended = False

    def until_end() -> Iterator[str]:
        nonlocal ended
        yield from lines
        ended = True

    reader = csv.reader(until_end(), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        limit = csv.field_size_limit(LONGEST_CELL)  # the limit is global in the process
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error):
                raise MediaError(
                    f"{path}: a cell in the row that begins in line {first} has more than {LONGEST_CELL:,} characters; is a "
                    "quotation mark missing?"
                ) from error
            if ended:
                raise MediaError(
                    f'{path}: a quotation mark opens in line {first} and is never closed; close it, or write "" for one within '
                    "a cell (--no-quotes takes quotation marks as they are)"
                ) from error
            row = str(error)
        finally:
            csv.field_size_limit(limit)
        yield first, reader.line_num, row


def _of_json(path: Path, encoding: str) -> Table:
    def lines() -> Iterator[tuple[int, str]]:
        return enumerate(_lines(path, encoding, "\n"), 1)

    def read(start: int) -> Iterator[Any]:
        for number, line in islice(((n, line) for n, line in lines() if line.strip()), start, None):
            yield json_row(line, number, encoding)

    def seen() -> Account:
        tally = Tally("rows")
        for number, line in lines():
            if line.strip():
                tally.used += 1
            else:
                tally.leave(EMPTY, f"line {number}")
        return tally.account()

    first = next(read(0), None)
    about, count = _digest(path)
    columns = list(first) if isinstance(first, dict) else None
    return Table(
        about=about | _about_encoding(encoding), columns=columns, total=count, read=read, seen=seen, beside=path.parent
    )


def json_row(line: str, number: int, encoding: str = "utf-8") -> dict[str, Any] | MediaError:
    """The row in a line of a file of JSON lines, or the error in its place. number: of the line, from 1."""
    try:
        if why := _text_error(line, encoding):
            raise MediaError(why)
        row = json.loads(line, object_pairs_hook=unique_keys)
        if isinstance(row, dict):
            return row
        raise MediaError(f"it is no JSON object: {shortened(line, 80)}")
    except (ValueError, RecursionError) as error:
        return MediaError(f"line {number}: {error}")


def _about_encoding(encoding: str) -> dict[str, str]:
    return {} if encoding.startswith("utf-8") else {"encoding": encoding}


def _digest(path: Path) -> tuple[dict[str, Any], int]:
    """JSON that identifies a file by its name and SHA-256, and the number of its lines."""
    digest, lines = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            lines += block.count(b"\n")
    return {"file": path.name, "sha256": digest.hexdigest()}, lines


def _of_parquet(path: Path) -> Table:
    parquet = _library("pyarrow.parquet", str(path))
    about, _ = _digest(path)
    try:
        with parquet.ParquetFile(path) as file:
            schema, total = file.schema_arrow, file.metadata.num_rows
            if total != (there := sum(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))):
                raise ValueError(f"it says that it has {total} rows, and its row groups say {there}")
            features = class_features(schema.metadata)
    except ConfigError:
        raise
    except Exception as error:  # Arrow has a dozen classes of errors for damaged files, some of them OSErrors
        raise ConfigError(f"{path} cannot be read as Parquet: {shortened(error)}") from error
    check_columns(str(path), schema.names)

    def read(start: int) -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if start < count:
                    yield from _group(file, group, start, count)
                start = max(0, start - count)

    # a damaged group hides how many of its rows are readable, so its number of rows comes from the file's own counts
    def _group(file: Any, group: int, start: int, count: int) -> Iterator[Any]:
        """The rows of a group; one error for each row that cannot be read, so that all are counted."""
        at = 0
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                rows = batch.slice(max(0, start - at))
                if at + len(batch) > count:
                    raise ValueError(f"it says that it has {count} rows, and has more")
                at += len(batch)
                for row in _python_rows(rows):
                    yield row if isinstance(row, Exception) else _named_row(features, row)
            if at < count:
                raise ValueError(f"it says that it has {count} rows, and has {at}")
        except Exception as error:
            why = f"row group {group} of {path} cannot be read: {type(error).__name__}: {shortened(error)}"
            for _ in range(count - max(at, start)):
                yield MediaError(why)

    return Table(
        about=about | ({"classes": "by name"} if features else {}),
        columns=schema.names,
        total=total,
        read=read,
        seen=lambda: Account(unit="rows", saw=total, yields=total),
        beside=path.parent,
    )


def _python_rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch of Arrow; an error in place of a row that is invalid, such as text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except ValueError:
        for at in range(len(batch)):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except ValueError as error:
                yield error


def _named_row(features: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """A row with class names in place of class numbers, or the error."""
    try:
        return {name: named(features.get(name), value, name) for name, value in row.items()}
    except MediaError as error:
        return error


def _of_dataset(dataset: Any, name: str, split: str | None) -> Table:
    """A Hugging Face data set: media undecoded, classes by their names."""
    tally = Tally("rows")
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ConfigError(f"{name} has the splits {', '.join(dataset)}; choose one with --split")
        for other in dataset:
            if other != split:
                for row in range(len(dataset[other])):
                    tally.leave(f"of the split {other}", f"row {row}")
        dataset = dataset[split]
    about = {"dataset": name, "split": str(dataset.split), "rows": len(dataset), "fingerprint": dataset._fingerprint}
    features = dataset.features.to_dict()
    if "ClassLabel" in str([f for f in features.values() if not isinstance(f, dict) or f.get("_type") != "ClassLabel"]):
        # an earlier version left classes within lists as numbers; what it began must not be continued with names
        about["classes"] = "by name"
    stored = dataset.with_format("arrow")  # as stored on the disk: no media are decoded, not even within lists

    def read(start: int) -> Iterator[Any]:
        for index in range(start, len(dataset)):
            try:
                yield _named_row(features, stored[index].to_pylist()[0])
            except Exception as error:
                yield error

    tally.used = len(dataset)
    account = tally.account()
    return Table(about=about, columns=dataset.column_names, total=len(dataset), read=read, seen=lambda: account)
