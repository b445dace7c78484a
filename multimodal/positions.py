"""Positions (time, row, column) as rotary angles, as sine-cosine encodings, and as learned grids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.shapes import ConfigError


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
    """The rotation of each pair of a head at each token's position: complex numbers (T, 1, K/2) of length 1."""
    angle_TK = position_TA.float()[:, axis_K] * frequency_K
    return torch.polar(torch.ones_like(angle_TK), angle_TK)[:, None]


def rotate(x_THK: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of every head, in float32 at least.

    rotation: complex (T, 1, K/2), because one complex product is one pass over memory and sines and cosines are six; or, in a
    compiled piece, real (T, 1, K/2, 2), because the compiler fuses those passes but has no code for complex numbers.
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
