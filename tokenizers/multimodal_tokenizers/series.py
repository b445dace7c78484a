"""Time series of several channels, with missing values and at regular or irregular times, as patches of steps."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from multimodal.media.sources import as_numbers
from multimodal.shapes import ConfigError, MediaError, check_number, check_whole
from multimodal.tokenizer import Tokenizer, Tokens, at_times, describe
from multimodal_tokenizers.features import grey_levels
from multimodal_tokenizers.scaling import scale_of

LATEST = 2**20  # steps; float32 would round later times to more than a tenth of a step


@dataclass(frozen=True)
class Series(Tokenizer):
    """An array (steps, channels) of numbers, or (steps,) of one channel; NaN is a missing value. A token is `patch` steps.

    Make one with `Series.of(values)`, from the series to train on. For each step a token has the standardised channels (0 where
    missing), a 0 or 1 for each that says whether it is there, and one for the step, because the last patch may be filled up. A
    token stands at the time of its first step.

    mean: subtracted from each channel.
    std: the divisor of each channel after that.
    patch: number of consecutive steps of a token.
    step_s: seconds from one step to the next; of irregular times, a typical distance.
    timed: whether a value is a pair (array, times in seconds) of irregular steps; each step then has one more feature, its time
        after the first step of its patch. Such series can be read but not written.
    causal: whether a token that is read attends only to earlier ones.

    Examples:
        >>> series = Series.of([np.array([[0.0, 5.0], [2.0, np.nan], [0.0, 7.0], [2.0, np.nan]])], patch=2)
        >>> tokens = series(np.array([[0.0, 5.0], [np.nan, 6.0], [1.0, 5.0]]))
        >>> len(tokens), series.decode(tokens).tolist()
        (2, [[0.0, 5.0], [nan, 6.0], [1.0, 5.0]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 1
    step_s: float = 1.0
    timed: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        check_whole("Series", least=1, patch=self.patch)
        check_number("Series", step_s=self.step_s)
        if not self.mean or len(self.mean) != len(self.std):
            raise ConfigError(
                f"Series: mean has {len(self.mean)} numbers and std {len(self.std)}; give one each for every channel"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ConfigError(f"Series: mean={self.mean} must be finite, and std={self.std} more than 0")
        if not 0 < self.step_s < math.inf:
            raise ConfigError(f"Series: step_s={self.step_s} must be more than 0 seconds")

    @classmethod
    def of(
        cls,
        values: Iterable[Any],
        *,
        patch: int = 1,
        step_s: float | None = None,
        timed: bool = False,
        causal: bool = False,
    ) -> Self:
        """Make one with the mean and standard deviation of each channel of these series.

        step_s: as the field; None: 1, or the median distance of irregular times.

        Raises:
            ConfigError: no series, different numbers of channels, or a channel without any value.
            MediaError: a series that cannot be read.
        """
        found = [_read(value, timed, None, "Series.of") for value in values]
        channels = {array.shape[1] for array, _ in found}
        if len(channels) != 1:
            came = f"series have {sorted(channels)} channels" if channels else "there are no series"
            raise ConfigError(f"Series.of: {came}; give one or more, all with the same channels")
        steps = np.concatenate([array for array, _ in found])
        there = ~np.isnan(steps)
        if not there.any(0).all():
            raise ConfigError(
                f"Series.of: channel {int(there.any(0).argmin())} has no value in any series; leave it out"
            )
        if step_s is None:
            gaps = np.concatenate([np.diff(time) for _, time in found if time is not None] or [np.ones(1)])
            step_s = float(np.median(gaps)) if len(gaps) else 1.0
        scales = [scale_of(f"Series.of: channel {i}", channel[~np.isnan(channel)]) for i, channel in enumerate(steps.T)]
        mean, std = zip(*scales, strict=True)
        return cls(mean, std, patch, step_s, timed, causal)

    @property
    def _columns(self) -> int:
        """Features of a step: each channel and whether it is there, whether the step is there, and its time if `timed`."""
        return 2 * len(self.mean) + 1 + self.timed

    @property
    def feature_size(self) -> int:
        return self.patch * self._columns

    @property
    def step(self) -> tuple[float, float, float]:
        """One token's time in seconds."""
        return (self.patch * self.step_s, 1.0, 1.0)

    def encode(self, value: Any) -> Tokens:
        array, time = _read(value, self.timed, len(self.mean), "Series.encode")
        there = ~np.isnan(array)
        scaled = np.where(there, (array - self.mean) / self.std, 0.0)
        columns = [scaled, there, np.ones((len(array), 1))]
        count = -(-len(array) // self.patch)
        if time is None:
            position_NA = self.places(count)
        else:
            if time[-1] > LATEST * self.step_s:
                raise MediaError(
                    f"Series.encode: {describe(value)} ends after {time[-1]:.6g} s, more than {LATEST} steps of "
                    f"step_s={self.step_s:g}; count times from the beginning of the series"
                )
            first = time[:: self.patch]
            columns.append(((time - np.repeat(first, self.patch)[: len(time)]) / self.step_s)[:, None])
            position_NA = at_times(torch.from_numpy(first).float())
        steps = np.pad(np.concatenate(columns, 1), ((0, count * self.patch - len(array)), (0, 0)))
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused
            content_NF = torch.from_numpy(rearrange(steps, "(n p) f -> n (p f)", p=self.patch).astype(np.float32))
        return Tokens(content_NF, position_NA)

    def decode(self, tokens: Tokens) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        channels = len(self.mean)
        steps = rearrange(tokens.content, "n (p f) -> (n p) f", p=self.patch).double().cpu().numpy()
        there = steps[:, 2 * channels] > 0.5
        array = steps[:, :channels] * self.std + self.mean
        array[steps[:, channels : 2 * channels] < 0.5] = np.nan
        if not self.timed:
            return array[there]
        first = np.repeat(tokens.position_NA[:, 0].double().cpu().numpy(), self.patch)
        return array[there], (first + steps[:, -1] * self.step_s)[there]

    def places(self, count: int) -> Tensor:
        if self.timed:
            raise ConfigError(
                "Series: with timed=True it can be read but not written, since the times of steps are not known before"
            )
        return at_times(torch.arange(count) * self.step[0])

    def picture(self, tokens: Tokens) -> Tensor:
        """The steps as grey levels, the first channel at the bottom."""
        steps = rearrange(tokens.content, "n (p f) -> (n p) f", p=self.patch)[:, : len(self.mean)]
        return grey_levels(steps)

    def examples(self) -> list[Any]:
        """Values for the conformance checks."""
        random, values = np.random.default_rng(0), []
        for count in (6, 9, 9, 14):
            steps = count * self.patch - 1 if self.patch > 1 else count
            array = random.standard_normal((steps, len(self.mean))) * self.std + self.mean
            array[random.random(array.shape) < 0.1] = np.nan
            time = np.cumsum(random.uniform(0.5, 1.5, steps)) * self.step_s
            values.append((array, time) if self.timed else array)
        return values


def _read(value: Any, timed: bool, channels: int | None, who: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The array (steps, channels) of float64, and the times in seconds if the value has them."""
    time = None
    if timed:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != 2:
            raise MediaError(f"{who}: timed=True wants a pair (array, times in seconds), not {describe(value)}")
        value, time = value[0], as_numbers(value[1], f"{who}: the times", "an array, tensor or list")
    array = as_numbers(value, who, "an array, tensor or list")
    array = array[:, None] if array.ndim == 1 and channels in (None, 1) else array
    if array.ndim != 2 or array.shape[1] != (channels or array.shape[-1]):
        turned = "; turn it round" if array.ndim == 2 and array.shape[0] == channels else ""
        raise MediaError(f"{who}: wanted an array (steps, {channels or 'channels'}), not {describe(value)}{turned}")
    if not array.size:
        raise MediaError(f"{who}: {describe(value)} has no steps; to leave a field out, give None")
    if np.isinf(array).any():
        raise MediaError(f"{who}: {describe(value)} has an infinite number; NaN is a missing one")
    if time is not None:
        if time.shape != (len(array),):
            raise MediaError(f"{who}: {len(array)} steps have times {time.shape}, wanted ({len(array)},)")
        if not np.isfinite(time).all() or time[0] < 0 or (np.diff(time) <= 0).any():
            raise MediaError(f"{who}: times must rise from step to step, and begin at 0 s or later")
    return array, time
