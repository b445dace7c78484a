"""Texts as errors and reports show them: short, and printable anywhere."""

from collections.abc import Iterable


def shortened(text: object, most: int = 300) -> str:
    """A text of at most `most` characters: its beginning, '...' and its end where it is longer.

    Bytes that are no text, as file names may hold them, are escaped.
    """
    text = text if isinstance(text, str) else str(text)
    if len(text) > most:
        end = (most - 3) // 3
        text = text[: most - 3 - end] + "..." + text[len(text) - end :]
    return text.encode("utf-8", "backslashreplace").decode()


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; that of a file may hold other bytes, which Python keeps as surrogates."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def listed(names: Iterable[object], most: int = 10) -> str:
    """'a, b, c', of many the first ones and how many there are."""
    names = list(names)
    more = f", ... ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(shortened(name, 60) for name in names[:most]) + more
