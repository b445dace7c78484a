"""Checks with variants of a value: what it holds is seen in its tokens, and how it lies in memory is not."""

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.check.cases import TokenizerCase, close_tokens, contents, equal_tokens
from multimodal.check.information import (
    Put,
    end_reversed,
    ends_changed,
    ignores_order,
    length_of,
    long_of,
    same_value,
    sequences,
    spread_of,
    tried,
)
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.tokenizer import Tokenizer, Tokens, describe

CHECKS: list[Check] = []
MOST_CLASSES = 500  # classes that are tried one by one
RARE = (("日", "本"), ("щ", "ж"), ("𝄞", "𝄢"))  # letters that a vocabulary may lack


def _all_same(tokenizer: Tokenizer, value: Any, others: Iterable[Any]) -> tuple[int, Any]:
    """How many of these could be encoded, all with the tokens of the value, and the last of them; 0 if any has other tokens."""
    differ, count, last = tried(tokenizer, value, others)
    return 0 if differ else count, last


def _share_tokens(tokenizer: Tokenizer, first: Any, second: Any) -> bool:
    """Whether two values that differ can both be encoded and have the same tokens."""
    return contents(first) != contents(second) and _all_same(tokenizer, first, [second])[0] > 0


@promise(CHECKS, basic=True)
def every_part_counts(case: TokenizerCase) -> None:
    """The first, a middle or a repeated element of a value changed changes its tokens, and so does a number beside an array."""
    if case.tokenizer.classes:
        return  # one token holds the whole value
    for value in case.values:
        for part, put, axis in sequences(value):
            spread = spread_of(case, part, axis)
            if spread and spread < 4:  # the channels of a picture, as in `nothing_lost`
                continue
            for whole in (part, long_of(part, axis)):
                if whole is None:
                    continue
                reach = spread if whole is part else spread and length_of(whole, axis) // 8
                for where, name in ((0.0, "begins"), (0.5, "goes on")):
                    others = (put(x) for x in ends_changed(whole, axis, reach, case.values, where))
                    count, other = _all_same(case.tokenizer, put(whole), others)
                    want(
                        not count,
                        f"{describe(put(whole))} and {describe(other)}, which {name} differently, give the same tokens: that part "
                        "of a value is lost in silence; every element must count",
                    )
            if isinstance(part, (str, list)) and not ignores_order(
                case.tokenizer, value, put(end_reversed(part, axis, length_of(part, axis)))
            ):
                doubled = put(part[0] + part if isinstance(part, str) else [part[0], *part])
                want(
                    not _share_tokens(case.tokenizer, value, doubled),
                    f"{describe(value)} and {describe(doubled)} give the same tokens: equal neighbours are merged into one",
                )
        for name, number, put in _numbers_beside(value):
            count, _ = _all_same(case.tokenizer, value, (put(type(number)(x)) for x in (2 * number, number + 1)))
            want(
                not count,
                f"the tokens of {describe(value)} stay the same whatever {name} is ({number!r} here): use it, or do not take it",
            )


def _numbers_beside(value: Any) -> Iterator[tuple[str, float, Put]]:
    """(name, number, function that puts another in its place) of the numbers beside arrays, such as a rate."""
    if isinstance(value, dict):
        for key, x in value.items():
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                yield f"{key!r}", x, lambda new, key=key: {**value, key: new}
    elif isinstance(value, tuple) and any(isinstance(x, (np.ndarray, Tensor)) for x in value):
        for i, x in enumerate(value):
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                yield f"entry {i}", x, lambda new, i=i: (*value[:i], new, *value[i + 1 :])


@promise(CHECKS)
def variants_differ(case: TokenizerCase) -> None:
    """Another case, accents, signs or fractions of a value give other tokens, unless the kind declares itself `lossy`."""
    if case.tokenizer.lossy or case.tokenizer.classes or not _given_back(case):
        return  # `decode_gives_value` shows what of the value is lost
    for value in case.values:
        for part, put, axis in sequences(value):
            if axis or spread_of(case, part, axis):
                continue
            for what, first, second in _variants(part):
                want(
                    not _share_tokens(case.tokenizer, put(first), put(second)),
                    f"{describe(put(first))} and {describe(put(second))} give the same tokens: {what} of a value "
                    f"{'are' if what.endswith('s') else 'is'} lost; keep it, or declare lossy=True",
                )


