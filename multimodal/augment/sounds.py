"""Augmentations of sounds: pairs (wave of one channel, its rate in Hz)."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.augment.base import Augmentation, check_between, check_pair, check_share
from multimodal.media import read_as_recorded
from multimodal.shapes import check_whole

Sound = tuple[Tensor, int]

STEPS = 40  # factors of speed are multiples of 1/40, so that few filters are computed, each of them short
WINDOW_S = 0.032  # of the short-time spectra of `Tempo` and `Pitch`


class SoundAugmentation(Augmentation):
    """A change of a sound, which may be anything that `AudioFrames` reads; the result is a pair (wave (S,) float32, rate in Hz)."""

    of = "sound"

    @staticmethod
    def read(value: Any) -> Sound:
        return read_as_recorded(value, who="augment")


@dataclass(frozen=True)
class Speed(SoundAugmentation):
    """Played faster or slower, which also changes the pitch (Ko et al. 2015); torchaudio resamples.

    least, largest: factors; 1.1 is faster. They are multiples of 1/40.
    """

    least: float = 0.9
    largest: float = 1.1

    def __post_init__(self) -> None:
        check_pair("Speed", 0.25, 4, factors=(self.least, self.largest))

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        return _resampled(value[0], _fortieths(self, draw)), value[1]


@dataclass(frozen=True)
class Tempo(SoundAugmentation):
    """Faster or slower at the same pitch, by torchaudio's phase vocoder.

    least, largest: factors; 1.1 is faster. They are multiples of 1/40.
    """

    least: float = 0.9
    largest: float = 1.1

    def __post_init__(self) -> None:
        check_pair("Tempo", 0.25, 4, factors=(self.least, self.largest))

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        return _stretched(value, _fortieths(self, draw) / STEPS), value[1]


@dataclass(frozen=True)
class Pitch(SoundAugmentation):
    """Higher or lower at the same tempo: stretched by torchaudio's phase vocoder, then resampled.

    least, largest: factors of all frequencies; 1.06 is a semitone. They are multiples of 1/40.
    """

    least: float = 0.9
    largest: float = 1.1

    def __post_init__(self) -> None:
        check_pair("Pitch", 0.25, 4, factors=(self.least, self.largest))

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        factor = _fortieths(self, draw)
        return _resampled(_stretched(value, STEPS / factor), factor), value[1]


@dataclass(frozen=True)
class Gain(SoundAugmentation):
    """Louder or quieter. A kind that removes the loudness, as `AudioFrames` does by default, sees no difference.

    least_db, largest_db: the change in decibels.
    """

    least_db: float = -12.0
    largest_db: float = 0.0

    def __post_init__(self) -> None:
        check_pair("Gain", -120, 60, decibels=(self.least_db, self.largest_db))

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        return value[0] * 10 ** (draw.uniform(self.least_db, self.largest_db) / 20), value[1]


@dataclass(frozen=True)
class Noise(SoundAugmentation):
    """White noise, quieter than the sound by a random number of decibels.

    least_db, largest_db: the signal-to-noise ratio, by the standard deviations of both.
    """

    least_db: float = 10.0
    largest_db: float = 45.0

    def __post_init__(self) -> None:
        check_pair("Noise", -60, 120, decibels=(self.least_db, self.largest_db))

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        wave_S, rate = value
        deviation = float(wave_S.std(correction=0)) * 10 ** (-draw.uniform(self.least_db, self.largest_db) / 20)
        return wave_S + torch.from_numpy(draw.standard_normal(len(wave_S), dtype=np.float32)) * deviation, rate


@dataclass(frozen=True)
class Pause(SoundAugmentation):
    """Silence before and after the sound, as when somebody presses a button to record.

    before_s, after_s: the longest of each, in seconds.
    """

    before_s: float = 0.1
    after_s: float = 0.1

    def __post_init__(self) -> None:
        check_between("Pause", 0, 60, before_s=self.before_s, after_s=self.after_s)

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        wave_S, rate = value
        return F.pad(wave_S, [int(rate * draw.uniform(0, most)) for most in (self.before_s, self.after_s)]), rate


@dataclass(frozen=True)
class TimeShift(SoundAugmentation):
    """The sound begins elsewhere; what stood before comes at the end. For sounds without an order, such as rain; not for words.

    share: the largest shift as a share of the duration.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        check_share("TimeShift", share=self.share)

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        return value[0].roll(int(draw.uniform(0, self.share) * len(value[0]))), value[1]


