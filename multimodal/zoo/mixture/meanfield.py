"""Mean-field variational inference: q(components) q(weights) q(parameters), each optimal given the others.

The E-step is a softmax of log-prior + log-likelihood as in attention, with expectations in place of both (Bishop 2006, section
10.2). A sparse Dirichlet prior on the weights starves the components that the data do not need.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from multimodal.shapes import ConfigError, check_shapes
from multimodal.zoo.mixture.fitting import Objective, Round
from multimodal.zoo.mixture.memory import BernoulliMixture, GaussianMixture, Mixture, scatter, split


class Posterior(ABC):
    """q over the parameters of M components."""

    @abstractmethod
    def expected_log_likelihood(self, x_BK: Tensor) -> Tensor:
        """E_q[log p(x | component)]: (B, M)."""

    @abstractmethod
    def divergence(self) -> Tensor:
        """KL(q || prior) of each component: (M,) float64."""

    @abstractmethod
    def expected(self, memory: Mixture) -> Mixture:
        """The mixture with the expected parameters."""


class Conjugate(ABC):
    """A conjugate prior over the parameters of each component: its posterior is of the same family."""

    mixture: ClassVar[type[Mixture]]  # the class of mixtures with such parameters
    usual: ClassVar[str]  # the usual call, for error messages

    @abstractmethod
    def absorb(self, x_BK: Tensor, posterior_BM: Tensor) -> Posterior:
        """The posterior over parameters, given the responsibilities."""


@dataclass(frozen=True)
class MeanField(Objective):
    """Coordinate ascent on the evidence lower bound; Bishop 2006, equations 10.49 to 10.70.

    parameters: the prior over each component's parameters.
    concentration: of the Dirichlet prior on the weights; below 1 it prefers few components.
    """

    parameters: Conjugate
    concentration: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.parameters, Conjugate):
            raise ConfigError(
                f"MeanField: parameters={self.parameters!r} is no prior; try "
                + " or ".join(kind.usual for kind in Conjugate.__subclasses__())
            )
        if self.concentration <= 0:
            raise ConfigError(
                f"MeanField: concentration={self.concentration} is not positive; 0.001 prefers few components"
            )

    def check(self, memory: Mixture) -> None:
        if not isinstance(memory, self.parameters.mixture):
            right = [kind.usual for kind in Conjugate.__subclasses__() if isinstance(memory, kind.mixture)]
            raise ConfigError(
                f"MeanField: {type(self.parameters).__name__} is a prior of {self.parameters.mixture.__name__}, not of "
                f"{type(memory).__name__}; use {right[0] if right else 'another objective'}"
            )

    def rounds(self, memory: Mixture, x_BK: Tensor) -> Iterator[Round]:
        posterior_BM = memory.responsibilities(x_BK)
        while True:
            used_M = posterior_BM.sum(0)
            weights = torch.distributions.Dirichlet(self.concentration + used_M.double())
            # expectations of logarithms take the place of the logarithms in an ordinary E-step
            alpha_M = weights.concentration
            parameters = self.parameters.absorb(x_BK, posterior_BM)
            expected_log_prior_M = alpha_M.digamma() - alpha_M.sum().digamma()
            log_joint_BM = parameters.expected_log_likelihood(x_BK) + expected_log_prior_M.to(x_BK.dtype)
            evidence_B, posterior_BM = split(log_joint_BM)
            prior = torch.distributions.Dirichlet(torch.full_like(alpha_M, self.concentration))
            # with the best responsibilities the terms of equation 10.70 that hold them add up to the log-normaliser
            cost = torch.distributions.kl_divergence(weights, prior) + parameters.divergence().sum()
            bound = (evidence_B.double().sum() - cost).item() / len(x_BK)
            weighted = replace(memory, log_prior_M=(alpha_M / alpha_M.sum()).log().to(x_BK.dtype))
            yield Round(bound, parameters.expected(weighted), posterior_BM.sum(0))


@dataclass(frozen=True)
class Beta(Conjugate):
    """A Beta prior on every bit of every component; 1/2 and 1/2 is Jeffreys'.

    ones: pseudo-count of ones.
    zeros: pseudo-count of zeros.
    """

    mixture, usual = BernoulliMixture, "Beta()"
    ones: float = 0.5
    zeros: float = 0.5

    def absorb(self, x_BK: Tensor, posterior_BM: Tensor) -> "BetaPosterior":
        ones_MK = (posterior_BM.T @ x_BK).double()
        zeros_MK = (posterior_BM.sum(0).double()[:, None] - ones_MK).clamp_min(0)  # rounding may go below
        return BetaPosterior(self, ones_MK + self.ones, zeros_MK + self.zeros)


@dataclass(frozen=True)
class BetaPosterior(Posterior):
    """A Beta distribution for every bit of every component, in float64."""

    prior: Beta
    ones_MK: Tensor
    zeros_MK: Tensor

    def _expected_logs(self) -> tuple[Tensor, Tensor]:
        both_MK = (self.ones_MK + self.zeros_MK).digamma()
        return self.ones_MK.digamma() - both_MK, self.zeros_MK.digamma() - both_MK

    def expected_log_likelihood(self, x_BK: Tensor) -> Tensor:
        one_MK, zero_MK = self._expected_logs()
        return torch.addmm(zero_MK.sum(-1).to(x_BK.dtype), x_BK, (one_MK - zero_MK).to(x_BK.dtype).T)

    def divergence(self) -> Tensor:
        one_MK, zero_MK = self._expected_logs()
        a, b = self.ones_MK, self.zeros_MK
        a0, b0 = torch.full_like(a[0, 0], self.prior.ones), torch.full_like(a[0, 0], self.prior.zeros)
        per_bit_MK = (a - a0) * one_MK + (b - b0) * zero_MK - _log_beta(a, b) + _log_beta(a0, b0)
        return per_bit_MK.sum(-1)

    def expected(self, memory: Mixture) -> BernoulliMixture:
        keys_MK = (self.ones_MK.log() - self.zeros_MK.log()).to(memory.log_prior_M.dtype)
        return BernoulliMixture(log_prior_M=memory.log_prior_M, values_MF=memory.values_MF, keys_MK=keys_MK)


@dataclass(frozen=True)
class GaussWishart(Conjugate):
    """A prior on mean and precision of every component: Bishop 2006, equation 10.40. Float64."""

    mixture, usual = GaussianMixture, "GaussWishart.scaled_to(x)"
    center_K: Tensor
    strength: float  # how many samples the center counts for
    degrees: float  # of freedom of the Wishart; more than K - 1
    spread_KK: Tensor  # the inverse of its scale matrix: as if `degrees` samples had scattered so around their mean

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.degrees <= len(self.center_K) - 1:
            raise ConfigError(
                f"GaussWishart: strength={self.strength} and degrees={self.degrees} must be above 0 and above "
                f"{len(self.center_K) - 1}; try 1 and {len(self.center_K)}"
            )

    @classmethod
    def scaled_to(
        cls, x_BK: Tensor, *, strength: float = 1.0, degrees: float | None = None, share: float = 1.0
    ) -> Self:
        """Centered on the samples; a component's expected precision is that of all samples with `share` of their variance."""
        GaussianMixture.check_samples("GaussWishart.scaled_to", x_BK)
        degrees = float(x_BK.shape[1]) if degrees is None else degrees
        return cls(x_BK.mean(0), strength, degrees, torch.diag(x_BK.var(0) * share * degrees))

    def absorb(self, x_BK: Tensor, posterior_BM: Tensor) -> "GaussWishartPosterior":
        check_shapes("GaussWishart", {"K": len(self.center_K)}, x_BK=x_BK)
        if self.center_K.dtype != x_BK.dtype:
            raise ConfigError(
                f"GaussWishart: center_K is {self.center_K.dtype}, samples are {x_BK.dtype}; use GaussWishart.scaled_to(x)"
            )
        used_M = posterior_BM.sum(0)
        strength_M = self.strength + used_M
        center_MK = (self.strength * self.center_K + posterior_BM.T @ x_BK) / strength_M[:, None]
        apart_MK = center_MK - self.center_K
        drift_MKK = self.strength * torch.einsum("mk,mj->mkj", apart_MK, apart_MK)
        spread_MKK = self.spread_KK + scatter(x_BK, posterior_BM, center_MK) + drift_MKK
        scale_MKK = torch.linalg.inv(spread_MKK)
        return GaussWishartPosterior(self, center_MK, strength_M, self.degrees + used_M, (scale_MKK + scale_MKK.mT) / 2)


