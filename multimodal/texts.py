"""Shortens texts and values for errors and reports."""

import reprlib
from collections import Counter
from collections.abc import Iterable
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
