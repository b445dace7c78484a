"""Sources of samples (anything with a length and [index], or anything iterable), their mixture and their order."""

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from math import inf
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import IterableDataset

from multimodal.data.frames import as_samples
from multimodal.declare import plain
from multimodal.shapes import ConfigError, MediaError

LARGEST_STORED = 2**20  # orders of more samples are computed instead of stored
BLOCK = 4096  # number of samples in which every share of a mixture is as declared


class Samples(Protocol):
    """Anything with a length that gives a sample (a mapping of fields) for an index.

    A source that is cheap to read only in some orders has a method `shuffled(key) -> (place -> index)`: its order of one epoch.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


Source = Samples | Iterable[Mapping[str, Any]]


def is_indexed(source: Any) -> bool:
    """Whether samples are read by index, in any order; otherwise the source can only be iterated."""
    if isinstance(source, IterableDataset):  # it inherits an [index] that always fails, and may have a length
        return False
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def in_batches(samples: Any, size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` samples, read lazily: by index if possible, else by iteration."""
    each = (samples[i] for i in range(len(samples))) if is_indexed(samples) else iter(samples)
    while part := list(islice(each, min(size, sys.maxsize))):
        yield part


def samples_or_errors(samples: Any) -> Iterator[Any]:
    """Yields samples; of a source with [index], in place of one that cannot be read its error."""
    if not is_indexed(samples):
        yield from samples
        return
    for i in range(len(samples)):
        try:
            sample = samples[i]
        except (ValueError, OSError) as error:
            sample = error
        yield sample


def check_source(who: str, pattern: str, source: Any) -> None:
    """Raise a ConfigError for a source that gives no samples."""
    if isinstance(source, (Mapping, str, bytes)) or not (is_indexed(source) or hasattr(source, "__iter__")):
        raise ConfigError(
            f"{who}: the data of task {pattern!r} are {type(source).__name__}; wanted a list, what has a length and [index], "
            "or what can be iterated"
        )
    if isinstance(source, Iterator):
        raise ConfigError(
            f"{who}: the data of task {pattern!r} are an iterator, which ends and cannot be gone back in; give what makes it, "
            "an object with __iter__"
        )
    if is_indexed(source) and len(source) == 0:
        raise ConfigError(f"{who}: the data of task {pattern!r} are empty")


def check_samples(who: str, pattern: str, samples: Any) -> None:
    """Raise a ConfigError for a source without a length or without samples."""
    check_source(who, pattern, samples)
    if not is_indexed(samples):
        raise ConfigError(
            f"{who}: the data of task {pattern!r} are {type(samples).__name__}, which has no length; wanted a list, or what "
            "has a length and [index]"
        )


class Wrapped:
    """Base of a source that gives the samples of another one, changed when they are read.

    samples: the other source, with a length and [index]. Its special order, if it has one, is that of this source too.
    """

    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def declare(self) -> dict[str, Any]:
        """The settings as JSON values."""
        raise NotImplementedError

    @property
    def declared(self) -> dict[str, Any]:
        """What `mm.fit` saves in `config.json` and compares when a run is resumed."""
        inner = getattr(self.samples, "declared", None)
        return {type(self).__name__: self.declare()} | ({} if inner is None else {"samples": inner})

    @property
    def shuffled(self) -> Callable[[str], Callable[[int], int]]:
        """The order of one epoch, see `Samples`; an AttributeError if `samples` have none."""
        return self.samples.shuffled  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Blanked(Wrapped):
    """The same samples, but with a probability `share`, drawn each time a sample is read, some of its fields are None.

    This trains a model for classifier-free guidance (Ho & Salimans 2022): it also learns to write without reading these fields.

    samples: the samples, with a length and [index].
    fields: the names of the fields that become None.
    share: the probability, from 0 to 1.
    """

    samples: Samples
    fields: tuple[str, ...]
    share: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", as_samples(self.samples))

    def declare(self) -> dict[str, Any]:
        return {"fields": list(self.fields), "share": self.share}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = self.samples[index]
        return {**sample, **dict.fromkeys(self.fields)} if np.random.random() < self.share else sample