def _given_back(case: TokenizerCase) -> bool:
    """Whether decode, if there is one, gives back the values."""
    t = case.tokenizer
    if not t.decodes:
        return True
    pairs = zip(case.values, case.tokens, strict=True)
    return all(same_value(value, t.decode(tokens), t.classes) is not False for value, tokens in pairs)


def _variants(part: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what differs, a value, the value with that changed)."""
    if isinstance(part, str):
        yield "the case", part, part.swapcase()
        accented = part + "é"
        plain = "".join(c for c in unicodedata.normalize("NFD", accented) if not unicodedata.combining(c))
        yield "accents", accented, plain
    elif isinstance(part, (np.ndarray, Tensor)):
        if part.dtype in (torch.float32, torch.float64, np.float32, np.float64) and bool((part != 0).any()):
            yield "signs", part, -part
            whole = part.floor() if isinstance(part, Tensor) else np.floor(part)
            yield "fractions", part, whole
    elif part and all(isinstance(x, float) for x in part):
        yield "signs", part, type(part)(-x for x in part)
        yield "fractions", part, type(part)(float(x // 1) for x in part)


@promise(CHECKS)
def extremes_differ(case: TokenizerCase) -> None:
    """Rare letters and very large numbers are refused or seen: they do not all give the same tokens, unless the kind is `lossy`."""
    if case.tokenizer.lossy or case.tokenizer.classes:
        return
    for value in case.values:
        for part, put, axis in sequences(value):
            if axis or spread_of(case, part, axis):
                continue
            for first, second in _extremes(part):
                want(
                    not _share_tokens(case.tokenizer, put(first), put(second)),
                    f"{describe(put(first))} and {describe(put(second))} give the same tokens: what is rare or large is "
                    "replaced in silence; refuse it, or declare lossy=True",
                )


def _extremes(part: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of values that end in different rare letters, or in different very large or negative numbers."""
    if isinstance(part, str):
        yield from ((part + a, part + b) for a, b in RARE)
    elif isinstance(part, (np.ndarray, Tensor)):
        for big in _large(part):
            pair = [part.clone() if isinstance(part, Tensor) else part.copy() for _ in range(2)]
            pair[0][-1], pair[1][-1] = big, 2 * big
            yield pair[0], pair[1]
    elif part and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in part):
        for big in (10**6, -(10**6)):
            yield type(part)([*part[:-1], type(part[-1])(big)]), type(part)([*part[:-1], type(part[-1])(2 * big)])


def _large(part: Any) -> list[float]:
    """Numbers far beyond those of an array, which its type can hold twice over."""
    if part.dtype not in (torch.float32, torch.float64, np.float32, np.float64):
        return []
    largest = 1e4 * max(1.0, float(abs(part).max()))
    return [largest, -largest]


@promise(CHECKS)
def missing_seen(case: TokenizerCase) -> None:
    """A missing number (NaN, None) is refused, or gives other tokens than the 0 or the mean that could stand in its place."""
    if case.tokenizer.classes:
        return
    for value in case.values:
        for part, put, axis in sequences(value):
            for gap, filled in _gaps(part) if not axis else ():
                try:
                    tokens = case.tokenizer(put(gap)), case.tokenizer(put(filled))
                except ValueError:
                    continue
                want(
                    not close_tokens(*tokens),
                    f"{describe(value)} with a missing number in it gives the tokens of the same with a number in its place: say "
                    "that it is missing (a feature of its own, an id), or refuse it",
                )


