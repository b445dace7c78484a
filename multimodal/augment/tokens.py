"""Augmentations of tokens, which act after a kind has encoded a value: masks in spectrograms, other series, tokens left out."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from multimodal.augment.base import TokenAugmentation, check_pair, check_share, torch_draws
from multimodal.shapes import ConfigError, check_whole
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class SpecAugment(TokenAugmentation):
    """Bands and spans of time of a spectrogram are replaced by its mean (Park et al. 2019), by torchaudio's masks.

    For kinds of log-mel frames: `AudioFrames` and `WhisperFrames`.

    bands: number of masks over frequencies.
    widest: the largest width of each, as a share of the bands.
    spans: number of masks over time.
    longest: the largest duration of each, as a share of the sound.
    """

    bands: int = 2
    widest: float = 0.2
    spans: int = 2
    longest: float = 0.1

    def __post_init__(self) -> None:
        check_whole("SpecAugment", least=0, bands=self.bands, spans=self.spans)
        check_share("SpecAugment", widest=self.widest, longest=self.longest)

    def change_tokens(self, tokens: Tokens, tokenizer: Tokenizer, draw: np.random.Generator) -> Tokens:
        from torchaudio.functional import mask_along_axis

        mels = _mels("SpecAugment", tokenizer)
        frames_CNF = tokens.content.reshape(1, -1, mels)
        mean = float(frames_CNF.mean())
        with torch_draws(draw):
            # mask_along_axis draws a width below its bound, so a share of 1 needs a bound above all frames
            for axis, number, share in ((2, self.bands, self.widest), (1, self.spans, self.longest)):
                for _ in range(number):
                    bound = math.floor(share * frames_CNF.shape[axis]) + 1
                    frames_CNF = mask_along_axis(frames_CNF, bound, mean, axis)
        return Tokens(frames_CNF.reshape(tokens.content.shape), tokens.position_NA, tokens.pairs)


@dataclass(frozen=True)
class FrequencyWarp(TokenAugmentation):
    """The frequencies of a spectrogram times a random factor, as of a longer or shorter vocal tract (Jaitly and Hinton 2013).

    Bands are read at their new places on the mel scale; time stays. For kinds of log-mel frames: `AudioFrames`, `WhisperFrames`.

    least, largest: factors; above 1 tones become higher.
    """

    least: float = 0.9
    largest: float = 1.1

    def __post_init__(self) -> None:
        check_pair("FrequencyWarp", 0.25, 4, factors=(self.least, self.largest))

    def change_tokens(self, tokens: Tokens, tokenizer: Tokenizer, draw: np.random.Generator) -> Tokens:
        mels, factor = _mels("FrequencyWarp", tokenizer), draw.uniform(self.least, self.largest)
        rate_hz: int = tokenizer.rate_hz  # type: ignore[attr-defined]
        frames_NF = tokens.content.reshape(-1, mels)
        # triangles stand at mels + 2 points of which the first and the last are corners only
        step = float(_to_mel(torch.tensor(rate_hz / 2))) / (mels + 1)
        centre_F = _to_hertz((torch.arange(mels) + 1) * step)
        place_F = (_to_mel(centre_F / factor) / step - 1).clamp(0, mels - 1)
        low_F = place_F.long().clamp(max=max(mels - 2, 0))
        share_F = place_F - low_F
        moved_NF = frames_NF[:, low_F] * (1 - share_F) + frames_NF[:, (low_F + 1).clamp(max=mels - 1)] * share_F
        return Tokens(moved_NF.reshape(tokens.content.shape), tokens.position_NA, tokens.pairs)


@dataclass(frozen=True)
class SeriesJitter(TokenAugmentation):
    """A time series with noise, larger or smaller, and a little earlier or later (Um et al. 2017). For `Series`.

    noise: the deviation of white noise, as a share of the deviation of each channel of the series.
    scale: the deviation of the logarithm of a factor, by which the series differs more or less from its means.
    shift: the largest shift as a share of the steps; the first or last value stands where there is none. Times stay.
    """

    noise: float = 0.1
    scale: float = 0.1
    shift: float = 0.02

    def __post_init__(self) -> None:
        check_share("SeriesJitter", noise=self.noise, scale=self.scale, shift=self.shift)

    def change_tokens(self, tokens: Tokens, tokenizer: Tokenizer, draw: np.random.Generator) -> Tokens:
        if not hasattr(tokenizer, "step_s") or not tokenizer.decodes:
            raise ConfigError(
                f"SeriesJitter: the tokens of {type(tokenizer).__name__} are no time series; it works on Series"
            )
        value = tokenizer.decode(tokens)
        array, *times = value if isinstance(value, tuple) else (value,)
        there = ~np.isnan(array)
        count = np.maximum(there.sum(0), 1)
        mean = np.where(there, array, 0).sum(0) / count
        deviation = np.sqrt(np.where(there, (array - mean) ** 2, 0).sum(0) / count)
        most = int(self.shift * len(array))
        shift = int(draw.integers(-most, most + 1))
        moved = array[np.clip(np.arange(len(array)) + shift, 0, len(array) - 1)]
        changed = mean + (moved - mean) * math.exp(self.scale * draw.standard_normal())
        changed = changed + self.noise * deviation * draw.standard_normal(array.shape)
        found = tokenizer((changed, *times) if times else changed)
        return Tokens(found.content, tokens.position_NA, tokens.pairs)


@dataclass(frozen=True)
class TokenDropout(TokenAugmentation):
    """A random share of the tokens is left out: the others keep their positions, and a step takes less time.

    Of pictures these are patches (Liu et al. 2023), of sounds frames, of texts pieces. At least one token stays. It is for fields
    that are read; a head that answers at each token (`EachRow`, `Masked`) needs all of them.

    share: the share that is left out, from 0 to 1.
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        check_share("TokenDropout", share=self.share)

    def change_tokens(self, tokens: Tokens, tokenizer: Tokenizer, draw: np.random.Generator) -> Tokens:
        order_N = draw.permutation(len(tokens))
        keep_N = torch.ones(len(tokens), dtype=torch.bool)
        keep_N[torch.from_numpy(order_N[: min(round(len(tokens) * self.share), len(tokens) - 1)])] = False
        return tokens.kept(keep_N)