@dataclass(frozen=True)
class GaussWishartPosterior(Posterior):
    """A Gauss-Wishart distribution for every component; equations 10.59 to 10.63."""

    prior: GaussWishart
    center_MK: Tensor
    strength_M: Tensor
    degrees_M: Tensor
    scale_MKK: Tensor

    def _digammas(self) -> Tensor:
        """sum over i of digamma((degrees + 1 - i) / 2), i = 1 .. K."""
        below_K = torch.arange(self.center_MK.shape[1], dtype=self.center_MK.dtype)
        return ((self.degrees_M[:, None] - below_K) / 2).digamma().sum(-1)

    def expected_log_likelihood(self, x_BK: Tensor) -> Tensor:
        width = x_BK.shape[1]
        log_det_M = self._digammas() + width * math.log(2) + torch.linalg.slogdet(self.scale_MKK).logabsdet  # 10.65
        apart_BMK = x_BK[:, None] - self.center_MK
        far_BM = torch.einsum("bmk,mkj,bmj->bm", apart_BMK, self.scale_MKK, apart_BMK) * self.degrees_M  # 10.64
        return (log_det_M - width * math.log(2 * math.pi) - width / self.strength_M - far_BM) / 2

    def divergence(self) -> Tensor:
        width, prior = self.center_MK.shape[1], self.prior
        apart_MK = self.center_MK - prior.center_K
        far_M = torch.einsum("mk,mkj,mj->m", apart_MK, self.scale_MKK, apart_MK) * self.degrees_M
        ratio_M = prior.strength / self.strength_M
        of_means_M = (width * (ratio_M - 1 - ratio_M.log()) + prior.strength * far_M) / 2
        degrees = torch.full_like(self.degrees_M, prior.degrees)
        relative_MKK = prior.spread_KK @ self.scale_MKK
        of_precisions_M = (
            -prior.degrees / 2 * torch.linalg.slogdet(relative_MKK).logabsdet
            + self.degrees_M / 2 * (relative_MKK.diagonal(dim1=1, dim2=2).sum(-1) - width)
            + torch.special.multigammaln(degrees / 2, width)
            - torch.special.multigammaln(self.degrees_M / 2, width)
            + (self.degrees_M - prior.degrees) / 2 * self._digammas()
        )
        return (of_means_M + of_precisions_M).double()

    def expected(self, memory: Mixture) -> GaussianMixture:
        precision_MKK = self.scale_MKK * self.degrees_M[:, None, None]
        return GaussianMixture(
            log_prior_M=memory.log_prior_M,
            values_MF=memory.values_MF,
            means_MK=self.center_MK,
            precision_MKK=precision_MKK,
        )


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()