def declared_sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of each source that has an attribute `declared` its value, as JSON returns it; any source may have one.

    Raises:
        ConfigError: it is no JSON value.
    """
    found = {}
    for pattern, source in data.items():
        if (value := getattr(source, "declared", None)) is not None:
            try:
                found[pattern] = plain(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"fit: the data of task {pattern!r} have an attribute `declared` that is no JSON value ({error}); give "
                    "numbers, texts, lists and mappings"
                ) from error
    return found


@dataclass(frozen=True)
class MissingCells(Wrapped):
    """The same samples, but each time a sample is read, other cells of its rows are missing.

    No few columns then decide alone, which helps small tables; it is dropout (Srivastava et al. 2014) of the cells.

    samples: the samples, with a length and [index].
    field: the field with the row of a table, a mapping.
    share: the probability that a cell becomes None, from 0 to below 1.
    """

    samples: Samples
    field: str = "row"
    share: float = 0.4

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", as_samples(self.samples))
        if not 0 <= self.share < 1:
            raise ConfigError(f"MissingCells: share={self.share} must be from 0 to below 1")

    def declare(self) -> dict[str, Any]:
        return {"field": self.field, "share": self.share}

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = self.samples[index]
        row = sample.get(self.field)
        if not isinstance(row, Mapping):
            raise MediaError(
                f"MissingCells: the field {self.field!r} of sample {index} is {type(row).__name__}, wanted a mapping"
            )
        # numpy's generator is seeded for each sample, as augmentation is
        there = np.random.random(len(row)) >= self.share
        cells = zip(row.items(), there, strict=True)
        return {**sample, self.field: {name: x if stays else None for (name, x), stays in cells}}


class Mixed:
    """Several data sets of one task as one: of every 4096 samples each has its share, however large it is.

    weights: of the data sets, in any unit; a number is a temperature: shares are len ** (1 / temperature), so 1 is by size and
    infinity equal.

    Raises:
        ConfigError: no data sets, or weights that do not fit them.
    """

    def __init__(self, *parts: Samples, weights: Sequence[float] | float = 1.0) -> None:
        parts = tuple(map(as_samples, parts))
        for i, part in enumerate(parts):
            check_samples("Mixed", f"part {i}", part)
        if not parts:
            raise ConfigError("Mixed: no data sets were given")
        if isinstance(weights, Sequence) and len(weights) != len(parts):
            raise ConfigError(f"Mixed: {len(weights)} weights were given for {len(parts)} data sets")
        self.parts = parts
        self.starts = list(accumulate(map(len, parts), initial=0))
        given = dict(enumerate(weights)) if isinstance(weights, Sequence) else weights
        self.share = shares(BLOCK, weighed(dict(enumerate(parts)), given, "Mixed"))

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def declared(self) -> list[Any] | None:
        """What the data sets declare, see `Wrapped`; None: none of them does."""
        found = [getattr(part, "declared", None) for part in self.parts]
        return found if any(part is not None for part in found) else None

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Mixed: there is no sample {index}; there are {len(self)}")
        part = next(i for i, stop in enumerate(self.starts[1:]) if index < stop)
        return self.parts[part][index - self.starts[part]]

    def shuffled(self, key: str) -> Callable[[int], int]:
        """The order of one epoch, see `Samples`."""
        schedule = Schedule(self.share, key)

        def index(place: int) -> int:
            part, visit = schedule(place)
            return self.starts[part] + index_at(self.parts[part], f"{key}/{part}", visit)

        return index


class Schedule:
    """Maps a position to (source, visit): the source of the sample there, and how many samples that source has had before.

    share: the number of positions of each source in a block, whose length is their sum. key: seeds the order within each block;
    None: each block has the order of `share`.
    """

    def __init__(self, share: Mapping[Any, int], key: str | None = None) -> None:
        self.share, self.key, self.block = dict(share), key, sum(share.values())
        self.plain = self._slots(list(range(self.block)))

    def __call__(self, position: int) -> tuple[Any, int]:
        block, slot = divmod(position, self.block)
        who, before = self.plain[slot] if self.key is None else self._shuffled(block)[slot]
        return who, block * self.share[who] + before

    def _slots(self, order: Sequence[int]) -> list[tuple[Any, int]]:
        names = [name for name, count in self.share.items() for _ in range(count)]
        before = dict.fromkeys(self.share, 0)
        slots = []
        for slot in order:
            slots.append((names[slot], before[names[slot]]))
            before[names[slot]] += 1
        return slots

    def _shuffled(self, block: int) -> list[tuple[Any, int]]:
        if getattr(self, "_last", (-1, []))[0] != block:
            self._last = block, self._slots(permutation(self.block, f"{self.key}/{block}").tolist())
        return self._last[1]


def weighed(sources: Mapping[Any, Any], mix: Mapping[Any, float] | float | None, who: str) -> dict[Any, float]:
    """The weight of each source. mix: weights by name, 1 for those not named; None: equal weights; a number: a temperature.

    Raises:
        ConfigError: an unknown name, a number that is not positive, or a temperature for sources without a length.
    """
    if isinstance(mix, (int, float)) and not isinstance(mix, bool):
        if not mix > 0:
            raise ConfigError(f"{who}: mix={mix!r} is a temperature; wanted a number above 0, 1 being by size")
        for name, source in sources.items():
            if not is_indexed(source):
                raise ConfigError(f"{who}: the data of {name!r} have no length to weigh them by; give weights by name")
        largest = max(map(len, sources.values()))
        return {name: (len(source) / largest) ** (1 / mix) for name, source in sources.items()}
    if not isinstance(mix, (Mapping, type(None))):
        raise ConfigError(f"{who}: mix={mix!r} is {type(mix).__name__}; wanted weights by task, or a temperature")
    for name, weight in (mix or {}).items():
        if (
            name not in sources
            or isinstance(weight, bool)
            or not isinstance(weight, (int, float))
            or not 0 < weight < inf
        ):
            raise ConfigError(
                f"{who}: mix gives {weight!r} to {name!r}; it wants a number above 0 for tasks of the data"
            )
    return {name: (mix or {}).get(name, 1.0) for name in sources}


def shares(total: int, weight: Mapping[Any, float]) -> dict[Any, int]:
    """Whole numbers that sum to `total`, at least 1 each, in the ratio of the weights (largest remainder)."""
    if len(weight) > total:
        raise ConfigError(f"{len(weight)} sources cannot each have a share of {total} samples")
    # round down, then give what is left to those that lost most; take from the largest if each had to have one
    exact = {name: total * w / sum(weight.values()) for name, w in weight.items()}
    share = {name: max(1, int(x)) for name, x in exact.items()}
    by_need = sorted(exact, key=lambda p: share[p] - exact[p])
    while (left := total - sum(share.values())) > 0:
        for name in by_need[:left]:
            share[name] += 1
    while sum(share.values()) > total:
        share[max(share, key=lambda p: share[p])] -= 1
    return share


def index_at(samples: Samples, key: str, visit: int) -> int:
    """The index of the sample at a visit; every epoch has another order."""
    epoch, place = divmod(visit, len(samples))
    return _order(_ById(samples), f"{key}/{epoch}", len(samples))(place)


class _ById:
    """A data set that is equal only to itself, so that it can be a key of a cache."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.samples is self.samples

    def __hash__(self) -> int:
        return id(self.samples)


