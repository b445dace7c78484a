"""Ready-made features, such as the cepstra or sensor readings of every hundredth of a second, with their time in seconds."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from multimodal.media.sources import as_floats, as_numbers
from multimodal.shapes import ConfigError, MediaError
from multimodal.tokenizer import Places, Tokenizer, Tokens, at_times, describe


@dataclass(frozen=True)
class Features(Tokenizer):
    """An array (frames, features) of numbers; a token is `stack` neighbouring frames.

    features: number of columns of the array.
    step_s: seconds from frame to frame.
    stack: number of frames of a token.
    context: number of further frames on either side that a token includes, so that neighbours overlap; the first and last frame
        are repeated beyond the ends.
    deltas: number of orders of differences along time that are appended: 0, 1 or 2.
    normalise: "value" subtracts the mean of each column of the value and divides by its standard deviation (a constant column
        becomes 0), or "none".
    hidden: width of the hidden layer of a two-layer embedding; None: a linear one.
    frame_names: the names of the frames, if every value has the same ones, such as the rows of a form; (): their times.
    """

    features: int
    step_s: float = 0.01
    stack: int = 1
    context: int = 0
    deltas: Literal[0, 1, 2] = 0
    normalise: Literal["value", "none"] = "value"
    hidden: int | None = None
    frame_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("stack", 1), ("context", 0), ("hidden", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ConfigError(f"Features: {name}={number} must be at least {least}")
        object.__setattr__(self, "frame_names", tuple(map(str, self.frame_names)))
        if not 0 < self.step_s < float("inf"):
            raise ConfigError(f"Features: step_s={self.step_s} must be more than 0 seconds")
        if self.deltas not in (0, 1, 2):
            raise ConfigError(f"Features: deltas={self.deltas} must be 0, 1 or 2")
        if self.normalise not in ("value", "none"):
            raise ConfigError(f"Features: normalise={self.normalise!r} must be 'value' or 'none'")

    @property
    def columns(self) -> int:
        """Features of a frame with its differences."""
        return self.features * (1 + self.deltas)

    @property
    def feature_size(self) -> int:
        return self.columns * (self.stack + 2 * self.context)

    @property
    def step(self) -> tuple[float, float, float]:
        """One token's time in seconds."""
        return (self.stack * self.step_s, 1.0, 1.0)

    def encode(self, value: Any) -> Tokens:
        frames_NF = self.frames(value)
        before, after = self.context, self.context + -len(frames_NF) % self.stack
        frames_NF = torch.cat([frames_NF[:1].expand(before, -1), frames_NF, frames_NF[-1:].expand(after, -1)])
        windows = frames_NF.unfold(0, self.stack + 2 * self.context, self.stack)
        stacked_NF = rearrange(windows, "n f w -> n (w f)").contiguous()
        return Tokens(stacked_NF, at_times(torch.arange(len(stacked_NF)) * self.step[0]))

    def frames(self, value: Any) -> Tensor:
        """Normalised frames (N, columns) with their differences, before they are stacked."""
        frames_NF = self._read(value)
        parts = [frames_NF]
        for _ in range(self.deltas):
            padded_NF = torch.cat([parts[-1][:1], parts[-1], parts[-1][-1:]])
            parts.append((padded_NF[2:] - padded_NF[:-2]) / 2)
        frames_NF = torch.cat(parts, 1)
        if self.normalise == "none":
            return frames_NF
        if len(frames_NF) == 1:
            raise MediaError(
                "Features.encode: normalise='value' leaves nothing of a single frame; give more, or use normalise='none'"
            )
        spread_F, mean_F = torch.std_mean(frames_NF.double(), 0, correction=0)
        moves_F = spread_F > 1e-6 * frames_NF.abs().amax(0)  # a smaller deviation is rounding
        return ((frames_NF - mean_F) / torch.where(moves_F, spread_F, torch.inf)).float()

    def _read(self, value: Any) -> Tensor:
        wanted = f"wanted an array or tensor (frames, {self.features}) of numbers"
        if not isinstance(value, (np.ndarray, Tensor)):
            raise MediaError(f"Features.encode: {wanted}, not {describe(value)}")
        given, value = value, as_numbers(value, "Features.encode", f"an array or tensor (frames, {self.features})")
        if value.ndim != 2 or value.shape[1] != self.features:
            turned = "; turn it round" if value.ndim == 2 and value.shape[0] == self.features else ""
            raise MediaError(f"Features.encode: {wanted}, not {describe(given)}{turned}")
        if not len(value):
            raise MediaError(f"Features.encode: {describe(given)} has no frames; to leave a field out, give None")
        if self.frame_names and len(value) != len(self.frame_names):
            raise MediaError(
                f"Features.encode: {describe(given)} has {len(value)} frames, but frame_names has {len(self.frame_names)}"
            )
        return as_floats(value, "Features.encode")

    def embed(self, width: int) -> nn.Module:
        return embedding(self.feature_size, self.hidden, width)

    def picture(self, tokens: Tokens) -> Tensor:
        """The frames without context as grey levels, the first column at the bottom."""
        windows = rearrange(tokens.content, "n (w f) -> n w f", f=self.columns)
        frames_NF = rearrange(windows[:, self.context : self.context + self.stack], "n w f -> (n w) f")
        return grey_levels(frames_NF)

    def token_names(self, tokens: Tokens) -> list[str]:
        """The names of the first and last frame of each token, if frames have names."""
        if not self.frame_names:
            return super().token_names(tokens)
        parts = [self.frame_names[i : i + self.stack] for i in range(0, len(self.frame_names), self.stack)]
        names = [part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
        return [names[round(time / self.step[0])] for time in tokens.position_NA[:, 0].tolist()]

    def examples(self) -> list[np.ndarray]:
        """Values for the conformance checks."""
        random = np.random.default_rng(0)
        counts = [len(self.frame_names)] * 4 if self.frame_names else [n * self.stack for n in (6, 9, 9, 14)]
        return [random.standard_normal((count, self.features)).astype(np.float32) for count in counts]


def embedding(features: int, hidden: int | None, width: int) -> nn.Module:
    """A linear layer; with `hidden` two, and a GELU between them."""
    if hidden is None:
        return nn.Linear(features, width)
    return nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, width))


def grey_levels(frames_NF: Tensor) -> Tensor:
    """Frames as a picture (Y, X, 1) in 0..1, the first feature at the bottom."""
    level = (frames_NF - frames_NF.min()) / (frames_NF.max() - frames_NF.min() + 1e-6)
    return level.T.flip(0)[:, :, None]


def spaced(content_NF: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """All values in one row with an empty token before each, so that what a convolution reads beyond a value is zero.

    Returns:
        the row (N + values, F), the index (N,) of each token in it, and where there is a token (N + values,).
    """
    count = len(places.lengths)
    value_N = torch.repeat_interleave(torch.arange(count), torch.tensor(places.lengths, dtype=torch.long))
    row_N = (torch.arange(len(value_N)) + value_N + 1).to(content_NF.device)
    spaced_NF = content_NF.new_zeros(len(value_N) + count, content_NF.shape[1]).index_copy(0, row_N, content_NF)
    there_N = torch.zeros(len(spaced_NF), device=content_NF.device, dtype=torch.bool).index_fill(0, row_N, True)
    return spaced_NF, row_N, there_N
