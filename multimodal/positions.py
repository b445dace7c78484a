"""Positions (time, row, column, ..) in steps and on a core's axes; as rotary angles, sine-cosine encodings and learned grids."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import AXES, ConfigError


def check_axes(where: str, axes: tuple[str, ...]) -> None:
    """Raise a ConfigError unless these are different names of axes, of which the first are time, row and column."""
    named = isinstance(axes, tuple) and all(isinstance(axis, str) and axis for axis in axes)
    if not named or axes[: len(AXES)] != AXES or len(set(axes)) != len(axes):
        raise ConfigError(
            f"{where}={axes!r} must be a tuple of different names that begins with {AXES}; further axes come behind, as in "
            f"{(*AXES, 'voice')}"
        )


def check_known(where: str, kinds: Mapping[str, Sequence[str]], known: Sequence[str], repair: str) -> None:
    """Raise a ConfigError if a kind has an axis that a core does not know.

    kinds: by name of a kind, its axes. known: those of the core. repair: what to write instead, with {axes} in it.
    """
    for name, axes in kinds.items():
        if lacking := [axis for axis in axes if axis not in known]:
            wanted = tuple(dict.fromkeys([*known, *(axis for axes in kinds.values() for axis in axes)]))
            raise ConfigError(
                f"{where}{name} places its tokens by {' and '.join(lacking)} too, but the core knows only {', '.join(known)}; "
                f"give it {repair.format(axes=wanted)}"
            )


def steps_of(step: Sequence[float], axes: int) -> Tensor:
    """One step on each of so many axes (A,): those of a kind's `step`, and 1 on further axes."""
    return torch.tensor((*step, *(1.0,) * (axes - len(step))))


def in_steps(position_NA: Tensor, step: Sequence[float]) -> Tensor:
    """Positions (.., A) in steps, from those in the units of a kind."""
    return position_NA / steps_of(step, position_NA.shape[-1])


def on_axes(position_NA: Tensor, axes: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Positions on other axes than their own, by name: 0 on those that they lack."""
    if tuple(axes) == tuple(wanted):
        return position_NA
    none_N = torch.zeros_like(position_NA[..., 0])
    return torch.stack([position_NA[..., axes.index(axis)] if axis in axes else none_N for axis in wanted], -1)


def only_time(position_NA: Tensor) -> Tensor:
    """The same times, and 0 on all other axes."""
    return F.pad(position_NA[..., :1], (0, position_NA.shape[-1] - 1))


@dataclass(frozen=True, kw_only=True)
class Rotary(Declared):
    """Rotary positions of an attention layer, where they differ from those of the core (Su et al. 2021).

    split: the ratio in which time, row, column and the core's further axes share the rotary pairs of a head; all 0: no rotary
        positions. Axes behind the last number have no pairs.
    base: for each of these axes, about the largest number of steps per radian of a pair.
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
    """Raise a ConfigError unless there is one share and one base for each axis."""
    if len(split) != len(base) or len(split) < len(AXES) or min(split) < 0:
        raise ConfigError(f"{where} give one number each for time, row and column, and for each further axis")


def rotary_frequencies(head_width: int, split: tuple[int, ...], base: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """For each pair of a head of width K, the position axis that rotates it and its radians per step: two vectors (K/2,).

    The pairs are divided among the axes in the ratio `split`; within an axis of n pairs, pair i rotates by
    base ** (-i / n) radians per step (Su et al. 2021, section 3.2.2; one base per axis).

    Raises:
        ConfigError: with more axes than three, one that has a share would get no pair.
    """
    pairs = head_width // 2
    shares = [pairs * s // sum(split) for s in split]
    if len(split) > len(AXES):  # of three axes rows and columns may get none, as in models that are trained already
        empty = [axis for axis, s in enumerate(split) if s and not shares[axis]]
        if sum(shares) + len(empty) > pairs:
            raise ConfigError(
                f"rotary positions: the {pairs} pairs of a head of width {head_width} do not suffice for split={split}; use fewer, "
                "wider heads, or give 0 for axes that need none"
            )
        for axis in empty:
            shares[axis] = 1
    # time gets what rounding leaves over; of more axes than three the first that has a share
    first = 0 if len(split) == len(AXES) else next(axis for axis, s in enumerate(split) if s)
    shares[first] += pairs - sum(shares)
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
