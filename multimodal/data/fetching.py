"""One sample, fetched and encoded: a function of the seed and of its turn alone, in whatever process it happens."""

import random
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from multimodal.data.sources import index_at, is_indexed
from multimodal.packer import Packer, Prepared
from multimodal.shapes import ConfigError, MediaError, shortened
from multimodal.stream import Stream

TRIES = 100  # samples in a row that may be broken where broken ones are passed over


@dataclass(frozen=True)
class Bad:
    """A sample that could not be used, and why."""

    task: str
    sample: str  # which one, in words
    error: str


@dataclass
class Batch:
    """What one step trains on in this process: packed micro-batches, the names of their samples, and what had to be left out.

    numbers: which of the step's micro-batches each is, counted over all processes.
    """

    streams: list[Stream]
    names: list[list[str]]
    numbers: list[int]
    bad: list[Bad]
    filled: float | None = None  # share of the token budget that is used


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the global generators of random, numpy and torch's CPU back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_generators(*key: int | str) -> None:
    """Set them from `key`: augmentations of any library become a function of (seed, turn), in any worker."""
    seed = crc32("/".join(map(str, key)).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Fetcher:
    """Fetches and encodes the samples of tasks, after setting all generators from the seed, the task and the turn."""

    packer: Packer
    data: Mapping[str, Any]
    seed: int

    def __call__(self, pattern: str, turn: int, where: str, given: Any = None) -> tuple[Prepared, str]:
        """The sample of a task at a turn, with its name; `given` if its source cannot be asked by number.

        Raises:
            MediaError, StreamError, TaskError: a sample that cannot be used.
        """
        samples, index = self.data[pattern], self._index(pattern, turn)
        name = f"sample {index} of the data ({where})"
        seed_generators(self.seed, pattern, turn)
        try:
            sample = samples[index] if is_indexed(samples) else given
        except ConfigError:
            raise  # no sample is to blame
        except Exception as error:
            raise MediaError(
                f"{name} of task {pattern!r} cannot be fetched: {type(error).__name__}: {shortened(error)}"
            ) from error
        return self.packer.prepare(pattern, sample, name), name

    def bad(self, pattern: str, turn: int, error: Exception) -> Bad:
        return Bad(pattern, f"sample {self._index(pattern, turn)}", shortened(error, 500))

    def _index(self, pattern: str, turn: int) -> int:
        samples = self.data[pattern]
        return index_at(samples, f"{self.seed}/{pattern}", turn) if is_indexed(samples) else turn


def loaded(dataset: Dataset, order: Iterable[Any], seed: int, workers: int) -> DataLoader:
    """The items of a data set in an order, made in `workers` processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=in_worker if workers else None,
        generator=torch.Generator().manual_seed(seed),  # else it draws from the global one
        pin_memory=False,
    )


def in_worker(_: int) -> None:
    """How a data worker starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers in order
    # schedulers send SIGTERM to all of a job's processes: the first is left to the main process too, a second one ends
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    torch.set_num_threads(1)