def _mels(who: str, tokenizer: Tokenizer) -> int:
    """The number of bands of the frames of a token."""
    mels = getattr(tokenizer, "mels", None)
    # the patches of SpectrogramPatches have mels too, but are squares of a spectrogram
    if mels is None or hasattr(tokenizer, "patch") or (tokenizer.feature_size or 0) % mels:
        raise ConfigError(
            f"{who}: the tokens of {type(tokenizer).__name__} are no log-mel frames; it works on AudioFrames and WhisperFrames, "
            "and Gaps and Equaliser on any sound"
        )
    return mels


LINEAR_HZ, MELS_BELOW, FACTOR_A_MEL = 1000.0, 15.0, math.log(6.4) / 27
"""Slaney's mel scale: 15 mels below 1000 Hz, evenly; above it 27 mels for each factor of 6.4."""


def _to_mel(hertz: Tensor) -> Tensor:
    above = MELS_BELOW + (hertz.clamp(min=LINEAR_HZ) / LINEAR_HZ).log() / FACTOR_A_MEL
    return torch.where(hertz < LINEAR_HZ, hertz * MELS_BELOW / LINEAR_HZ, above)


def _to_hertz(mel: Tensor) -> Tensor:
    above = LINEAR_HZ * ((mel - MELS_BELOW).clamp(min=0) * FACTOR_A_MEL).exp()
    return torch.where(mel < MELS_BELOW, mel * LINEAR_HZ / MELS_BELOW, above)
