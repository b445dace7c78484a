"""Docstrings of this library as Google style, which the API reference is made from: "name: meaning" lines become tables."""

import re
from collections.abc import Iterable
from typing import Any

import griffe

_HEADING = re.compile(r"(Args|Attributes|Examples|Raises|Returns|Yields):$")
_ERRORS = re.compile(r"(?:^|(?<=[.;] ))((?:[A-Z]\w*(?:Error|Warning)(?:, )?)+): ", re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Gives every docstring the sections that a reader of Google style knows."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite the docstring of a function."""
        if func.docstring is not None:
            func.docstring.value = sections(func.docstring.value, [p.name for p in func.parameters], "Args")

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """A constant or type of a module is shown too, although only its value says what it is."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_module:
            attr.docstring = griffe.Docstring("A constant or type of this value.", parent=attr)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Rewrite the docstring of a class, whose members are known now."""
        made = cls.members.get("__init__")
        parameters = [p.name for p in made.parameters] if isinstance(made, griffe.Function) else []
        if cls.docstring is not None:
            cls.docstring.value = sections(cls.docstring.value, [*cls.members, *parameters], "Attributes")


def sections(text: str, names: Iterable[str], title: str) -> str:
    """The docstring with its "name: meaning" lines under `title`, and its errors one a line.

    text: the docstring, without indentation.
    names: those that such a line may begin with.
    title: "Args" or "Attributes".
    """
    name = rf"(?:{'|'.join(map(re.escape, sorted(names))) or '(?!)'})"
    item = re.compile(rf"(?:^|(?<=[.;] )){name}(?:(?:, | and ){name})*: ", re.MULTILINE)
    prose: list[str] = []
    items: list[str] = []
    rest: list[str] = []
    for paragraph in re.split(r"\n{2,}", text):
        lines = paragraph.split("\n")
        heading = _HEADING.match(lines[0])
        if heading:
            body = [line.removeprefix("    ") for line in lines[1:]]
            if heading[1] == "Raises":
                body = [re.sub(r", (?=[^:]*Error: )", " | ", line) for line in _items(body, _ERRORS)]
            rest.append(_section(heading[1], body))
            continue
        found = item.search(paragraph)
        first = found.start() if found else len(paragraph)
        if before := paragraph[:first].rstrip():
            prose.append(before)
        items += _items(paragraph[first:].split("\n"), item)
    if items:
        rest.insert(0, _section(title, items))
    return "\n\n".join(prose + rest)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"    {line}" for line in lines)])


def _items(lines: Iterable[str], item: re.Pattern[str]) -> list[str]:
    """The text of these lines as one line an item."""
    text = "\n".join(line.strip() for line in lines)
    starts = [match.start() for match in item.finditer(text)]
    if not starts:
        return [" ".join(text.split())] if text else []
    pieces = (text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True))
    return [" ".join(piece.split()) for piece in pieces]
