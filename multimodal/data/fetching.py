"""Fetches and encodes samples. The n-th visit of a task gives the same sample with the same augmentation in any process."""

import ctypes
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
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
from multimodal.texts import shortened

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TRIES = 100  # broken samples in a row that may be skipped, where broken ones are skipped at all
CHECK_S = 0.5  # interval at which a wait for data checks whether the run is to stop
ENDING_S = 3.0  # from asking data workers to end to killing them
STUCK_S = 10.0  # how long a run that is to stop waits for its next data


@dataclass(frozen=True)
class Bad:
    """A sample that could not be used.

    task: its task.
    sample: its name, such as "sample 7".
    error: the reason.
    """

    task: str
    sample: str
    error: str


@dataclass
class Batch:
    """The data of one step in this process.

    streams: the packed micro-batches.
    names: the names of the samples of each micro-batch, in packing order.
    numbers: the index of each micro-batch within the step, counted over all processes.
    bad: the samples that were left out.
    filled: the share of the token budget that is used; None: there is no budget.
    """

    streams: list[Stream]
    names: list[list[str]]
    numbers: list[int]
    bad: list[Bad]
    filled: float | None = None


def seed_generators(*key: int | str) -> None:
    """Seed all global generators from `key`, so that random augmentations depend only on (seed, visit), in any worker."""
    seed = crc32("/".join(map(str, key)).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Fetcher:
    """Fetches and encodes the samples of tasks, after seeding all generators with the seed, the task and the visit.

    packer: encodes the samples.
    data: the source of each task.
    seed: of the order and of the generators.
    progress: where data workers write the sample they are at.
    """

    packer: Packer
    data: Mapping[str, Any]
    seed: int
    progress: "WorkerProgress" = field(default_factory=lambda: WorkerProgress())

    def __call__(self, pattern: str, visit: int, where: str, sample: Any = None) -> tuple[Prepared, str]:
        """The encoded sample of a task at a visit, and its name. sample: the raw one, if the source can only be iterated.

        Raises:
            MediaError, StreamError, TaskError: a sample that cannot be used.
        """
        samples, index = self.data[pattern], self._index(pattern, visit)
        name = f"sample {index} of the data ({where})"
        self.progress.record(list(self.data).index(pattern), index)
        seed_generators(self.seed, pattern, visit)
        try:
            sample = samples[index] if is_indexed(samples) else sample
        except ConfigError:
            raise  # the setup is wrong, not a sample
        except Exception as error:
            raise MediaError(
                f"{name} of task {pattern!r} cannot be fetched: {type(error).__name__}: {shortened(error)}"
            ) from error
        return self.packer.prepare(pattern, sample, name), name

    def bad(self, pattern: str, visit: int, error: Exception) -> Bad:
        return Bad(pattern, f"sample {self._index(pattern, visit)}", shortened(error, 500))

    def _index(self, pattern: str, visit: int) -> int:
        samples = self.data[pattern]
        return index_at(samples, f"{self.seed}/{pattern}", visit) if is_indexed(samples) else visit


class WorkerProgress:
    """The current sample of each data worker, in shared memory, so that the main process can read it when a worker has died.

    at: (workers, 2), the index of the task and the index of the sample; -1: none yet.
    """

    def __init__(self) -> None:
        self.at: torch.Tensor | None = None

    def allocate(self, workers: int) -> None:
        self.at = torch.full((workers, 2), -1).share_memory_()

    def record(self, task: int, sample: int) -> None:
        worker = get_worker_info()
        if worker is not None and self.at is not None:
            self.at[worker.id, 0], self.at[worker.id, 1] = task, sample


class Loader:
    """The items of a data set in a given order, made by `workers` processes (0: this one), all of which end with the block.

        with Loader(dataset, order, fetch, workers) as items: ...

    make: maps the iterator of items to the one that `with` returns. asked: whether the run is to stop; if it is, the loader waits
    at most STUCK_S for data.

    Raises, in the block:
        StreamError: a worker died, or no data came when the run was to stop; the message names the current samples.
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
        self.stuck = ""  # the error after workers were killed because no data came
        self.done, self.watch = threading.Event(), None
        if workers:
            fetch.progress.allocate(workers)
        self.loader = DataLoader(
            _ErrorsAsItems(dataset) if workers else dataset,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            worker_init_fn=in_worker if workers else None,
            # without it, DataLoader draws from the global generator
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
            self.watch = threading.Thread(target=self._end_stuck_wait, name="watch over data workers", daemon=True)
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
                    self._await_deaths()
                    raise StuckError(self.stuck) from None
                raise
            self.since = None
            if isinstance(item, Exception):
                raise item
            yield item

    def _end_stuck_wait(self) -> None:
        """Runs in a thread. If the run is to stop and no data come, kills the workers, which ends the main thread's wait.

        The main thread may be blocked in half a message, or in memory that a worker shares, so it cannot check.
        """
        stopping_since = None
        while not self.done.wait(CHECK_S):
            since, now = self.since, time.monotonic()
            stopping_since = None if since is None or not self.asked() else stopping_since or now
            if since is not None and stopping_since is not None and now - max(stopping_since, since) >= STUCK_S:
                places = [at for number in range(len(self.workers)) if (at := self._at(number))]
                self.stuck = (
                    f"fit: no data came for {STUCK_S:g} s after the run was asked to stop; the data workers were at "
                    f"{', '.join(places) or 'no sample yet'}"
                )
                self._kill()
                return

    def _await_deaths(self) -> None:
        """Wait until all killed workers are gone, and drop the error that PyTorch's signal handler raises for them.

        It raises it once, wherever the main thread is then: later it would end the run in place of the StuckError.
        """
        for worker in self.workers:
            with suppress(RuntimeError):
                worker.join()
            worker.join()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.done.set()
        if self.watch is not None:
            self.watch.join()
        # asked before the workers are ended, since then all of them are dead
        lost = isinstance(error, (RuntimeError, OSError, EOFError)) and not self.stuck
        died = self._death() if lost else ""
        self._end()
        if died:
            raise StreamError(
                f"fit: {died}. With workers=0 the same happens in the main process, where it can be looked at; a system that is "
                "short of memory kills as well"
            ) from error

    def _death(self) -> str:
        """How the first dead worker ended; '': all of them run."""
        for number, worker in enumerate(self.workers):
            code = worker.exitcode
            if code is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                where = f" while it was at {at}" if (at := self._at(number)) else ""
                return f"data worker {number} {how}{where}"
        return ""

    def _at(self, worker: int) -> str:
        """'sample 7 of task ..': the current or last sample of a worker."""
        current = self.fetch.progress.at
        task, sample = (-1, -1) if current is None else current[worker].tolist()
        return f"sample {sample} of task {list(self.fetch.data)[task]!r}" if task >= 0 else ""

    def _end(self) -> None:
        """Ask all workers to end, and kill those that do not: only SIGKILL ends a worker that is stuck in C code."""
        if not self.workers:
            return
        killer = threading.Timer(ENDING_S, self._kill)
        killer.daemon = True
        killer.start()
        try:
            # PyTorch waits 5 s for each and then sends SIGTERM, which a stuck worker ignores
            self.items._shutdown_workers()
        except RuntimeError:
            pass  # PyTorch's own check of its workers raises this when one was killed
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
    """A run was asked to stop while it waited for data, and no data came."""


class _ErrorsAsItems(Dataset):
    """A data set that returns its errors as items. If a worker raised them, PyTorch would add a traceback to the message."""

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
    """Prepares a data worker: signals, one thread, and its end with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and ends the workers
    # schedulers send SIGTERM to all processes of a job: the main process handles the first one, a second one ends the worker
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a stuck worker would not notice that the main process was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
