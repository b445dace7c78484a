"""Steps of a token budget: packs of samples of any length, chosen among the next `look_ahead` samples so that packs are full.

position 0 1 2 3 4 5 ..   task and sample of a position: a function of (seed, position)
         | | | | | |      position p belongs to lane p mod lanes; a process has every ranks-th lane
lane 0: [0 2 4 ..] -- the next `look_ahead` samples, encoded in the data workers --> one full pack a step
"""

import io
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from multimodal.data.fetching import TRIES, Bad, Batch, Fetcher, Loader, seed_generators
from multimodal.data.frames import as_samples
from multimodal.data.sources import BLOCK, IterableReader, Schedule, Source, check_source, is_indexed, shares, weighed
from multimodal.files import check_fields
from multimodal.packer import Packer, Prepared
from multimodal.process_state import preserved_rng
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal.texts import shortened

CHUNK = 8  # samples that go to a worker and come back together


@dataclass(frozen=True)
class _Request:
    """A request to a worker: encode the sample at a place of a lane, which is a visit of a task.

    sample: the raw sample, if its source can only be iterated, which the main process does.
    """

    lane: int
    place: int
    pattern: str
    visit: int
    sample: Any = None


@dataclass
class _Lane:
    """A sequence of samples from which one pack a step is chosen.

    number: of the lane, from 0.
    next: the place after the last requested one.
    again: places to request before `next`: those that were in `waiting` when the state was saved.
    pending: the number of samples that are requested and not yet in `waiting`.
    encoded: (place, sample or error, name) as they came from the workers.
    waiting: (place, sample, name) of the samples among which the next pack is chosen, in order.
    reached: the place after the last one that came into `waiting` or was broken.
    readers: the reader of each source that can only be iterated, by task.
    broken_in_a_row: the number of broken samples since the last one that was not.
    """

    number: int
    next: int = 0
    again: deque[int] = field(default_factory=deque)
    pending: int = 0
    encoded: deque[tuple[int, Prepared | Bad, str]] = field(default_factory=deque)
    waiting: list[tuple[int, Prepared, str]] = field(default_factory=list)
    reached: int = 0
    readers: dict[str, IterableReader] = field(default_factory=dict)
    broken_in_a_row: int = 0


