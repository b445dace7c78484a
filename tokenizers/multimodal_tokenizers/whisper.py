"""Sound as Whisper reads it: log-mel frames, two a token, and two convolutions as the embedding."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.shapes import ConfigError
from multimodal.tokenizer import Places, Tokenizer, Tokens, at_times
from multimodal_tokenizers.audio import read_limited
from multimodal_tokenizers.features import grey_levels, spaced

HOP, WINDOW = 160, 400  # samples from frame to frame, and of a frame: 10 and 25 ms
FRAMES = 2  # of a token: the stride of the second convolution
POWER_FLOOR = 1e-10  # the least power that the logarithm gets
RANGE = 8.0  # powers of ten below the loudest one, below which powers are clamped


@dataclass(frozen=True)
class WhisperFrames(Tokenizer):
    """Log-mel frames of 10 ms and their embedding by convolutions (Radford et al. 2022), equal to transformers'
    WhisperFeatureExtractor; a token is two frames, and its time is in seconds.

    The loudest moment of a sound sets its floor, as in Whisper, so that no part of it can be encoded by itself.

    mels: number of bands of a frame: 80, or 128 of large-v3.
    pad_seconds: sounds are padded with silence to this duration, as in Whisper's training; a longer one is refused.
        None: a sound is padded to a whole token only.
    """

    mels: int = 80
    pad_seconds: float | None = 30.0
    rate_hz: ClassVar[int] = 16000
    lossy = True
    step = (FRAMES * HOP / 16000, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.mels < 1:
            raise ConfigError(f"WhisperFrames: mels={self.mels} must be at least 1; Whisper has 80 or 128")
        tokens = None if self.pad_seconds is None else self.pad_seconds / self.step[0]
        if tokens is not None and (tokens < 1 or abs(tokens - round(tokens)) > 1e-6):
            raise ConfigError(
                f"WhisperFrames: pad_seconds={self.pad_seconds} is not a multiple of {self.step[0]}, the seconds of a token"
            )

    @property
    def feature_size(self) -> int:
        return FRAMES * self.mels

    def encode(self, value: Any) -> Tokens:
        token = FRAMES * HOP
        most = self.max_tokens * token if self.pad_seconds is None else round(self.pad_seconds * self.rate_hz)
        wave_S = read_limited(value, rate_hz=self.rate_hz, samples=most, who="WhisperFrames.encode")
        wanted = most if self.pad_seconds is not None else -(-len(wave_S) // token) * token
        frames_NF = self.spectrogram(F.pad(wave_S, (0, wanted - len(wave_S))))
        stacked_NF = rearrange(frames_NF, "(n s) f -> n (s f)", s=FRAMES)
        return Tokens(stacked_NF, self.places(len(stacked_NF)))

    def spectrogram(self, wave_S: Tensor) -> Tensor:
        """Log-mel frames (N, mels), one for each whole hop of 10 ms; their centres are reflected at both ends."""
        window = torch.hann_window(WINDOW, device="cpu")
        waves = torch.stft(wave_S, WINDOW, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)
        # Whisper drops the last frame, whose centre is the end of the sound
        power_NF = waves[:, :-1].abs().square().T @ _mel_bands(self.mels)
        log_NF = power_NF.clamp(min=POWER_FLOOR).log10()
        return (torch.maximum(log_NF, log_NF.max() - RANGE) + 4) / 4

    def places(self, count: int) -> Tensor:
        return at_times(torch.arange(count) * self.step[0])

    def picture(self, tokens: Tokens) -> Tensor:
        """The spectrogram, low tones at the bottom."""
        return grey_levels(rearrange(tokens.content, "n (s f) -> (n s) f", s=FRAMES))

    def embed(self, width: int) -> nn.Module:
        return _ConvStem(self.mels, width)


@lru_cache(maxsize=4)
def _mel_bands(mels: int) -> Tensor:
    """Triangles (frequencies, mels) of equal area from 0 to 8000 Hz, their corners evenly on Slaney's scale: linear below 1000 Hz,
    then 27 mels for each factor of 6.4.

    In float64, since torchaudio's of float32 are off by up to 4e-4 of a narrow band's value.
    """
    # it is cached, so it must not be on the device of one caller
    highest = 15 + 27 * math.log(8) / math.log(6.4)
    corner_mel = torch.linspace(0, highest, mels + 2, dtype=torch.float64, device="cpu")
    corner_hz = torch.where(corner_mel < 15, corner_mel * 200 / 3, 1000 * 6.4 ** ((corner_mel - 15) / 27))
    hz = torch.linspace(0, 8000, WINDOW // 2 + 1, dtype=torch.float64, device="cpu")[:, None]
    low, centre, high = corner_hz[:-2], corner_hz[1:-1], corner_hz[2:]
    triangles = torch.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


class _ConvStem(nn.Module):
    """gelu(conv) twice, over three frames each, the second with stride 2; each value is zero-padded by itself."""

    reads_places = True  # the neighbours of a frame are those of its own value

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(mels, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=FRAMES, padding=1)

    def forward(self, content_NF: Tensor, places: Places) -> Tensor:
        spaced_NF, row_N, there_N = spaced(content_NF, places)
        frames = rearrange(spaced_NF, "n (s f) -> 1 f (n s)", s=FRAMES)
        # the bias of the first convolution fills the empty tokens, which the second must see empty
        hidden = F.gelu(self.first(frames)).masked_fill(~there_N.repeat_interleave(FRAMES), 0.0)
        return F.gelu(self.second(hidden))[0].T[row_N]

    def padded(self, content: Tensor, position_BNA: Tensor, length_B: Tensor) -> Tensor:
        """The same for values side by side (B, N), padded behind."""
        count = content.shape[1]
        there_B1N = (torch.arange(count, device=content.device) < length_B[:, None])[:, None]
        there_B1S = there_B1N[..., None].expand(-1, -1, -1, FRAMES).flatten(2)
        frames = content.unflatten(2, (FRAMES, -1)).permute(0, 3, 1, 2).flatten(2)
        hidden = F.gelu(self.first(frames.masked_fill(~there_B1S, 0.0))).masked_fill(~there_B1S, 0.0)
        return F.gelu(self.second(hidden)).transpose(1, 2)
