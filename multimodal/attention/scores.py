"""Scores: the log-likelihood of a query under a key, up to a function of the query alone.

A score that is a product of features runs on every fused kernel; any other is computed for each pair, a block of queries at a
time. A score with learned parameters makes them in `weights`, and its methods get them as their last argument.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError, StreamError


class Score(Declared, ABC):
    """The log-likelihood of a query under a key.

    Subclass as a frozen dataclass and write `log_likelihood`, or derive from `Factored` and write `features`.

    turned: whether queries and keys get rotary positions first.
    """

    turned: ClassVar[bool] = True

    @property
    def most(self) -> int | None:
        """The largest number of keys for which it is defined; None: any number."""
        return None

    def weights(self, heads: int, width: int) -> nn.Module | None:
        """Makes its learned parameters, for `heads` query heads of this width; the methods below get them last."""
        return None

    def keys(self, k_BMGK: Tensor, order_BM: Tensor) -> Tensor:
        """The keys (B, M, G, ..) that queries are compared with: their contents, unless a score replaces them by positions."""
        return k_BMGK

    @abstractmethod
    def log_likelihood(self, q_BTHK: Tensor, k_BMHK: Tensor, weights: Any = None) -> Tensor:
        """The log-likelihoods (B, H, T, M), in nats; keys have as many heads as queries."""


class Factored(Score):
    """A score that is a product of features: scale * q' . k'."""

    @abstractmethod
    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        """(q' (B, T, H, K'), k' (B, M, G, K'), scale). Keys may have fewer heads than queries."""

    def log_likelihood(self, q_BTHK: Tensor, k_BMHK: Tensor, weights: Any = None) -> Tensor:
        q, k, scale = self.features(q_BTHK, k_BMHK, weights)
        return torch.einsum("bthk,bmhk->bhtm", q, k) * scale


def with_column(q_BTHK: Tensor, k_BMGK: Tensor, bias_BMG: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """The features with one more column, which adds `bias_BMG` to the score of each key.

    With it Gaussian likelihoods and mixing weights run on kernels that compute products only.
    """
    one = q_BTHK.new_full((*q_BTHK.shape[:-1], 1), 1 / scale)
    return torch.cat([q_BTHK, one], -1), torch.cat([k_BMGK, bias_BMG[..., None].to(k_BMGK.dtype)], -1), scale


@dataclass(frozen=True)
class ScaledDotProduct(Factored):
    """q . k / sqrt(K): Vaswani et al. 2017, equation 1."""

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        return q_BTHK, k_BMGK, 1 / math.sqrt(q_BTHK.shape[-1])


@dataclass(frozen=True)
class DotProduct(Factored):
    """scale * q . k: Luong et al. 2015, section 3.1, where it is 1.

    scale: factor of the product.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "scale")

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        return q_BTHK, k_BMGK, self.scale


@dataclass(frozen=True)
class General(Factored):
    """q W k with a matrix for each head: Luong et al. 2015, section 3.1. W multiplies the query, and is the identity at first."""

    def weights(self, heads: int, width: int) -> nn.Module:
        return HeadMatrix(torch.eye(width).repeat(heads, 1, 1))

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        return torch.einsum("bthk,hkj->bthj", q_BTHK, weights.matrix.to(q_BTHK.dtype)), k_BMGK, 1.0


@dataclass(frozen=True)
class Cosine(Factored):
    """sharpness * cos(q, k): the content-based score of Graves et al. 2014, equation 6.

    sharpness: factor of the cosine; its initial value if it is learned.
    learned: whether each head learns its own sharpness.
    """

    sharpness: float = 10.0
    learned: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "sharpness")

    def weights(self, heads: int, width: int) -> nn.Module | None:
        return _LogScale(heads, self.sharpness) if self.learned else None

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        q, k = F.normalize(q_BTHK, dim=-1), F.normalize(k_BMGK, dim=-1)
        if weights is not None:
            return q * weights.log_scale.exp()[:, None].to(q.dtype), k, 1.0
        return q, k, self.sharpness


