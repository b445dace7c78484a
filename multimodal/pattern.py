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
    """One field of a pattern: "photo:image" has the name photo and the kind image; "image" is both.

    name: the key under which a sample has it.
    kind: the name of the tokenizer that encodes it.
    column: its index in the text of the pattern, which errors mark.
    many: whether it takes a list of any number of values, also none: "image*".
    """

    name: str
    kind: str
    column: int
    many: bool = False


@dataclass(frozen=True)
class Pattern:
    """A parsed task: the fields that are read and the one that is written; or, of a pair, the fields of both sides.

    text: the pattern as the user wrote it.
    reads: the fields that are read, in the order of the stream; of a pair, those of the left side, then those of the right.
    written: the field that is written; None: a pair, for which nothing is written.
    right: of a pair, the fields of the right side, which are the last of `reads`; else empty.
    hides: whether the written field is one of `reads`, parts of which the head hides, so that a sample has it only once.
    answer: the key under which a sample has what is written; "" for a pair.
    """

    text: str
    reads: tuple[Field, ...]
    written: Field | None
    right: tuple[Field, ...] = ()
    hides: bool = False
    answer: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        name = "" if self.written is None else self.written.name
        if not self.hides and any(field.name == name for field in self.reads):
            name = "answer"  # in "text -> text" a sample needs two keys: 'text' is read and 'answer' is written
        object.__setattr__(self, "answer", name)

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Parse "photo:image question:text -> answer:text". The left side may be empty: "-> text" writes from nothing.

        A field with a star, "image* text -> label" or "photos:image* text -> label", takes a list of any number of values.

        "photo:image <-> caption:text" is a pair: each side is one field or more, and a model learns which belong together.

        Raises:
            TaskError: the pattern is malformed; the message marks the column and says what was expected.
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
        elif writes[0].many:
            raise _error(
                text,
                text.index("*", writes[0].column),
                "writes a list, but an answer is one value; a kind that is itself a list, such as Sequence(of=..), can be written",
            )
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
        """Whether this is a pair ("image <-> text"), which matches two sides and writes nothing."""
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
        """All fields, from left to right."""
        return self.reads if self.written is None else (*self.reads, self.written)

    @property
    def writes(self) -> Field:
        """The field that is written.

        Raises:
            TaskError: this is a pair, for which nothing is written.
        """
        if self.written is None:
            raise self.writes_nothing()
        return self.written

    def writes_nothing(self) -> TaskError:
        """The error of asking a pair for an answer."""
        return TaskError(
            f"task {self.text!r} writes nothing, because it is a pair; use Model.vectors for the vectors of one side, and "
            "Model.matches for the probability that two sides match"
        )

    def check_kinds(self, tokenizers: Mapping[str, Any]) -> None:
        """Check that every field's kind has a tokenizer.

        Raises:
            TaskError: a kind has no tokenizer; the message marks the field and lists the tokenizers.
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
        """Check that a sample has a key for every field that is read, and with `answer` for the one that is written.

        A value may be None, which leaves the field out of this sample.

        Raises:
            TaskError: names the missing field and the fields that the sample has.
        """
        if not isinstance(sample, Mapping):
            first = next((f.name for f in (*self.reads, *self.fields)), "text")
            raise TaskError(
                f"task {self.text!r}: a sample is a mapping of fields, not {type(sample).__name__}; write {{{first!r}: ..}}"
            )
        wanted = [f.name for f in self.reads] + ([self.answer] if answer and self.written is not None else [])
        for name in wanted:
            if name not in sample:
                # a close name is probably a misspelt key, so the repair is to rename it
                close = (
                    did_you_mean(name, map(str, sample)).replace("did you mean", "rename").replace("?", f" to {name!r}")
                )
                raise TaskError(
                    f"task {self.text!r}: the sample has no field {name!r}; "
                    f"it has {shortened(', '.join(map(repr, sample)), 300) or 'none'}{close}"
                    + ("" if close else "; give None for a field that this sample lacks")
                )


def _fields(text: str, start: int, stop: int) -> list[Field]:
    """The fields in text[start:stop]; scanned by index, because errors mark the column."""
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
        many = end < stop and text[end] == "*"
        end += many
        if end < stop and not text[end].isspace():
            star = ", and a star behind it for a list" if "*" in (text[end], text[end - 1]) else ""
            raise _error(
                text, end, f"has {text[end]!r} here; fields are words, or name:kind{star}, with blanks between"
            )
        fields.append(Field(name, kind, at, many))
        at = end


def _word(text: str, at: int, stop: int) -> str:
    match = _WORD.match(text, at, stop)
    if match is None:
        came = repr(text[at]) if at < stop else "nothing"
        hint = "; a star stands directly behind a field, as in 'image*'" if came == "'*'" else ""
        raise _error(text, at, f"has {came} where a field's name was wanted (letters, digits, underscore){hint}")
    return match.group()


def _error(text: str, column: int, problem: str) -> TaskError:
    return TaskError(f"task {text!r} {problem}\n    {text}\n    {' ' * column}^")