@lru_cache(maxsize=64)
def _order(source: _ById, key: str, size: int) -> Callable[[int], int]:
    # the order of a source of shards reads neighbours together
    if hasattr(source.samples, "shuffled"):
        return source.samples.shuffled(key)
    if size > LARGEST_STORED:
        return scattered(size, key)
    order = permutation(size, key)
    return lambda place: int(order[place])


def permutation(size: int, key: str) -> torch.Tensor:
    """All numbers below `size` in an order drawn from `key`."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(crc32(key.encode())))


def scattered(size: int, key: str) -> Callable[[int], int]:
    """A permutation of the numbers below `size` that needs no memory: a Feistel network over the next power of four, walked
    until it falls below `size` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains")."""
    half = -(-(size - 1).bit_length() // 2)
    mask = (1 << half) - 1
    keys = [crc32(f"{key}/{i}".encode()) for i in range(4)]

    def index(place: int) -> int:
        while True:
            left, right = place >> half, place & mask
            for k in keys:
                mixed = (right * 0x9E3779B97F4A7C15 + k * 0xBF58476D1CE4E5B9) & (2**64 - 1)
                mixed = ((mixed ^ mixed >> 31) * 0x94D049BB133111EB) & (2**64 - 1)
                left, right = right, left ^ (mixed >> 32 & mask)
            place = left << half | right
            if place < size:
                return place

    return index


class IterableReader:
    """Reads a source that can only be iterated by rising sample numbers; when the source ends, it is iterated again.

    A source with `state_dict` and `load_state_dict` (Hugging Face's streams) resumes from a state; any other is read again from
    its beginning, which is exact but takes time.
    """

    EVERY = 64  # number of samples between two saved states of the source

    def __init__(self, source: Iterable[Any], before: Callable[[int], None] = lambda visit: None) -> None:
        """before: called with the number of each sample before it is read, skipped ones included."""
        stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self.stateful = stateful and not _has_buffer(source)
        self.source: Any = copy.deepcopy(source) if self.stateful else source  # each lane has its own position
        self.start = copy.deepcopy(self.source.state_dict()) if self.stateful else None
        self.visit, self.before = 0, before  # visit: number of samples read
        self.states: deque[dict[str, Any]] = deque()
        self.samples = self._samples_of(resumed=False)

    def at(self, visit: int) -> Any:
        """Sample number `visit`, which must not be smaller than in an earlier call."""
        assert visit >= self.visit
        while True:
            if self.stateful and self.visit % self.EVERY == 0:
                self.states.append({"turn": self.visit, "state": copy.deepcopy(self.source.state_dict())})
            self.before(self.visit)
            sample = next(self.samples)
            self.visit += 1
            if self.visit > visit:
                return sample

    def state(self, oldest: int) -> dict[str, Any]:
        """A state from which sample number `oldest` and all after it can be read again; older states are deleted."""
        while len(self.states) > 1 and self.states[1]["turn"] <= oldest:
            self.states.popleft()
        return self.states[0] if self.states else {"turn": 0, "state": None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state of `state`."""
        self.states.clear()
        self.visit = state["turn"]
        if state["state"] is not None:
            self.source.load_state_dict(copy.deepcopy(state["state"]))
        self.samples = self._samples_of(resumed=state["state"] is not None)

    def _samples_of(self, resumed: bool) -> Iterator[Any]:
        while True:
            found = False
            for sample in self.source:
                found = True
                yield sample
            # after a resume the rest of the source may be empty
            if not found and not resumed:
                raise MediaError(f"{type(self.source).__name__}: the data have no samples")
            resumed = False
            if self.stateful:
                self.source.load_state_dict(copy.deepcopy(self.start))


def _has_buffer(source: Any) -> bool:
    """Whether the source has samples in a buffer that its states lack, as a shuffled stream of Hugging Face has."""
    part = getattr(source, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        part = getattr(part, "ex_iterable", None)
    return False
