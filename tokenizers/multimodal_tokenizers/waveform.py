"""Sound as raw samples, embedded by learned convolutions."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.media import read_sound
from multimodal.shapes import ConfigError, check_whole
from multimodal.tokenizer import Tokenizer, Tokens, at_times

QUIETEST = 1e-5  # the least root mean square that a sound is divided by


@dataclass(frozen=True)
class Waveform(Tokenizer):
    """A sound as raw samples: a token is `hop` samples and the `context` before them, embedded by convolutions.

    The convolutions, after the encoder of wav2vec 2.0 (Baevski et al. 2020), see the samples of one token only, so that each token
    is embedded by itself. Positions are in seconds. `decode` gives one channel at `rate_hz`; with normalise="clip" its loudness is
    not that of the value.

    rate_hz: samples per second, to which every sound is resampled.
    hop: samples from token to token; the last token is filled up with silence.
    context: number of samples before its own that a token includes. Only with 0 can a sound be written.
    strides: the stride of each convolution; its kernel is twice as long.
    channels: channels of each convolution.
    normalise: "clip" divides by the root mean square of the whole sound; "none" leaves it as it is.
    causal: whether a token that is read attends only to earlier ones; then use normalise="none", since the loudness of a sound
        is known only at its end.
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
        if not self.strides or self._outputs < 1:
            raise ConfigError(
                f"Waveform: strides={self.strides} must be one or more, and leave something of the {self.feature_size} samples of "
                f"hop={self.hop} and context={self.context}; give fewer or shorter ones"
            )

    @property
    def feature_size(self) -> int:
        return self.context + self.hop

    @property
    def step(self) -> tuple[float, float, float]:
        """One token's time in seconds."""
        return (self.hop / self.rate_hz, 1.0, 1.0)

    @property
    def _outputs(self) -> int:
        """Number of outputs of the last convolution for one token."""
        outputs = self.feature_size
        for stride in self.strides:
            outputs = -(-outputs // stride) - 1  # filled up to whole strides, under a kernel of two
        return outputs

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
                f"Waveform: with context={self.context} a sound can be read but not written, as a written token lacks these "
                "samples; use context=0"
            )
        return at_times(torch.arange(count) * self.step[0])

    def embed(self, width: int) -> nn.Module:
        return _Stem(self.strides, self.channels, self._outputs, width)


class _Stem(nn.Module):
    """Convolutions, each with GELU, and a linear layer of the outputs of the last one."""

    def __init__(self, strides: tuple[int, ...], channels: int, outputs: int, width: int) -> None:
        super().__init__()
        inputs = (1, *[channels] * (len(strides) - 1))
        convolutions = [
            nn.Conv1d(count, channels, 2 * stride, stride) for count, stride in zip(inputs, strides, strict=True)
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # so that a signal keeps its power from one to the next
        self.strides = strides
        self.convolutions = nn.ModuleList(convolutions)
        self.linear = nn.Linear(outputs * channels, width)

    def forward(self, content_NF: Tensor) -> Tensor:
        hidden = content_NF[:, None]
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            # filled up to whole strides, or the last samples would lie under no kernel
            hidden = F.gelu(convolution(F.pad(hidden, (0, -hidden.shape[-1] % stride))))
        return self.linear(hidden.flatten(1))
