"""What a person gives (a folder of classes, a table, a data set, samples in memory) as rows of columns, with their parts."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from multimodal.data import as_samples, is_indexed, open_table, read_folder
from multimodal.data.folders import SPLITS, WORDS, splits_of
from multimodal.data.shards import INDEX, Shards
from multimodal.data.tables import HUB, Table
from multimodal.progress import progress_bar
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.texts import listed, shortened

PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "held_out"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""The part that a folder or a cell of a column `split` names."""
assert set(PARTS) == set(SPLITS)
SPLIT = "split"  # the name of such a column
UNTYPED = (".csv", ".tsv")  # tables whose cells are texts
SPREADSHEET = (".xlsx", ".xlsm")
INTERNED = 64  # characters of a cell that is held once, however often it comes


@dataclass
class Rows:
    """Rows, column by column: columns[name][i] is a cell, None where it is missing.

    names: of each row, for messages: a file or the number of a row.
    given: of each row, the part that the data say it is in; None: they say nothing.
    about: JSON values that identify the data, compared when a run goes on.
    beside: the folder that paths in cells are relative to.
    untyped: whether all cells are texts.
    saw: how many rows there were.
    left_out: by reason, the names of rows that are not among these.
    says: what was decided while reading, a line each.
    classes: whether the answer is a class, however few samples it has, as in a folder of classes.
    """

    columns: dict[str, list[Any]]
    names: list[str]
    given: list[str | None]
    about: dict[str, Any]
    beside: Path = Path()
    untyped: bool = False
    saw: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    says: list[str] = field(default_factory=list)
    classes: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def leave(self, reason: str, name: str) -> None:
        """Note a row that is left out."""
        self.left_out.setdefault(reason, []).append(name)


def gather(data: Any, *, test: Any = None, encoding: str | None = None, quiet: bool = False) -> Rows:
    """The rows of `data`, and behind them those of `test`, which are the test part.

    Raises:
        ConfigError: nothing that can be read, or no rows.
    """
    rows = _rows_of(data, encoding, quiet)
    if test is not None:
        more = _rows_of(test, encoding, quiet)
        if missing := [name for name in rows.columns if name not in more.columns]:
            raise ConfigError(
                f"test: {_named(test)} has no column {missing[0]!r}, which {_named(data)} has; it has {listed(more.columns)}"
            )
        rows.columns = {name: [*cells, *more.columns[name]] for name, cells in rows.columns.items()}
        if "test" in rows.given:
            raise ConfigError(f"test: {_named(data)} has a test part of its own; leave out one of the two")
        rows.given = [*(part or "train" for part in rows.given), *["test"] * len(more)]
        rows.names += [f"test {name}" for name in more.names]
        rows.about = {"data": rows.about, "test": more.about}
        rows.saw += more.saw
        for reason, names in more.left_out.items():
            rows.left_out.setdefault(reason, []).extend(names)
        if os.path.realpath(rows.beside) != os.path.realpath(more.beside):
            raise ConfigError(
                "test: it lies in another folder than the data, and paths are relative to one; put both in one"
            )
    if not len(rows):
        raise ConfigError(f"{_named(data)} holds no rows that can be used{_why(rows)}")
    return rows


def _named(data: Any) -> str:
    return shortened(data, 100) if isinstance(data, (str, os.PathLike)) else type(data).__name__


def _why(rows: Rows) -> str:
    first = [f"{reason}: {listed(names, 3)}" for reason, names in rows.left_out.items()]
    return f"; {'; '.join(first)}" if first else ""


def _rows_of(data: Any, encoding: str | None, quiet: bool) -> Rows:
    if not isinstance(data, (str, os.PathLike)):
        return _of_samples(data, quiet)
    name, path = os.fspath(data), Path(data)
    if path.is_dir():
        if (path / INDEX).is_file():
            return _of_samples(Shards(path), quiet, {"shards": path.name})
        if not any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            return _of_folder(path)
    if path.suffix.lower() in SPREADSHEET:
        return _of_spreadsheet(path)
    return _of_table(name, encoding, quiet)


