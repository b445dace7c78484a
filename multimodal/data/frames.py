"""Tables in memory (DataFrames of pandas and polars, tables of Arrow) as samples, and the class names in their schema."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from multimodal.shapes import ConfigError, MediaError
from multimodal.texts import listed, repeated


class Frame:
    """The rows of a DataFrame or of an Arrow table by position, as {column: value}; a missing value is None.

    Raises:
        ConfigError: column names that are no str, or that repeat.
    """

    def __init__(self, table: Any, library: str) -> None:
        self.library, self.size, self.features = library, len(table), {}
        if library == "pyarrow":
            names, self.features = table.schema.names, class_features(table.schema.metadata)
        else:
            names = list(table.columns)
        check_columns(f"a table of {library}", names)
        # columns of pandas, because a row of pandas has one type for all cells
        self.table: Any = {name: table[name].array for name in names} if library == "pandas" else table

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.size <= index < self.size:
            raise IndexError(f"there is no row {index}; there are {self.size}")
        index = int(index) % self.size
        if self.library == "pandas":
            row = {name: column[index] for name, column in self.table.items()}
        elif self.library == "polars":
            row = self.table.row(index, named=True)
        else:
            row = self.table.slice(index, 1).to_pylist()[0]
        return {name: named(self.features.get(name), _cell(value), name) for name, value in row.items()}


def as_samples(source: Any) -> Any:
    """A DataFrame of pandas or polars, or a table of Arrow, as samples; any other source unchanged."""
    for kind in type(source).__mro__:  # includes subclasses, such as that of geopandas
        name = kind.__module__.partition(".")[0], kind.__name__
        if name in (("pandas", "DataFrame"), ("polars", "DataFrame"), ("pyarrow", "Table"), ("pyarrow", "RecordBatch")):
            return Frame(source, name[0])
        if name in (("pandas", "Series"), ("polars", "Series")):  # [i] of pandas looks up the index, not the position
            return list(source)
        if name == ("polars", "LazyFrame"):
            raise ConfigError("a LazyFrame of polars has not been read; give what its collect() returns")
    return source


def check_columns(where: str, names: list[Any]) -> None:
    """Raise a ConfigError for columns without a name or with the same name."""
    if unnamed := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(f"{where} has columns without a name: {listed(unnamed)}; give each column a text as its name")
    if twice := repeated(names):
        raise ConfigError(f"{where} has several columns of one name: {listed(twice)}; rename them")


def _cell(value: Any) -> Any:
    """A cell as a Python value; NaN, NA and NaT become None."""
    if isinstance(value, (np.number, np.bool_)):
        value = value.item()
    missing = isinstance(value, float) and value != value
    return None if missing or type(value).__name__ in ("NAType", "NaTType") else value


def class_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features by column in the schema of a table that Hugging Face `datasets` wrote; {} for any other table.

    Raises:
        ConfigError: the description cannot be read; without it classes would be bare numbers.
    """
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        if isinstance(features, dict):
            return features
        raise TypeError("features are no mapping")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"the schema's description by Hugging Face datasets cannot be read ({type(error).__name__}), and it may name classes; "
            "write the table again without it: table.replace_schema_metadata(None)"
        ) from error


def named(feature: Any, value: Any, where: str) -> Any:
    """A value whose class numbers are replaced by class names, at any depth; class -1 (unknown) becomes None.

    feature: the description by `datasets`: {"_type": "ClassLabel", "names": [..]}, or lists and mappings of such.

    Raises:
        MediaError: a number without a class name.
    """
    if value is None or not isinstance(feature, (dict, list)):
        return value
    if isinstance(feature, list):  # the form of a list in older versions
        feature = {"_type": "List", "feature": feature[0] if feature else None}
    names, described = feature.get("names"), isinstance(feature.get("_type"), str)
    if feature.get("_type") == "ClassLabel" and isinstance(names, list):
        if value == -1:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
            raise MediaError(f"{where} is class {value!r}, and there are names for {len(names)}")
        return names[value]
    inner = feature.get("feature") if described else None
    if isinstance(value, list):
        return [named(inner, part, where) for part in value]
    if isinstance(value, Mapping):  # a list of mappings is stored as a mapping of lists
        return {
            key: [named(inner.get(key), part, f"{where}.{key}") for part in values]
            if isinstance(inner, dict) and isinstance(values, list)
            else named(feature.get(key), values, f"{where}.{key}")
            for key, values in value.items()
        }
    return value
