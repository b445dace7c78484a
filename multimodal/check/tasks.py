"""Checks of a task with its samples: what is read does not hold the answer, and fields do not stand on each other's places."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.check.cases import close_tokens, contents
from multimodal.check.information import is_file
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.packer import Packer
from multimodal.pattern import Field, Pattern
from multimodal.shapes import ConfigError
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, describe

CHECKS: list[Check] = []
ENOUGH = 8  # samples in which a number has to equal the answer before it is no accident
MOST_NUMBERS = 4096  # of an array that are compared with answers
BEFORE = 24  # letters before an answer in a text that are compared


@dataclass
class TaskCase:
    """A task under test, its kinds of data by name, and samples with answers."""

    task: Task
    tokenizers: Mapping[str, Tokenizer]
    samples: list[Mapping[str, Any]]

    def __post_init__(self) -> None:
        self.packer = Packer(self.tokenizers, [self.task])

    def check_given(self) -> None:
        if len(self.samples) < 2:
            raise ConfigError(f"conformance: {len(self.samples)} samples came; give two or more, better {ENOUGH}")

    @property
    def pattern(self) -> Pattern:
        return self.packer.patterns[self.task.pattern]

    @cached_property
    def answers(self) -> list[Any]:
        """The answer of each sample; [] where nothing is written, or parts of what is read are hidden and asked for."""
        if self.pattern.pair or self.pattern.hides:
            return []
        return [sample[self.pattern.answer] for sample in self.samples]

    def read(self) -> Iterator[tuple[Field, list[Any]]]:
        """(field, its values) of each field that is read, of which every sample has one."""
        for field in self.pattern.reads:
            values = [sample.get(field.name) for sample in self.samples]
            if all(value is not None for value in values):
                yield field, values


@promise(CHECKS, basic=True)
def samples_encode(case: TaskCase) -> None:
    """Every sample has its fields and its answer, and can be encoded."""
    for i, sample in enumerate(case.samples):
        try:
            case.packer([(case.task.pattern, sample)], names=[f"sample {i}"])
        except ValueError as error:
            raise ConformanceError(str(error)) from error


@promise(CHECKS)
def answers_differ(case: TaskCase) -> None:
    """Not every sample has the same answer, which could be learned without reading anything."""
    if case.answers:
        different = {repr(contents(answer)) for answer in case.answers}
        want(len(different) > 1, f"all {len(case.answers)} samples have the answer {describe(case.answers[0])}")


@promise(CHECKS)
def answer_unread(case: TaskCase) -> None:
    """No field that is read is the answer, or holds it: as an entry, a column, the text behind a word such as "label:"."""
    if not case.answers or len({repr(contents(a)) for a in case.answers}) < 2:
        return  # `answers_differ` says so
    kind = case.packer.answer_tokenizers[case.task.pattern]
    for field, values in case.read():
        pairs = list(zip(values, case.answers, strict=True))
        want(
            not all(value is answer for value, answer in pairs) or isinstance(case.answers[0], (str, int)),
            f"field {field.name!r} and the answer are the same object in every sample: what is read is what is asked for",
        )
        want(
            not all(type(v) is type(a) and contents(v) == contents(a) for v, a in pairs),
            f"field {field.name!r} is equal to the answer in every sample: what is read is what is asked for",
        )
        if (where := _where(values, case.answers, kind)) is not None:
            want(
                False,
                f"field {field.name!r} holds the answer in every sample, {where}: take it out of what is read",
            )


def _where(values: Sequence[Any], answers: Sequence[Any], kind: Tokenizer) -> str | None:
    """Where all values hold the answers."""
    if isinstance(values[0], str):
        return _where_in_text(values, answers)
    if isinstance(values[0], dict):
        for key in values[0]:
            inside = [value.get(key) if isinstance(value, dict) else None for value in values]
            if all(_says(x, answer, kind) for x, answer in zip(inside, answers, strict=True)):
                return f"as its entry {key!r}"
            if all(x is not None for x in inside) and (where := _where(inside, answers, kind)) is not None:
                return f"in its entry {key!r} {where}"
        return None
    rows = [_numbers(value) for value in values]
    if len(values) < ENOUGH or any(row is None for row in rows):
        return None
    wanted = [_number(answer, kind) for answer in answers]
    if any(number is None for number in wanted):
        return None
    for i in range(min(len(row) for row in rows if row is not None)):
        if all(row[i] == number for row, number in zip(rows, wanted, strict=True) if row is not None):
            return f"as number {i}"
    return None


def _says(x: Any, answer: Any, kind: Tokenizer) -> bool:
    """Whether an entry is the answer: itself, as text, or as the number of its class."""
    if isinstance(x, (str, int, float, np.generic)) and isinstance(answer, (str, int, float, np.generic)):
        return str(x) == str(answer) or (isinstance(x, int) and not isinstance(x, bool) and x == _number(answer, kind))
    return x is answer


def _number(answer: Any, kind: Tokenizer) -> float | None:
    """A number itself; the number of a class."""
    if isinstance(answer, (int, float)):
        return float(answer)
    if not kind.classes or kind.vocab_size is None:
        return None
    return float(kind(answer).content[0])


def _numbers(value: Any) -> np.ndarray | None:
    """The first numbers of an array or list."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array.reshape(-1)[:MOST_NUMBERS].astype(np.float64) if array.dtype.kind in "biuf" else None