@dataclass(frozen=True)
class Gaussian(Factored):
    """-|q - k|^2 / (2 variance): a Gaussian of the same variance around every key.

    With variance sqrt(K) it is the scaled dot product with the prior exp(-|k|^2 / (2 sqrt(K))).

    variance: variance of each component of a query; None: sqrt(K).
    """

    variance: float | None = None

    def __post_init__(self) -> None:
        if self.variance is not None:
            _check_positive(self, "variance")

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        scale = 1 / (math.sqrt(q_BTHK.shape[-1]) if self.variance is None else self.variance)
        # |q|^2 is left out, since it is a function of the query alone
        return with_column(q_BTHK, k_BMGK, k_BMGK.square().sum(-1) * (-scale / 2), scale)


@dataclass(frozen=True)
class Bernoulli(Factored):
    """log p(q | k) of binary queries under independent bits with logits k: Bishop 2006, equation 9.48."""

    turned: ClassVar[bool] = False

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        return with_column(q_BTHK, k_BMGK, -F.softplus(k_BMGK).sum(-1), 1.0)


@dataclass(frozen=True)
class LocationBased(Factored):
    """softmax(W q) over the positions of keys: Luong et al. 2015, equation 8. The contents of keys have no influence.

    places: the largest number of keys of a sample.
    """

    places: int
    turned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive(self, "places")

    @property
    def most(self) -> int:
        return self.places

    def weights(self, heads: int, width: int) -> nn.Module:
        return HeadMatrix(torch.randn(heads, width, self.places) * width**-0.5)

    def keys(self, k_BMGK: Tensor, order_BM: Tensor) -> Tensor:
        # one-hot positions as keys make W q a product of features
        order_BM = order_BM.expand(k_BMGK.shape[:2]).long()
        if not torch.compiler.is_exporting() and (count := int(order_BM.max()) + 1) > self.places:
            raise StreamError(
                f"LocationBased: there are {count} keys to point at, but places={self.places}; declare more places"
            )
        return F.one_hot(order_BM, self.places)[:, :, None].expand(-1, -1, k_BMGK.shape[2], -1).to(k_BMGK.dtype)

    def features(self, q_BTHK: Tensor, k_BMGK: Tensor, weights: Any = None) -> tuple[Tensor, Tensor, float]:
        return torch.einsum("bthk,hkp->bthp", q_BTHK, weights.matrix.to(q_BTHK.dtype)), k_BMGK, 1.0


@dataclass(frozen=True)
class Additive(Score):
    """v . tanh(W q + U k): Bahdanau et al. 2015, section A.1.2 (Luong's "concat"). It is no product of features.

    hidden: width of v; None: that of a head.
    """

    hidden: int | None = None
    turned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.hidden is not None:
            _check_positive(self, "hidden")

    def weights(self, heads: int, width: int) -> nn.Module:
        return _Additive(heads, width, self.hidden or width)

    def log_likelihood(self, q_BTHK: Tensor, k_BMHK: Tensor, weights: Any = None) -> Tensor:
        q = torch.einsum("bthk,hkj->bhtj", q_BTHK, weights.query.to(q_BTHK.dtype))
        k = torch.einsum("bmhk,hkj->bhmj", k_BMHK, weights.key.to(q_BTHK.dtype))
        return torch.einsum(
            "bhtmj,hj->bhtm", (q[:, :, :, None] + k[:, :, None]).tanh(), weights.vector.to(q_BTHK.dtype)
        )


class HeadMatrix(nn.Module):
    """A matrix for each head, stored as one matrix with the heads' rows below each other.

    matrices: parameters that the optimiser treats as matrices.
    """

    matrices = ("weight",)

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.heads = len(start)
        self.weight = nn.Parameter(start.flatten(0, 1))

    def fused(self) -> dict[str, list[int]]:
        """For Muon, the numbers of rows of the matrices that `weight` consists of: one matrix for each head."""
        return {"weight": [len(self.weight) // self.heads] * self.heads}

    @property
    def matrix(self) -> Tensor:
        return self.weight.unflatten(0, (self.heads, -1))


class _LogScale(nn.Module):
    def __init__(self, heads: int, start: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(start)))


class _Additive(nn.Module):
    matrices = ("query", "key")

    def __init__(self, heads: int, width: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, width, hidden) * width**-0.5)
        self.key = nn.Parameter(torch.randn(heads, width, hidden) * width**-0.5)
        self.vector = nn.Parameter(torch.randn(heads, hidden) * hidden**-0.5)


def _check_positive(part: Any, name: str) -> None:
    if not getattr(part, name) > 0:
        raise ConfigError(f"{type(part).__name__}: {name}={getattr(part, name)} must be above 0")
