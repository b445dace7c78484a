"""What `multimodal shards` reads: folders, CSV, JSON lines, Parquet and Hugging Face data sets, row by row from any row on."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from multimodal.shapes import ConfigError, MediaError, did_you_mean

KINDS = {
    "image": (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff"),
}
_FIELD = {suffix: field for field, suffixes in KINDS.items() for suffix in suffixes}
HUB = "hf:"
LONGEST_CELL = 2**30  # characters; the csv module's own limit is 131,072


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows (mappings) of a source. An exception in place of a row says why that one cannot be used.

    about: what the source is, to be compared when the work goes on. total: rows, or about as many. beside: what paths are relative
    to. ignored: how many files of which other kinds a folder has.
    """

    about: Mapping[str, Any]
    columns: Sequence[str] | None
    total: int
    read: Callable[[int], Iterator[Any]]
    beside: Path = Path()
    ignored: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)

    def rows(self, start: int) -> Iterator[Any]:
        for row in self.read(start):
            try:
                row = row if isinstance(row, Exception) else self._fields(row)
            except TypeError as error:
                row = error
            yield row

    def choosing(self, fields: Mapping[str, str], files: Sequence[str]) -> "Table":
        """Only these columns, under these names (field: column; all if none); of `files`, paths of files take the file's place.

        Raises:
            ConfigError: a column that is not there.
        """
        there = list(fields) or list(self.columns or files)
        for name, wanted in (("--fields", fields.values()), ("--files", files)):
            known = there if name == "--files" else list(self.columns or wanted)
            for column in wanted:
                if column not in known:
                    raise ConfigError(
                        f"{name}: there is no {column!r}; there are {', '.join(known)}{did_you_mean(column, known)}"
                    )
        about = {**self.about, "fields": dict(fields), "files": list(files)}
        return replace(self, about=about, fields=dict(fields), files=tuple(files))

    def _fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {name: row.get(column) for name, column in self.fields.items()} if self.fields else dict(row)
        for name in self.files:
            if (file := chosen.get(name)) is not None:
                chosen[name] = self.beside / file
        return chosen


def open_table(name: str, split: str | None = None) -> Table:
    """The rows of a folder, file or data set.

    name: a folder of files in class folders, or one that Hugging Face saved; a .csv, .tsv, .jsonl or .parquet file; hf:NAME or
    hf:NAME:CONFIGURATION, a data set of the hub.

    Raises:
        ConfigError: none of these, or a library that is not installed.
    """
    path = Path(name)
    if name.startswith(HUB):
        hub, _, configuration = name.removeprefix(HUB).partition(":")
        datasets = _library("datasets", name)
        return _of_dataset(datasets.load_dataset(hub, configuration or None, split=split), name, split)
    if path.is_dir():
        if any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            return _of_dataset(_library("datasets", name).load_from_disk(name), path.name, split)
        return _of_folder(path)
    if not path.is_file():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"there is no file or folder {name}{did_you_mean(path.name, near)} (a data set of the Hugging Face hub is hf:NAME)"
        )
    kinds = {".csv": _of_csv, ".tsv": _of_csv, ".jsonl": _of_json, ".ndjson": _of_json, ".parquet": _of_parquet}
    if path.suffix.lower() not in kinds:
        raise ConfigError(f"{name}: wanted a folder or a file that ends in {', '.join(kinds)}")
    return kinds[path.suffix.lower()](path)


def _library(name: str, for_what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{for_what} is read by {name}; install it: pip install 'multimodal-stream[data]'") from None


def _of_folder(folder: Path) -> Table:
    """Files in class folders: the first folder below is the label, the kind of file the field."""
    digest, ignored, names = hashlib.sha256(), Counter(), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if path.name.startswith(".") or path.suffix.lower() not in _FIELD:
            ignored[path.suffix.lower() or path.name] += 1
            continue
        names.append(name)
        digest.update(f"{name.as_posix()}\0{path.stat().st_size}\n".encode(errors="surrogateescape"))
    if not names:
        raise ConfigError(f"{folder} holds no picture or sound ({', '.join(_FIELD)})")

    def read(start: int) -> Iterator[Any]:
        for name in names[start:]:
            label = name.parts[0] if len(name.parts) > 1 else None
            yield {_FIELD[name.suffix.lower()]: folder / name, "label": label}

    fields = [*dict.fromkeys(_FIELD[name.suffix.lower()] for name in names), "label"]
    about = {"folder": folder.name, "sha256 of names and sizes": digest.hexdigest()}
    return Table(about=about, columns=fields, total=len(names), read=read, ignored=dict(ignored))


def _of_csv(path: Path) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def lines() -> Iterator[Any]:
        csv.field_size_limit(LONGEST_CELL)
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                try:
                    yield next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield MediaError(f"line {reader.line_num}: {error}")

    header = next(lines(), [])
    if isinstance(header, Exception) or not header or len(set(header)) < len(header):
        raise ConfigError(f"{path}: wanted a first line that names the columns, each once, not {header}")

    def read(start: int) -> Iterator[Any]:
        rows = (line for line in islice(lines(), 1, None) if line != [])
        for line in islice(rows, start, None):
            if isinstance(line, Exception):
                yield line
            elif len(line) != len(header):
                yield MediaError(f"it has {len(line)} columns, and the first line names {len(header)}")
            else:
                yield {name: cell or None for name, cell in zip(header, line, strict=True)}

    about, count = _digest(path)
    return Table(about=about, columns=header, total=max(0, count - 1), read=read, beside=path.parent)


def _of_json(path: Path) -> Table:
    def read(start: int) -> Iterator[Any]:
        with open(path, "rb") as file:
            for line in islice((line for line in file if line.strip()), start, None):
                try:
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else MediaError("it is no JSON object")
                except ValueError as error:
                    yield error
                except RecursionError:
                    yield MediaError("it is nested too deeply")

    first = next(read(0), None)
    about, count = _digest(path)
    columns = list(first) if isinstance(first, dict) else None
    return Table(about=about, columns=columns, total=count, read=read, beside=path.parent)


def _digest(path: Path) -> tuple[dict[str, Any], int]:
    """What the file is, and how many lines it has."""
    digest, lines = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            lines += block.count(b"\n")
    return {"file": path.name, "sha256": digest.hexdigest()}, lines


def _of_parquet(path: Path) -> Table:
    parquet = _library("pyarrow.parquet", str(path))
    about, _ = _digest(path)
    with parquet.ParquetFile(path) as file:
        columns, total = file.schema_arrow.names, file.metadata.num_rows

    def read(start: int) -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if start >= count:
                    start -= count
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    yield from islice(batch.to_pylist(), min(start, len(batch)), None)
                    start = max(0, start - len(batch))

    return Table(about=about, columns=columns, total=total, read=read, beside=path.parent)


def _of_dataset(dataset: Any, name: str, split: str | None) -> Table:
    """A Hugging Face data set: media undecoded, classes by their names."""
    datasets = _library("datasets", name)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ConfigError(f"{name} has the splits {', '.join(dataset)}; choose one with --split")
        dataset = dataset[split]
    about = {"dataset": name, "split": str(dataset.split), "rows": len(dataset), "fingerprint": dataset._fingerprint}
    for column, feature in dataset.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    classes = {name: kind.names for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}

    def read(start: int) -> Iterator[Any]:
        for index in range(start, len(dataset)):
            try:
                row = dataset[index]
                for column, names in classes.items():
                    row[column] = None if row[column] in (None, -1) else names[row[column]]  # -1: nobody knows
                yield row
            except Exception as error:
                yield error

    return Table(about=about, columns=dataset.column_names, total=len(dataset), read=read)
