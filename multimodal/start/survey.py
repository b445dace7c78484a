"""Looks at every sample before training: sizes, lengths, broken files, equal samples, answers that contradict each other."""

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.media import read_image, read_sound
from multimodal.progress import progress_bar
from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.start.columns import (
    ANSWER_KINDS,
    ANSWERS,
    READ_KINDS,
    Column,
    answer_column,
    as_media,
    gives_away,
    is_id,
    read_column,
)
from multimodal.start.gather import Rows
from multimodal.texts import listed, shortened

LARGEST = 2**27  # pixels of a picture
SOME_PIXELS = 1000  # that are compared to count the colours of a picture
SUSPECT = 0.3  # the share of equal rows from which on rows repeat by nature
RATES = (8000, 16000)
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WHO = "quick"


@dataclass(frozen=True)
class FieldSeen:
    """A field that is read.

    name: its name in samples.
    kind: the name of its tokenizer: image, audio, series, text or row.
    columns: the columns it is made of, several of a row.
    facts: what the rules need to know of it, as JSON values.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Survey:
    """Samples that can be used, and what was seen of them.

    fields: what is read.
    answer: the field that is answered; its kind is one of ANSWER_KINDS.
    samples: gives the sample of a row.
    used: the numbers of the rows that are used.
    key: by number of a row, a hash of what is read; equal samples have equal ones.
    answers: by number of a row, its answer.
    findings: what a person should know, a line each.
    repeats: whether equal rows are usual in these data.
    measured: fills in the facts of the fields, once it is known which rows are trained on.
    """

    fields: list[FieldSeen]
    answer: FieldSeen
    samples: Callable[[int], dict[str, Any]]
    used: list[int]
    key: dict[int, bytes]
    answers: list[Any]
    group: Column | None = None
    time: list[float] | None = None
    findings: list[str] = field(default_factory=list)
    repeats: bool = False
    measured: Callable[[Sequence[int]], None] = lambda train: None


def survey(
    rows: Rows,
    *,
    read: Sequence[str] = (),
    write: str | None = None,
    group: str | None = None,
    time: str | None = None,
    quiet: bool = False,
) -> Survey:
    """Choose the fields and look at all samples; rows that cannot be used are noted in `rows`.

    read: "column" or "field=column"; a field that is called like a kind is of this kind. write: the same for the answer.

    Raises:
        ConfigError: no such column, nothing to read or to answer, or fewer than two samples that can be used.
    """
    findings = list(rows.says)
    answer_name, answer_from = _named(write if write is not None else _default_answer(rows))
    wanted = answer_name if answer_name in ANSWER_KINDS and write and "=" in write else None
    answer = answer_column(rows, answer_from, "label" if rows.classes else wanted)
    findings += answer.says
    apart = {answer_from, group, time} - {None}
    chosen = [_named(text) for text in read]
    for _, column in chosen:
        if column == answer_from:
            raise ConfigError(f"column {column!r} is read and is the answer; leave it out of one")
        if column in apart:
            findings.append(f"{column} is read, though the parts are made by it")
    columns = _columns(rows, chosen, apart, answer, findings)
    fields = _fields(rows, chosen, columns, findings)
    kinds = {"label": "label", "labels": "label", "number": "number", "text": "text"}
    name = answer_name if write and "=" in write and answer_name not in ANSWER_KINDS else kinds[answer.kind]
    if name in {seen.name for seen in fields}:
        name = "answer"
    found = Survey(
        fields, FieldSeen(name, answer.kind, (answer_from,)), _no_sample, [], {}, answer.cells, findings=findings
    )
    found.samples = _maker(fields, columns, found.answer, answer)
    if group is not None:
        found.group = read_column(rows, group, "category")
    if time is not None:
        found.time = _times(rows, time)
    _look(rows, found, columns, answer, quiet)
    _equal_samples(rows, found)
    return found


def _no_sample(row: int) -> dict[str, Any]:
    return {}


def _default_answer(rows: Rows) -> str:
    for name in ANSWERS:
        for column in rows.columns:
            if column.lower() == name:
                return column
    raise ConfigError(f"say which column is the answer: --write COLUMN; there are {listed(rows.columns)}")


def _named(text: str) -> tuple[str, str]:
    """(field, column) of "field=column" or "column"."""
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{text!r} names no column; give a name, or field=column")
    name, equal, column = text.partition("=")
    if not equal:
        return text, text
    if not WORD.fullmatch(name) or not column:
        raise ConfigError(f"{text!r}: wanted field=column, with a field of letters, digits and underscores")
    return name, column


def _columns(
    rows: Rows, chosen: list[tuple[str, str]], apart: set[Any], answer: Column, findings: list[str]
) -> dict[str, Column]:
    """The columns that are read, each with its kind; those that say nothing are left out unless they were asked for."""
    columns: dict[str, Column] = {}
    if chosen:
        for name, column in chosen:
            wanted = {"row": None}.get(name, name if name in READ_KINDS else None)
            columns[column] = read_column(rows, column, wanted)
            if columns[column].kind == "id":
                columns[column].kind = "text"
            findings += columns[column].says
            if gives_away(columns[column], answer.cells):
                findings.append(f"{column} says the answer one to one; it is read, as it was asked for")
        return columns
    counting: list[Column] = []  # columns that look like ids
    for name in rows.columns:
        if name in apart:
            continue
        try:
            column = read_column(rows, name)
        except ConfigError as error:
            findings.append(f"{name} is left out: {shortened(error, 200)}")
            continue
        why = None
        if column.kind == "id" or is_id(name, column):
            why = "it is another one in each row, as an id is"
            counting += [column] if column.kind == "number" else []
        elif (
            column.kind in ("number", "category")
            and len({cell for cell in column.cells if cell is not None}) < 2
            and not column.missing
        ):
            why = f"it is the same in all rows ({_as_said(column.cells[0])})"
        elif column.kind in ("number", "category", "text") and gives_away(column, answer.cells):
            why = "it says the answer one to one, which no new sample would"
        if why is not None:
            findings.append(f"{name} is left out: {why} (--read takes it all the same)")
            continue
        findings += column.says
        columns[name] = column
    if not columns and counting:
        findings.append(f"{counting[0].name} is read all the same, as there is nothing else")
        return {counting[0].name: counting[0]}
    if not columns:
        raise ConfigError(
            f"no column is left to read{': ' + '; '.join(findings) if findings else ''}; name those to read: --read COLUMN"
        )
    return columns


def _as_said(cell: Any) -> str:
    return f"{cell:g}" if isinstance(cell, float) else shortened(cell, 40)


def _fields(
    rows: Rows, chosen: list[tuple[str, str]], columns: Mapping[str, Column], findings: list[str]
) -> list[FieldSeen]:
    """The fields that samples have: one for each column of media and texts, and one row of all numbers and categories."""
    names = {column: name for name, column in chosen if name != column}
    alone = {name: column for name, column in columns.items() if column.kind not in ("number", "category")}
    counts = Counter(column.kind for column in alone.values())
    fields: list[FieldSeen] = []
    for name, column in alone.items():
        short = names.get(name) or (
            column.kind if counts[column.kind] == 1 else re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
        )
        if not WORD.fullmatch(short) or short in {seen.name for seen in fields}:
            short = f"{column.kind}{len(fields) + 1}"
        fields.append(FieldSeen(short, column.kind, (name,)))
    together = tuple(name for name, column in columns.items() if column.kind in ("number", "category"))
    if together:
        fields.append(FieldSeen("row", "row", together))
    return fields


def _maker(
    fields: Sequence[FieldSeen], columns: Mapping[str, Column], answer: FieldSeen, answers: Column
) -> Callable[[int], dict[str, Any]]:
    def sample(row: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for seen in fields:
            if seen.kind == "row":
                made[seen.name] = {name: columns[name].cells[row] for name in seen.columns}
            else:
                made[seen.name] = as_media(columns[seen.columns[0]].cells[row])
        made[answer.name] = answers.cells[row]
        return made

    return sample


def _times(rows: Rows, name: str) -> list[float]:
    """The column that the parts are made by, as numbers: dates and times of ISO 8601, or numbers."""
    from datetime import datetime

    if name not in rows.columns:
        raise ConfigError(
            f"time: there is no column {name!r}; there are {listed(rows.columns)}{did_you_mean(name, rows.columns)}"
        )
    found = []
    for row, cell in enumerate(rows.columns[name]):
        try:
            if hasattr(cell, "isoformat"):
                cell = cell.isoformat()
            try:
                value = float(cell)
            except ValueError:
                when = datetime.fromisoformat(str(cell).strip())
                value = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(
                f"time: {rows.names[row]} has {shortened(repr(cell), 60)} in column {name!r}; wanted a date such as 2024-05-31, a "
                "time by ISO 8601, or a number"
            )
        found.append(value)
    return found


# every sample once


def _look(rows: Rows, found: Survey, columns: Mapping[str, Column], answer: Column, quiet: bool) -> None:
    """Read everything once: leave out what is broken, and measure the rest."""
    measures: dict[str, Any] = {seen.name: _MEASURES[seen.kind](seen) for seen in found.fields}
    with progress_bar("looking at the data", len(rows), quiet=quiet) as bar:
        for row, name in enumerate(rows.names):
            bar.advance()
            if answer.cells[row] is None:
                rows.leave("without an answer", name)
                continue
            digest, nothing = hashlib.blake2b(digest_size=16), True
            try:
                for seen in found.fields:
                    if seen.kind == "row":
                        value: Any = [columns[column].cells[row] for column in seen.columns]
                        nothing &= all(cell is None for cell in value)
                    else:
                        value = columns[seen.columns[0]].cells[row]
                        nothing &= value is None
                    if value is not None:
                        digest.update(measures[seen.name].add(row, value))
                    digest.update(b"\0")
            except (MediaError, OSError) as error:
                rows.leave("broken", f"{name}: {shortened(error, 200)}")
                continue
            if nothing:
                rows.leave("nothing to read", name)
                continue
            found.used.append(row)
            found.key[row] = digest.digest()
    if len(found.used) < 2:
        why = "; ".join(f"{reason}: {listed(names, 3)}" for reason, names in rows.left_out.items())
        raise ConfigError(
            f"{len(found.used)} samples can be used, and two or more are wanted{'; ' + why if why else ''}"
        )

    def measured(train: Sequence[int]) -> None:
        found.fields = [
            FieldSeen(seen.name, seen.kind, seen.columns, measures[seen.name].facts(columns, found.used, train))
            for seen in found.fields
        ]

    found.measured = measured


def _equal_samples(rows: Rows, found: Survey) -> None:
    """Say which samples are equal, and which of these have different answers."""
    by_key: dict[bytes, list[int]] = defaultdict(list)
    for row in found.used:
        by_key[found.key[row]].append(row)
    equal = [some for some in by_key.values() if len(some) > 1]
    if not equal:
        return
    count = sum(map(len, equal))
    only_rows = all(seen.kind == "row" for seen in found.fields)
    found.repeats = only_rows and count > SUSPECT * len(found.used)
    shown = listed((" = ".join(rows.names[row] for row in some[:3]) for some in equal), 3)
    kept = (
        "rows like these repeat by nature, so they may lie in both parts"
        if found.repeats
        else "equal ones lie in one part"
    )
    found.findings.append(f"{count:,} samples are equal to others, in {len(equal):,} groups ({shown}); {kept}")
    against = [some for some in equal if len({str(found.answers[row]) for row in some}) > 1]
    if against:
        shown = listed(
            (
                " and ".join(f"{rows.names[row]} ({shortened(found.answers[row], 30)})" for row in some[:3])
                for some in against
            ),
            3,
        )
        found.findings.append(
            f"in {len(against):,} groups equal samples have different answers: {shown}; they are kept as they are"
        )


def _bytes_of(value: Any) -> bytes | None:
    """The bytes of an undecoded file; None: it is a value in memory."""
    value = as_media(value)
    if isinstance(value, (str, os.PathLike)):
        if isinstance(value, str) and value.startswith("data:"):
            return value.encode()
        return Path(value).read_bytes()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if hasattr(value, "getvalue"):
        return value.getvalue()
    return None


class _Pictures:
    def __init__(self, seen: FieldSeen) -> None:
        self.sides: dict[int, tuple[int, int]] = {}
        self.moments: dict[int, np.ndarray] = {}  # by row, the mean of each channel and of its square
        self.grey = True
        self.colours: list[float] = []  # of each picture, number of colours by number of pixels

    def add(self, row: int, value: Any) -> bytes:
        data = _bytes_of(value)
        source = as_media(value) if data is None or isinstance(as_media(value), (str, os.PathLike)) else data
        image_CYX = read_image(source, channels=3, max_pixels=LARGEST, who=WHO)
        self.sides[row] = (image_CYX.shape[1], image_CYX.shape[2])
        self.grey = self.grey and bool((image_CYX[0] == image_CYX[1]).all() and (image_CYX[1] == image_CYX[2]).all())
        flat = image_CYX.flatten(1).double()
        few_NC = image_CYX.flatten(1)[:, :: max(1, flat.shape[1] // SOME_PIXELS)].T.numpy()
        self.colours.append(len(np.unique(few_NC, axis=0)) / len(few_NC))
        self.moments[row] = np.stack([flat.mean(1).numpy(), flat.square().mean(1).numpy()])
        return data if data is not None else image_CYX.numpy().tobytes()

    def facts(self, columns: Mapping[str, Column], used: Sequence[int], train: Sequence[int]) -> dict[str, Any]:
        sides = [self.sides[row] for row in used if row in self.sides]
        # each picture of the training part counts the same, whatever its size
        known = [self.moments[row] for row in train if row in self.moments]
        mean, square = np.mean(known, 0) if known else np.array([[0.5] * 3, [0.5] * 3])
        std = np.sqrt(np.maximum(square - mean**2, 1e-4))
        return {
            "height": _spread([height for height, _ in sides]),
            "width": _spread([width for _, width in sides]),
            "longest": _spread([max(pair) for pair in sides]),
            "shortest": min((min(pair) for pair in sides), default=0),
            "pixels": max((height * width for height, width in sides), default=0),
            "grey": self.grey,
            "colours": round(float(np.median(self.colours)), 3) if self.colours else 0.0,
            "mean": [round(x, 3) for x in mean.tolist()],
            "std": [round(x, 3) for x in std.tolist()],
        }


class _Sounds:
    def __init__(self, seen: FieldSeen) -> None:
        self.seconds: list[float] = []
        self.rates: Counter[int] = Counter()

    def add(self, row: int, value: Any) -> bytes:
        import io

        import soundfile

        value, data = as_media(value), _bytes_of(value)
        rate = 16000
        if data is not None:
            try:
                rate = soundfile.info(io.BytesIO(data)).samplerate
            except soundfile.LibsndfileError:
                rate = 16000  # a format that another library reads
        elif isinstance(value, Mapping):
            rate = int(value["sampling_rate"])
        elif isinstance(value, tuple):
            rate = int(value[1])
        wave_S = read_sound(value, rate_hz=rate, who=WHO)
        self.rates[rate] += 1
        self.seconds.append(len(wave_S) / rate)
        return data if data is not None else wave_S.numpy().tobytes()

    def facts(self, columns: Mapping[str, Column], used: Sequence[int], train: Sequence[int]) -> dict[str, Any]:
        rates = {str(rate): count for rate, count in self.rates.most_common(5)}
        return {
            "seconds": _spread(self.seconds),
            "rates": rates,
            "rate": self.rates.most_common(1)[0][0] if rates else 16000,
        }


class _Series:
    def __init__(self, seen: FieldSeen) -> None:
        self.steps: list[int] = []
        self.channels: Counter[int] = Counter()
        self.missing = 0

    def add(self, row: int, value: Any) -> bytes:
        value = as_media(value)
        try:
            array = (
                np.load(value, allow_pickle=False)
                if isinstance(value, (str, os.PathLike))
                else np.asarray(value, dtype=np.float64)
            )
            array = np.asarray(array, dtype=np.float64)
        except (ValueError, TypeError, EOFError) as error:
            raise MediaError(f"{WHO}: it is no array of numbers: {shortened(error)}") from error
        if array.ndim not in (1, 2) or not len(array) or np.isinf(array).any():
            raise MediaError(
                f"{WHO}: an array of shape {array.shape}; wanted (steps,) or (steps, channels) of finite numbers, or NaN"
            )
        channels = 1 if array.ndim == 1 else array.shape[1]
        if self.channels and channels not in self.channels:
            raise MediaError(f"{WHO}: {channels} channels, and those before have {next(iter(self.channels))}")
        self.steps.append(len(array))
        self.channels[channels] += 1
        self.missing += int(np.isnan(array).sum())
        return array.tobytes()

    def facts(self, columns: Mapping[str, Column], used: Sequence[int], train: Sequence[int]) -> dict[str, Any]:
        return {"steps": _spread(self.steps), "channels": next(iter(self.channels), 1), "missing": self.missing}


class _Texts:
    def __init__(self, seen: FieldSeen) -> None:
        self.sizes: list[int] = []
        self.words: list[int] = []

    def add(self, row: int, value: Any) -> bytes:
        try:
            data = value.encode()
        except UnicodeEncodeError as error:
            raise MediaError(f"{WHO}: the text is not valid Unicode: {error}") from error
        self.sizes.append(len(data))
        self.words.append(len(value.split()))
        return data

    def facts(self, columns: Mapping[str, Column], used: Sequence[int], train: Sequence[int]) -> dict[str, Any]:
        return {"bytes": _spread(self.sizes), "words": _spread(self.words), "total": sum(self.sizes)}


class _Table:
    def __init__(self, seen: FieldSeen) -> None:
        self.columns = seen.columns

    def add(self, row: int, value: Any) -> bytes:
        return repr(value).encode()

    def facts(self, columns: Mapping[str, Column], used: Sequence[int], train: Sequence[int]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.columns:
            there = [cell for row in used if (cell := columns[name].cells[row]) is not None]
            entry: dict[str, Any] = {"kind": columns[name].kind, "missing": len(used) - len(there)}
            if columns[name].kind == "number":
                entry |= _spread(there)
            else:
                entry["categories"] = len(set(there))
            found[name] = entry
        return {"columns": found}


_MEASURES = {"image": _Pictures, "audio": _Sounds, "series": _Series, "text": _Texts, "row": _Table}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """The least, the middle and the largest of some numbers."""
    if not values:
        return {"least": 0, "middle": 0, "most": 0}
    ordered = sorted(values)
    return {"least": _short(ordered[0]), "middle": _short(ordered[len(ordered) // 2]), "most": _short(ordered[-1])}


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
