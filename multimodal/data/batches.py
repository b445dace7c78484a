"""Steps of a fixed number of samples; the samples of a step are a function of (seed, step)."""

from collections.abc import Callable, Mapping

from torch.utils.data import Dataset

from multimodal.data.fetching import TRIES, Bad, Batch, Fetcher, Loader
from multimodal.data.frames import as_samples
from multimodal.data.sources import Samples, Schedule, check_samples, shares, weighed
from multimodal.packer import Packer, Prepared
from multimodal.process_state import preserved_rng
from multimodal.shapes import ConfigError, MediaError, StreamError


def steps_of_epoch(data: Mapping[str, Samples], share: Mapping[str, int]) -> float:
    """The number of steps after which every sample has come; of several tasks, that of the one that takes longest.

    share: by task, the number of its samples in a step.
    """
    return max(len(as_samples(samples)) / share[pattern] for pattern, samples in data.items())


class Batches(Dataset):
    """Item `step` is that step's micro-batches, packed: `accumulate` streams of batch / accumulate samples.

    Every task has an equal share of each batch, or one in the ratio of `mix`. The data of each task are shuffled anew each epoch.
    max_bad: above 0, a broken sample is left out and reported, and another of its task takes its place. rank and ranks: this
    process and the number of processes; it gets its `accumulate` of the ranks x accumulate micro-batches of a step, so that the
    first micro-batches of all processes have the samples of the first one of a single process, and so on. The samples of a step
    do not depend on the number of processes.

    Raises:
        ConfigError, TaskError: data, mix or batch that do not fit.
    """

    def __init__(
        self,
        packer: Packer,
        data: Mapping[str, Samples],
        *,
        batch: int,
        accumulate: int = 1,
        seed: int = 0,
        mix: Mapping[str, float] | float | None = None,
        max_bad: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        data = {pattern: as_samples(samples) for pattern, samples in data.items()}
        for pattern, samples in data.items():
            packer.check_task(pattern)
            check_samples("fit", pattern, samples)
        if batch < max(len(data), accumulate * ranks):
            raise ConfigError(
                f"fit: batch={batch} must hold at least one sample of each of the {len(data)} tasks, and one for each of "
                f"{accumulate * ranks} micro-batches" + (f" ({accumulate} in {ranks} processes)" if ranks > 1 else "")
            )
        self.fetch, self.max_bad = Fetcher(packer, dict(data), seed), max_bad
        self.parts, self.own = accumulate * ranks, range(rank * accumulate, (rank + 1) * accumulate)
        self.schedule = Schedule(shares(batch, weighed(data, mix, "fit")))

    @property
    def epoch(self) -> float:
        """The number of steps of an epoch, see `steps_of_epoch`."""
        return steps_of_epoch(self.fetch.data, self.schedule.share)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return 2**40  # no end: `fit` decides how many steps there are

    def __getitem__(self, step: int) -> Batch:
        found = Batch([], [], [], [])
        size = self.schedule.block
        with preserved_rng():
            for part in self.own:
                samples = [self._sample(step, slot, found.bad) for slot in range(part, size, self.parts)]
                found.streams.append(self.fetch.packer.lay([sample for sample, _ in samples]))
                found.names.append([name for _, name in samples])
                found.numbers.append(part)
        return found

    def _sample(self, step: int, slot: int, bad: list[Bad]) -> tuple[Prepared, str]:
        pattern, visit = self.schedule(step * self.schedule.block + slot)
        # a spare is a visit so far ahead that training never gets there, and the same in every process
        for spare in range(TRIES):
            try:
                return self.fetch(pattern, visit + spare * 2**48, f"step {step + 1}")
            except (MediaError, StreamError) as error:
                if not self.max_bad:
                    raise
                bad.append(self.fetch.bad(pattern, visit + spare * 2**48, error))
        why = f"{TRIES} samples in a row are broken, and max_bad={self.max_bad} may be"
        raise MediaError(f"task {pattern!r}: {why}; the last one: {bad[-1].error}")

    def loader(self, start: int, stop: int, workers: int, asked: Callable[[], bool] = lambda: False) -> Loader:
        """Steps start .. stop - 1, made in `workers` processes (0: in this one)."""
        return Loader(self, range(start, stop), self.fetch, workers, asked=asked)

    def state(self) -> dict:
        """The position in the data besides the step: nothing, since a step is a function of its number."""
        return {}

    def restore(self, state: Mapping) -> None:
        """Nothing to restore, see `state`."""
