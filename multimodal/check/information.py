"""Checks which information of a value its tokens hold: nothing is cut or lost, and causal tokens hold nothing of later elements."""

import os
import unittest
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.check.cases import TokenizerCase, close_tokens, contents, equal_tokens
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.tokenizer import Tokenizer, Tokens, describe

CHECKS: list[Check] = []
LONG = 1500  # elements of a long value: longer than most limits that cut
LARGEST = 2**18  # numbers in a long value
CLOSE = 1e-3  # the largest error of a decoded value, as a share of its largest number


@promise(CHECKS, basic=True)
def nothing_lost(case: TokenizerCase) -> None:
    """The last element of a value changed changes its tokens, of long values too; what is too long is refused and never cut."""
    if case.tokenizer.classes:
        return  # one token holds the whole value
    tried = False
    for value in case.values:
        for part, put, axis in sequences(value):
            spread = spread_of(case, part, axis)
            if spread and spread < 4:  # the channels of a picture: a change of one may leave its codes as they are
                continue
            tried |= _compared(case.tokenizer, value, (put(x) for x in ends_changed(part, axis, spread, case.values)))
            # limits that cut, such as 512 tokens, show on long values only
            if (long := long_of(part, axis)) is not None:
                changed = (put(x) for x in ends_changed(long, axis, spread and length_of(long, axis) // 8, case.values))
                _compared(case.tokenizer, put(long), changed)
                if not ignores_order(case.tokenizer, value, put(end_reversed(part, axis, length_of(part, axis)))):
                    _compared(case.tokenizer, put(long), (put(x) for x in _tails_reversed(long, axis)), close_tokens)
    if not tried:
        raise unittest.SkipTest(f"no end of {describe(case.values[0])} could be changed")


def _compared(
    tokenizer: Tokenizer,
    value: Any,
    changed: Iterator[Any],
    same: Callable[[Tokens, Tokens], bool] = equal_tokens,
) -> bool:
    """Whether a changed value gives other tokens; fails if some can be encoded, and all of those give the same."""
    differ, count, last = tried(tokenizer, value, changed, same)
    if count and not differ:
        raise ConformanceError(
            f"{describe(value)} and {describe(last)}, which ends differently, give the same {len(tokenizer(value))} tokens: the "
            "end is cut or lost in silence; refuse what is too long"
        )
    return differ


def tried(
    tokenizer: Tokenizer,
    value: Any,
    others: Iterable[Any],
    same: Callable[[Tokens, Tokens], bool] = equal_tokens,
) -> tuple[bool, int, Any]:
    """(whether one of these has other tokens than the value, how many were encoded until it was found, the last of them).

    Values that are refused do not count; of a value that is refused itself, none does.
    """
    try:
        tokens = tokenizer(value)
    except ValueError:
        return False, 0, value
    count, last = 0, value
    for other in others:
        try:
            found = tokenizer(other)
        except ValueError:
            continue
        count, last = count + 1, other
        if not same(found, tokens):
            return True, count, last
    return False, count, last


def ignores_order(tokenizer: Tokenizer, value: Any, reordered: Any) -> bool:
    """Whether the tokens ignore the order of elements, as a bag of words does."""
    try:
        return close_tokens(tokenizer(reordered), tokenizer(value))
    except ValueError:
        return False


def spread_of(case: TokenizerCase, part: Any, axis: int) -> int:
    """How many last elements may have to change before the tokens do; 0: one. More for ids of numbers and for lossy kinds."""
    coarse = isinstance(part, (np.ndarray, Tensor)) and (case.tokenizer.vocab_size is not None or case.tokenizer.lossy)
    return max(length_of(part, axis) // 2, 1) if coarse else 0


@promise(CHECKS)
def causal_prefix(case: TokenizerCase) -> None:
    """Where the kind is causal, the first tokens of a value do not depend on its end: a beginning of it gives a beginning of them.

    The last tokens of the beginning may differ, because windows or pieces of words reach over its end.
    """
    if not case.tokenizer.causal or case.tokenizer.classes:
        return
    tried = False
    for value in case.values:
        for part, put, axis in sequences(value):
            whole, tokens = _repeated(case.tokenizer, part, put, axis)
            cut = length_of(whole, axis) * 7 // 10
            if tokens is None or cut < 1:
                continue
            if getattr(part, "ndim", 1) > 1 and not _is_value(case.tokenizer, put(_upto(whole, axis, cut))):
                continue  # an axis of fixed size, such as channels, has no beginning and end
            # a value without its end, and values with other ends: the first tokens must not know
            for shorter in (_upto(whole, axis, cut), *ends_changed(whole, axis, length_of(whole, axis) - cut, [value])):
                try:
                    found = case.tokenizer(put(shorter))
                except ValueError:
                    continue
                count = max(min(len(found), len(tokens) * 7 // 10) // 4, 1)
                tried = True
                want(
                    len(tokens) >= count and close_tokens(_first(found, count), _first(tokens, count)),
                    f"causal=True, but the first {count} of {len(tokens)} tokens of {describe(put(whole))} change with what "
                    f"comes after {cut} of its {length_of(whole, axis)} elements: tokens know the whole value; let each depend on "
                    "what came before, or take causal=True off",
                )
    if not tried:
        raise unittest.SkipTest(f"no beginning of {describe(case.values[0])} is a value too")


def _repeated(tokenizer: Tokenizer, part: Any, put: Callable[[Any], Any], axis: int) -> tuple[Any, Tokens | None]:
    """The part, repeated until it has 64 tokens if the tokenizer accepts that; and its tokens."""
    best, tokens = part, None
    while _size(part) <= LARGEST:
        try:
            best, tokens = part, tokenizer(put(part))
        except ValueError:
            break
        if len(tokens) >= 64:
            break
        part = _joined(part, axis, 2)
    return best, tokens


def _is_value(tokenizer: Tokenizer, value: Any) -> bool:
    try:
        tokenizer(value)
    except ValueError:
        return False
    return True


def _first(tokens: Tokens, count: int) -> Tokens:
    return Tokens(tokens.content[:count], tokens.position_NA[:count])


@promise(CHECKS)
def decode_gives_value(case: TokenizerCase) -> None:
    """Decode gives back the value that was encoded (numbers within a thousandth), unless the kind declares itself `lossy`."""
    t = case.tokenizer
    if not t.decodes:
        raise unittest.SkipTest("it has no decode: this kind is only read")
    if t.lossy:
        return
    compared, got = False, None
    for value, tokens in zip(case.values, case.tokens, strict=True):
        got = t.decode(tokens)
        same = same_value(value, got, t.classes)
        compared |= same is not None
        want(
            same is not False,
            f"{describe(value)} comes back from decode as {describe(got)}: its tokens lose what it held; keep it, or declare "
            "lossy=True",
        )
    if not compared:
        raise unittest.SkipTest(
            f"{describe(case.values[0])} and what decode gives, {describe(got)}, are of types that cannot be compared"
        )


def same_value(value: Any, got: Any, unordered: bool) -> bool | None:
    """Whether decode gave the value; None: their types cannot be compared, such as a file name and its picture."""
    if isinstance(value, (str, bytes)) or isinstance(got, (str, bytes)):
        return value == got or str(value) == str(got) if isinstance(got, type(value)) or unordered else None
    numbers, others = _numbers(value), _numbers(got)
    if numbers is not None and others is not None:
        return _same_numbers(numbers, others)
    if isinstance(value, dict) and isinstance(got, dict):
        # an entry that is None is one that is not there
        value, got = ({k: x for k, x in one.items() if x is not None} for one in (value, got))
        return value.keys() == got.keys() and all(same_value(value[k], got[k], unordered) is not False for k in value)
    if isinstance(value, (list, tuple)) and isinstance(got, (list, tuple)):
        if unordered:
            return sorted(map(str, value)) == sorted(map(str, got))
        return len(value) == len(got) and all(
            same_value(a, b, unordered) is not False for a, b in zip(value, got, strict=True)
        )
    return bool(value == got) if type(value) is type(got) else None


def _numbers(value: Any) -> np.ndarray | None:
    """The numbers of an array, tensor, picture, number, or list of such."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    if isinstance(value, (str, bytes, dict)):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "biuf" else None


def _same_numbers(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether numbers are equal, even with channels first, with bytes scaled to 0..1, or padded to a whole token; None: unknown."""
    top = 255.0 if a.dtype == np.uint8 and b.dtype.kind == "f" else 1.0
    a, b = a.astype(np.float64) / top, b.astype(np.float64)
    if a.ndim == 3 and a.shape[-1] <= 4 and b.ndim == 3 and b.shape[-1] != a.shape[-1]:
        a = np.moveaxis(a, -1, 0)
    a, b = (x.squeeze() if a.ndim != b.ndim else x for x in (a, b))
    if a.ndim != b.ndim:
        return None
    if any(x > y for x, y in zip(a.shape, b.shape, strict=True)):
        if a.ndim < 2:
            return False
        shared = tuple(slice(min(x, y)) for x, y in zip(a.shape, b.shape, strict=True))
        return False if np.allclose(a[shared], b[shared], rtol=0, atol=CLOSE) else None  # None: a smaller picture
    b = b[tuple(slice(x) for x in a.shape)]
    return bool(np.allclose(a, b, rtol=0, atol=CLOSE * max(1.0, float(np.abs(a).max(initial=0.0))), equal_nan=True))


def resembles(again: Sequence[Tokens], tokens: Sequence[Tokens]) -> bool:
    """Whether values that were decoded and encoded again are, on average, nearer to their own tokens than to those of others."""

    def nearness(a: Tokens, b: Tokens) -> float:
        n = min(len(a), len(b))
        x, y = a.content[:n], b.content[:n]
        return (
            float((x == y).double().mean()) if not x.is_floating_point() else -float((x - y).double().square().mean())
        )

    gains = []
    for i, own in enumerate(again):
        others = [nearness(own, other) for j, other in enumerate(tokens) if j != i]
        gains.append(nearness(own, tokens[i]) - sum(others) / len(others))
    return sum(gains) > 0


Put = Callable[[Any], Any]


def sequences(value: Any) -> Iterator[tuple[Any, Put, int]]:
    """(part, function that puts another part in its place, axis) for each sequence in a value, or the value itself."""
    if isinstance(value, (str, bytes)) and value:
        if not is_file(value):  # what it holds is in the file
            yield value, lambda new: new, 0
    elif isinstance(value, (np.ndarray, Tensor)):
        for axis in range(value.ndim):
            if value.shape[axis]:
                yield value, lambda new: new, axis
    elif isinstance(value, dict):
        for key, x in value.items():
            for part, put, axis in sequences(x):
                yield part, lambda new, key=key, put=put: {**value, key: put(new)}, axis
    elif type(value) in (list, tuple) and value:
        arrays = [i for i, x in enumerate(value) if isinstance(x, (np.ndarray, Tensor)) and x.ndim]
        for i in arrays:  # a pair such as (wave, rate)
            for part, put, axis in sequences(value[i]):
                yield part, lambda new, i=i, put=put: type(value)([*value[:i], put(new), *value[i + 1 :]]), axis
        if not arrays:
            yield value, lambda new: new, 0


def is_file(value: Any) -> bool:
    """Whether a value is the path of a file."""
    try:
        return os.path.isfile(value)
    except (TypeError, ValueError):  # a text that cannot be a path
        return False


def length_of(part: Any, axis: int) -> int:
    return part.shape[axis] if isinstance(part, (np.ndarray, Tensor)) else len(part)


def _size(part: Any) -> int:
    return int(np.prod(part.shape)) if isinstance(part, (np.ndarray, Tensor)) else len(part)


def _joined(part: Any, axis: int, times: int) -> Any:
    if isinstance(part, Tensor):
        return torch.cat([part] * times, axis)
    return np.concatenate([part] * times, axis) if isinstance(part, np.ndarray) else part * times


def long_of(part: Any, axis: int) -> Any:
    """The part, repeated to LONG elements; None if that exceeds LARGEST numbers."""
    times = -(-LONG // length_of(part, axis))
    return _joined(part, axis, times) if times > 1 and _size(part) * times <= LARGEST else None


def _at(axis: int, where: slice) -> tuple[slice, ...]:
    return (slice(None),) * axis + (where,)


def _upto(part: Any, axis: int, stop: int) -> Any:
    return part[_at(axis, slice(stop))] if isinstance(part, (np.ndarray, Tensor)) else part[:stop]


def ends_changed(part: Any, axis: int, spread: int, values: Sequence[Any], where: float = 1.0) -> Iterator[Any]:
    """Copies in which one element is changed, then 2, 4, .. up to `spread`. where: 0, .5, 1: the first, middle or last ones."""
    count = 1
    while True:
        stop = count + round(where * (length_of(part, axis) - count))
        yield from _end_changed(part, axis, count, values, stop)
        if count >= min(spread, length_of(part, axis)):
            return
        count = min(2 * count, spread)


def _end_changed(part: Any, axis: int, count: int, values: Sequence[Any], stop: int | None = None) -> Iterator[Any]:
    """Copies in which the last `count` elements are changed, or those before `stop`."""
    stop = length_of(part, axis) if stop is None else stop
    if isinstance(part, (np.ndarray, Tensor)):
        array = part.detach().cpu().numpy() if isinstance(part, Tensor) else part
        end = _at(axis, slice(stop - count, stop))
        if array.dtype.kind not in "biuf":
            return
        low, high = np.nanmin(array), np.nanmax(array)
        fills = [low, high] if low != high else [low + np.ones_like(low), np.zeros_like(low)]
        if array.dtype.kind != "b":
            fills.append((low + high) / 2 if array.dtype.kind == "f" else (int(low) + int(high)) // 2)
        for fill in fills:
            other = array.copy()
            other[end] = fill
            if not np.array_equal(other, array):
                yield torch.from_numpy(other) if isinstance(part, Tensor) else other
        return
    seen: list[Any] = []
    for value in [part, *values]:
        for element in value if isinstance(value, type(part)) else ():
            # by their contents, because arrays in an element have no single answer to ==
            if len(seen) < 8 and contents(element) not in map(contents, [*seen, part[stop - 1]]):
                seen.append(element)
    if isinstance(part, str):
        seen += [c for c in "ae1" if c not in seen and c != part[stop - 1]]
    last = part[stop - 1]
    if isinstance(part, list | tuple) and isinstance(last, (int, float)) and not isinstance(last, bool):
        seen += [last + 1, last - 1]
    if isinstance(last, (list, tuple, np.ndarray, Tensor)):
        seen += [put(x) for inner, put, at in sequences(last) for x in _end_changed(inner, at, 1, [])]
    for element in seen:
        tail: Any = [element] * count
        if isinstance(part, str):
            tail = element * count
        elif isinstance(part, (bytes, tuple)):
            tail = type(part)(tail)
        yield part[: stop - count] + tail + part[stop:]


def _tails_reversed(part: Any, axis: int) -> Iterator[Any]:
    """Copies whose last eighth or last half is reversed, which keeps its mean, spread and extremes."""
    length = length_of(part, axis)
    reordered = [end_reversed(part, axis, count) for count in (length // 8, length // 2)]
    yield from (other for other in reordered if contents(other) != contents(part))


def end_reversed(part: Any, axis: int, count: int) -> Any:
    """A copy whose last `count` elements are reversed."""
    start = length_of(part, axis) - count
    if isinstance(part, Tensor):
        return torch.cat([part.narrow(axis, 0, start), part.narrow(axis, start, count).flip(axis)], axis)
    if isinstance(part, np.ndarray):
        end = np.flip(part[_at(axis, slice(start, None))], axis)
        return np.concatenate([part[_at(axis, slice(start))], end], axis)
    return part[:start] + part[start:][::-1]
