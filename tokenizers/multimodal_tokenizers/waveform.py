"""Sound as its raw samples, with learned convolutions as the embedding."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.media import read_sound
from multimodal.shapes import ConfigError, check_whole
from multimodal.tokenizer import Tokenizer, Tokens, at_times

QUIETEST = 1e-5  # the least root mean square that a clip is divided by


@dataclass(frozen=True)
class Waveform(Tokenizer):
    """Raw samples; a token is `hop` of them and `context` before, read by a stack of convolutions (after Baevski et al. 2020).

    The convolutions see one token's samples, so that tokens are embedded each by itself. Places are seconds. `decode` gives the
    samples back; the mean of channels, the rate and with normalise="clip" the loudness are not those of the value.

    rate_hz: samples per second, to which every sound is resampled.
    hop: samples from token to token; the last token is filled up with silence.
    context: samples before its own that a token includes. With 0 a sound can be written too.
    strides: of each convolution, whose kernel has twice its length.
    channels: channels of the convolutions.
    normalise: "clip" divides by the root mean square of the clip, or "none".
    causal: whether a token that is read attends only to earlier ones; then use normalise="none", since the loudness of a clip is
        known only at its end.
    max_seconds: a longer sound is refused before it is decoded.
    """

    rate_hz: int = 16000
    hop: int = 320
    context: int = 80
    strides: tuple[int, ...] = (5, 4, 4)
    channels: int = 64
    normalise: Literal["clip", "none"] = "clip"
    causal: bool = False
    max_seconds: float = 600.0
    lossy = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        check_whole("Waveform", least=1, rate_hz=self.rate_hz, hop=self.hop, channels=self.channels)
        check_whole("Waveform", least=0, context=self.context)
        for stride in self.strides:
            check_whole("Waveform: strides", least=1, stride=stride)
        if self.normalise not in ("clip", "none"):
            raise ConfigError(f"Waveform: normalise={self.normalise!r} must be 'clip' or 'none'")
        if not self.max_seconds > 0:
            raise ConfigError(f"Waveform: max_seconds={self.max_seconds} must be more than 0")
        if not self.strides or self._left < 1:
            raise ConfigError(
                f"Waveform: strides={self.strides} leave nothing of the {self.feature_size} samples of hop={self.hop} and "
                f"context={self.context}; give fewer or shorter strides, one at least"
            )

    @property
    def feature_size(self) -> int:
        return self.context + self.hop

    @property
    def step(self) -> tuple[float, float, float]:
        """One token's time in seconds."""
        return (self.hop / self.rate_hz, 1.0, 1.0)

    @property
    def _left(self) -> int:
        """Positions that the convolutions leave of a token."""
        left = self.feature_size
        for stride in self.strides:
            left = -(-left // stride) - 1
        return left

    def encode(self, value: Any) -> Tokens:
        wave_S = read_sound(value, rate_hz=self.rate_hz, who="Waveform.encode", max_seconds=self.max_seconds)
        if self.normalise == "clip":
            wave_S = wave_S / wave_S.square().mean().sqrt().clamp(min=QUIETEST)
        wave_S = F.pad(wave_S, (self.context, -len(wave_S) % self.hop))
        content_NF = wave_S.unfold(0, self.feature_size, self.hop).clone()
        return Tokens(content_NF, at_times(torch.arange(len(content_NF)) * self.step[0]))

    def decode(self, tokens: Tokens) -> tuple[Tensor, int]:
        """The sound (wave_S, rate_hz): float32 from -1 to 1."""
        wave_S = tokens.content[:, self.context :].float().cpu().flatten()
        return wave_S / max(1.0, float(wave_S.abs().max()) if len(wave_S) else 0.0), self.rate_hz

    def places(self, count: int) -> Tensor:
        if self.context:
            raise ConfigError(
                f"Waveform: context={self.context} samples are not known to a token that is written; context=0 can be written"
            )
        return at_times(torch.arange(count) * self.step[0])

    def embed(self, width: int) -> nn.Module:
        return _Stem(self.strides, self.channels, self._left, width)


class _Stem(nn.Module):
    """Convolutions with GELU, and a linear layer over the positions that are left."""

    def __init__(self, strides: tuple[int, ...], channels: int, left: int, width: int) -> None:
        super().__init__()
        inputs = (1, *[channels] * (len(strides) - 1))
        convolutions = [
            nn.Conv1d(count, channels, 2 * stride, stride) for count, stride in zip(inputs, strides, strict=True)
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # so that a signal keeps its power through all of them
        self.strides = strides
        self.convolutions = nn.ModuleList(convolutions)
        self.linear = nn.Linear(left * channels, width)

    def forward(self, content_NF: Tensor) -> Tensor:
        hidden = content_NF[:, None]
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            # up to a whole number of strides, or the last samples would lie in no window
            hidden = F.gelu(convolution(F.pad(hidden, (0, -hidden.shape[-1] % stride))))
        return self.linear(hidden.flatten(1))
