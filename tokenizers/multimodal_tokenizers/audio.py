"""Sound as log-mel frames with their time in seconds; any duration, no fixed window."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from multimodal.media import read_sound
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, Tokens, at_times


@dataclass(frozen=True)
class AudioFrames(Tokenizer):
    """Log-mel spectrogram, `stack` neighbouring frames a token; sound of any rate is resampled to `rate_hz`.

    Places are seconds, so that the same sound recorded at another rate lies on the same places. `normalise="clip"` takes off
    each clip's own mean and spread (loudness does not matter); "fixed" uses one mean and spread for all.
    """

    rate_hz: int = 16000
    mels: int = 64  # bands
    hop_ms: float = 10.0
    window_ms: float = 25.0
    stack: int = 4  # frames a token
    normalise: Literal["clip", "fixed"] = "clip"

    def __post_init__(self) -> None:
        for name in ("rate_hz", "mels", "hop_ms", "window_ms", "stack"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"AudioFrames: {name}={getattr(self, name)} must be more than 0")
        if self.hop_samples < 1 or self.window_ms < self.hop_ms:
            raise ConfigError(
                f"AudioFrames: hop_ms={self.hop_ms} must be a sample or more and window_ms={self.window_ms} no less"
            )
        if self.normalise not in ("clip", "fixed"):
            raise ConfigError(f"AudioFrames: normalise={self.normalise!r} must be 'clip' or 'fixed'")

    @property
    def hop_samples(self) -> int:
        return round(self.rate_hz * self.hop_ms / 1000)

    @property
    def feature_size(self) -> int:
        return self.mels * self.stack

    @property
    def step(self) -> tuple[float, float, float]:
        """One token's time in seconds."""
        return (self.stack * self.hop_samples / self.rate_hz, 1.0, 1.0)

    def encode(self, value: Any) -> Tokens:
        wave_S = read_sound(value, rate_hz=self.rate_hz, who="AudioFrames.encode")
        frames_NF = self.spectrogram(wave_S)
        frames_NF = F.pad(frames_NF[None], (0, 0, 0, -len(frames_NF) % self.stack), mode="replicate")[0]
        stacked_NF = rearrange(frames_NF, "(n s) f -> n (s f)", s=self.stack)
        return Tokens(stacked_NF, at_times(torch.arange(len(stacked_NF)) * self.step[0]))

    def picture(self, tokens: Tokens) -> Tensor:
        """The spectrogram, low tones at the bottom."""
        frames_NF = rearrange(tokens.content, "n (s f) -> (n s) f", s=self.stack)
        level = (frames_NF - frames_NF.min()) / (frames_NF.max() - frames_NF.min() + 1e-6)
        return level.T.flip(0)[:, :, None]

    def spectrogram(self, wave_S: Tensor) -> Tensor:
        """Normalised log-mel frames (N, mels), one for each hop that begins within the sound."""
        window = round(self.rate_hz * self.window_ms / 1000)
        mel = _mel(self.rate_hz, window, self.hop_samples, self.mels)
        count = math.ceil(len(wave_S) / self.hop_samples)
        wave_S = F.pad(wave_S, (0, max(0, (count - 1) * self.hop_samples + mel.n_fft - len(wave_S))))
        log_NF = (mel(wave_S).T[:count] + 1e-6).log()
        if self.normalise == "fixed":
            return (log_NF + 6) / 4
        return (log_NF - log_NF.mean()) / (log_NF.std(correction=0) + 1e-3)


@lru_cache(maxsize=8)
def _mel(rate_hz: int, window: int, hop: int, mels: int):
    from torchaudio.transforms import MelSpectrogram

    n_fft = 2 ** math.ceil(math.log2(window))
    return MelSpectrogram(
        rate_hz,
        n_fft=n_fft,
        win_length=window,
        hop_length=hop,
        n_mels=mels,
        center=False,
        norm="slaney",
        mel_scale="slaney",
    )
