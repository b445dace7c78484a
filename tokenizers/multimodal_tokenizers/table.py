"""Rows of a table: numbers, categories and missing values, one token for each column."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError, MediaError, check_number, check_whole, did_you_mean, is_number
from multimodal.texts import listed, repeated, shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal_tokenizers.labels import names_a_class
from multimodal_tokenizers.scaling import far_apart, mean_and_std, scaled

VALUE, MISSING, COLUMN = range(3)  # the features of a token
BOUND = 3.0  # the linear part of a number's embedding levels off towards this many standard deviations
FEW = 20  # so many different texts are categories even if every row has another


@dataclass(frozen=True)
class Column(Declared):
    """A column of a table: of categories if `categories` are given, else of numbers.

    name: its name, the key of its value in a row.
    mean: subtracted from numbers.
    std: the divisor of numbers after that.
    edges: rising edges of bins, in the units of the column, where the piecewise linear embedding bends; (): it is linear.
    categories: the names of the categories.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    edges: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"Column {shortened(repr(self.name), 60)}"
        for field in ("edges", "categories"):
            if isinstance(getattr(self, field), str) or not isinstance(getattr(self, field), Iterable):
                raise ConfigError(f"{where}: {field}={shortened(repr(getattr(self, field)), 60)} is not a tuple")
            object.__setattr__(self, field, tuple(getattr(self, field)))
        object.__setattr__(self, "name", str(self.name))
        check_number(where, mean=self.mean, std=self.std, **{f"edges[{i}]": x for i, x in enumerate(self.edges)})
        for field, number in (("mean", float(self.mean)), ("std", float(self.std))):
            object.__setattr__(self, field, number)
        object.__setattr__(self, "edges", tuple(map(float, self.edges)))
        texts = tuple(map(_category, self.categories))
        if None in texts:
            wrong = self.categories[texts.index(None)]
            raise ConfigError(f"{where}: {describe(wrong)} cannot be the name of a category; give a text")
        object.__setattr__(self, "categories", texts)
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ConfigError(f"{where}: mean={self.mean} must be finite, and std={self.std} more than 0")
        if any(not a < b for a, b in zip(self.edges, self.edges[1:], strict=False)) or len(self.edges) == 1:
            raise ConfigError(f"{where}: edges={listed(self.edges)} must be two or more rising numbers, or none")
        if self.edges and self.categories:
            raise ConfigError(f"{where}: edges are for numbers, and categories are given too; give one of them")
        if twice := repeated(self.categories):
            raise ConfigError(f"{where}: categories occur twice: {listed(twice)}")


