"""Sound as log-mel frames with their time in seconds; any duration, no fixed window."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.media import read_sound, sound_blocks
from multimodal.shapes import ConfigError, MediaError, check_whole, is_number
from multimodal.tokenizer import Places, Tokenizer, Tokens, at_times, describe
from multimodal_tokenizers.features import grey_levels, spaced

LEVEL, SPREAD = -6.0, 4.0  # mean and standard deviation of the log-mels of sound, in nats, for normalise="fixed"
FLOOR = 1e-6  # power added before the logarithm
CLIP_FLOOR = 1e-7  # the floor as a share of the clip's largest power: 70 dB below it
SILENCE = 1e-30  # the least power that a clip is divided by
NEWEST = 2  # version of the features
FIRST_FIELDS = {"rate_hz", "mels", "hop_ms", "window_ms", "stack", "normalise", "causal"}  # of multimodal 0.1
LAYERS = 3  # of `_BandStem`
POWER_ROUNDS, PHASE_ROUNDS = 10, 32  # of the two iterations of `decode`; more do not improve the measured error


@dataclass(frozen=True)
class AudioFrames(Tokenizer):
    """Log-mel spectrogram, `stack` neighbouring frames a token; sound of any rate is resampled to `rate_hz`.

    Places are seconds, so that the same sound recorded at another rate has the same places.

    `decode` makes a sound of written frames. The frames have no phases, so it is not the encoded sound sample by sample; and with
    normalise="clip" it has the mean and deviation of "fixed", because those of the clip are not stored.

    rate_hz: samples per second, to which every sound is resampled.
    mels: number of bands of a frame.
    hop_ms: milliseconds from frame to frame.
    window_ms: milliseconds of sound in a frame.
    stack: number of frames of a token.
    normalise: "clip" subtracts the mean of the clip and divides by its standard deviation, which removes the loudness; "fixed"
        uses one mean and deviation for all clips.
    causal: whether a token that is read attends only to earlier ones; then use normalise="fixed", since the mean of a clip is
        known only at its end.
    max_seconds: a longer sound is refused before it is decoded.
    version: 2, or 1 for the features of multimodal 0.1, for its checkpoints: the same floor under the logarithm for loud and quiet
    clips, and a shorter filter for resampling.
    trim_db: frames before and after all frames whose power is at most so many decibels below that of the loudest one are left
        out, as the silence around a word; times then begin at the first frame that stays. For sounds that are classified, not
        for those that are transcribed with the times of their words, and not for those that are written: encoded again, they
        may lose frames at both ends. None: all frames stay.
    stem_channels: what embeds a token: 0 is a linear map of its frames; else three convolutions over time and frequency with so
        many channels, twice and four times as many, each followed by the largest of two neighbouring bands. They know a pattern
        at other frequencies, such as those of another voice; they read neighbouring tokens, so that sounds are not written.
    """

    rate_hz: int = 16000
    mels: int = 64
    hop_ms: float = 10.0
    window_ms: float = 25.0
    stack: int = 4
    normalise: Literal["clip", "fixed"] = "clip"
    causal: bool = False
    max_seconds: float = 3600.0
    version: int = NEWEST
    trim_db: float | None = None
    stem_channels: int = 0
    lossy = True

    def __post_init__(self) -> None:
        for name in ("rate_hz", "mels", "hop_ms", "window_ms", "stack", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"AudioFrames: {name}={getattr(self, name)} must be more than 0")
        if self.hop_samples < 1 or self.window_ms < self.hop_ms:
            raise ConfigError(
                f"AudioFrames: hop_ms={self.hop_ms} must be a sample or more and window_ms={self.window_ms} no less"
            )
        if self.normalise not in ("clip", "fixed"):
            raise ConfigError(f"AudioFrames: normalise={self.normalise!r} must be 'clip' or 'fixed'")
        if self.trim_db is not None and not (is_number(self.trim_db) and 0 < self.trim_db < math.inf):
            raise ConfigError(f"AudioFrames: trim_db={self.trim_db!r} must be more than 0 and finite, or None")
        if self.trim_db is not None and self.causal:
            raise ConfigError(
                f"AudioFrames: trim_db={self.trim_db} needs the loudest frame, which is known only at the end of a sound; with "
                "causal=True use trim_db=None"
            )
        check_whole("AudioFrames", least=0, stem_channels=self.stem_channels)
        if self.stem_channels and self.causal:
            raise ConfigError(
                f"AudioFrames: stem_channels={self.stem_channels} reads the next token, so that causal=True is not possible; use "
                "stem_channels=0"
            )
        if self.stem_channels and self.mels < 2**LAYERS:
            raise ConfigError(
                f"AudioFrames: mels={self.mels} must be at least {2**LAYERS} for the {LAYERS} convolutions of stem_channels="
                f"{self.stem_channels}, each of which halves the bands"
            )
        if self.version not in (1, 2):
            raise ConfigError(f"AudioFrames: version={self.version!r} of the features must be 1 or 2")

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        """Rebuild a tokenizer from `config()`; a configuration of multimodal 0.1 has no version, which means version 1."""
        if "version" not in config and set(config) >= FIRST_FIELDS:
            config = config | {"version": 1}
        return super().from_config(config, files)

    @property
    def resampling(self) -> Literal["kaiser", "hann"]:
        """The filter that resamples sounds to `rate_hz`."""
        return "hann" if self.version == 1 else "kaiser"

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
        wave_S = read_sound(
            value,
            rate_hz=self.rate_hz,
            who="AudioFrames.encode",
            max_seconds=self.max_seconds,
            resampling=self.resampling,
        )
        frames_NF = self.spectrogram(wave_S)
        frames_NF = F.pad(frames_NF[None], (0, 0, 0, -len(frames_NF) % self.stack), mode="replicate")[0]
        stacked_NF = rearrange(frames_NF, "(n s) f -> n (s f)", s=self.stack)
        return Tokens(stacked_NF, self.places(len(stacked_NF)))

    def embed(self, width: int) -> nn.Module:
        return (
            _BandStem(self.mels, self.stack, self.stem_channels, width) if self.stem_channels else super().embed(width)
        )

    def places(self, count: int) -> Tensor:
        return at_times(torch.arange(count) * self.step[0])

    def decode(self, tokens: Tokens, *, vocoder: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, int]:
        """The sound (wave_S, rate_hz) of these frames: float32 from -1 to 1, one hop for each frame.

        vocoder: makes the wave instead, from `log_mel(tokens)`.
        """
        log_NF = self.log_mel(tokens)
        if vocoder is not None:
            return vocoder(log_NF), self.rate_hz
        wave_S = self._wave_of(log_NF) if len(log_NF) else torch.zeros(0)
        return wave_S / max(1.0, float(wave_S.abs().max()) if len(wave_S) else 0.0), self.rate_hz

    def log_mel(self, tokens: Tokens) -> Tensor:
        """The natural logarithm (N, mels) of the power in each band of each frame, the input of vocoders."""
        frames_NF = rearrange(tokens.content, "n (s f) -> (n s) f", s=self.stack)
        return frames_NF.float().cpu() * SPREAD + LEVEL

    def _wave_of(self, log_NF: Tensor) -> Tensor:
        """Estimate the powers of all frequencies, then phases that fit them (Griffin & Lim 1984; Perraudin et al. 2013).

        Both iterations start from fixed values, so that the same frames give the same sound.
        """
        from torchaudio.functional import griffinlim

        mel, hop = self._mel, self.hop_samples
        log_NF = log_NF.clamp(max=30.0)  # frames of an untrained model may be anything; exp must stay finite
        wanted = (log_NF.exp() - FLOOR).clamp(min=0).T
        bands = mel.mel_scale.get_buffer("fb")  # (frequencies, mels)
        total = bands.sum(1, keepdim=True) + 1e-8
        power = bands @ (wanted / bands.sum(0)[:, None].clamp(min=1e-8)) / total
        for _ in range(POWER_ROUNDS):  # multiplicative updates stay above 0 (Lee & Seung 2000)
            power = power * (bands @ (wanted / (bands.T @ power + 1e-9))) / total
        # griffinlim centres frames on multiples of a hop, `spectrogram` begins them there: half a frame lies between
        lead = math.ceil(mel.n_fft / 2 / hop)
        power = torch.cat([power[:, :1].expand(-1, lead), power, power[:, -1:]], 1)
        window = mel.spectrogram.get_buffer("window")
        wave_S = griffinlim(
            power, window, mel.n_fft, hop, len(window), power=2.0, n_iter=PHASE_ROUNDS, momentum=0.99, length=None,
            rand_init=False,
        )  # fmt: skip
        wave_S = wave_S[lead * hop - mel.n_fft // 2 :][: len(log_NF) * hop]
        return F.pad(wave_S, (0, len(log_NF) * hop - len(wave_S)))

    @property
    def _mel(self):
        return _mel(self.rate_hz, round(self.rate_hz * self.window_ms / 1000), self.hop_samples, self.mels)

    def picture(self, tokens: Tokens) -> Tensor:
        """The spectrogram, low tones at the bottom."""
        return grey_levels(rearrange(tokens.content, "n (s f) -> (n s) f", s=self.stack))

    def spectrogram(self, wave_S: Tensor) -> Tensor:
        """Normalised log-mel frames (N, mels), one for each hop that begins within the sound, without those that are trimmed."""
        mel = self._mel
        count = math.ceil(len(wave_S) / self.hop_samples)
        wave_S = F.pad(wave_S, (0, max(0, (count - 1) * self.hop_samples + mel.n_fft - len(wave_S))))
        power_NF = mel(wave_S).T[:count]
        if self.trim_db is not None:
            power_N = power_NF.sum(1)
            loud_N = (power_N >= power_N.max() * 10 ** (-self.trim_db / 10)).nonzero()[:, 0]
            power_NF = power_NF[loud_N[0] : loud_N[-1] + 1]
        if self.normalise == "clip" and self.version > 1:
            power_NF = power_NF / power_NF.max().clamp(min=SILENCE)
        floor = FLOOR if self.normalise == "fixed" or self.version == 1 else CLIP_FLOOR
        log_NF = (power_NF + floor).log()
        if self.normalise == "fixed":
            return (log_NF - LEVEL) / SPREAD
        return (log_NF - log_NF.mean()) / (log_NF.std(correction=0) + 1e-3)


class _BandStem(nn.Module):
    """Convolutions over three bands and three neighbours in time: first of frames, then of tokens; each value is zero-padded by
    itself.

    Each is followed by the largest of two neighbouring bands (the first also by that of the frames of a token) and a ReLU; at the
    end one linear layer reads the bands and channels of a token. There is no norm: with one over the channels of each place
    fewer words of other speakers were right.
    """

    reads_places = True  # the neighbours of a frame are those of its own value

    def __init__(self, mels: int, stack: int, channels: int, width: int) -> None:
        super().__init__()
        sizes = [1, *(channels * 2**i for i in range(LAYERS))]
        self.stack = stack
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes)]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight)  # so that a signal keeps its power from one to the next
        self.convolutions = nn.ModuleList(convolutions)
        self.linear = nn.Linear(sizes[-1] * (mels // 2**LAYERS), width)

    def forward(self, content_NF: Tensor, places: Places) -> Tensor:
        spaced_NF, row_N, there_N = spaced(content_NF, places)
        return self._embedded(spaced_NF[None], there_N[None])[0, row_N]

    def padded(self, content: Tensor, position_BNA: Tensor, length_B: Tensor) -> Tensor:
        """The same for values side by side (B, N), padded behind."""
        there_BN = torch.arange(content.shape[1], device=content.device) < length_B[:, None]
        return self._embedded(content.masked_fill(~there_BN[..., None], 0.0), there_BN)

    def _embedded(self, content: Tensor, there_BN: Tensor) -> Tensor:
        """Embeds tokens (B, N, F), of which those that are not there are zero."""
        hidden, frames = rearrange(content, "b n (s f) -> b 1 (n s) f", s=self.stack), self.stack
        for convolution in self.convolutions:
            hidden = F.relu(F.max_pool2d(convolution(hidden), (frames, 2)))
            # biases fill the tokens that are not there, which the next convolution must see empty
            hidden, frames = hidden.masked_fill(~there_BN[:, None, :, None], 0.0), 1
        return self.linear(rearrange(hidden, "b c n f -> b n (c f)"))


def read_limited(value: Any, *, rate_hz: int, samples: int, who: str, cut: bool | None = None) -> Tensor:
    """A sound (`multimodal.media.read_sound`) of at most so many samples at `rate_hz`; a longer one is refused once that is known.

    cut: True: give its first samples instead. False: the error names the setting; None: there is no such setting.

    Raises:
        MediaError: as `read_sound`, or too long; names `who`.
    """
    parts, came = [], 0
    for wave_S, total in sound_blocks(value, rate_hz=rate_hz, who=who):
        came += len(wave_S)
        if max(came, total) > samples and not cut:
            raise MediaError(
                f"{who}: {describe(value)} has {max(came, total) / rate_hz:.6g} s or more, and at most {samples / rate_hz:.6g} s "
                f"are read at once; split it into pieces{', or read its beginning alone: cut=True' if cut is False else ''}"
            )
        parts.append(wave_S)
        if came >= samples:
            break
    return torch.cat(parts)[:samples]


@lru_cache(maxsize=8)
def _mel(rate_hz: int, window: int, hop: int, mels: int):
    from torchaudio.transforms import MelSpectrogram

    n_fft = 2 ** math.ceil(math.log2(window))
    with torch.device("cpu"):  # it is cached, so it must not be on the device of one caller
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