class Packs(Dataset):
    """`packs` streams a step, each of at most `tokens` tokens, out of sources of any sort.

    look_ahead: number of samples of a lane among which the next pack is chosen; the one that waits longest is always in it. The
    samples of a pack are a function of (data, seed, tokens, packs, look_ahead): neither the number of workers nor the number of
    processes changes them. A sample longer than the budget counts as broken. max_bad: above 0, broken samples are left out and
    reported. rank and ranks: this process and the number of processes; it gets every ranks-th pack of a step.

    Raises:
        ConfigError, TaskError: data, mix or packs that do not fit.
    """

    def __init__(
        self,
        packer: Packer,
        data: Mapping[str, Source],
        *,
        tokens: int,
        packs: int = 1,
        look_ahead: int = 256,
        seed: int = 0,
        mix: Mapping[str, float] | float | None = None,
        max_bad: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        data = {pattern: as_samples(source) for pattern, source in data.items()}
        for pattern, source in data.items():
            packer.check_task(pattern)
            check_source("fit", pattern, source)
        if packs % ranks:
            raise ConfigError(
                f"fit: packs={packs} cannot be shared by {ranks} processes; try packs={-(-packs // ranks) * ranks}"
            )
        self.fetch, self.max_bad = Fetcher(packer, dict(data), seed), max_bad
        self.schedule = Schedule(shares(BLOCK, weighed(data, mix, "fit")), f"{seed}/turns")
        self.tokens, self.packs, self.look_ahead = tokens, packs, look_ahead
        self.lanes = [self._lane(number) for number in range(rank, packs, ranks)]

    @property
    def epoch(self) -> None:
        """How many steps an epoch takes depends on the lengths of the samples, and is not known before they are packed."""
        return None

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, requests: list[_Request]) -> bytes:
        """In a worker: some samples, encoded. As bytes, since a tensor sent to another process costs an open file."""
        found = []
        with preserved_rng():
            for t in requests:
                try:
                    sample, name = self.fetch(t.pattern, t.visit, f"place {t.place} of lane {t.lane}", t.sample)
                    if len(sample) > self.tokens:
                        raise StreamError(
                            f"{name} of task {t.pattern!r} is {len(sample)} tokens long, and a pack holds "
                            f"tokens={self.tokens}; raise that, or shorten the sample"
                        )
                    found.append((t.place, sample, name))
                except (MediaError, StreamError) as error:
                    if not self.max_bad:
                        raise
                    found.append((t.place, self.fetch.bad(t.pattern, t.visit, error), ""))
        bytes_of = io.BytesIO()
        _TensorsAsBytes(bytes_of, pickle.HIGHEST_PROTOCOL).dump((requests[0].lane, found))
        return bytes_of.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "lanes": []}  # workers only encode

    def loader(self, start: int, stop: int, workers: int, asked: Callable[[], bool] = lambda: False) -> Loader:
        """Steps start .. stop - 1; after each, `state` is the position of the next one."""
        # workers are asked for more whenever one of them has room
        requests, make = iter(self.requests, None), partial(self._packed, stop - start)
        return Loader(self, requests, self.fetch, workers, make=make, asked=asked)

    def _packed(self, steps: int, replies: Iterator[bytes]) -> Iterator[Batch]:
        by_number = {lane.number: lane for lane in self.lanes}
        for _ in range(steps):
            batch = Batch([], [], [], [], 0.0)
            for lane in self.lanes:
                while not self._ready(lane, batch.bad):
                    number, found = pickle.loads(next(replies))
                    by_number[number].encoded.extend(found)
                # the worker encodes ahead, but a pack is chosen among exactly `look_ahead` samples, however fast workers are
                chosen = fullest([len(sample) for _, sample, _ in lane.waiting], self.tokens)
                pack = [lane.waiting[i] for i in chosen]
                lane.waiting = [entry for i, entry in enumerate(lane.waiting) if i not in set(chosen)]
                batch.streams.append(self.fetch.packer.lay([sample for _, sample, _ in pack]))
                batch.names.append([name for _, _, name in pack])
                batch.numbers.append(lane.number)
                self._reader_states(lane)  # so that readers forget states that are not needed any more
            used = sum(len(stream) for stream in batch.streams)
            batch.filled = used / (self.tokens * len(self.lanes))
            yield batch

    def _ready(self, lane: _Lane, bad: list[Bad]) -> bool:
        """Move encoded samples to `waiting`; returns whether `look_ahead` of them wait."""
        while lane.encoded and len(lane.waiting) < self.look_ahead:
            place, sample, name = lane.encoded.popleft()
            lane.pending -= 1
            lane.reached = max(lane.reached, place + 1)
            if isinstance(sample, Bad):
                bad.append(sample)
                lane.broken_in_a_row += 1
                if lane.broken_in_a_row > max(self.max_bad, TRIES):
                    why = f"{lane.broken_in_a_row} samples in a row are broken, and max_bad={self.max_bad} may be"
                    raise MediaError(f"{why}; the last one: {sample.error}")
                continue
            lane.broken_in_a_row = 0
            lane.waiting.append((place, sample, name))
        return len(lane.waiting) == self.look_ahead

    def requests(self) -> list[_Request]:
        """The next requests to a worker: samples of the lane that has the fewest."""
        # balanced lanes, because a step needs a pack of each
        lane = min(self.lanes, key=lambda lane: len(lane.waiting) + lane.pending)
        found = []
        with preserved_rng():
            for _ in range(CHUNK):
                if lane.again:
                    place = lane.again.popleft()
                else:
                    place, lane.next = lane.next, lane.next + 1
                pattern, visit = self.schedule(place * self.packs + lane.number)
                sample = self._read(lane, pattern, visit) if pattern in lane.readers else None
                found.append(_Request(lane.number, place, pattern, visit, sample))
        lane.pending += len(found)
        return found

    @staticmethod
    def _read(lane: _Lane, pattern: str, visit: int) -> Any:
        """The raw sample at a visit of a source that can only be iterated.

        Raises:
            MediaError: the source failed. `max_bad` does not apply, because an iterator that raised gives no further samples.
        """
        try:
            return lane.readers[pattern].at(visit)
        except ConfigError:
            raise
        except Exception as error:
            at = lane.readers[pattern].visit
            raise MediaError(
                f"task {pattern!r}: sample {at} of its stream cannot be read: {type(error).__name__}: {shortened(error)}; an "
                "iterator ends with an error, so max_bad cannot skip it: catch the error in the source, or give "
                "one that has a length and [index]"
            ) from error

    def state(self) -> dict[str, Any]:
        """The position of each lane after the last step: numbers, and the states of sources that have one."""
        return {
            "lanes": {
                str(lane.number): {
                    "next": lane.reached,
                    "waiting": [place for place, _, _ in lane.waiting],
                    "flows": self._reader_states(lane),
                }
                for lane in self.lanes
            }
        }

    def _reader_states(self, lane: _Lane) -> dict[str, Any]:
        """For each reader, a state from which the samples that still wait can be read again."""
        # samples that wait were read from the source already and have to be read again after a resume
        oldest = min([place for place, _, _ in lane.waiting[:1]] + [lane.reached])
        states = {}
        for pattern, reader in lane.readers.items():
            place = oldest
            while self.schedule(place * self.packs + lane.number)[0] != pattern:
                place += 1
            states[pattern] = reader.state(self.schedule(place * self.packs + lane.number)[1])
        return states

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load a state, which has the lanes of all processes.

        Raises:
            ConfigError, LookupError: the state is damaged, or of other packs.
        """
        for i, lane in enumerate(self.lanes):
            saved = state["lanes"][str(lane.number)]
            check_fields(f"lane {lane.number}", saved, {"next": int, "waiting": list, "flows": dict}, ConfigError)
            if not all(type(place) is int and 0 <= place < saved["next"] for place in saved["waiting"]):
                raise ConfigError(f"lane {lane.number}: 'waiting' must be places before 'next'={saved['next']}")
            # a new lane, so that no sample that this one has read stays
            fresh = self._lane(lane.number)
            fresh.next = fresh.reached = saved["next"]
            fresh.again = deque(saved["waiting"])
            for pattern, reader in fresh.readers.items():
                reader.restore(saved["flows"][pattern])
            self.lanes[i] = fresh

    def _lane(self, number: int) -> _Lane:
        readers = {
            # random draws of the source depend only on the seed and on its visit
            pattern: IterableReader(source, partial(seed_generators, self.fetch.seed, pattern, "read"))
            for pattern, source in self.fetch.data.items()
            if not is_indexed(source)
        }
        return _Lane(number, readers=readers)


class _TensorsAsBytes(pickle.Pickler):
    """Pickles tensors as bytes, because torch's own way opens a file for each tensor."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def fullest(lengths: Sequence[int], budget: int) -> list[int]:
    """Indices of the samples to pack: the first one, and those of the others that fill the budget best; of equal fillings the one
    with earlier samples.

    Subset sums as the bits of an integer: bit n of reach[i] says whether some of the first i + 1 samples, the first included, have
    exactly n tokens together.
    """
    within = (1 << (budget + 1)) - 1
    reach = [1 << lengths[0]]
    for length in lengths[1:]:
        reach.append((reach[-1] | reach[-1] << length) & within)
    left = reach[-1].bit_length() - 1  # the best filling; now from the last sample back: take one only if it is needed
    chosen = []
    for i in range(len(lengths) - 1, 0, -1):
        if not reach[i - 1] >> left & 1:
            chosen.append(i)
            left -= lengths[i]
    return [0, *reversed(chosen)]
