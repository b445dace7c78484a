"""What each column of a table is: pictures, sounds, series, texts, numbers, categories or ids; and what is answered."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.data.folders import KINDS
from multimodal.shapes import ConfigError, did_you_mean, is_number
from multimodal.start.gather import Later, Rows
from multimodal.texts import listed, shortened

READ_KINDS = ("image", "audio", "series", "text", "number", "category")
ANSWER_KINDS = ("label", "labels", "number", "text")
ANSWERS = ("label", "labels", "class", "target", "category", "answer", "y")
"""Names of columns that are the answer where none is named; the first of them that is there."""
SUFFIXES = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes} | {".npy": "series"}
MISSING = frozenset(("na", "n/a", "nan", "null", "none", "?", "-", "missing", "unknown"))
"""Words that stand for a missing value in a column whose other cells are numbers."""
PLAIN = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
THOUSANDS = re.compile(r"\s*[-+]?\d{1,3}(,\d{3})+(\.\d+)?\s*")
DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,\d+\s*")
MOSTLY = 0.9  # the share of numbers from which on the other cells of a column are strays
FEW = 50  # different texts that are categories whatever their number of rows
SHORT = 60  # characters of the longest usual category
LOOKED_AT = 5000  # cells that decide what texts are
FEW_NUMBERS = 20  # different whole numbers to answer that are classes


@dataclass
class Column:
    """A column as it is read.

    kind: one of READ_KINDS or ANSWER_KINDS.
    cells: its values, as samples have them; None: missing.
    says: what was decided, a line each.
    """

    name: str
    kind: str
    cells: list[Any]
    says: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        return sum(cell is None for cell in self.cells)


def read_column(rows: Rows, name: str, wanted: str | None = None) -> Column:
    """A column that is read. wanted: its kind, if the user said so.

    Raises:
        ConfigError: the column is not there, holds nothing, or cannot be of this kind.
    """
    cells = [None if _is_missing(cell) else cell for cell in _cells(rows, name)]
    there = [cell for cell in cells if cell is not None]
    if not there:
        raise ConfigError(f"column {name!r} holds nothing in {len(cells):,} rows; leave it out")
    kind = _kind_of_media(there, rows) or _kind_of_values(there)
    if kind is None and (found := _numbers(name, cells, rows.untyped)) is not None:
        kind, column = "number", found
    else:
        column = Column(name, "", cells)
    if kind is None:
        kind = _kind_of_texts(there)
    if wanted is None and kind == "series" and name == "image":  # a grey picture has two axes, as a series has
        kind = "image"
    if wanted is not None:
        _check_wanted(name, wanted, kind, there)
        kind = wanted
        if wanted in ("text", "category"):
            column = Column(name, "", [None if cell is None else _as_text(cell) for cell in cells])
    column.kind = kind
    if kind in ("image", "audio", "series"):
        column.cells = [_as_path(cell, rows.beside) for cell in column.cells]
    elif kind == "text":
        column.cells = [None if cell is None else str(cell) for cell in column.cells]
    elif kind == "category":
        column.cells = [None if cell is None else _as_text(cell) for cell in column.cells]
    return column


def answer_column(rows: Rows, name: str, wanted: str | None = None) -> Column:
    """The column that is answered. wanted: its kind, if the user said so.

    Raises:
        ConfigError: the column is not there, holds nothing, or cannot be answered.
    """
    cells = [None if _is_missing(cell) else cell for cell in _cells(rows, name)]
    there = [cell for cell in cells if cell is not None]
    if not there:
        raise ConfigError(f"the column to answer, {name!r}, holds nothing in {len(cells):,} rows")
    several = [isinstance(cell, (list, tuple, np.ndarray)) for cell in there]
    if any(several):
        if not all(several) or not all(isinstance(one, (str, int, np.integer)) for cell in there for one in cell):
            raise ConfigError(
                f"the column to answer, {name!r}, has lists that are not all of names, such as {shortened(repr(there[0]), 80)}"
            )
        return Column(name, "labels", [None if cell is None else [str(one) for one in cell] for cell in cells])
    if not all(isinstance(cell, (str, bool, np.bool_)) or is_number(cell) for cell in there):
        wrong = next(cell for cell in there if not isinstance(cell, (str, bool, np.bool_)) and not is_number(cell))
        raise ConfigError(
            f"the column to answer, {name!r}, has {type(wrong).__name__}; wanted names, numbers, texts or lists of names"
        )
    numbers = None if any(isinstance(cell, (bool, np.bool_)) for cell in there) else _numbers(name, cells, rows.untyped)
    if numbers is not None and wanted in (None, "number"):
        values = [cell for cell in numbers.cells if cell is not None]
        whole = all(float(value).is_integer() for value in values)
        if wanted == "number" or not whole or len(set(values)) > FEW_NUMBERS:
            numbers.kind = "number"
            return numbers
    if wanted == "number":
        raise ConfigError(
            f"the column to answer, {name!r}, has cells that are no numbers, such as {shortened(repr(there[0]), 60)}"
        )
    texts = [None if cell is None else _as_text(cell).strip() or None for cell in cells]
    count = Counter(text for text in texts if text is not None)
    long = sum(len(text) > SHORT for text in count) > len(count) / 10
    total = sum(count.values())
    # a class has two samples or more, on average
    many = len(count) > max(FEW, total // 5) or (total >= 10 and 2 * len(count) > total)
    kind = wanted or ("text" if long or many else "label")
    return Column(name, kind, [None if cell is None else _as_text(cell) for cell in cells] if kind == "text" else texts)


def _cells(rows: Rows, name: str) -> list[Any]:
    if name not in rows.columns:
        raise ConfigError(
            f"there is no column {name!r}; there are {listed(rows.columns)}{did_you_mean(name, rows.columns)}"
        )
    return rows.columns[name]


def _is_missing(cell: Any) -> bool:
    return (
        cell is None
        or (isinstance(cell, (float, np.floating)) and cell != cell)
        or (isinstance(cell, str) and not cell.strip())
    )


def _as_text(cell: Any) -> str:
    """A cell as the name of a class or category; 1.0, as columns with gaps have it, is 1."""
    if is_number(cell) and float(cell).is_integer() and abs(float(cell)) < 2**53:
        return str(int(cell))
    return str(cell)


def _as_path(cell: Any, beside: Path) -> Any:
    if isinstance(cell, (str, os.PathLike)) and not (isinstance(cell, str) and cell.startswith("data:")):
        return os.path.abspath(beside / cell)
    return cell


def _kind_of_media(there: Sequence[Any], rows: Rows) -> str | None:
    """The kind of files whose paths are in these cells, or of media in memory; None: they are neither."""
    some = there[:LOOKED_AT]
    if all(isinstance(cell, (str, os.PathLike)) for cell in some):
        kinds = Counter(SUFFIXES.get(os.path.splitext(cell)[1].lower()) for cell in some)
        kind, count = kinds.most_common(1)[0]
        if kind is None or count < MOSTLY * len(some):
            return None
        # a text may end like a file; files are there, at least some
        return (
            kind
            if any((rows.beside / cell).exists() for cell in some[:1000]) or isinstance(some[0], os.PathLike)
            else None
        )
    first = some[0]
    if isinstance(first, Later):
        return _kind_of_file(first.load())
    if hasattr(first, "getbands") or (
        isinstance(first, np.ndarray) and first.dtype == np.uint8 and first.ndim in (2, 3)
    ):
        return "image"
    if isinstance(first, Mapping) and {"array", "sampling_rate"} <= set(first):
        return "audio"
    if isinstance(first, tuple) and len(first) == 2 and is_number(first[1]) and hasattr(first[0], "shape"):
        return "audio"
    if hasattr(first, "read") or isinstance(first, (bytes, Mapping)):
        return _kind_of_file(first)
    return None


def _kind_of_file(value: Any) -> str:
    """Whether an undecoded file is a picture or a sound."""
    from multimodal.media import read_image
    from multimodal.shapes import MediaError

    try:
        read_image(as_media(value), channels=3, max_pixels=2**27, who="quick")
    except MediaError:
        return "audio"
    return "image"


def as_media(value: Any) -> Any:
    """A value as a tokenizer takes it: Hugging Face's mapping of bytes and path as the bytes or the path."""
    if isinstance(value, Later):
        value = value.load()
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


