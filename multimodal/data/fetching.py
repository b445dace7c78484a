"""One sample, fetched and encoded: a function of the seed and of its turn alone, in whatever process it happens."""

import ctypes
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from multimodal.data.sources import index_at, is_indexed
from multimodal.packer import Packer, Prepared
from multimodal.shapes import ConfigError, MediaError, StreamError
from multimodal.stream import Stream

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TRIES = 100  # samples in a row that may be broken where broken ones are passed over
LOOK_S = 0.5  # so often a wait for data is looked at: is the run to stop?
ENDING_S = 3.0  # from asking data workers to end to killing them
STUCK_S = 10.0  # so long a run that is to stop waits for its next data


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
    desk: "Desk" = field(default_factory=lambda: Desk())

    def __call__(self, pattern: str, turn: int, where: str, given: Any = None) -> tuple[Prepared, str]:
        """The sample of a task at a turn, with its name; `given` if its source cannot be asked by number.

        Raises:
            MediaError, StreamError, TaskError: a sample that cannot be used.
        """
        samples, index = self.data[pattern], self._index(pattern, turn)
        name = f"sample {index} of the data ({where})"
        self.desk.put(list(self.data).index(pattern), index)
        seed_generators(self.seed, pattern, turn)
        try:
            sample = samples[index] if is_indexed(samples) else given
        except ConfigError:
            raise  # no sample is to blame
        except Exception as error:
            raise MediaError(
                f"{name} of task {pattern!r} cannot be fetched: {type(error).__name__}: {error}"
            ) from error
        return self.packer.prepare(pattern, sample, name), name

    def bad(self, pattern: str, turn: int, error: Exception) -> Bad:
        return Bad(pattern, f"sample {self._index(pattern, turn)}", str(error))

    def _index(self, pattern: str, turn: int) -> int:
        samples = self.data[pattern]
        return index_at(samples, f"{self.seed}/{pattern}", turn) if is_indexed(samples) else turn


class Desk:
    """Which sample each data worker is at, in memory that it shares with the main process: what is left of one that dies."""

    def __init__(self) -> None:
        self.at: torch.Tensor | None = None  # (workers, 2): number of the task, of the sample; -1: none yet

    def seat(self, workers: int) -> None:
        self.at = torch.full((workers, 2), -1).share_memory_()

    def put(self, task: int, sample: int) -> None:
        worker = get_worker_info()
        if worker is not None and self.at is not None:
            self.at[worker.id, 0], self.at[worker.id, 1] = task, sample


class Loader:
    """The items of a data set in an order, made in `workers` processes (0: in this one); none of these outlives the block.

        with Loader(dataset, order, fetch, workers) as items: ...

    make: what becomes of the items before they are given. asked: whether the run is to stop; then the wait for data has an end.

    Raises, in the block:
        StreamError: a worker died, or none gave data when the run was to stop; says which sample it was at.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Iterable[Any],
        fetch: Fetcher,
        workers: int,
        *,
        make: Callable[[Iterator[Any]], Iterator[Any]] = iter,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.fetch, self.make, self.asked = fetch, make, asked
        self.workers: list[Any] = []
        self.items: Any = None
        self.since: float | None = None  # when the wait for the next item began
        self.stuck = ""  # what is said of workers that were killed because nothing came
        self.done, self.watch = threading.Event(), None
        if workers:
            fetch.desk.seat(workers)
        self.loader = DataLoader(
            _Telling(dataset) if workers else dataset,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            worker_init_fn=in_worker if workers else None,
            # else it draws from the global one
            generator=torch.Generator().manual_seed(crc32(str(fetch.seed).encode())),
            pin_memory=False,
        )

    def __iter__(self) -> Iterator[Any]:
        with self as items:
            yield from items

    def __enter__(self) -> Iterator[Any]:
        self.items = iter(self.loader)
        self.workers = list(getattr(self.items, "_workers", ()))
        if self.workers:
            self.watch = threading.Thread(target=self._watched, name="watch over data workers", daemon=True)
            self.watch.start()
        return self.make(self._items())

    def _items(self) -> Iterator[Any]:
        while True:
            self.since = time.monotonic()
            try:
                item = next(self.items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                if self.stuck:
                    raise StuckError(self.stuck) from None
                raise
            self.since = None
            if isinstance(item, Exception):
                raise item
            yield item

    def _watched(self) -> None:
        """In a thread: ends the wait of the main one by killing the workers, when the run is to stop and nothing comes.

        The main thread may wait for half a message, or for memory that a worker is to hand over, so it cannot look itself.
        """
        asked_at = None
        while not self.done.wait(LOOK_S):
            since, now = self.since, time.monotonic()
            asked_at = None if since is None or not self.asked() else asked_at or now
            if since is not None and asked_at is not None and now - max(asked_at, since) >= STUCK_S:
                places = [at for number in range(len(self.workers)) if (at := self._at(number))]
                self.stuck = (
                    f"fit: no data came for {STUCK_S:g} s after the run was asked to stop; the data workers were at "
                    f"{', '.join(places) or 'no sample yet'}"
                )
                self._kill()
                return

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.done.set()
        if self.watch is not None:
            self.watch.join()
        # looked at before the others are ended, as then all of them are dead
        lost = isinstance(error, (RuntimeError, OSError, EOFError)) and not self.stuck
        told = self._death() if lost else ""
        self._end()
        if told:
            raise StreamError(
                f"fit: {told}. With workers=0 the same happens in the main process, where it can be looked at; a system that is "
                "short of memory kills as well"
            ) from error

    def _death(self) -> str:
        """How a worker ended, if one did."""
        for number, worker in enumerate(self.workers):
            code = worker.exitcode
            if code is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                where = f" while it was at {at}" if (at := self._at(number)) else ""
                return f"data worker {number} {how}{where}"
        return ""

    def _at(self, worker: int) -> str:
        """'sample 7 of task ..', the one that a worker is at, or was when it died."""
        desk = self.fetch.desk.at
        task, sample = (-1, -1) if desk is None else desk[worker].tolist()
        return f"sample {sample} of task {list(self.fetch.data)[task]!r}" if task >= 0 else ""

    def _end(self) -> None:
        """Ask all workers to end, and kill those that do not: one that is stuck in C code listens to no signal but SIGKILL."""
        if not self.workers:
            return
        killer = threading.Timer(ENDING_S, self._kill)
        killer.daemon = True
        killer.start()
        try:
            # PyTorch waits 5 s for each and then sends SIGTERM, which such a one does not hear
            self.items._shutdown_workers()
        except RuntimeError:
            pass  # of PyTorch's watch over its workers, which sees one killed
        finally:
            killer.cancel()
            killer.join()
            self._kill()
            self.items = None

    def _kill(self) -> None:
        for worker in self.workers:
            if worker.is_alive():
                worker.kill()


class StuckError(StreamError):
    """No data came while a run was to stop."""


class _Telling(Dataset):
    """A data set whose errors are items: raised in a worker, PyTorch would put a traceback into their message."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except (ConfigError, MediaError, StreamError) as error:
            return error

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def in_worker(_: int) -> None:
    """How a data worker starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers in order
    # schedulers send SIGTERM to all of a job's processes: the first is left to the main process too, a second one ends
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a worker that is stuck does not notice that the main process was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
