"""Texts of values: shortened for errors and reports, and as JSON."""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def shortened(text: object, most: int = 300) -> str:
    """A text of at most `most` characters; of a longer one the beginning, '...' and the end.

    Surrogates, which stand for undecodable bytes of file names, are escaped.
    """
    text = text if isinstance(text, str) else str(text)
    if len(text) > most:
        end = (most - 3) // 3
        text = text[: most - 3 - end] + "..." + text[len(text) - end :]
    return text.encode("utf-8", "backslashreplace").decode()


def short_repr(value: Any) -> str:
    """A value as Python writes it, shortened in the middle. Unlike `shortened(repr(value))` it is fast for large values, and
    possible for deeply nested ones."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 160
    return short.repr(value)


def is_text(name: str) -> bool:
    """Whether a name can be encoded in UTF-8. File names may hold other bytes, for which Python has surrogates."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in the order of their first occurrence."""
    return [name for name, count in Counter(names).items() if count > 1]


def listed(names: Iterable[object], most: int = 10) -> str:
    """'a, b, c'; of more than `most` names the first ones and the count."""
    names = list(names)
    more = f", ... ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(shortened(name, 60) for name in names[:most]) + more


def as_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON: NaN and infinity become null, arrays become lists, other types become their str."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str, indent=indent)


def _finite(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
