"""Steps of a token budget: samples of any length, chosen so that packs are full, from lanes that look a bounded way ahead.

position 0 1 2 3 4 5 ..   which task and which sample: a function of (seed, position)
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
from multimodal.data.sources import BLOCK, Flow, Source, Turns, check_source, is_indexed, shares, weighed
from multimodal.files import check_fields
from multimodal.packer import Packer, Prepared
from multimodal.process_state import preserved_rng
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal.texts import shortened

CHUNK = 8  # samples that go to a worker and come back together


@dataclass(frozen=True)
class _Ticket:
    """What a worker is asked for: the sample at a place of a lane, which is some task's turn."""

    lane: int
    place: int
    pattern: str
    turn: int
    given: Any = None  # the sample as it came, of a source that is iterated


@dataclass
class _Lane:
    """Samples in order: those that are looked at, those that have come too early, and how many were asked for."""

    number: int
    next: int = 0  # the place behind the last one that was asked for
    # places to ask for before that: those that waited when it was saved
    again: deque[int] = field(default_factory=deque)
    owed: int = 0  # asked for and not yet in `waiting`
    come: deque[tuple[int, Prepared | Bad, str]] = field(default_factory=deque)
    waiting: list[tuple[int, Prepared, str]] = field(default_factory=list)
    reached: int = 0  # the place behind the last one that came into `waiting` or was found broken
    flows: dict[str, Flow] = field(default_factory=dict)
    broken_in_a_row: int = 0


