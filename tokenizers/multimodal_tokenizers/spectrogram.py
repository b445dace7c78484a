"""Sound as overlapping patches of its spectrogram, as the Audio Spectrogram Transformer reads it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal_tokenizers.audio import read_limited

HOP, WINDOW = 160, 400  # samples from frame to frame, and of a frame: 10 and 25 ms


@dataclass(frozen=True)
class SpectrogramPatches(Tokenizer):
    """Overlapping patches of Kaldi's log-mel frames (Gong et al. 2021), equal to transformers' ASTFeatureExtractor and to what the
    convolution of its ASTModel reads, in its order: all times of the lowest bands first.

    A position is (seconds, row of patches from low to high bands, 0). The content of a patch is its bands, one after the other, as
    in the weights of that convolution. Less than 10 ms at the end, and fewer than `stride` of the highest bands, are in no patch.

    frames: number of frames of 10 ms of every sound, after padding; transformers calls it max_length.
    mels: number of bands.
    patch: bands and frames of a patch.
    stride: bands and frames from patch to patch.
    mean: subtracted from the log-mels.
    std: half of their divisor.
    cut: whether of a sound that is too long the beginning is read; otherwise it is refused.
    """

    frames: int = 1024
    mels: int = 128
    patch: int = 16
    stride: int = 10
    mean: float = -4.2677393
    std: float = 4.5689974
    cut: bool = False
    rate_hz: ClassVar[int] = 16000
    lossy = True

    def __post_init__(self) -> None:
        if min(self.patch, self.stride) < 1 or self.patch > min(self.frames, self.mels):
            raise ConfigError(
                f"SpectrogramPatches: patch={self.patch} and stride={self.stride} must be at least 1, and a patch no larger than "
                f"frames={self.frames} and mels={self.mels}"
            )
        if self.std <= 0:
            raise ConfigError(f"SpectrogramPatches: std={self.std} must be more than 0")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows (bands) and columns (times) of patches of every sound."""
        return (self.mels - self.patch) // self.stride + 1, (self.frames - self.patch) // self.stride + 1

    @property
    def feature_size(self) -> int:
        return self.patch**2

    @property
    def step(self) -> tuple[float, float, float]:
        """The seconds from patch to patch, and one row."""
        return (self.stride * HOP / self.rate_hz, 1.0, 1.0)

    def encode(self, value: Any) -> Tokens:
        frames_NF = self.spectrogram(value)
        patches = frames_NF.T.unfold(0, self.patch, self.stride).unfold(1, self.patch, self.stride)
        rows, times = self.grid
        place = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(times)) * self.step[0])
        position_NA = torch.stack([place[:, 1], place[:, 0], torch.zeros(len(place))], 1)
        return Tokens(patches.reshape(rows * times, self.feature_size), position_NA)

    def spectrogram(self, value: Any) -> Tensor:
        """Normalised log-mel frames (N, mels) of a sound, cut or padded to those that are in patches."""
        from torchaudio.compliance.kaldi import fbank

        read = (self.grid[1] - 1) * self.stride + self.patch  # frames that are in patches
        wave_S = read_limited(
            value,
            rate_hz=self.rate_hz,
            samples=WINDOW + read * HOP - 1,  # one more is another frame
            who="SpectrogramPatches.encode",
            cut=self.cut,
        )
        if len(wave_S) < WINDOW:
            raise MediaError(
                f"SpectrogramPatches.encode: the sound has {len(wave_S)} samples at {self.rate_hz} Hz, less than one frame of "
                f"{WINDOW}; append silence"
            )
        found_NF = fbank(wave_S[None], sample_frequency=self.rate_hz, window_type="hanning", num_mel_bins=self.mels)
        # zeros that are normalised like the rest: not silence, but what the weights were trained on
        frames_NF = torch.zeros(read, self.mels)
        frames_NF[: len(found_NF)] = found_NF
        return (frames_NF - self.mean) / (2 * self.std)

    def token_names(self, tokens: Tokens) -> list[str]:
        return [f"at {time:.4g} s, row {row:g}" for time, row, _ in tokens.position_NA.tolist()]
