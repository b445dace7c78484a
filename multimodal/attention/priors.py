"""Log-priors over keys: what depends on the position of a key and not on its content. They add, and rules are priors too."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.attention.scores import HeadMatrix
from multimodal.masks import Pairs, Prior
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class ALiBi(Prior):
    """-slope * distance, with slopes 2 ** (-8 h / H) for the heads h = 1 .. H (Press et al. 2022), the same in both directions."""

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        heads = q_BTHK.shape[2]
        slope_H = 2 ** (-8 * torch.arange(1, heads + 1, device=q_BTHK.device) / heads)
        return -slope_H[:, None, None] * pairs.distance.abs()


@dataclass(frozen=True)
class RelativeBias(Prior):
    """One learned number for each head and distance, up to `reach` tokens either way (Raffel et al. 2020, without buckets).

    reach: the largest distance with a number of its own, in tokens; farther ones share the last.
    """

    reach: int

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ConfigError(f"RelativeBias: reach={self.reach} distinguishes no distances; use 1 or more")

    def weights(self, heads: int, width: int) -> nn.Module:
        return _Table(heads, 2 * self.reach + 1)

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        return weights.table[:, pairs.distance[:, 0].clamp(-self.reach, self.reach) + self.reach].transpose(0, 1)


@dataclass(frozen=True)
class PredictedWindow(Prior):
    """Local-p: a Gaussian around a place that the query predicts, p = S sigmoid(v . tanh(W q)): Luong et al. 2015, equations 9, 10.

    S: how many keys the query may look at. sigma: standard deviation in tokens (Luong: half of the window's half-width).
    renormalise: as a prior, so that responsibilities sum to 1; or, as Luong writes it, multiplied onto them: they sum to less.
    """

    sigma: float
    renormalise: bool = True

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ConfigError(f"PredictedWindow: sigma={self.sigma} must be above 0")

    @property
    def normalised(self) -> bool:
        return self.renormalise

    def weights(self, heads: int, width: int) -> nn.Module:
        return _Pointing(heads, width)

    def centre(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        """Where each query expects its key, in tokens: (B, H, T, 1)."""
        hidden = torch.einsum("bthk,hkj->bthj", q_BTHK, weights.matrix.to(q_BTHK.dtype)).tanh()
        share_BHT = torch.einsum("bthj,hj->bht", hidden, weights.vector.to(q_BTHK.dtype)).sigmoid()
        return share_BHT[..., None] * pairs.count[:, None]

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        away = pairs.k.order[:, None] - self.centre(pairs, q_BTHK, weights)
        return -away.square() / (2 * self.sigma**2)


@dataclass(frozen=True)
class MixingWeights(Prior):
    """log pi of the component at each place, learned for each head: the mixing weights of a memory of `size` components.

    size: how many components the memory has.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"MixingWeights: size={self.size} has no components; use 1 or more")

    @property
    def most(self) -> int:
        return self.size

    def weights(self, heads: int, width: int) -> nn.Module:
        return _Table(heads, self.size)

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        if int(pairs.k.order.max()) >= self.size:
            raise ConfigError(
                f"MixingWeights: there are {int(pairs.k.order.max()) + 1} components, but size={self.size}; declare as many"
            )
        log_HM = weights.table.log_softmax(-1)
        return log_HM[:, pairs.k.order[:, 0].long()].transpose(0, 1)[:, :, None]


class _Table(nn.Module):
    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, size))


class _Pointing(HeadMatrix):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__(torch.randn(heads, width, width) / math.sqrt(width))
        self.vector = nn.Parameter(torch.randn(heads, width) / math.sqrt(width))