def _of_folder(path: Path) -> Rows:
    """Files in class folders, of all splits."""
    # a folder of pictures and sounds has no one answer
    found: dict[str, Any] = {}
    for kind in WORDS:
        try:
            splits = splits_of(path, (kind,))
            found[kind] = [
                (split, read_folder(path, split=split, fields=(kind,), labelled=True)) for split in splits or [None]
            ]
        except ConfigError as error:
            found[kind] = error
    kinds = [kind for kind, there in found.items() if not isinstance(there, ConfigError)]
    if not kinds:
        raise (
            found["image"]
            if "holds no" in str(found["audio"]) and "holds no" not in str(found["image"])
            else _neither(path)
        )
    if len(kinds) > 1:
        counts = {kind: sum(len(folder.members) for _, folder in found[kind]) for kind in kinds}
        if all(counts.values()):
            raise ConfigError(
                f"{path} holds {counts['image']:,} pictures and {counts['audio']:,} sounds in class folders; a model for both is "
                "made from a table that says which belong together; else put them into two folders"
            )
        kinds = [max(counts, key=lambda kind: counts[kind])]
    (kind,), rows = kinds, Rows({}, [], [], {"folder": path.resolve().name}, path, classes=True)
    files: list[Any] = []
    labels: list[Any] = []
    for split, folder in found[kind]:
        for member in folder.members:
            files.append(os.path.abspath(path / member.name))
            labels.append(member.label)
            rows.names.append(member.name.as_posix())
            rows.given.append(PARTS[split.lower()] if split else None)
        for reason, out in folder.account.left_out.items():
            if not reason.startswith(("of the split", "of another format")) or not split:
                rows.left_out.setdefault(reason, []).extend([*out.names, *["..."] * (out.count - len(out.names))])
    rows.columns = {kind: files, "label": labels}
    rows.saw = len(files) + sum(map(len, rows.left_out.values()))
    if not files:
        raise ConfigError(
            f"{path} holds {WORDS[kind]}s, and none lies in a class folder; make a sub-folder for each class, or a table with a "
            f"column of files and one of answers: multimodal train table.csv --read {kind}=file --write label"
        )
    rows.about |= {
        "files": len(files),
        "bytes": sum(os.path.getsize(file) for file in files),
        "first": rows.names[0],
        "last": rows.names[-1],
    }
    return rows


def _neither(path: Path) -> ConfigError:
    tables = [
        entry.name
        for entry in sorted(path.iterdir())
        if entry.suffix.lower() in (*UNTYPED, ".jsonl", ".parquet", *SPREADSHEET)
    ]
    hint = f"; it holds a table, which is given by its name: {path / tables[0]}" if tables else ""
    return ConfigError(
        f"{path} holds neither pictures nor sounds{hint}; wanted a sub-folder for each class with its files in it, as in "
        f"{path}/cat/1.jpg"
    )


def _of_table(name: str, encoding: str | None, quiet: bool) -> Rows:
    """A table in a file, or a data set of Hugging Face with all its splits."""
    path, says = Path(name), []
    splits: list[str | None] = [None]
    table = None
    try:
        table = open_table(name, encoding=encoding)
    except ConfigError as error:
        # a data set in splits names them; each is read
        _, said, names = str(error).partition(" has the splits ")
        if not said:
            raise ConfigError(_offline(name, str(error))) from error
        splits = [split.strip() for split in names.partition(";")[0].split(",")]
    if path.suffix.lower() in UNTYPED and table is not None and table.columns is not None and len(table.columns) == 1:
        for delimiter, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if delimiter in table.columns[0]:
                table = open_table(name, encoding=encoding, delimiter=delimiter)
                says.append(f"its cells are separated by {word}")
                break
    rows = Rows({}, [], [], {}, path.parent, path.suffix.lower() in UNTYPED, says=says)
    cells = _Cells(rows)
    for split in splits:
        part = table if table is not None and split is None else open_table(name, split, encoding=encoding)
        if split is not None and split.lower() not in PARTS:
            rows.says.append(f"its split {split!r} is left out: it is none of {', '.join(PARTS)}")
            continue
        rows.about[split or "table"] = dict(part.about)
        with progress_bar(f"reading {shortened(name, 40)}", part.total, quiet=quiet) as bar:
            for number, row in enumerate(part.rows(0)):
                bar.advance()
                rows.saw += 1
                where = f"row {number + 1}" if split is None else f"{split} row {number + 1}"
                if isinstance(row, Exception):
                    rows.leave("broken rows", f"{where}: {shortened(row, 200)}")
                else:
                    cells.add(where, row, PARTS[split.lower()] if split else None, partial(_row_of, part, number))
    cells.finish()
    return rows


def _row_of(table: Table, number: int) -> Mapping[str, Any]:
    return next(table.rows(number))


def _offline(name: str, message: str) -> str:
    if not name.startswith(HUB):
        return message
    return (
        f"{message}; a data set of the hub needs a network, or a copy of it on this disk: give the folder that "
        "`save_to_disk` of Hugging Face datasets wrote"
    )