@dataclass(frozen=True)
class TableRow(Tokenizer):
    """A row, as a mapping from column to value; None, NaN and columns that are left out are missing values.

    Make one with `TableRow.of(frame)`, from the rows to train on. A token is (value, whether it is missing, index of the column),
    where the value is a standardised number or the index of a category. Each column has weights of its own: a number is embedded by
    a linear and a piecewise linear function (Gorishniy et al. 2022, equation 1), a category and a missing value by a vector.

    columns: the columns, in the order of the tokens.
    unseen: whether categories that a column does not name are read, all as the same one; if not, they are refused.

    Examples:
        >>> rows = [{"age": 31, "sex": "female"}, {"age": None, "sex": "male"}, {"age": 40, "sex": "male"}]
        >>> table = TableRow.of(rows)
        >>> [column.categories for column in table.columns]
        [(), ('female', 'male')]
        >>> table.decode(table({"age": 40, "sex": None}))
        {'age': 40.0, 'sex': None}
    """

    columns: tuple[Column, ...]
    unseen: bool = False
    feature_size = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        if not self.columns or not all(isinstance(column, Column) for column in self.columns):
            raise ConfigError("TableRow: columns must be one Column or more; TableRow.of(rows) makes them")
        if twice := repeated(column.name for column in self.columns):
            raise ConfigError(f"TableRow: columns have the same name: {listed(twice)}")

    @classmethod
    def of(
        cls, rows: Any, *, categories: Iterable[str] = (), bins: int = 8, rarest: int = 1, unseen: bool | None = None
    ) -> Self:
        """Make one for the columns of these rows: a DataFrame of pandas or polars, a table of Arrow, or a list of mappings.

        Columns of numbers are read as numbers; those of texts, truth values and pandas' categories as categories.

        categories: names of further columns to read as categories, such as numeric codes.
        bins: number of bins of each column of numbers, of about equally many rows each; 0: none.
        rarest: a category of fewer rows is read as an unseen one, so that the vector of unseen ones is trained on rare ones.
        unseen: as the field; None: True if there was a category that rare.

        Raises:
            ConfigError: a column has no value, values that are neither, or too many categories; the message names it.
        """
        check_whole("TableRow.of", least=0, bins=bins)
        check_whole("TableRow.of", least=1, rarest=rarest)
        by_name = _columns(rows)
        named = {str(name) for name in ([categories] if isinstance(categories, str) else categories)}
        if hasattr(getattr(rows, "dtypes", None), "items"):  # a DataFrame of pandas
            named |= {str(name) for name, kind in rows.dtypes.items() if str(kind) == "category"}
        if unknown := sorted(named - set(by_name)):
            raise ConfigError(
                f"TableRow.of: categories names {unknown[0]!r}, but the columns are {listed(by_name)}"
                f"{did_you_mean(unknown[0], by_name)}"
            )
        columns, dropped = [], False
        for name, values in by_name.items():
            there = [value for value in values if not _is_missing(value)]
            if not there:
                raise ConfigError(f"TableRow.of: column {name!r} has no value in {len(values)} rows; leave it out")
            if name not in named and all(map(is_number, there)):
                columns.append(_of_numbers(name, there, bins))
                continue
            count = _counted(name, there)
            if name not in named and len(count) > max(FEW, len(there) // 2):
                raise ConfigError(
                    f"TableRow.of: column {name!r} has {len(count)} different texts in {len(there)} rows, too many for categories; "
                    f"leave it out, read it by a tokenizer of its own, or say categories=({name!r},)"
                )
            frequent = sorted((text for text in count if count[text] >= rarest), key=_order)
            if not frequent:
                raise ConfigError(
                    f"TableRow.of: no category of column {name!r} has {rarest} rows; leave out the column, or rarest"
                )
            dropped |= len(frequent) < len(count)
            columns.append(Column(name, categories=tuple(frequent)))
        return cls(tuple(columns), dropped if unseen is None else unseen)

    @property
    def length(self) -> int:
        return len(self.columns)

    @property
    def written_features(self) -> int:
        return COLUMN

    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        return torch.cat([features_NF, position_NA[:, :1].to(features_NF)], 1)

    def encode(self, value: Any) -> Tokens:
        of_frame = hasattr(value, "items") and len(getattr(value, "shape", ())) == 1  # a row of a DataFrame
        entries = [*value.items()] if of_frame or isinstance(value, Mapping) else []
        if not entries:
            raise MediaError(f"TableRow.encode: wanted a mapping from column to value, not {describe(value)}")
        row = {str(name): x for name, x in entries}
        if len(row) < len(entries):
            twice = repeated(str(name) for name, _ in entries)
            raise MediaError(f"TableRow.encode: the column {shortened(repr(twice[0]), 60)} is there twice; rename one")
        names = {column.name: i for i, column in enumerate(self.columns)}
        if unknown := [name for name in row if name not in names]:
            raise MediaError(
                f"TableRow.encode: there is no column {shortened(repr(unknown[0]), 60)}; there are {listed(names)}"
                f"{did_you_mean(unknown[0], names)}"
            )
        features = []
        for i, column in enumerate(self.columns):
            x = row.get(column.name)
            missing = _is_missing(x)
            features.append((0.0 if missing else self._number(column, x), float(missing), float(i)))
        content_NF = torch.tensor(features, dtype=torch.float64).float()
        return Tokens(content_NF, self.places(len(names)))

    def _number(self, column: Column, value: Any) -> float:
        """The first feature of a value that is not missing."""
        where = f"TableRow.encode: column {column.name!r}"
        if column.categories:
            name = _category(value)
            if name in column.categories:
                return float(column.categories.index(name))
            if name is not None and self.unseen:
                return float(len(column.categories))
            hint = ""
            if name is not None:
                hint = did_you_mean(name, column.categories) + "; TableRow(.., unseen=True) reads others"
            raise MediaError(f"{where} is {describe(value)}, wanted one of {listed(column.categories)}{hint}")
        if not is_number(value) or not math.isfinite(_as_float(value)):
            raise MediaError(f"{where} is {describe(value)}, wanted a finite number, or None where it is missing")
        return (_as_float(value) - column.mean) / column.std

    def decode(self, tokens: Tokens) -> dict[str, Any]:
        """The row. What a model writes that is no number, such as NaN, is missing."""
        found: dict[str, Any] = {}
        for column, (x, missing) in zip(self.columns, tokens.content[:, :COLUMN].tolist(), strict=False):
            if missing > 0.5 or not math.isfinite(x):
                found[column.name] = None
            elif column.categories:  # an unseen one has no name
                found[column.name] = dict(enumerate(column.categories)).get(max(round(x), 0))
            else:
                found[column.name] = x * column.std + column.mean
        return found

    def token_names(self, tokens: Tokens) -> list[str]:
        """The names of the columns."""
        return [self.columns[round(time)].name for time in tokens.position_NA[:, 0].tolist()]

    def embed(self, width: int) -> nn.Module:
        return _Embedding(self.columns, width)

    def examples(self) -> list[dict[str, Any]]:
        """Rows for the conformance checks."""
        rows = []
        for i, missing in enumerate((-1, 0, -1, len(self.columns) - 1)):
            row: dict[str, Any] = {}
            for j, column in enumerate(self.columns):
                names = column.categories
                value = names[(i + j) % len(names)] if names else column.mean + (i - 1.3 + j % 3) * column.std
                row[column.name] = None if j == missing else value
            rows.append(row)
        return rows


class _Embedding(nn.Module):
    """A vector of the column plus one of the value: linear and piecewise linear in a number, looked up for a category.

    A missing value has another vector of its column instead. What lies between two categories, as models may write it, gets a
    vector between theirs.
    """

    full_precision = True  # bfloat16 would round the indices of columns and categories
    matrices = ("slope_ND",)

    edges_NF: Tensor
    rows_2N: Tensor

    def __init__(self, columns: tuple[Column, ...], width: int) -> None:
        super().__init__()
        self.bins = max(
            1, *(len(column.edges) for column in columns)
        )  # the number itself, and the bins between the edges
        # infinite edges are never reached
        edges_NF = torch.full((len(columns), self.bins), math.inf)
        rows, total = [], 0  # of each column of categories: its first row of the table, and how many they are
        for i, column in enumerate(columns):
            edges = torch.tensor(column.edges, dtype=torch.float64)
            edges_NF[i, : len(edges)] = (edges - column.mean) / column.std
            rows.append((total, len(column.categories)) if column.categories else (0, 0))
            total += len(column.categories) + 1 if column.categories else 0  # one more row for unseen ones
        self.register_buffer("edges_NF", edges_NF, persistent=False)
        self.register_buffer("rows_2N", torch.tensor(rows).T.contiguous(), persistent=False)
        # two vectors of each column: if its value is there, and if it is missing
        self.column = nn.Embedding(2 * len(columns), width)
        nn.init.normal_(self.column.weight, std=0.1)
        if not all(column.categories for column in columns):
            slope = torch.randn(len(columns), self.bins, width) * 0.02
            slope[:, 0] *= 5  # of the number itself; the others are of the bins
            self.slope_ND = nn.Parameter(slope.flatten(0, 1))
        if total:
            self.category = nn.Embedding(total, width)
            nn.init.normal_(self.category.weight, std=0.1)
            with torch.no_grad():  # an unseen category adds nothing until it has learned from rare ones
                ends = [first + count for first, count in rows if count]
                self.category.weight[ends] = 0.0

    def forward(self, content_NF: Tensor) -> Tensor:
        value_N, missing_N1, column_N = content_NF[:, VALUE], content_NF[:, MISSING, None], content_NF[:, COLUMN]
        column_N = column_N.round().clamp(0, len(self.edges_NF) - 1).long()
        first_N, count_N = F.embedding(column_N, self.rows_2N.T).unbind(1)
        parts = self.column(2 * column_N)
        if hasattr(self, "slope_ND"):
            index_NF = column_N[:, None] * self.bins + torch.arange(self.bins, device=column_N.device)
            bent_NF = self._bent(value_N, column_N) * (count_N == 0)[:, None]
            parts = parts + torch.einsum("nf,nfd->nd", bent_NF.to(parts), F.embedding(index_NF, self.slope_ND))
        if hasattr(self, "category"):
            last_N = first_N + count_N
            at_N = first_N + torch.minimum(value_N.clamp(min=0), count_N.to(value_N))
            low_N = torch.minimum(at_N.floor().long(), last_N)
            rows = torch.lerp(
                self.category(low_N), self.category(torch.minimum(low_N + 1, last_N)), (at_N - low_N)[:, None].to(parts)
            )
            parts = parts + rows * (count_N > 0)[:, None]
        return torch.lerp(parts, self.column(2 * column_N + 1), missing_N1.to(parts))

    def _bent(self, value_N: Tensor, column_N: Tensor) -> Tensor:
        """(N, F) the number, levelling off towards BOUND, and the share of each bin that is below it."""
        near_N = value_N.clamp(-1e9, 1e9)  # the square of what is farther away may be infinite
        straight_N = near_N / (1 + (near_N / BOUND).square()).sqrt()
        edge_NF = F.embedding(column_N, self.edges_NF)
        low_NF, high_NF = edge_NF[:, :-1], edge_NF[:, 1:]
        low_NF = low_NF.masked_fill(low_NF.isinf(), 0.0)
        width_NF = (high_NF - low_NF).clamp(min=1e-30)  # edges that float32 cannot tell apart are a step
        return torch.cat([straight_N[:, None], ((value_N[:, None] - low_NF) / width_NF).clamp(0, 1)], 1)


def _columns(rows: Any) -> dict[str, list[Any]]:
    """{column: its values}; rows that lack a column have None."""
    library = type(rows).__module__.partition(".")[0]
    if library == "pandas" and hasattr(rows, "to_dict"):
        _check_once(rows.columns)
        rows = rows.to_dict("records")
    elif library == "polars" and hasattr(rows, "to_dicts"):
        rows = rows.to_dicts()
    elif library == "pyarrow" and hasattr(rows, "to_pylist"):
        _check_once(rows.column_names)
        rows = rows.to_pylist()
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise ConfigError(f"TableRow.of: wanted a DataFrame or a list of mappings, not {describe(rows)}")
    rows = list(rows)
    for row in rows:
        if not isinstance(row, Mapping):
            raise ConfigError(f"TableRow.of: wanted a mapping from column to value for each row, not {describe(row)}")
    names = dict.fromkeys(name for row in rows for name in row)
    if not names:
        raise ConfigError("TableRow.of: there are no rows, or they have no columns")
    _check_once(names)  # 1 and "1" are one
    return {str(name): [row.get(name) for row in rows] for name in names}


def _check_once(names: Iterable[Any]) -> None:
    if twice := repeated(map(str, names)):
        raise ConfigError(
            f"TableRow.of: there are two columns {shortened(repr(twice[0]), 60)}; rename one, or leave it out"
        )


def _of_numbers(name: str, values: list[Any], bins: int) -> Column:
    numbers = np.array([*map(_as_float, values)])
    if not np.isfinite(numbers).all():
        raise ConfigError(
            f"TableRow.of: column {name!r} has an infinite number; replace it, by None where it is missing"
        )
    mean, std = mean_and_std(numbers)
    if far_apart(
        numbers, mean, std
    ):  # then the middle counts: the median of the different numbers, and of their distances
        different = np.unique(numbers)
        mean = float(np.median(different))
        std = 1.4826 * float(np.median(np.abs(different - mean)))  # as a standard deviation
    with np.errstate(over="ignore", invalid="ignore"):
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1))) if bins else np.zeros(0)
    if not np.isfinite([mean, std, *edges]).all():
        raise ConfigError(f"TableRow.of: column {name!r} has numbers that are too large; divide them first")
    edges = edges[np.unique(scaled(edges, mean, std), return_index=True)[1]]
    return Column(name, mean, std, tuple(edges.tolist()) if len(edges) > 1 else ())


def _counted(name: str, values: list[Any]) -> Counter[str]:
    """How often each category occurs in a column."""
    count: Counter[str] = Counter()
    for value in values:
        if (text := _category(value)) is None:
            raise ConfigError(
                f"TableRow.of: column {name!r} has {describe(value)}, which is no number and no category; make numbers or texts of "
                "it, or leave the column out"
            )
        count[text] += 1
    return count


def _is_missing(value: Any) -> bool:
    # by the names of pandas' own, since pandas is not imported for them
    if value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and value != value


def _as_float(value: Any) -> float:
    """A number; infinity where it is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _category(value: Any) -> str | None:
    """The name of a category; None: the value cannot be one. 3.0 is '3', as pandas makes floats of codes if some are missing."""
    if names_a_class(value):
        return str(value)
    # as int, since float would round what is longer than its digits
    return str(math.trunc(value)) if isinstance(value, Real) and _as_float(value).is_integer() else None


def _order(name: str) -> tuple[bool, float, str]:
    """Sorts categories: first numbers, by their size, then texts."""
    digits = name.removeprefix("-").isdecimal()
    return not digits, float(name) if digits else 0.0, name