def _where_in_text(texts: Sequence[str], answers: Sequence[Any]) -> str | None:
    """The letters before the answer, if they are the same in every text."""
    if not all(isinstance(text, str) for text in texts):
        return None
    if all(len(PurePath(text).parts) > 1 and PurePath(text).suffix for text in texts):
        return None  # names of files, of which `file_names_unread` speaks
    words = [str(answer) for answer in answers if isinstance(answer, (str, int)) and str(answer)]
    if len(words) != len(texts):
        return None
    places = [_before(text, word) for text, word in zip(texts, words, strict=True)]
    for shared in places[0]:
        for others in places[1:]:
            shared = max((_ending(shared, other) for other in others), key=len, default="")
        if len(shared.strip()) >= 3 and (len(texts) >= ENOUGH or ":" in shared or "=" in shared):
            return f"behind {shared!r}"
    return "at its beginning" if len(texts) >= ENOUGH and all("" in there for there in places) else None


def _ending(a: str, b: str) -> str:
    """The letters with which both end."""
    count = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    return a[len(a) - count :]


def _before(text: str, word: str) -> set[str]:
    """The letters before each place where a text has this word; "" at its beginning."""
    found, at = set(), text.find(word)
    while at >= 0:
        end = at + len(word)
        if (at == 0 or not text[at - 1].isalnum()) and (end == len(text) or not text[end].isalnum()):
            found.add(text[max(at - BEFORE, 0) : at])
        at = text.find(word, at + 1)
    return found


@promise(CHECKS)
def file_names_unread(case: TaskCase) -> None:
    """What is read of a file is what it holds: its name and folder, which often say the answer, change no token."""
    for field, values in case.read():
        kind = case.packer.tokenizers[field.kind]
        for value, answer in itertools.zip_longest(values, case.answers):
            if not isinstance(value, (str, PurePath)):
                continue
            if kind.text and isinstance(value, str):
                parts = PurePath(value).parts
                told = (
                    answer is not None and len(parts) > 1 and str(answer) in (*parts, *PurePath(value).stem.split("_"))
                )
                want(
                    not told,
                    f"field {field.name!r} reads the text {value!r}, the name of a file that says the answer {answer!r}; read the "
                    "file, or leave its name out",
                )
            elif is_file(value):
                with tempfile.TemporaryDirectory() as folder:
                    copy = Path(folder) / f"value{PurePath(value).suffix}"
                    shutil.copyfile(value, copy)
                    want(
                        close_tokens(kind(type(value)(str(copy))), kind(value)),
                        f"field {field.name!r}: {describe(value)} has other tokens under another name: the kind reads names, which "
                        "often say the answer",
                    )


@promise(CHECKS)
def fields_apart(case: TaskCase) -> None:
    """No two fields of a sample have tokens at the same place, by which the core tells them apart."""
    if case.pattern.pair:
        return
    for i, sample in enumerate(case.samples):
        stream = case.packer([(case.task.pattern, sample)])
        segment_T = stream.layout.info.segment
        rounded_TA = (stream.position_TA * 64).round()
        _, place_T = rounded_TA.unique(dim=0, return_inverse=True)
        owners = torch.stack([place_T, segment_T.long()], 1).unique(dim=0)[:, 0].bincount()
        if int(owners.max()) > 1:
            both_T = place_T == int(owners.argmax())
            read = [field.name for field in case.pattern.reads if sample[field.name] is not None]
            found = [read[i] if i < len(read) else "the answer" for i in segment_T[both_T].unique().tolist()]
            at = ", ".join(f"{x:g}" for x in stream.position_TA[both_T][0].tolist())
            want(
                False,
                f"sample {i}: {' and '.join(found)} both have a token at ({at}): the places of a kind begin at time 0, "
                "behind the field before it",
            )