def _kind_of_values(there: Sequence[Any]) -> str | None:
    """The kind of cells that are no texts or numbers; None: they are."""
    first = there[0]
    if isinstance(first, (list, tuple, np.ndarray)):
        try:
            array = np.asarray(first, dtype=np.float64)
        except (ValueError, TypeError):
            array = np.zeros(())
        if array.ndim in (1, 2):
            return "series"
        raise ConfigError(
            f"cells such as {shortened(repr(first), 60)} are neither series of numbers, pictures nor texts; leave the column out"
        )
    if isinstance(first, Mapping):
        raise ConfigError(
            f"cells such as {shortened(repr(first), 60)} are mappings; leave the column out, or make a column of each key"
        )
    if all(isinstance(cell, (bool, np.bool_)) for cell in there):
        return "category"
    return None


def _numbers(name: str, cells: Sequence[Any], untyped: bool) -> Column | None:
    """The column as numbers; None: it is none of numbers. Texts are numbers only in tables whose cells are all texts."""
    there = [cell for cell in cells if cell is not None]
    if not untyped:
        if not all(is_number(cell) for cell in there):
            return None
        return Column(name, "number", [None if cell is None else _number(cell) for cell in cells])
    texts = [str(cell).strip() for cell in there]
    known = [text for text in texts if text.lower() not in MISSING]
    if not known:
        return None
    commas = sum("," in text for text in known)
    reads = float
    says = []
    if commas and all(THOUSANDS.fullmatch(text) or PLAIN.fullmatch(text) for text in known):
        reads = lambda text: float(text.replace(",", ""))  # noqa: E731
        says.append(f"{name}: commas are read as those between thousands, as in {next(t for t in known if ',' in t)}")
    elif commas and all(DECIMAL_COMMA.fullmatch(text) or re.fullmatch(r"\s*[-+]?\d+\s*", text) for text in known):
        reads = lambda text: float(text.replace(",", "."))  # noqa: E731
        says.append(f"{name}: commas are read as decimal ones, as in {next(t for t in known if ',' in t)}")
    values: list[Any] = []
    strays: list[str] = []
    for cell in cells:
        text = "" if cell is None else str(cell).strip()
        try:
            value = reads(text) if text else None
        except ValueError:
            value = None
            if text.lower() not in MISSING:
                strays.append(text)
        values.append(None if value is None or not np.isfinite(value) else value)
    if sum(value is not None for value in values) < MOSTLY * len(known) or len(strays) == len(known):
        return None
    words = Counter(text for text in texts if text.lower() in MISSING)
    if words:
        says.append(f"{name}: {sum(words.values()):,} cells ({listed(map(repr, words), 4)}) are read as missing")
    if strays:
        says.append(
            f"{name}: {len(strays):,} cells are no numbers ({listed(map(repr, dict.fromkeys(strays)), 4)}) and are read as missing"
        )
    return Column(name, "number", values, says)