def _gaps(part: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs: with a missing number in its middle, and with 0, the mean or the number before in its place."""
    if isinstance(part, (np.ndarray, Tensor)):
        if part.dtype not in (torch.float32, torch.float64, np.float32, np.float64):
            return
        copy: Any = torch.clone if isinstance(part, Tensor) else np.copy
        middle = len(part) // 2
        gap = copy(part)
        gap[middle] = float("nan")
        there = part[[i for i in range(len(part)) if i != middle]]
        there = there[there == there]  # the value may have other missing numbers
        for number in (0.0, float(there.mean()) if len(there) else 0.0, part[middle - 1]):
            filled = copy(part)
            filled[middle] = number
            if not (filled[middle] != filled[middle]).any():
                yield gap, filled
    elif isinstance(part, list) and part and all(isinstance(x, (int, float)) for x in part):
        middle = len(part) // 2
        for missing in (None, float("nan")):
            for number in (0, sum(part) // len(part), part[middle - 1]):
                yield [*part[:middle], missing, *part[middle + 1 :]], [*part[:middle], number, *part[middle + 1 :]]


@promise(CHECKS)
def equal_values_agree(case: TokenizerCase) -> None:
    """A value that lies otherwise in memory gives the same tokens: an array turned, with gaps, backwards; other order of keys."""
    for value, tokens in zip(case.copies(), case.tokens, strict=True):
        for how, other in _laid_out(value):
            try:
                found = case.tokenizer(other)
            except ValueError:  # it says so, as torch does of arrays that run backwards
                continue
            want(
                close_tokens(found, tokens),
                f"{describe(value)} gives other tokens {how}, which holds the same: encode depends on how a value lies in memory; "
                "copy it first (np.ascontiguousarray, sorted keys)",
            )


def _laid_out(value: Any) -> Iterator[tuple[str, Any]]:
    """(how, the same value laid out in another way)."""
    if isinstance(value, dict) and len(value) > 1:
        yield "with its keys in another order", dict(reversed(value.items()))
    if isinstance(value, dict):
        for key, x in value.items():
            yield from ((how, {**value, key: other}) for how, other in _laid_out(x))
    elif isinstance(value, tuple):
        for i, x in enumerate(value):
            yield from ((how, (*value[:i], other, *value[i + 1 :])) for how, other in _laid_out(x))
    elif isinstance(value, np.ndarray) and value.ndim and value.size:
        yield "as a view that runs backwards", value[::-1].copy()[::-1]
        yield "as a view with gaps", np.repeat(value, 2, -1)[..., ::2]
        if value.ndim > 1:
            yield "in the order of columns", np.asfortranarray(value)
    elif isinstance(value, Tensor) and value.dim() and value.numel():
        yield "as a view with gaps", value.repeat_interleave(2, -1)[..., ::2]
        if value.dim() > 1:
            yield "in the order of columns", value.mT.contiguous().mT


@promise(CHECKS)
def foreign_element_refused(case: TokenizerCase) -> None:
    """A value in which one element is of a foreign type raises a ValueError; the element is not left out or replaced."""
    for value in case.values:
        for foreign in _with_foreign(value):
            try:
                case.tokenizer(foreign)
            except ValueError:
                continue
            raise ConformanceError(
                f"{describe(foreign)} was encoded without complaint: refuse what an element cannot be"
            )


def _with_foreign(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)) and value:
        for i in {0, len(value) - 1}:
            yield type(value)([*value[:i], object(), *value[i + 1 :]])
    elif isinstance(value, dict):
        yield from ({**value, key: object()} for key in value)


@promise(CHECKS)
def unknown_class_refused(case: TokenizerCase) -> None:
    """A class that the kind does not have raises a ValueError; it does not become one of those that it has."""
    if not case.tokenizer.classes or case.tokenizer.lossy:
        return
    known = [tokens for tokens in case.tokens if len(tokens)]
    for value in case.values:
        for foreign in _foreign_classes(value):
            try:
                found = case.tokenizer(foreign)
            except ValueError:
                continue
            taken = [i for i, tokens in enumerate(known) if equal_tokens(tokens, found)]
            other = _foreign_classes(foreign)[0]  # a second one, so that a class for all unknown ones shows
            instead = f"as {describe(case.values[taken[0]])}" if taken else f"just as {describe(other)}"
            want(
                not taken and not _share_tokens(case.tokenizer, foreign, other),
                f"{describe(foreign)} is no class of this kind and was encoded {instead}; refuse it",
            )


def _foreign_classes(value: Any) -> list[Any]:
    """Values of the same type that are no classes."""
    if isinstance(value, str):
        return [f"{value}, no such class", f"{value} is no class"]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value + 10**6, value + 10**6 + 1, -1 - value]
    if isinstance(value, list):
        return [[*value, *foreign] for foreign in ([f"no class {i}"] for i in range(2))]
    return []


@promise(CHECKS)
def every_class_named(case: TokenizerCase) -> None:
    """Every class decodes to a value of its own, which encodes to that class again."""
    t = case.tokenizer
    if not t.classes or t.vocab_size is None or t.lossy or not t.decodes:
        return
    position_NA = case.tokens[0].position_NA
    for i in range(min(t.vocab_size, MOST_CLASSES)):
        value = t.decode(Tokens(torch.tensor([i]), position_NA))
        try:
            again = t(value).content.tolist()
        except ValueError as error:
            raise ConformanceError(f"class {i} decodes to {describe(value)}, which encode refuses: {error}") from error
        want(
            again == [i],
            f"class {i} decodes to {describe(value)}, which is encoded as class {again}; name each class once",
        )