@dataclass(frozen=True)
class Later:
    """A picture or a sound that lies in a data set or in shards: it is read when it is needed, and not held."""

    row: Callable[[], Mapping[str, Any]]
    column: str

    def load(self) -> Any:
        return self.row()[self.column]


class _Cells:
    """Fills the columns of rows; a text that comes often is held once, and a column that begins late has None before."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.held = rows, dict[str, str]()

    def add(
        self, name: str, row: Mapping[str, Any], part: str | None, again: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """again: reads the row once more; then its media are not held."""
        count = len(self.rows.names)
        for column, value in row.items():
            if not isinstance(column, str):
                raise ConfigError(f"{name}: the column {column!r} is {type(column).__name__}; name columns by texts")
            if isinstance(value, str) and len(value) <= INTERNED:
                value = self.held.setdefault(value, value)
            if again is not None and (hasattr(value, "read") or isinstance(value, bytes) or _is_media(value)):
                value = Later(again, column)
            cells = self.rows.columns.setdefault(column, [])
            cells.extend([None] * (count - len(cells)))
            cells.append(value)
        self.rows.names.append(name)
        self.rows.given.append(part)

    def finish(self) -> None:
        """Make all columns equally long, and read the column `split`."""
        rows = self.rows
        for cells in rows.columns.values():
            cells.extend([None] * (len(rows) - len(cells)))
        named = rows.columns.get(SPLIT)
        if (
            named
            and all(isinstance(part, str) and part.strip().lower() in PARTS for part in named)
            and not any(rows.given)
        ):
            rows.given = [PARTS[part.strip().lower()] for part in named]
            del rows.columns[SPLIT]


def _is_media(value: Any) -> bool:
    """Whether it is how Hugging Face stores a picture or a sound."""
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def _of_samples(data: Any, quiet: bool, about: dict[str, Any] | None = None) -> Rows:
    """Samples in memory, a DataFrame, or shards."""
    samples = as_samples(data)
    if isinstance(samples, (Mapping, str, bytes)) or not is_indexed(samples):
        raise ConfigError(
            f"quick: the data are {type(data).__name__}; wanted a folder, a table, hf:NAME, a DataFrame, or samples with a "
            "length and [index], each a mapping of fields"
        )
    rows = Rows({}, [], [], {**(about or {}), "samples": len(samples)})
    cells = _Cells(rows)
    with progress_bar("reading samples", len(samples), quiet=quiet) as bar:
        for number in range(len(samples)):
            bar.advance()
            sample = samples[number]
            if not isinstance(sample, Mapping):
                raise ConfigError(
                    f"quick: sample {number} is {type(sample).__name__}, wanted a mapping of fields; Fields(samples, 'image', "
                    "'label') names the parts of a tuple"
                )
            cells.add(f"sample {number}", sample, None, partial(samples.__getitem__, number) if about else None)
    rows.saw = len(rows)
    cells.finish()
    return rows


def _as_cell(value: Any) -> Any:
    """A cell of a workbook; dates and times by ISO 8601."""
    return value.isoformat() if hasattr(value, "isoformat") else value


def _of_spreadsheet(path: Path) -> Rows:
    """The first sheet of a workbook of Excel: its first row names the columns."""
    try:
        import openpyxl  # pyright: ignore[reportMissingModuleSource]
    except ImportError:
        raise ConfigError(
            f"{path} is read by openpyxl; install it (pip install 'multimodal-stream[xlsx]'), or save the sheet as CSV"
        ) from None
    if not path.is_file():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no file {path}{did_you_mean(path.name, near)}")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # of a dozen classes
        raise ConfigError(f"{path} cannot be read as a workbook: {type(error).__name__}: {shortened(error)}") from error
    rows = Rows({}, [], [], {"file": path.name, "bytes": path.stat().st_size}, path.parent)
    cells = _Cells(rows)
    lines: Iterator[Sequence[Any]] = iter(book.worksheets[0].iter_rows(values_only=True))
    header = [str(name) for name in next(lines, ()) if name is not None]
    if not header or len(set(header)) < len(header):
        raise ConfigError(
            f"{path}: wanted a first row that names the columns, each once, not {listed(header) or 'nothing'}"
        )
    for number, line in enumerate(lines, 2):
        if all(value is None for value in line):
            continue
        rows.saw += 1
        values = list(map(_as_cell, line[: len(header)]))
        cells.add(f"row {number}", dict(zip(header, values, strict=False)), None)
    if len(book.worksheets) > 1:
        rows.says.append(f"its first sheet is read, of {len(book.worksheets)}")
    cells.finish()
    return rows