@dataclass(frozen=True)
class RandomPiece(SoundAugmentation):
    """A piece of the sound.

    least, largest: its share of the duration.
    """

    least: float = 0.5
    largest: float = 1.0

    def __post_init__(self) -> None:
        check_pair("RandomPiece", 1e-3, 1, shares=(self.least, self.largest))

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        wave_S, rate = value
        count = max(1, round(len(wave_S) * draw.uniform(self.least, self.largest)))
        start = int(draw.integers(len(wave_S) - count + 1))
        return wave_S[start : start + count], rate


@dataclass(frozen=True)
class Equaliser(SoundAugmentation):
    """Other loudness of low and high tones, as by another microphone, room or loudspeaker.

    largest_db: the standard deviation of the gain, in decibels.
    octaves: the gain is drawn at points so far apart on the logarithm of the frequency, from half the rate downwards.
    """

    largest_db: float = 4.0
    octaves: float = 1.0

    def __post_init__(self) -> None:
        check_between("Equaliser", 0, 60, largest_db=self.largest_db)
        check_between("Equaliser", 0.1, 10, octaves=self.octaves)

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        wave_S, rate = value
        # some lengths, such as primes, have slow transforms; a power of 2 has not
        padded = 2 ** math.ceil(math.log2(max(len(wave_S), 2)))
        spectrum = torch.fft.rfft(wave_S, padded)
        # 8 octaves below half the rate, and below them the gain of the lowest point
        points = np.arange(-8.0, self.octaves, self.octaves)
        at = np.log2(np.maximum(np.linspace(0, 1, len(spectrum)), 2.0**-8))
        gain_db = np.interp(at, points, draw.normal(0, self.largest_db, len(points)))
        filtered_S = torch.fft.irfft(spectrum * torch.from_numpy(np.float32(10 ** (gain_db / 20))), padded)
        return filtered_S[: len(wave_S)], rate


@dataclass(frozen=True)
class Gaps(SoundAugmentation):
    """Spans of silence in the sound.

    number: of spans.
    longest_s: the longest duration of each, in seconds.
    """

    number: int = 1
    longest_s: float = 0.1

    def __post_init__(self) -> None:
        check_whole("Gaps", least=1, number=self.number)
        check_between("Gaps", 0, 60, longest_s=self.longest_s)

    def change(self, value: Sound, draw: np.random.Generator) -> Sound:
        wave_S, rate = value[0].clone(), value[1]
        for _ in range(self.number):
            start = int(draw.integers(len(wave_S)))
            wave_S[start : start + int(rate * draw.uniform(0, self.longest_s))] = 0
        return wave_S, rate


def _fortieths(span: Any, draw: np.random.Generator) -> int:
    """A factor from `least` to `largest` of a declaration, in fortieths."""
    low, high = round(span.least * STEPS), round(span.largest * STEPS)
    return int(draw.integers(low, high + 1))


@lru_cache(maxsize=128)
def _resampler(old: int, new: int) -> Any:
    from torchaudio.transforms import Resample

    with torch.device("cpu"):  # it is cached, so it must not be on the device of one caller
        return Resample(old, new)


def _resampled(wave_S: Tensor, fortieths: int) -> Tensor:
    """The wave with its duration divided by this factor."""
    common = math.gcd(fortieths, STEPS)
    return wave_S if fortieths == STEPS else _resampler(fortieths // common, STEPS // common)(wave_S)


def _stretched(sound: Sound, factor: float) -> Tensor:
    """The wave with its duration divided by this factor, and with its frequencies."""
    from torchaudio.functional import phase_vocoder

    wave_S, rate = sound
    count = max(1, round(len(wave_S) / factor))
    window = 2 ** math.ceil(math.log2(max(16, rate * WINDOW_S)))
    if factor == 1 or len(wave_S) <= window:  # less than a window has no spectra to stretch
        return wave_S
    hop = window // 4
    hann = torch.hann_window(window, device="cpu")
    spectra = torch.stft(wave_S, window, hop, window=hann, return_complex=True)
    advance = torch.linspace(0, math.pi * hop, len(spectra), device="cpu")[:, None]
    return torch.istft(phase_vocoder(spectra, factor, advance), window, hop, window=hann, length=count)