class Packs(Dataset):
    """`packs` streams a step, each of at most `tokens` tokens, out of sources of any sort.

    look_ahead: samples of a lane among which the next pack is chosen; the one that waits longest is always in it. Which samples
    make a pack depends on (data, seed, tokens, packs, look_ahead) alone: not on workers, nor on how many processes share the
    lanes. A sample longer than the budget counts as broken. max_bad: above 0, broken samples are passed over and told.
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
        self.turns = Turns(shares(BLOCK, weighed(data, mix, "fit")), f"{seed}/turns")
        self.tokens, self.packs, self.look_ahead = tokens, packs, look_ahead
        self.lanes = [self._lane(number) for number in range(rank, packs, ranks)]

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, tickets: list[_Ticket]) -> bytes:
        """In a worker: some samples, encoded. As bytes, since a tensor sent to another process costs an open file."""
        found = []
        with preserved_rng():
            for t in tickets:
                try:
                    sample, name = self.fetch(t.pattern, t.turn, f"place {t.place} of lane {t.lane}", t.given)
                    if len(sample) > self.tokens:
                        raise StreamError(
                            f"{name} of task {t.pattern!r} is {len(sample)} tokens long, and a pack holds "
                            f"tokens={self.tokens}; raise that, or shorten the sample"
                        )
                    found.append((t.place, sample, name))
                except (MediaError, StreamError) as error:
                    if not self.max_bad:
                        raise
                    found.append((t.place, self.fetch.bad(t.pattern, t.turn, error), ""))
        bytes_of = io.BytesIO()
        _Plain(bytes_of, pickle.HIGHEST_PROTOCOL).dump((tickets[0].lane, found))
        return bytes_of.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "lanes": []}  # workers encode; who waits where is known in the main process only

    def loader(self, start: int, stop: int, workers: int, asked: Callable[[], bool] = lambda: False) -> Loader:
        """Steps start .. stop - 1; after each, `state` says from where the next one goes on."""
        # workers are asked for more whenever one of them has room
        tickets, make = iter(self.tickets, None), partial(self._packed, stop - start)
        return Loader(self, tickets, self.fetch, workers, make=make, asked=asked)

    def _packed(self, steps: int, encoded: Iterator[bytes]) -> Iterator[Batch]:
        by_number = {lane.number: lane for lane in self.lanes}
        for _ in range(steps):
            batch = Batch([], [], [], [], 0.0)
            for lane in self.lanes:
                while not self._ready(lane, batch.bad):
                    number, found = pickle.loads(next(encoded))
                    by_number[number].come.extend(found)
                chosen = fullest([len(sample) for _, sample, _ in lane.waiting], self.tokens)
                pack = [lane.waiting[i] for i in chosen]
                lane.waiting = [entry for i, entry in enumerate(lane.waiting) if i not in set(chosen)]
                batch.streams.append(self.fetch.packer.lay([sample for _, sample, _ in pack]))
                batch.names.append([name for _, _, name in pack])
                batch.numbers.append(lane.number)
                self._kept(lane)
            used = sum(len(stream) for stream in batch.streams)
            batch.filled = used / (self.tokens * len(self.lanes))
            yield batch

    def _ready(self, lane: _Lane, bad: list[Bad]) -> bool:
        """Whether exactly `look_ahead` samples wait, after taking what has come."""
        while lane.come and len(lane.waiting) < self.look_ahead:
            place, sample, name = lane.come.popleft()
            lane.owed -= 1
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

    def tickets(self) -> list[_Ticket]:
        """The next samples to ask a worker for: of the lane that has the fewest."""
        lane = min(self.lanes, key=lambda lane: len(lane.waiting) + lane.owed)
        found = []
        with preserved_rng():
            for _ in range(CHUNK):
                if lane.again:
                    place = lane.again.popleft()
                else:
                    place, lane.next = lane.next, lane.next + 1
                pattern, turn = self.turns(place * self.packs + lane.number)
                given = self._read(lane, pattern, turn) if pattern in lane.flows else None
                found.append(_Ticket(lane.number, place, pattern, turn, given))
        lane.owed += len(found)
        return found

    @staticmethod
    def _read(lane: _Lane, pattern: str, turn: int) -> Any:
        """The sample at a turn of a source that can only be iterated.

        Raises:
            MediaError: the source failed. `max_bad` cannot skip this, because an iterator that raised gives no further samples.
        """
        try:
            return lane.flows[pattern].at(turn)
        except ConfigError:
            raise
        except Exception as error:
            at = lane.flows[pattern].turn
            raise MediaError(
                f"task {pattern!r}: sample {at} of its stream cannot be had: {type(error).__name__}: {shortened(error)}; an "
                "iterator does not go on after an error, so max_bad cannot pass over it: catch the error in the source, or give "
                "one that has a length and [index]"
            ) from error

    def state(self) -> dict[str, Any]:
        """Where each lane goes on behind the last step that was given: plain numbers, and the states of sources that have one."""
        return {
            "lanes": {
                str(lane.number): {
                    "next": lane.reached,
                    "waiting": [place for place, _, _ in lane.waiting],
                    "flows": self._kept(lane),
                }
                for lane in self.lanes
            }
        }

    def _kept(self, lane: _Lane) -> dict[str, Any]:
        """For each source that is iterated, a state from which all that still waits can be had again."""
        oldest = min([place for place, _, _ in lane.waiting[:1]] + [lane.reached])
        kept = {}
        for pattern, flow in lane.flows.items():
            place = oldest
            while self.turns(place * self.packs + lane.number)[0] != pattern:
                place += 1
            kept[pattern] = flow.state(self.turns(place * self.packs + lane.number)[1])
        return kept

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, whichever processes' lanes it was made of."""
        for i, lane in enumerate(self.lanes):
            saved = state["lanes"][str(lane.number)]
            check_fields(f"lane {lane.number}", saved, {"next": int, "waiting": list, "flows": dict}, ConfigError)
            if not all(type(place) is int and 0 <= place < saved["next"] for place in saved["waiting"]):
                raise ConfigError(f"lane {lane.number}: 'waiting' must be places before 'next'={saved['next']}")
            fresh = self._lane(lane.number)
            fresh.next = fresh.reached = saved["next"]
            fresh.again = deque(saved["waiting"])
            for pattern, flow in fresh.flows.items():
                flow.restore(saved["flows"][pattern])
            self.lanes[i] = fresh

    def _lane(self, number: int) -> _Lane:
        flows = {
            # random draws of the source depend only on the seed and on its turn
            pattern: Flow(source, partial(seed_generators, self.fetch.seed, pattern, "read"))
            for pattern, source in self.fetch.data.items()
            if not is_indexed(source)
        }
        return _Lane(number, flows=flows)


class _Plain(pickle.Pickler):
    """Tensors as their bytes: what torch does instead opens a file for each."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def fullest(lengths: Sequence[int], budget: int) -> list[int]:
    """Which samples to pack: the first one, and of the others those that fill the budget best, earlier ones before later ones.

    Subset sums as bits of one whole number: bit n of reach[i] says that the first i + 1 samples can make exactly n tokens.
    """
    within = (1 << (budget + 1)) - 1
    reach = [1 << lengths[0]]
    for length in lengths[1:]:
        reach.append((reach[-1] | reach[-1] << length) & within)
    left = reach[-1].bit_length() - 1
    chosen = []
    for i in range(len(lengths) - 1, 0, -1):
        if not reach[i - 1] >> left & 1:
            chosen.append(i)
            left -= lengths[i]
    return [0, *reversed(chosen)]
