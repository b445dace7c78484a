"""Fixed-form variational inference: lower bounds of the evidence, and estimators of them that have a gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.attention.reads import Gumbel


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z) = N(mean, exp(log_std)^2), a factor for each feature."""

    mean_F: Tensor
    log_std_F: Tensor

    def at(self, noise_BF: Tensor) -> Tensor:
        """z = mean + std * noise: the reparameterised sample of Kingma & Welling 2014, equation 10."""
        return self.mean_F + self.log_std_F.exp() * noise_BF

    def log_prob(self, z_BF: Tensor) -> Tensor:
        """log q(z): (B,)."""
        return torch.distributions.Normal(self.mean_F, self.log_std_F.exp()).log_prob(z_BF).sum(-1)


def elbo(log_joint: Callable[[Tensor], Tensor], q: DiagonalGaussian, noise_BF: Tensor) -> Tensor:
    """log p(x, z) - log q(z) at reparameterised samples: (B,). Kingma & Welling 2014, equations 3 and 7."""
    z_BF = q.at(noise_BF)
    return log_joint(z_BF) - q.log_prob(z_BF)


def score_function_elbo(log_joint: Callable[[Tensor], Tensor], q: DiagonalGaussian, noise_BF: Tensor) -> Tensor:
    """Has the value of `elbo` and the gradient (log p - log q) grad log q(z): REINFORCE (Williams 1992); (B,)."""
    z_BF = q.at(noise_BF).detach()
    log_q_B = q.log_prob(z_BF)
    value_B = (log_joint(z_BF) - log_q_B).detach()
    return value_B + value_B * (log_q_B - log_q_B.detach())


def enumerated_elbo(log_joint_BM: Tensor, log_q_BM: Tensor) -> Tensor:
    """E_q[log p(x, component) - log q(component)] by summing over the components: (B,). At most logsumexp(log_joint)."""
    return (log_q_BM.exp() * (log_joint_BM - log_q_BM)).sum(-1)


def gumbel_elbo(likelihood: Callable[[Tensor], Tensor], log_q_BM: Tensor, log_prior_M: Tensor, read: Gumbel) -> Tensor:
    """log p(x | a relaxed sample of q) - KL(q || prior): (B,). Jang et al. 2017; Maddison et al. 2017.

    likelihood: log p(x | weights over the components), (B, M) -> (B,). The sample is that of the attention read `read`.
    """
    weights_BM = read.weigh(log_q_BM, training=True)
    return likelihood(weights_BM) - (log_q_BM.exp() * (log_q_BM - log_prior_M)).sum(-1)


def reinforce_elbo(log_joint_BM: Tensor, log_q_BM: Tensor, baseline: float, generator: torch.Generator) -> Tensor:
    """One sampled component for each x: (B,). Unbiased, with the score-function gradient for q; `baseline` lowers its variance."""
    drawn = torch.multinomial(log_q_BM.detach().exp(), 1, generator=generator)
    log_q_B, log_joint_B = log_q_BM.gather(1, drawn)[:, 0], log_joint_BM.gather(1, drawn)[:, 0]
    value_B = log_joint_B - log_q_B.detach()
    return value_B + (value_B.detach() - baseline) * (log_q_B - log_q_B.detach())
