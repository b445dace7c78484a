"""A mixture model as a memory: keys are its components, the prior its weights, and a read is the posterior mean of the values.

For an exponential family log p(x | j) = T(x) . eta_j - A(eta_j): the query is T(x), the key eta_j, and log pi_j - A(eta_j) is one
more key column. So Bayes' rule is one call of scaled dot-product attention, without approximation (Bishop 2006, equations 9.13
and 9.56).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.attention.scores import Bernoulli, with_column
from multimodal.shapes import ConfigError, check_shapes


@dataclass(frozen=True, kw_only=True, repr=False)
class Mixture(ABC):
    """M components: their parameters (fields of the subclass), mixing weights, and the value of each.

    log_prior_M: log of the mixing weights.
    values_MF: what a read returns of each component: p(label | component), pixels, anything.
    """

    log_prior_M: Tensor
    values_MF: Tensor

    @property
    @abstractmethod
    def width(self) -> int:
        """K, the features of a sample."""

    @abstractmethod
    def factors(self, x_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(query_BF, key_MF, bias_M) with log p(x | component) = query . key + bias, which may be in float64."""

    @abstractmethod
    def maximise(self, x_BK: Tensor, posterior_BM: Tensor) -> Self:
        """The M-step: parameters and weights of highest expected log-likelihood."""

    @abstractmethod
    def unconstrained(self) -> dict[str, Tensor]:
        """The parameters mapped to unconstrained values, for gradient descent."""

    @abstractmethod
    def constrained(self, parameters: dict[str, Tensor]) -> Self:
        """The mixture whose `unconstrained` parameters these are."""

    def __len__(self) -> int:
        return len(self.log_prior_M)

    def __repr__(self) -> str:
        answers, dtype = self.values_MF.shape[1], self.log_prior_M.dtype
        return (
            f"{type(self).__name__}({len(self)} components of {self.width} features, {answers} answers each, {dtype})"
        )

    @classmethod
    def check_samples(cls, where: str, x_BK: Tensor) -> None:
        """Raise ConfigError where these are no samples of such a mixture; nan is left to who meets it."""
        if not isinstance(x_BK, Tensor):
            raise ConfigError(f"{where}: samples are of type {type(x_BK).__name__}; make a tensor: torch.as_tensor(x)")
        if not x_BK.is_floating_point():
            raise ConfigError(f"{where}: samples are {x_BK.dtype}, not floating point; convert them: x.float()")
        if x_BK.dim() != 2:
            raise ConfigError(f"{where}: samples are {tuple(x_BK.shape)}, not (samples, features); try x.flatten(1)")

    def check_precision(self, x_BK: Tensor) -> None:
        """Raise ConfigError where samples and parameters are of different precision."""
        if x_BK.dtype != self.log_prior_M.dtype:
            raise ConfigError(
                f"{type(self).__name__}: samples are {x_BK.dtype}, the mixture is {self.log_prior_M.dtype}; convert the "
                "samples: x.to(mixture.log_prior_M.dtype)"
            )

    def log_joint(self, x_BK: Tensor) -> Tensor:
        """log p(x, component): (B, M)."""
        query_BF, key_MF, bias_M = self.factors(x_BK)
        return torch.addmm((bias_M + self.log_prior_M).to(x_BK.dtype), query_BF, key_MF.T)

    def responsibilities(self, x_BK: Tensor) -> Tensor:
        """p(component | x): (B, M)."""
        return self.log_joint(x_BK).softmax(-1)

    def log_likelihood(self, x_BK: Tensor) -> Tensor:
        """The evidence log p(x), the log-normaliser of the attention: (B,)."""
        return self.log_joint(x_BK).logsumexp(-1)

    def usage(self, x_BK: Tensor) -> Tensor:
        """How many samples each component answers for, N_k of Bishop 2006, equation 9.27: (M,)."""
        return self.responsibilities(x_BK).sum(0)

    def read(self, x_BK: Tensor) -> Tensor:
        """E[value | x] = sum of responsibility * value, by one fused attention: (B, F)."""
        query_BF, key_MF, bias_M = self.factors(x_BK)
        column_M = bias_M + self.log_prior_M
        # a constant changes no softmax, and float32 has more digits for small numbers
        column_M = column_M - column_M.mean()
        q, k, scale = with_column(query_BF[None, :, None], key_MF[None, :, None], column_M[None, :, None], 1.0)
        v = self.values_MF.to(q.dtype)[None, None]
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v, scale=scale)[0, 0]

    def answering(self, x_BK: Tensor, answer_BF: Tensor) -> Self:
        """The same components; each answers with the mean of the answers that it is responsible for."""
        posterior_BM = self.responsibilities(x_BK)
        used_M = posterior_BM.sum(0).clamp_min(torch.finfo(x_BK.dtype).tiny)
        return replace(self, values_MF=posterior_BM.T @ answer_BF.to(x_BK.dtype) / used_M[:, None])

    def prune(self, keep_M: Tensor) -> Self:
        """Only the components where `keep_M` is true (or those it numbers); their weights are normalised again.

        Raises:
            ConfigError: nothing would be left.
        """
        chosen = {field.name: getattr(self, field.name)[keep_M] for field in fields(self)}
        if not len(chosen["log_prior_M"]):
            raise ConfigError(f"prune: none of {len(self)} components would be left; lower the threshold of usage")
        return replace(self, **chosen | {"log_prior_M": chosen["log_prior_M"].log_softmax(-1)})


