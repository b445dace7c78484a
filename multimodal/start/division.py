"""Divides samples into parts for training and testing; equal samples and those of one group are never on two sides."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from multimodal.shapes import ConfigError
from multimodal.texts import listed

TRAIN, HELD_OUT, TEST = PARTS = ("train", "held_out", "test")
TEST_SHARE = 0.2
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_FROM = 0.1, 2000, 2000
"""From so many training samples on, this share of them, and at most so many, is held out to see how training goes."""
BINS = 5  # of numbers to answer, of equally many samples each, which all parts have


@dataclass
class Division:
    """The rows of each part. says: how they were chosen, a line each. left_out: rows that had to go, with the reason."""

    parts: dict[str, list[int]]
    says: list[str] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)


def divide(
    rows: Sequence[int],
    *,
    strata: Mapping[int, Hashable],
    keys: Mapping[int, bytes],
    given: Mapping[int, str | None],
    groups: Mapping[int, Hashable] | None = None,
    times: Mapping[int, float] | None = None,
    seed: int = 0,
    repeats: bool = False,
) -> Division:
    """Divide rows.

    strata: of each row, the class that all parts should have their share of. keys: of each row, a hash; rows with one hash stay
    together unless `repeats`. given: of each row, the part that the data name. groups: rows of one group stay together. times: the
    latest rows are the test part.

    Raises:
        ConfigError: no rows for a part, or no two classes that a test part could tell apart.
    """
    found = Division({part: [] for part in PARTS})
    if any(given[row] for row in rows):
        if groups is not None or times is not None:
            raise ConfigError(
                "the data name their parts (folders, a column split, or test=), so group and time would do nothing; leave them out"
            )
        _given(rows, given, keys, found, repeats)
    elif times is not None:
        if groups is not None:
            raise ConfigError("give group or time: parts by time do not keep groups together")
        _by_time(rows, times, found)
    else:
        _drawn(rows, strata, keys, groups, seed, repeats, found)
    if not found.parts[TEST] and found.parts[HELD_OUT]:
        found.parts[TEST], found.parts[HELD_OUT] = found.parts[HELD_OUT], []
        found.says.append("there is no test part, so the part val is the test part: nothing is chosen by it")
    if not found.parts[TEST]:
        _cut(found, TEST, TEST_SHARE, strata, keys, groups, seed, repeats)
        found.says.append(
            f"test: {len(found.parts[TEST]):,} of the training samples, drawn with seed {seed}, as the data name no test part"
        )
    if not found.parts[TRAIN]:
        raise ConfigError("there is nothing to train on: all samples are in the test part")
    if not found.parts[HELD_OUT] and len(found.parts[TRAIN]) >= HELD_OUT_FROM and times is None:
        share = min(HELD_OUT_SHARE, HELD_OUT_MOST / len(found.parts[TRAIN]))
        _cut(found, HELD_OUT, share, strata, keys, groups, seed, repeats)
        found.says.append(
            f"held out: {len(found.parts[HELD_OUT]):,} of the training samples, to see how training goes and when to stop"
        )
    for part in PARTS:
        found.parts[part].sort()
    return found


def _given(
    rows: Sequence[int], given: Mapping[int, str | None], keys: Mapping[int, bytes], found: Division, repeats: bool
) -> None:
    for row in rows:
        found.parts[given[row] or TRAIN].append(row)
    found.says.append("the parts are those that the data name")
    # a sample that is tested must not be trained on; the test part stays as it is
    seen: set[bytes] = set()
    for part in (TEST, HELD_OUT, TRAIN):
        both = [row for row in found.parts[part] if keys[row] in seen] if not repeats else []
        for row in both:
            found.left_out[row] = f"equal to a sample of another part, and so not in {part.replace('_', ' ')}"
        gone = set(both)
        found.parts[part] = [row for row in found.parts[part] if row not in gone]
        seen |= {keys[row] for row in found.parts[part]}
    if found.left_out:
        found.says.append(
            f"{len(found.left_out):,} samples are equal to ones of the test part and are left out of the others"
        )


def _by_time(rows: Sequence[int], times: Mapping[int, float], found: Division) -> None:
    ordered = sorted(rows, key=lambda row: (times[row], row))
    first = max(1, min(len(ordered) - 1, round(len(ordered) * (1 - TEST_SHARE))))
    while first < len(ordered) and first > 0 and times[ordered[first]] == times[ordered[first - 1]]:
        first += 1  # what happened at one time stays together
    if first == len(ordered):
        raise ConfigError("time: the last fifth of the samples has one time; leave out time, or give a finer one")
    found.parts[TRAIN], found.parts[TEST] = ordered[:first], ordered[first:]
    found.says.append(f"test: the latest {len(ordered) - first:,} samples; training sees none of their time")


def _drawn(
    rows: Sequence[int],
    strata: Mapping[int, Hashable],
    keys: Mapping[int, bytes],
    groups: Mapping[int, Hashable] | None,
    seed: int,
    repeats: bool,
    found: Division,
) -> None:
    found.parts[TRAIN] = list(rows)
    _cut(found, TEST, TEST_SHARE, strata, keys, groups, seed, repeats)
    by = "of each class the same share, " if len(set(strata.values())) > 1 else ""
    kept = " and whole groups" if groups is not None else ""
    found.says.append(f"test: a fifth of the samples, {by}drawn with seed {seed}; equal samples{kept} stay on one side")
    if repeats:
        found.says[-1] = (
            f"test: a fifth of the samples, {by}drawn with seed {seed}{kept and '; whole groups stay on one side'}"
        )


def _cut(
    found: Division,
    part: str,
    share: float,
    strata: Mapping[int, Hashable],
    keys: Mapping[int, bytes],
    groups: Mapping[int, Hashable] | None,
    seed: int,
    repeats: bool,
) -> None:
    """Move a share of the training part to another part, whole units of rows that belong together."""
    rows = found.parts[TRAIN]
    units = _units(rows, keys, groups, repeats)
    random = np.random.default_rng([seed, PARTS.index(part)])
    order = random.permutation(len(units))
    count: dict[Hashable, int] = defaultdict(int)
    where: dict[Hashable, int] = defaultdict(int)  # units that have the class
    for unit in units:
        for one in {strata[row] for row in unit}:
            where[one] += 1
    for row in rows:
        count[strata[row]] += 1
    # a class in two units or more has one in each part, and none is left without training samples
    wanted = {one: max(1, round(share * n)) if where[one] > 1 else 0 for one, n in count.items()}
    taken: dict[Hashable, int] = defaultdict(int)
    left = dict(where)
    moved: set[int] = set()
    for i in sorted(order.tolist(), key=lambda i: -len(units[i])):
        mine: dict[Hashable, int] = defaultdict(int)
        for row in units[i]:
            mine[strata[row]] += 1
        # nearer to what is wanted with the unit than without
        gain = sum(abs(wanted[one] - taken[one]) - abs(wanted[one] - taken[one] - n) for one, n in mine.items())
        if gain > 0 and all(left[one] > 1 for one in mine):
            moved.update(units[i])
            for one, n in mine.items():
                taken[one] += n
                left[one] -= 1
    if not moved:
        raise ConfigError(
            f"no {part.replace('_', ' ')} part can be made: {len(rows):,} samples in {len(units):,} units (groups, equal samples) "
            "that must stay together; give more samples, or a test part of your own (test=)"
        )
    alone = [str(one) for one, n in where.items() if n < 2]
    if alone and part == TEST:
        found.says.append(f"not tested, as all of its samples belong together or there is one only: {listed(alone)}")
    found.parts[TRAIN] = [row for row in rows if row not in moved]
    found.parts[part] = [row for row in rows if row in moved]


def _units(
    rows: Sequence[int], keys: Mapping[int, bytes], groups: Mapping[int, Hashable] | None, repeats: bool
) -> list[list[int]]:
    """Rows that must stay together: equal ones, and those of one group; also by way of third ones."""
    parent = {row: row for row in rows}

    def top(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[Hashable, int] = {}
    for row in rows:
        marks: list[Hashable] = [] if repeats else [("key", keys[row])]
        if groups is not None:
            marks.append(("group", groups[row]))
        for mark in marks:
            other = first.setdefault(mark, row)
            a, b = top(other), top(row)
            parent[max(a, b)] = min(a, b)
    units: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        units[top(row)].append(row)
    return list(units.values())


def strata_of(kind: str, rows: Sequence[int], answers: Sequence[object]) -> dict[int, Hashable]:
    """What all parts should have their share of: the class; a fifth of the range of numbers; nothing of texts."""
    if kind == "label":
        return {row: str(answers[row]) for row in rows}
    if kind == "labels":
        return {row: tuple(sorted(answers[row]))[:1] for row in rows}  # type: ignore[call-overload]
    if kind == "number":
        values = np.array([float(answers[row]) for row in rows])  # type: ignore[arg-type]
        edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
        return {row: int(place) for row, place in zip(rows, np.searchsorted(edges, values), strict=True)}
    return dict.fromkeys(rows, 0)