def _number(cell: Any) -> Any:
    value = cell.item() if hasattr(cell, "item") else cell
    return value if np.isfinite(float(value)) else None


def _kind_of_texts(there: Sequence[Any]) -> str:
    """ "category", "id" or "text"."""
    some = [str(cell) for cell in there[:LOOKED_AT]]
    count = len(set(some))
    spaces = sum(" " in text.strip() for text in some) / len(some)
    length = sorted(map(len, some))[len(some) // 2]
    if len(some) > 20 and count == len(some) and spaces < 0.05 and length <= SHORT:
        return "id"
    usual = length <= SHORT and (
        count <= max(FEW, len(some) // 10) if len(some) > 100 else count <= max(5, len(some) // 3)
    )
    return "category" if usual else "text"


def _check_wanted(name: str, wanted: str, kind: str, there: Sequence[Any]) -> None:
    arrays = ("image", "series")  # which of both an array with two axes is, only its owner knows
    if (
        wanted == kind
        or (wanted in arrays and kind in arrays)
        or (wanted in ("text", "category") and kind in ("text", "category", "number", "id"))
    ):
        return
    raise ConfigError(
        f"column {name!r} is asked for as {wanted}, and looks like {kind}: {shortened(repr(there[0]), 80)}"
    )


def is_id(name: str, column: Column) -> bool:
    """Whether a column of numbers counts the rows: whole numbers, each once, that rise by one; or all different and named id."""
    values = [cell for cell in column.cells if cell is not None]
    if column.kind != "number" or len(values) < 20 or len(set(values)) < len(values):
        return False
    if not all(float(value).is_integer() for value in values):
        return False
    steps = {b - a for a, b in pairwise(values)}
    return steps == {1} or re.search(r"(^|[\W_])(id|index|nr|number|key)$", name.lower()) is not None


def gives_away(column: Column, answer: Sequence[Any]) -> bool:
    """Whether the cells of a column say the answer one to one: each answer has one cell, and each cell one answer."""
    if any(isinstance(value, list) for value in answer):
        return False
    if column.kind == "number" and all(value is None or is_number(value) for value in answer):
        both = [
            (float(a), float(b)) for a, b in zip(column.cells, answer, strict=True) if a is not None and b is not None
        ]
        x, y = np.array(both).T if both else np.zeros((2, 0))
        spread = len(both) >= 10 and x.std() > 0 and y.std() > 0
        return bool(spread and abs(np.corrcoef(x, y)[0, 1]) > 1 - 1e-9)
    pairs = {
        (str(cell), str(value))
        for cell, value in zip(column.cells, answer, strict=True)
        if cell is not None and value is not None
    }
    left, right = {a for a, _ in pairs}, {b for _, b in pairs}
    known = sum(cell is not None for cell in column.cells)
    return known >= 10 and len(pairs) == len(left) == len(right) > 1 and len(pairs) * 2 <= known
