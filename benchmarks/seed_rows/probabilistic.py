"""Rows of the probabilistic half without an example: fixed-form variational inference and TrueSkill.

    uv run benchmarks/seeds.py fixed-form trueskill

fixed-form: about 0.1 CPU-minutes; trueskill: none. Each `measure_...` returns numbers by name; benchmarks/seeds.py has their bars.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from multimodal.attention.reads import Gumbel
from multimodal.zoo.mixture import (
    BernoulliMixture,
    DiagonalGaussian,
    elbo,
    enumerated_elbo,
    gumbel_elbo,
    score_function_elbo,
)

X, NOISE_STD = torch.tensor([1.3, -0.4, 2.0], dtype=torch.float64), 0.5
"""What was seen of three latent numbers z ~ N(0, 1), and with what error."""


def measure_fixed_form(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """Bounds where the evidence is known: (a) a conjugate Gaussian, (b) a Bernoulli mixture with an amortised q."""
    return {**conjugate(seed, quick), **of_mixture(seed, quick)}


def conjugate(seed: int, quick: bool) -> dict[str, float]:
    """x | z ~ N(z, s^2), z ~ N(0, 1): the posterior is N(x / (1 + s^2), s^2 / (1 + s^2)) and the evidence N(x; 0, 1 + s^2)."""
    generator = torch.Generator().manual_seed(seed)
    mean_F, log_std_F = (torch.zeros(len(X), dtype=X.dtype, requires_grad=True) for _ in range(2))
    steps = 50 if quick else 1500
    optimiser = torch.optim.Adam([mean_F, log_std_F], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def noise(count: int) -> Tensor:
        return torch.randn(count, len(X), generator=generator, dtype=X.dtype)

    variance = {}
    for name, bound in (("reparameterised", elbo), ("score-function", score_function_elbo)):
        # one for each sample, at q = prior
        means_BF = torch.zeros(100 if quick else 10_000, len(X), dtype=X.dtype, requires_grad=True)
        q = DiagonalGaussian(means_BF, log_std_F.detach())
        (gradient_BF,) = torch.autograd.grad(bound(_log_joint, q, noise(len(means_BF))).sum(), means_BF)
        variance[f"gradient variance, {name}"] = gradient_BF.var(0).mean().item()
    with torch.no_grad():
        at_prior = elbo(_log_joint, DiagonalGaussian(mean_F, log_std_F), noise(100_000)).mean().item()
    for _ in range(steps):
        loss = -elbo(_log_joint, DiagonalGaussian(mean_F, log_std_F), noise(64)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        q = DiagonalGaussian(mean_F, log_std_F)
        reached = elbo(_log_joint, q, noise(100_000)).mean().item()
        shrink = 1 + NOISE_STD**2
        exact = torch.distributions.Normal(0.0, math.sqrt(shrink)).log_prob(X).sum().item()
        return {
            "|ELBO - log p|": abs(reached - exact),
            "mean error": (q.mean_F - X / shrink).abs().max().item(),
            "variance error": (q.log_std_F.mul(2).exp() - NOISE_STD**2 / shrink).abs().max().item(),
            "log p": exact,
            "ELBO with q = prior": at_prior,
            **variance,
            "score-function variance / reparameterised": variance["gradient variance, score-function"]
            / variance["gradient variance, reparameterised"],
        }


def _log_joint(z_BF: Tensor) -> Tensor:
    """log p(x, z) of the conjugate Gaussian: (B,)."""
    of_z = torch.distributions.Normal(torch.zeros_like(X), 1.0).log_prob(z_BF)
    return (of_z + torch.distributions.Normal(z_BF, NOISE_STD).log_prob(X)).sum(-1)


def of_mixture(seed: int, quick: bool, components: int = 8, bits: int = 24) -> dict[str, float]:
    """q(component | x) from a linear layer, trained by Gumbel-softmax on samples of a mixture; log p(x) is a logsumexp."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the linear layer and of Gumbel's noise
    keys_MK = 1.5 * torch.randn(components, bits, generator=generator)
    log_prior_M = torch.randn(components, generator=generator).log_softmax(-1)
    memory = BernoulliMixture(log_prior_M=log_prior_M, values_MF=keys_MK.sigmoid(), keys_MK=keys_MK)
    drawn_B = torch.multinomial(log_prior_M.exp(), 2000, replacement=True, generator=generator)
    x = torch.bernoulli(memory.means_MK[drawn_B], generator=generator)
    encoder = nn.Sequential(nn.Linear(bits, components), nn.LogSoftmax(-1))
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.02)
    steps = 30 if quick else 600
    for step in range(steps):
        x_BK = x[torch.randint(len(x), (100,), generator=generator)]
        read = Gumbel(0.3 ** (step / steps))
        scores_BM = memory.log_joint(x_BK) - log_prior_M
        bound_B = gumbel_elbo(lambda weights: (weights * scores_BM).sum(-1), encoder(x_BK), log_prior_M, read)  # noqa: B023
        optimiser.zero_grad()
        (-bound_B.mean()).backward()
        optimiser.step()
    with torch.no_grad():
        log_joint_BM, log_q_BM = memory.log_joint(x).double(), encoder(x).double().log_softmax(-1)
    exact_B = log_joint_BM.logsumexp(-1)
    bound_B = enumerated_elbo(log_joint_BM, log_q_BM)
    return {
        "ELBO - log p, largest": (bound_B - exact_B).max().item(),
        "mixture: log p": exact_B.mean().item(),
        "mixture: ELBO": bound_B.mean().item(),
        "mixture: ELBO with q = prior": enumerated_elbo(log_joint_BM, log_prior_M.double().expand_as(log_q_BM))
        .mean()
        .item(),
    }


def trueskill(
    winner: tuple[float, float], loser: tuple[float, float], *, draw: float = 0.1
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(mean, standard deviation) of both players' skills after a game: Herbrich, Minka & Graepel 2006, section 3.

    Performances are skills + N(0, beta^2), skills drift by tau a game; a draw is a difference below a margin. This is expectation
    propagation (moment matching), not mean-field.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    beta, tau = 25 / 6, 25 / 300
    margin = normal.icdf(torch.tensor((draw + 1) / 2, dtype=torch.float64)).item() * math.sqrt(2) * beta
    prior = [sigma**2 + tau**2 for _, sigma in (winner, loser)]
    c = math.sqrt(2 * beta**2 + sum(prior))
    t = torch.tensor((winner[0] - loser[0] - margin) / c, dtype=torch.float64)
    v = (normal.log_prob(t).exp() / normal.cdf(t)).item()
    w = v * (v + t.item())
    after = [(variance, math.sqrt(variance * (1 - variance * w / c**2))) for variance in prior]
    return (winner[0] + after[0][0] * v / c, after[0][1]), (loser[0] - after[1][0] * v / c, after[1][1])


def measure_trueskill(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """The two games in the README of the PyPI package `trueskill`, to its three decimals."""
    won, lost = trueskill((25, 25 / 3), (30, 25 / 3))
    best, _ = trueskill((25, 25 / 3), (25, 25 / 3))
    first = zip((*won, *lost), (30.768, 7.030, 24.232, 7.030), strict=True)
    second = zip(best, (29.396, 7.171), strict=True)
    return {
        "error of 30.768 / 24.232 / 7.030": max(abs(ours - theirs) for ours, theirs in first),
        "error of 29.396 / 7.171": max(abs(ours - theirs) for ours, theirs in second),
        "winner's mean": won[0],
        "winner's mean before (baseline)": 25.0,
    }