@dataclass(frozen=True, kw_only=True, repr=False)
class BernoulliMixture(Mixture):
    """Independent bits in each component: Bishop 2006, section 9.3.3. Keys are the logits of the bits' means."""

    keys_MK: Tensor
    RAREST = 0.002  # means stay this far from 0 and 1, so that no picture is impossible; EM still never falls

    @classmethod
    def around(cls, x_BK: Tensor, components: int, generator: torch.Generator) -> Self:
        """A start: each component half way between the mean of all samples and one of them, all of equal weight."""
        cls.check_samples(f"{cls.__name__}.around", x_BK)
        chosen = _chosen(x_BK, components, generator)
        mean_MK = (0.5 * chosen + 0.5 * x_BK.mean(0)).clamp(cls.RAREST, 1 - cls.RAREST)
        log_prior_M = x_BK.new_full((components,), -math.log(components))
        return cls(log_prior_M=log_prior_M, values_MF=mean_MK, keys_MK=mean_MK.logit())

    @classmethod
    def check_samples(cls, where: str, x_BK: Tensor) -> None:
        super().check_samples(where, x_BK)
        if ((x_BK < 0) | (x_BK > 1)).any():
            raise ConfigError(
                f"{where}: samples of a BernoulliMixture are bits or shares with 0 <= x <= 1, but these go from "
                f"{x_BK.min():.4g} to {x_BK.max():.4g}; threshold or scale them, or take GaussianMixture"
            )

    @property
    def width(self) -> int:
        return self.keys_MK.shape[1]

    @property
    def means_MK(self) -> Tensor:
        """p(bit = 1 | component)."""
        return self.keys_MK.sigmoid()

    def factors(self, x_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.check_precision(x_BK)
        check_shapes("BernoulliMixture", {"K": self.width}, x_BK=x_BK)
        # what a query of zeros scores is the column of the score
        nothing = torch.zeros_like(self.keys_MK[None, :1, None])
        bias_M = Bernoulli().log_likelihood(nothing, self.keys_MK[None, :, None], None)[0, 0, 0]
        return x_BK, self.keys_MK, bias_M

    def seeing(self, which_K: Tensor) -> Self:
        """The mixture of those bits alone: hidden ones are summed out."""
        return replace(self, keys_MK=self.keys_MK[:, which_K])

    def maximise(self, x_BK: Tensor, posterior_BM: Tensor) -> Self:
        used_M = posterior_BM.sum(0).clamp_min(torch.finfo(x_BK.dtype).tiny)
        mean_MK = (posterior_BM.T @ x_BK / used_M[:, None]).clamp(self.RAREST, 1 - self.RAREST)
        return replace(self, log_prior_M=(used_M / used_M.sum()).log(), keys_MK=mean_MK.logit())

    def unconstrained(self) -> dict[str, Tensor]:
        return {"keys_MK": self.keys_MK, "log_prior_M": self.log_prior_M}

    def constrained(self, parameters: dict[str, Tensor]) -> Self:
        return replace(self, keys_MK=parameters["keys_MK"], log_prior_M=parameters["log_prior_M"].log_softmax(-1))


@dataclass(frozen=True, kw_only=True, repr=False)
class GaussianMixture(Mixture):
    """A Gaussian of full covariance in each component: Bishop 2006, section 9.2. Wants float64 where variances are far apart."""

    means_MK: Tensor
    precision_MKK: Tensor  # inverse covariance
    LEAST_VARIANCE = 1e-6  # added to every variance, as scikit-learn does

    @classmethod
    def around(cls, x_BK: Tensor, components: int, generator: torch.Generator) -> Self:
        """A start: components at samples, all of equal weight and with a tenth of the variance of all samples."""
        cls.check_samples(f"{cls.__name__}.around", x_BK)
        means_MK = _chosen(x_BK, components, generator)
        precision_MKK = torch.diag(10 / x_BK.var(0)).expand(components, -1, -1).clone()
        log_prior_M = x_BK.new_full((components,), -math.log(components))
        return cls(log_prior_M=log_prior_M, values_MF=means_MK, means_MK=means_MK, precision_MKK=precision_MKK)

    @property
    def width(self) -> int:
        return self.means_MK.shape[1]

    def factors(self, x_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.check_precision(x_BK)
        width = check_shapes("GaussianMixture", {"K": self.width}, x_BK=x_BK)["K"]
        query_BF = torch.cat([x_BK, torch.einsum("bk,bj->bkj", x_BK, x_BK).flatten(1)], -1)
        turned_MK = torch.einsum("mkj,mj->mk", self.precision_MKK, self.means_MK)
        key_MF = torch.cat([turned_MK, self.precision_MKK.flatten(1) * -0.5], -1)
        volume_M = torch.linalg.slogdet(self.precision_MKK).logabsdet - width * math.log(2 * math.pi)
        return query_BF, key_MF, (volume_M - (self.means_MK * turned_MK).sum(-1)) / 2

    def maximise(self, x_BK: Tensor, posterior_BM: Tensor) -> Self:
        used_M = posterior_BM.sum(0).clamp_min(10 * torch.finfo(x_BK.dtype).eps)
        means_MK = posterior_BM.T @ x_BK / used_M[:, None]
        cov_MKK = scatter(x_BK, posterior_BM, means_MK) / used_M[:, None, None]
        least_KK = self.LEAST_VARIANCE * torch.eye(x_BK.shape[1], dtype=x_BK.dtype)
        prior = (used_M / used_M.sum()).log()
        return replace(self, log_prior_M=prior, means_MK=means_MK, precision_MKK=torch.linalg.inv(cov_MKK + least_KK))

    def unconstrained(self) -> dict[str, Tensor]:
        root = torch.linalg.cholesky(self.precision_MKK)
        root_MKK = root.tril(-1) + torch.diag_embed(root.diagonal(dim1=1, dim2=2).log())
        return {"means_MK": self.means_MK, "root_MKK": root_MKK, "log_prior_M": self.log_prior_M}

    def constrained(self, parameters: dict[str, Tensor]) -> Self:
        root_MKK = parameters["root_MKK"].tril(-1) + torch.diag_embed(
            parameters["root_MKK"].diagonal(dim1=1, dim2=2).exp()
        )
        return replace(
            self,
            means_MK=parameters["means_MK"],
            precision_MKK=root_MKK @ root_MKK.mT,
            log_prior_M=parameters["log_prior_M"].log_softmax(-1),
        )


def split(log_joint_BM: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(x) (B,), p(component | x) (B, M)) from log p(x, component).

    Responsibilities below exp(-60) become 0: among them are subnormal numbers, which make the product of the M-step 16 times
    slower.
    """
    best_BF = log_joint_BM.detach().amax(-1, keepdim=True)
    joint_BM = F.threshold(log_joint_BM - best_BF, -60, -math.inf).exp()
    total_BF = joint_BM.sum(-1, keepdim=True)
    return (best_BF + total_BF.log())[:, 0], joint_BM.detach() / total_BF.detach()


def scatter(x_BK: Tensor, posterior_BM: Tensor, center_MK: Tensor) -> Tensor:
    """Sum over samples of responsibility * (x - center)(x - center)': (M, K, K)."""
    apart_BMK = x_BK[:, None] - center_MK
    return torch.einsum("bm,bmk,bmj->mkj", posterior_BM, apart_BMK, apart_BMK)


def _chosen(x_BK: Tensor, components: int, generator: torch.Generator) -> Tensor:
    if not isinstance(generator, torch.Generator):
        raise ConfigError(
            f"around: generator={generator!r} is no torch.Generator; try torch.Generator().manual_seed(0)"
        )
    if not 1 <= components <= len(x_BK):
        raise ConfigError(f"around: components={components} starts at samples, of which there are {len(x_BK)}")
    return x_BK[torch.randperm(len(x_BK), generator=generator)[:components]]
