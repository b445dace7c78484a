"""Priors that weigh keys by position or relation: ALiBi, biases, windows. Mask rules, which shut keys out, are in masks.py."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention.scores import HeadMatrix
from multimodal.masks import Pairs, Prior
from multimodal.relations import ReadsRelations
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class ALiBi(Prior):
    """-slope * |distance| in tokens, with slope 2 ** (-8 h / H) for head h = 1 .. H (Press et al. 2022), in both directions."""

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        heads = q_BTHK.shape[2]
        slope_H = 2 ** (-8 * torch.arange(1, heads + 1, device=q_BTHK.device) / heads)
        return -slope_H[:, None, None] * pairs.distance.abs()


@dataclass(frozen=True)
class RelativeBias(Prior):
    """A learned bias for each head and signed distance, up to `reach` tokens either way (Raffel et al. 2020, without buckets).

    reach: the largest distance with a bias of its own, in tokens; larger ones share it.
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
class BucketedBias(Prior):
    """A learned bias for each head and range of distances: Raffel et al. 2020, section 2.1.

    The nearest distances have a bias each; the ranges of farther ones grow as their logarithm.

    buckets: number of ranges.
    reach: the distance in tokens from which on all share the last range.
    directed: whether keys behind and before the query have half of the ranges each; else all keys behind the query are at distance
        0, which is for causal layers.
    shared: whether the layers of a core have one table in common.
    """

    buckets: int = 32
    reach: int = 128
    directed: bool = True
    shared: bool = True

    def __post_init__(self) -> None:
        least = 4 if self.directed else 2
        if self.buckets < least or self.buckets % least:
            raise ConfigError(f"BucketedBias: buckets={self.buckets} must be a multiple of {least}")
        if self.reach <= self.buckets // least:
            raise ConfigError(
                f"BucketedBias: reach={self.reach} leaves no far distances; give more than {self.buckets // least}"
            )

    def weights(self, heads: int, width: int) -> nn.Module:
        return _Table(heads, self.buckets)

    def bucket(self, distance: Tensor) -> Tensor:
        """The range of each distance, key minus query."""
        count = self.buckets // 2 if self.directed else self.buckets
        first = count * (distance > 0) if self.directed else 0
        near, exact = distance.abs() if self.directed else (-distance).clamp(min=0), count // 2
        # in float32, as models were trained with it: a distance between two ranges depends on the rounding
        growth = torch.log(near.clamp(min=1).float() / exact) / math.log(self.reach / exact) * (count - exact)
        far = (exact + growth.long()).clamp(max=count - 1)
        return first + torch.where(near < exact, near.long(), far)

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        return weights.table[:, self.bucket(pairs.distance[:, 0])].transpose(0, 1)


@dataclass(frozen=True, init=False)
class Related(ReadsRelations, Prior):
    """A learned number for each head and relation, 0 at first, which is added to the score of the pairs that have this relation.

    `Related("edge", "next")` is the edge encoding of graph transformers (Ying et al. 2021, without paths): other pairs get 0, and
    pairs with several of these relations the sum.

    relations: the names of the relations, as a tokenizer of the model declares them.
    """

    relations: tuple[str, ...]

    def weights(self, heads: int, width: int) -> nn.Module:
        return _Table(heads, len(self.relations))

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        links, relation_BTM = pairs.q.links, pairs.relation
        if links is None or relation_BTM is None:
            return weights.table.new_zeros(1, 1, 1, 1)
        bias_SH = links.sets_of(self.relations).to(weights.table.dtype) @ weights.table.T
        # an embedding, whose gradient is summed in a fixed order; row 0 has no relation
        return F.embedding(relation_BTM, bias_SH, padding_idx=0).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PredictedWindow(Prior):
    """Local-p attention: a Gaussian around the position p = S sigmoid(v . tanh(W q)) that the query predicts.

    Luong et al. 2015, equations 9 and 10; S is the number of keys to which the query may attend.

    sigma: standard deviation in tokens (Luong: half of the window's half-width).
    renormalise: whether it is a prior, so that attention weights sum to 1; False: it multiplies them after the softmax, as Luong
        writes it, and they sum to less.
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
        return _PredictedCentre(heads, width)

    def centre(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        """The predicted position p of each query, in tokens: (B, H, T, 1)."""
        hidden = torch.einsum("bthk,hkj->bthj", q_BTHK, weights.matrix.to(q_BTHK.dtype)).tanh()
        share_BHT = torch.einsum("bthj,hj->bht", hidden, weights.vector.to(q_BTHK.dtype)).sigmoid()
        return share_BHT[..., None] * pairs.count[:, None]

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        distance = pairs.k.order[:, None] - self.centre(pairs, q_BTHK, weights)
        return -distance.square() / (2 * self.sigma**2)


@dataclass(frozen=True)
class MixingWeights(Prior):
    """Learned log mixing weights of a mixture whose components are the keys, for each head.

    size: number of components.
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
        if not torch.compiler.is_exporting() and int(pairs.k.order.max()) >= self.size:
            raise ConfigError(
                f"MixingWeights: there are {int(pairs.k.order.max()) + 1} components, but size={self.size}; declare as many"
            )
        log_HM = weights.table.log_softmax(-1)
        return log_HM[:, pairs.k.order[:, 0].long()].transpose(0, 1)[:, :, None]


class _Table(nn.Module):
    """A learned number for each head and index."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, size))


class _PredictedCentre(HeadMatrix):
    """W and v of `PredictedWindow`, for each head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(torch.randn(heads, width, width) / math.sqrt(width))
        self.vector = nn.Parameter(torch.randn(heads, width) / math.sqrt(width))
