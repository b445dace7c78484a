"""From data sets to batches: which sample comes at which step is a function of (seed, step) alone."""

import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from multimodal.shapes import ConfigError, MediaError
from multimodal.stream import Packer, Stream


class Samples(Protocol):
    """Anything with a length that gives a sample (a mapping of fields) for an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Blanked:
    """The same samples, but in a share of the times one is asked for, some of its fields are None.

    A model that is to write with guidance learns by this what it would write if it had read nothing (Ho & Salimans 2022).
    """

    samples: Samples
    fields: tuple[str, ...]
    share: float = 0.1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = self.samples[index]
        return {**sample, **dict.fromkeys(self.fields)} if np.random.random() < self.share else sample


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
    """Set them from `key`: augmentations of any library become a function of (seed, step, slot), in any worker."""
    seed = crc32("/".join(map(str, key)).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)


def check_samples(who: str, pattern: str, samples: Any) -> None:
    """Refuse what has no length or no samples with a ConfigError."""
    if isinstance(samples, Mapping) or not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
        raise ConfigError(
            f"{who}: the data of task {pattern!r} are {type(samples).__name__}; wanted a list, or what has a length and [index]"
        )
    if len(samples) == 0:
        raise ConfigError(f"{who}: the data of task {pattern!r} are empty")


class Batches(Dataset):
    """Item `step` is that step's micro-batches, packed: a list of `accumulate` streams of batch / accumulate samples.

    Every task has an equal share of each batch, or one in the ratio of `mix`. Each task's data are shuffled anew each time round.
    """

    def __init__(
        self,
        packer: Packer,
        data: Mapping[str, Samples],
        *,
        batch: int,
        accumulate: int = 1,
        seed: int = 0,
        mix: Mapping[str, float] | None = None,
    ) -> None:
        if not data:
            raise ConfigError("fit: no data were given; give samples by task, as in {'image -> label': samples}")
        for pattern, samples in data.items():
            packer.check_task(pattern)
            check_samples("fit", pattern, samples)
        if batch < len(data) * accumulate:
            raise ConfigError(
                f"fit: batch={batch} must hold at least one sample of each of the {len(data)} tasks in each of "
                f"{accumulate} micro-batches"
            )
        for pattern, weight in (mix or {}).items():
            if pattern not in data or not weight > 0:
                raise ConfigError(
                    f"fit: mix gives {weight!r} to {pattern!r}; it wants a number above 0 for tasks of the data"
                )
        self.packer, self.data, self.accumulate, self.seed = packer, dict(data), accumulate, seed
        self.share = _shares(batch, {pattern: (mix or {}).get(pattern, 1.0) for pattern in data})

    def __len__(self) -> int:
        return 2**40  # as many steps as anyone asks for

    def __getitem__(self, step: int) -> list[Stream]:
        with kept_generators():
            batch = [
                self._sample(pattern, step, step * count + slot)
                for pattern, count in self.share.items()
                for slot in range(count)
            ]
        parts = [batch[part :: self.accumulate] for part in range(self.accumulate)]
        return [
            self.packer([(pattern, sample) for pattern, sample, _ in part], names=[name for _, _, name in part])
            for part in parts
        ]

    def _sample(self, pattern: str, step: int, position: int) -> tuple[str, Mapping[str, Any], str]:
        samples = self.data[pattern]
        time_round, place = divmod(position, len(samples))
        index = int(_shuffled(len(samples), self.seed, pattern, time_round)[place])
        name = f"sample {index} of the data (step {step})"
        seed_generators(self.seed, pattern, position)
        try:
            return pattern, samples[index], name
        except Exception as error:
            raise MediaError(
                f"{name} of task {pattern!r} cannot be fetched: {type(error).__name__}: {error}"
            ) from error

    def loader(self, start: int, stop: int, workers: int) -> DataLoader:
        """Steps start .. stop - 1, made in `workers` processes (0: in this one)."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            worker_init_fn=_in_worker if workers else None,
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=False,
        )


def _shares(batch: int, weight: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to `batch`, at least 1 each, in the ratio of the weights (largest remainder)."""
    exact = {pattern: batch * w / sum(weight.values()) for pattern, w in weight.items()}
    share = {pattern: max(1, int(x)) for pattern, x in exact.items()}
    by_need = sorted(exact, key=lambda p: share[p] - exact[p])
    while (left := batch - sum(share.values())) > 0:
        for pattern in by_need[:left]:
            share[pattern] += 1
    while sum(share.values()) > batch:
        share[max(share, key=lambda p: share[p])] -= 1
    return share


@lru_cache(maxsize=16)
def _shuffled(size: int, *key: int | str) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(crc32("/".join(map(str, key)).encode())))


def _in_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers in order
    torch.set_num_threads(1)
