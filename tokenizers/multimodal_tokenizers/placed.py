"""Positions as features: a grid of them, and an embedding of features that end in a position."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.positions import sine_cosine
from multimodal.shapes import ConfigError


class PlacedLinear(nn.Module):
    """A linear layer of the first `features` features, plus sines and cosines of the last `axes`, which are a position.

    features: number of features that the linear layer reads; it may be all of them, the position too.
    axes: number of features that are the position.
    scale: steps per unit of the position.
    """

    full_precision = True  # bfloat16 would round neighbouring positions far from the middle to one number

    def __init__(self, features: int, axes: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.features, self.axes, self.scale = features, axes, scale
        self.linear = nn.Linear(features, width)
        # each axis has the same number of sines and cosines; a rest of the width gets none
        self.encoded = width - width % (2 * axes)
        if not self.encoded:
            raise ConfigError(f"width={width} is less than {2 * axes}, a sine and a cosine for each of {axes} axes")

    def forward(self, content_NF: Tensor) -> Tensor:
        embedded_ND = self.linear(content_NF[:, : self.features].to(self.linear.weight.dtype))
        place_NA = content_NF[:, -self.axes :] * self.scale
        rest = embedded_ND.shape[1] - self.encoded
        return embedded_ND + F.pad(sine_cosine(place_NA, self.encoded), (0, rest)).to(embedded_ND.dtype)


@lru_cache(maxsize=256)
def grid_positions(times: int, rows: int, columns: int) -> Tensor:
    """Positions (N, 3) of times x rows x columns tokens, in steps; do not change the tensor, which is cached."""
    # on the CPU, so that it has numbers also if the first caller builds a model on the meta device
    with torch.device("cpu"):
        return torch.cartesian_prod(*(torch.arange(float(n)) for n in (times, rows, columns)))
