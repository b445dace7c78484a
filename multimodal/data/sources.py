"""Where samples come from: anything with a length and [index], or anything that can be iterated."""

import copy
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
from multimodal.shapes import ConfigError, MediaError

WHOLE = 2**20  # up to so many samples an order is a drawn permutation; beyond, one that needs no memory
BLOCK = 4096  # samples in which every share of a mixture is as declared


class Samples(Protocol):
    """Anything with a length that gives a sample (a mapping of fields) for an index.

    A source that is cheap to read in some orders only has a method `shuffled(key) -> (place -> index)`: its order of one round.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


Source = Samples | Iterable[Mapping[str, Any]]


def is_indexed(source: Any) -> bool:
    """Whether samples are asked for by number, so that any place of any round can be had without those before it."""
    if isinstance(source, IterableDataset):  # it inherits an [index] that always fails, and may have a length
        return False
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def in_batches(samples: Any, size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` samples, read lazily: by index if possible, else by iteration."""
    each = (samples[i] for i in range(len(samples))) if is_indexed(samples) else iter(samples)
    while part := list(islice(each, size)):
        yield part


def check_source(who: str, pattern: str, source: Any) -> None:
    """Refuse what gives no samples with a ConfigError."""
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
    """Refuse what has no length or no samples with a ConfigError."""
    check_source(who, pattern, samples)
    if not is_indexed(samples):
        raise ConfigError(
            f"{who}: the data of task {pattern!r} are {type(samples).__name__}, which has no length; wanted a list, or what "
            "has a length and [index]"
        )


@dataclass(frozen=True)
class Blanked:
    """The same samples, but in a share of the times one is asked for, some of its fields are None.

    A model that is to write with guidance learns by this what it would write if it had read nothing (Ho & Salimans 2022).

    samples: the samples, with a length and [index].
    fields: the names of the fields that become None.
    share: how often, from 0 to 1.
    """

    samples: Samples
    fields: tuple[str, ...]
    share: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", as_samples(self.samples))
        if hasattr(self.samples, "shuffled"):
            object.__setattr__(self, "shuffled", self.samples.shuffled)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = self.samples[index]
        return {**sample, **dict.fromkeys(self.fields)} if np.random.random() < self.share else sample


class Mixed:
    """Several data sets of one task as one: each has its share of every stretch of samples, however large it is.

    weights: in any unit; a number is a temperature, by which a share is len ** (1 / temperature): 1 is by size, infinity equal.
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

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Mixed: there is no sample {index}; there are {len(self)}")
        part = next(i for i, stop in enumerate(self.starts[1:]) if index < stop)
        return self.parts[part][index - self.starts[part]]

    def shuffled(self, key: str) -> Callable[[int], int]:
        turns = Turns(self.share, key)

        def index(place: int) -> int:
            part, turn = turns(place)
            return self.starts[part] + index_at(self.parts[part], f"{key}/{part}", turn)

        return index


class Turns:
    """Whose turn it is at a position, and how many turns it had before: every block has each one's share, in a shuffled order.

    Without a key each block is in the order of the shares.
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
    """The weight of each source: equal, as given by name (1 for those not named), or by a temperature.

    Raises:
        ConfigError: a name or number that cannot be, or a temperature over what has no length.
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
    exact = {name: total * w / sum(weight.values()) for name, w in weight.items()}
    share = {name: max(1, int(x)) for name, x in exact.items()}
    by_need = sorted(exact, key=lambda p: share[p] - exact[p])
    while (left := total - sum(share.values())) > 0:
        for name in by_need[:left]:
            share[name] += 1
    while sum(share.values()) > total:
        share[max(share, key=lambda p: share[p])] -= 1
    return share


def index_at(samples: Samples, key: str, turn: int) -> int:
    """Which sample comes at a turn: round after round, each in an order of its own."""
    time_round, place = divmod(turn, len(samples))
    return _order(_Same(samples), f"{key}/{time_round}", len(samples))(place)


class _Same:
    """A data set that is equal only to itself, so that its orders can be remembered."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.samples is self.samples

    def __hash__(self) -> int:
        return id(self.samples)


@lru_cache(maxsize=64)
def _order(same: _Same, key: str, size: int) -> Callable[[int], int]:
    if hasattr(same.samples, "shuffled"):
        return same.samples.shuffled(key)
    if size > WHOLE:
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


class Flow:
    """A source that can only be iterated, as if it could be asked by number, in rising order; it starts again when it ends.

    A source with `state_dict` and `load_state_dict` (Hugging Face's streams) goes on from a state; any other is read again up to
    its place, which is exact but takes time.
    """

    EVERY = 64  # samples between two states that are remembered

    def __init__(self, source: Iterable[Any], before: Callable[[int], None] = lambda turn: None) -> None:
        """before: called with the number of each sample before it is read, skipped ones included."""
        stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self.stateful = stateful and not _forgets(source)
        self.source: Any = copy.deepcopy(source) if self.stateful else source  # every lane goes its own way
        self.start = copy.deepcopy(self.source.state_dict()) if self.stateful else None
        self.turn, self.before = 0, before  # samples read
        self.kept: deque[dict[str, Any]] = deque()
        self.samples = self._forever(begun=False)

    def at(self, turn: int) -> Any:
        """Sample number `turn`, which must not lie before one that was asked for."""
        assert turn >= self.turn
        while True:
            if self.stateful and self.turn % self.EVERY == 0:
                self.kept.append({"turn": self.turn, "state": copy.deepcopy(self.source.state_dict())})
            self.before(self.turn)
            sample = next(self.samples)
            self.turn += 1
            if self.turn > turn:
                return sample

    def state(self, oldest: int) -> dict[str, Any]:
        """From where sample number `oldest` and all after it can be had again; what lies before is forgotten."""
        while len(self.kept) > 1 and self.kept[1]["turn"] <= oldest:
            self.kept.popleft()
        return self.kept[0] if self.kept else {"turn": 0, "state": None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where a state was taken."""
        self.kept.clear()
        self.turn = state["turn"]
        if state["state"] is not None:
            self.source.load_state_dict(copy.deepcopy(state["state"]))
        self.samples = self._forever(begun=state["state"] is not None)

    def _forever(self, begun: bool) -> Iterator[Any]:
        while True:
            found = False
            for sample in self.source:
                found = True
                yield sample
            if not found and not begun:
                raise MediaError(f"{type(self.source).__name__}: the data have no samples")
            begun = False
            if self.stateful:
                self.source.load_state_dict(copy.deepcopy(self.start))


def _forgets(source: Any) -> bool:
    """Whether its states lack samples that it holds back, as those of a shuffled stream of Hugging Face do."""
    part = getattr(source, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        part = getattr(part, "ex_iterable", None)
    return False
