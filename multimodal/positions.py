"""Positions (time, row, column) as rotary angles, as sine-cosine encodings, and as learned grids."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rotary(Declared):
    """Rotary positions of an attention layer, where they differ from those of the core (Su et al. 2021).

    split: the ratio in which time, row and column share the rotary pairs of a head; all 0: no rotary positions.
    base: for time, row and column, about the largest number of steps per radian of a pair.
    fraction: the share of the pairs of a head that rotate, the first ones; the others stay as they are.
    factor: positions are divided by it, so that longer samples have angles known from training (Chen et al. 2023).
    bands: (low, high, tokens) of Llama 3.1, or None. Pairs that turn fewer than `low` times in `tokens` steps are divided by the
        factor, those with more than `high` turns are not, and those between by a mean of both.
    """

    split: tuple[int, ...] = (1, 0, 0)
    base: tuple[float, ...] = (10000.0, 100.0, 100.0)
    fraction: float = 1.0
    factor: float = 1.0
    bands: tuple[float, float, int] | None = None

    def __post_init__(self) -> None:
        check_rotary("Rotary: split and base", self.split, self.base)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"Rotary: fraction={self.fraction} must be above 0 and at most 1")
        if not self.factor > 0:
            raise ConfigError(f"Rotary: factor={self.factor} must be above 0")
        if self.bands is not None and not 0 < self.bands[0] < self.bands[1]:
            raise ConfigError(f"Rotary: bands={self.bands} must be (low, high, tokens) with 0 < low < high")

    def frequencies(self, head_width: int) -> tuple[Tensor, Tensor]:
        """For each pair of a head of width K, the position axis that rotates it and its radians per step: two vectors (K/2,)."""
        pairs = head_width // 2
        turning = round(self.fraction * pairs)
        axis_K, frequency_K = rotary_frequencies(2 * turning, self.split, self.base)
        if self.bands is None:
            frequency_K = frequency_K / self.factor
        else:
            low, high, tokens = self.bands
            turns_K = frequency_K * tokens / (2 * math.pi)
            keep_K = ((turns_K - low) / (high - low)).clamp(0, 1)
            frequency_K = frequency_K * (keep_K + (1 - keep_K) / self.factor)
        still = pairs - turning
        return F.pad(axis_K, (0, still)), F.pad(frequency_K, (0, still))


def check_rotary(where: str, split: tuple[int, ...], base: tuple[float, ...]) -> None:
    """Raise a ConfigError unless there is one share and one base for each of the three axes."""
    if len(split) != 3 or len(base) != 3 or min(split) < 0:
        raise ConfigError(f"{where} give one number each for time, row and column")


def rotary_frequencies(head_width: int, split: tuple[int, ...], base: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """For each pair of a head of width K, the position axis that rotates it and its radians per step: two vectors (K/2,).

    The pairs are divided among time, row and column in the ratio `split`; within an axis of n pairs, pair i rotates by
    base ** (-i / n) radians per step (Su et al. 2021, section 3.2.2; one base per axis).
    """
    pairs = head_width // 2
    shares = [pairs * s // sum(split) for s in split]
    shares[0] += pairs - sum(shares)  # time gets what rounding leaves over
    axis_K = torch.cat([torch.full((n,), axis) for axis, n in enumerate(shares)])
    frequency = [float(b) ** (-torch.arange(n) / max(n, 1)) for n, b in zip(shares, base, strict=True)]
    return axis_K, torch.cat(frequency)


def rotations(position_TA: Tensor, axis_K: Tensor, frequency_K: Tensor) -> Tensor:
    """The rotation of each pair of a head at each token's position: complex numbers (T, 1, K/2) of length 1.

    In a program of torch.export they are real, see `rotate`.
    """
    angle_TK = position_TA.float()[:, axis_K] * frequency_K
    if torch.compiler.is_exporting():
        return torch.stack([angle_TK.cos(), angle_TK.sin()], -1)[:, None]
    return torch.polar(torch.ones_like(angle_TK), angle_TK)[:, None]


def rotate(x_THK: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of every head, in float32 at least.

    rotation: complex (T, 1, K/2), because one complex product is one pass over memory and sines and cosines are six; or, in a
    compiled piece or an exported program, real (T, 1, K/2, 2): the compiler fuses those passes but has no code for complex
    numbers, nor has ONNX.
    """
    x_THK = x_THK if x_THK.dtype == torch.float64 else x_THK.float()
    pairs = x_THK.view(*x_THK.shape[:-1], x_THK.shape[-1] // 2, 2)
    if not rotation.is_complex():
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    # view_as_complex needs an even offset and even strides
    if x_THK.storage_offset() % 2 or any(step % 2 for step in x_THK.stride()[:-1]):
        pairs = pairs.contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2)


def sine_cosine(position_NA: Tensor, width: int, base: float = 100.0) -> Tensor:
    """Sine-cosine encoding (N, width) of positions, with as many sines and cosines for each axis (after Vaswani et al. 2017).

    Angles are computed in float32 at least; this cannot restore positions that were rounded to bfloat16 before.

    base: ratio of the highest to about the lowest frequency, whose highest is 1 radian per unit.

    Raises:
        ConfigError: width is not a multiple of 2 numbers for each axis.
    """
    axes = position_NA.shape[1]
    if width % (2 * axes):
        raise ConfigError(
            f"sine_cosine: width={width} is not a multiple of {2 * axes}; use one that is, or another position scheme"
        )
    pairs = width // (2 * axes)
    position_NA = position_NA.to(torch.promote_types(position_NA.dtype, torch.float32))
    frequency_K = base ** (-torch.arange(pairs, device=position_NA.device) / pairs)
    angle = position_NA[:, :, None] * frequency_K
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)


class LearnedGrid(nn.Module):
    """A learned grid of `size` x `size` position embeddings, interpolated to a grid of any size (as ViTs do).

    Input: positions (N, 2) as fractions of height and width, in 0..1, in float32 at least. Output: embeddings (N, width) in the
    precision of the input, bilinear between grid points.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.grid_DYX = nn.Parameter(torch.randn(width, size, size) * 0.02)

    def forward(self, fraction_NA: Tensor) -> Tensor:
        yx = fraction_NA.flip(-1) * 2 - 1  # grid_sample wants (x, y) in -1..1
        grid = self.grid_DYX[None].to(yx.dtype)
        sampled = F.grid_sample(grid, yx[None, None], align_corners=False, padding_mode="border")
        return sampled[0, :, 0].T
