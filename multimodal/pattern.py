"""The pattern of a task, parsed: "image text -> text" (what is read -> what is written) or "image <-> text" (a pair)."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal.shapes import TaskError, did_you_mean
from multimodal.texts import shortened

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Field:
    """One field of a sample: its name and the tokenizer that reads or writes it ("photo:image"; "image" is both)."""

    name: str
    kind: str
    column: int  # where it stands in the pattern, for errors


@dataclass(frozen=True)
class Pattern:
    """A parsed task: fields read, in stream order, and the one field written; or the fields of two sides that belong together."""

    text: str
    reads: tuple[Field, ...]  # of a pair, those of both sides
    written: Field | None  # None: a pair, for which nothing is written
    right: tuple[Field, ...] = ()  # of a pair, the last of `reads`
    hides: bool = False  # whether what is written is part of what is read, so that a sample carries it once
    answer: str = dataclasses.field(init=False)  # the name under which a sample carries what is written; "" of a pair

    def __post_init__(self) -> None:
        name = "" if self.written is None else self.written.name
        if not self.hides and any(field.name == name for field in self.reads):
            name = "answer"  # "text -> text" reads 'text' and wants 'answer'
        object.__setattr__(self, "answer", name)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Parse "photo:image question:text -> answer:text". The left side may be empty: "-> text" writes from nothing.

        "photo:image <-> caption:text" is a pair: each side is one field or more, and a model learns which belong together.

        Raises:
            TaskError: shows the pattern, marks the place, and says what was wanted.
        """
        if not isinstance(text, str):
            raise TaskError(f"a task is a text such as 'image -> label', not {type(text).__name__} {text!r}")
        arrow = text.find("->")
        if arrow < 0:
            raise _error(
                text, len(text), "has no '->'; write the fields that are read, '->', and the field that is written"
            )
        if (second := text.find("->", arrow + 2)) >= 0:
            raise _error(text, second, "has a second '->'; a task has one")
        pair = text[:arrow].endswith("<")
        reads = _fields(text, 0, arrow - pair)
        writes = _fields(text, arrow + 2, len(text))
        if pair:
            for side, column in ((reads, arrow - 1), (writes, len(text))):
                if not side:
                    raise _error(text, column, "has an empty side; name one field or more on each side of '<->'")
            reads += writes
        elif not writes:
            raise _error(text, len(text), "writes nothing; name one field after '->'")
        elif len(writes) > 1:
            raise _error(text, writes[1].column, "writes more than one field; write a task for each")
        seen: set[str] = set()
        for field in reads:
            if field.name in seen:
                raise _error(
                    text,
                    field.column,
                    f"reads {field.name!r} twice; name them apart, as in 'left:{field.kind} right:{field.kind}'",
                )
            seen.add(field.name)
        if pair:
            return cls(text=text, reads=tuple(reads), written=None, right=tuple(writes))
        if {writes[0].name, "answer"} <= seen:
            raise _error(
                text,
                writes[0].column,
                f"writes {writes[0].name!r}, but 'answer', where a sample would carry it, is read as well; "
                f"name it apart, as in 'target:{writes[0].kind}'",
            )
        return cls(text=text, reads=tuple(reads), written=writes[0])

    @property
    def pair(self) -> bool:
        """Whether this task says which two belong together, and writes nothing."""
        return self.written is None

    @property
    def sides(self) -> dict[str, tuple[Field, ...]]:
        """The fields of a pair's sides, "left" and "right".

        Raises:
            TaskError: this is no pair.
        """
        if not self.pair:
            raise TaskError(f"task {self.text!r} has no sides; a pair has two, as in 'image <-> text'")
        return {"left": self.reads[: len(self.reads) - len(self.right)], "right": self.right}

    @property
    def fields(self) -> tuple[Field, ...]:
        """All of them, from left to right."""
        return self.reads if self.written is None else (*self.reads, self.written)

    @property
    def writes(self) -> Field:
        """The field that is written.

        Raises:
            TaskError: a pair, for which nothing is written.
        """
        self.check_answers()
        assert self.written is not None
        return self.written

    def check_answers(self) -> None:
        """Raises a TaskError where this is a pair."""
        if self.pair:
            raise TaskError(
                f"task {self.text!r} writes nothing, as it tells which two belong together; use Model.vectors for what it "
                "makes of one side, and Model.matches for how well two sides fit"
            )

    def check_kinds(self, tokenizers: Mapping[str, Any]) -> None:
        """Check that every field's kind has a tokenizer.

        Raises:
            TaskError: shows the pattern, marks the field, lists the tokenizers that exist.
        """
        for field in self.fields:
            if field.kind not in tokenizers:
                raise _error(
                    self.text,
                    field.column,
                    f"names {field.kind!r}, which no tokenizer reads or writes; "
                    f"there are {', '.join(map(repr, sorted(tokenizers)))}{did_you_mean(field.kind, tokenizers)}",
                )

    def check_sample(self, sample: Mapping[str, Any], answer: bool) -> None:
        """Check that a sample has every field this task reads (and writes, if `answer`); None means left out on purpose.

        Raises:
            TaskError: names the missing field and the fields that came.
        """
        if not isinstance(sample, Mapping):
            raise TaskError(f"task {self.text!r}: a sample is a mapping of fields, not {type(sample).__name__}")
        wanted = [f.name for f in self.reads] + ([self.answer] if answer and self.written is not None else [])
        for name in wanted:
            if name not in sample:
                close = (
                    did_you_mean(name, map(str, sample)).replace("did you mean", "rename").replace("?", f" to {name!r}")
                )
                raise TaskError(
                    f"task {self.text!r}: the sample has no field {name!r}; "
                    f"it has {shortened(', '.join(map(repr, sample)), 300) or 'none'}{close}"
                    + ("" if close else "; give None for a field that this sample lacks")
                )


def _fields(text: str, start: int, stop: int) -> list[Field]:
    fields: list[Field] = []
    at = start
    while True:
        while at < stop and text[at].isspace():
            at += 1
        if at >= stop:
            return fields
        name = _word(text, at, stop)
        end = at + len(name)
        kind = name
        if end < stop and text[end] == ":":
            kind = _word(text, end + 1, stop)
            end += 1 + len(kind)
        if end < stop and not text[end].isspace():
            raise _error(text, end, f"has {text[end]!r} here; fields are words, or name:kind, with blanks between")
        fields.append(Field(name, kind, at))
        at = end


def _word(text: str, at: int, stop: int) -> str:
    match = _WORD.match(text, at, stop)
    if match is None:
        came = repr(text[at]) if at < stop else "nothing"
        raise _error(text, at, f"has {came} where a field's name was wanted (letters, digits, underscore)")
    return match.group()


def _error(text: str, column: int, problem: str) -> TaskError:
    return TaskError(f"task {text!r} {problem}\n    {text}\n    {' ' * column}^")
