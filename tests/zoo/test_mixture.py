"""Mixtures as memories: against Bayes' rule written as loops, against scikit-learn and scipy, and against Monte-Carlo."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.special import betaln, digamma, gammaln
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

from multimodal.attention.reads import Gumbel
from multimodal.attention.scores import ScaledDotProduct
from multimodal.shapes import ConfigError, ShapeError
from multimodal.zoo.mixture import (
    EM,
    Adam,
    BernoulliMixture,
    Beta,
    DiagonalGaussian,
    GaussianMixture,
    GaussWishart,
    MeanField,
    Mixture,
    elbo,
    enumerated_elbo,
    fit,
    gumbel_elbo,
    reinforce_elbo,
    score_function_elbo,
)

BITS, COMPONENTS, ANSWERS = 9, 5, 3


def bernoulli(dtype: torch.dtype = torch.float64) -> tuple[BernoulliMixture, Tensor]:
    """A mixture with unequal weights, and 40 samples of it."""
    keys_MK = 2 * torch.randn(COMPONENTS, BITS, dtype=dtype)
    prior_M = torch.randn(COMPONENTS, dtype=dtype).log_softmax(-1)
    values_MF = torch.randn(COMPONENTS, ANSWERS, dtype=dtype)
    memory = BernoulliMixture(log_prior_M=prior_M, values_MF=values_MF, keys_MK=keys_MK)
    which_B = torch.multinomial(prior_M.exp(), 40, replacement=True)
    return memory, torch.bernoulli(memory.means_MK[which_B])


def gaussian(dtype: torch.dtype = torch.float64) -> tuple[GaussianMixture, Tensor]:
    root_MKK = torch.randn(COMPONENTS, 3, 3, dtype=dtype)
    memory = GaussianMixture(
        log_prior_M=torch.randn(COMPONENTS, dtype=dtype).log_softmax(-1),
        values_MF=torch.randn(COMPONENTS, ANSWERS, dtype=dtype),
        means_MK=2 * torch.randn(COMPONENTS, 3, dtype=dtype),
        precision_MKK=root_MKK @ root_MKK.mT + 0.3 * torch.eye(3, dtype=dtype),
    )
    return memory, 2 * torch.randn(40, 3, dtype=dtype)


def log_likelihoods(memory: Mixture, x_BK: Tensor) -> np.ndarray:
    """log p(x | component) with nothing shared with the code: a product over bits, or scipy's Gaussian."""
    if isinstance(memory, BernoulliMixture):
        mean = 1 / (1 + np.exp(-memory.keys_MK.double().numpy()))
        return np.array([[math.log(np.prod(np.where(x == 1, m, 1 - m))) for m in mean] for x in x_BK.numpy()])
    assert isinstance(memory, GaussianMixture)
    covs = np.linalg.inv(memory.precision_MKK.double().numpy())
    normals = [stats.multivariate_normal(m, c) for m, c in zip(memory.means_MK.double().numpy(), covs, strict=True)]
    return np.stack([normal.logpdf(x_BK.double().numpy()) for normal in normals], 1)


KINDS = pytest.mark.parametrize("make", [bernoulli, gaussian])


@KINDS
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_reading_is_bayes_rule(make, dtype: torch.dtype, close: float):
    memory, x_BK = make(dtype)
    joint = np.exp(log_likelihoods(memory, x_BK)) * np.exp(memory.log_prior_M.double().numpy())
    posterior = joint / joint.sum(1, keepdims=True)
    assert np.abs(memory.responsibilities(x_BK).numpy() - posterior).max() < close
    assert np.abs(memory.read(x_BK).numpy() - posterior @ memory.values_MF.double().numpy()).max() < 4 * close
    assert np.abs(memory.log_likelihood(x_BK).numpy() - np.log(joint.sum(1))).max() < 20 * close
    assert np.abs(memory.usage(x_BK).numpy() - posterior.sum(0)).max() < 40 * close
    assert posterior.max(1).min() < 0.9  # some samples are in doubt


def test_scaled_dot_product_attention_is_the_e_step_of_a_gaussian_mixture():
    width, q, k = 16, torch.randn(7, 16, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    bent_M = k.square().sum(-1) / (2 * math.sqrt(width))
    same = torch.eye(width, dtype=torch.float64).expand(6, -1, -1) / math.sqrt(width)  # variance sqrt(width)
    mixture = GaussianMixture(log_prior_M=bent_M.log_softmax(-1), values_MF=k, means_MK=k, precision_MKK=same)
    score = ScaledDotProduct().log_likelihood(q[None, :, None], k[None, :, None], None)[0, 0]
    assert (mixture.responsibilities(q) - score.softmax(-1)).abs().max() < 1e-12
    attended = F.scaled_dot_product_attention(q[None], k[None], k[None])[0]
    assert (mixture.read(q) - attended).abs().max() < 1e-12


def test_hidden_bits_are_summed_out():
    memory, x_BK = bernoulli()
    seen = torch.tensor([0, 3, 4, 7])
    hidden = torch.tensor([i for i in range(BITS) if i not in seen])
    total_B = torch.zeros(len(x_BK), dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=len(hidden)):
        whole_BK = x_BK.clone()
        whole_BK[:, hidden] = torch.tensor(bits, dtype=torch.float64)
        total_B += memory.log_likelihood(whole_BK).exp()
    assert (memory.seeing(seen).log_likelihood(x_BK[:, seen]) - total_B.log()).abs().max() < 1e-10


@KINDS
def test_pruning_keeps_the_read_of_the_rest(make):
    memory, x_BK = make()
    keep_M = torch.tensor([True, False, True, True, False])
    posterior_BM = memory.responsibilities(x_BK)[:, keep_M]
    wanted_BF = posterior_BM @ memory.values_MF[keep_M] / posterior_BM.sum(1, keepdim=True)
    for keep in (keep_M, keep_M.nonzero()[:, 0]):
        pruned = memory.prune(keep)
        assert len(pruned) == 3
        assert (pruned.read(x_BK) - wanted_BF).abs().max() < 1e-10
        assert pruned.log_prior_M.exp().sum().item() == pytest.approx(1)
    with pytest.raises(ConfigError, match="none of 5 components would be left"):
        memory.prune(torch.zeros(5, dtype=torch.bool))


def test_answers_are_weighted_means_of_what_was_seen():
    memory, x_BK = bernoulli()
    labels_BF = torch.eye(4, dtype=torch.float64)[torch.randint(4, (len(x_BK),))]
    posterior_BM = memory.responsibilities(x_BK)
    taught = memory.answering(x_BK, labels_BF)
    for j in range(COMPONENTS):
        wanted = (
            sum(p * label for p, label in zip(posterior_BM[:, j], labels_BF, strict=True)) / posterior_BM[:, j].sum()
        )
        assert torch.allclose(taught.values_MF[j], wanted)
    assert torch.allclose(taught.values_MF.sum(1), torch.ones(COMPONENTS, dtype=torch.float64))


def test_em_for_gaussians_is_that_of_scikit_learn():
    memory, x_BK = gaussian()
    found = fit(memory, x_BK, EM(), steps=6)
    theirs = SklearnMixture(
        COMPONENTS,
        weights_init=memory.log_prior_M.exp().numpy(),
        means_init=memory.means_MK.numpy(),
        precisions_init=memory.precision_MKK.numpy(),
        max_iter=6,
        tol=0,
        reg_covar=GaussianMixture.LEAST_VARIANCE,
    )
    with pytest.warns(ConvergenceWarning):
        theirs.fit(x_BK.numpy())
    assert isinstance(found.memory, GaussianMixture)
    assert np.allclose(found.memory.means_MK.numpy(), np.asarray(theirs.means_), atol=1e-8)
    assert np.allclose(found.memory.log_prior_M.exp().numpy(), np.asarray(theirs.weights_), atol=1e-8)
    assert np.allclose(found.memory.precision_MKK.numpy(), np.asarray(theirs.precisions_), rtol=1e-6)
    assert found.bounds[-1] == pytest.approx(theirs.score(x_BK.numpy()), abs=1e-9)


def test_em_for_bits_is_that_of_the_book():
    memory, x_BK = bernoulli()
    joint = np.exp(log_likelihoods(memory, x_BK) + memory.log_prior_M.numpy())
    r = joint / joint.sum(1, keepdims=True)
    stepped = fit(memory, x_BK, EM(), steps=1).memory
    mean = np.stack([(r[:, j, None] * x_BK.numpy()).sum(0) / r[:, j].sum() for j in range(COMPONENTS)])
    rarest = BernoulliMixture.RAREST
    assert isinstance(stepped, BernoulliMixture)
    assert np.allclose(stepped.means_MK.numpy(), mean.clip(rarest, 1 - rarest))
    assert np.allclose(stepped.log_prior_M.exp().numpy(), r.mean(0))


@KINDS
def test_every_objective_climbs_and_only_the_objective_changes(make):
    x_BK = make()[1]
    x_BK = torch.cat([x_BK, x_BK.flip(0)[:7]])
    start = type(make()[0]).around(x_BK, 3, torch.Generator().manual_seed(1))
    prior = Beta() if make is bernoulli else GaussWishart.scaled_to(x_BK)
    em, mean_field, adam = (fit(start, x_BK, objective, steps=40) for objective in (EM(), MeanField(prior), Adam(0.05)))
    assert min(np.diff(em.bounds)) > -1e-10
    assert min(np.diff(mean_field.bounds)) > -1e-10
    assert replace(em, bounds=[1.0, 3.0, 2.5, 2.25, 4.0, 3.8]).largest_fall == pytest.approx(0.5)
    assert replace(em, bounds=[1.0, 2.0]).largest_fall == 0
    assert em.bounds[-1] > em.bounds[0] + 0.05
    assert adam.bounds[-1] > adam.bounds[0] + 0.05
    assert mean_field.bounds[-1] < em.bounds[-1]  # it pays for parameters
    for found in (em, adam, mean_field):
        assert len(found.bounds) == len(found.cpu_s) == 41
        assert found.usage_M.sum().item() == pytest.approx(len(x_BK))
        assert found.cpu_s == sorted(found.cpu_s)
    for found in (em, adam):  # what is reported belongs to what is returned
        assert found.memory.log_likelihood(x_BK).mean().item() == pytest.approx(found.bounds[-1], abs=1e-12)
    assert em.reached(em.bounds[5])[0] <= 5
    assert em.reached(0.0 if make is bernoulli else 1e9) == (math.inf, math.inf)


@KINDS
def test_unconstrained_parameters_are_the_same_mixture(make):
    memory, x_BK = make()
    again = memory.constrained(memory.unconstrained())
    assert (again.log_joint(x_BK) - memory.log_joint(x_BK)).abs().max() < 1e-10


def test_the_gradient_is_the_responsibility_weighted_score():
    memory, x_BK = bernoulli()
    keys_MK, prior_M = (x.clone().requires_grad_() for x in (memory.keys_MK, memory.log_prior_M))
    replace(memory, keys_MK=keys_MK, log_prior_M=prior_M).log_likelihood(x_BK).sum().backward()
    r, mean = memory.responsibilities(x_BK), memory.means_MK
    for j in range(COMPONENTS):
        fisher = sum(r[i, j] * (x_BK[i] - mean[j]) for i in range(len(x_BK)))
        assert torch.allclose(torch.as_tensor(keys_MK.grad)[j], torch.as_tensor(fisher))
    assert torch.allclose(torch.as_tensor(prior_M.grad), r.sum(0))


def test_the_bound_of_gauss_wishart_is_that_of_monte_carlo():
    x_BK = torch.randn(15, 2, dtype=torch.float64) * torch.tensor([1.0, 2.0]) + torch.tensor([0.5, -1.0])
    start = GaussianMixture.around(x_BK, 3, torch.Generator().manual_seed(0))
    prior, concentration = GaussWishart.scaled_to(x_BK, strength=0.7, degrees=4.0, share=0.5), 0.8
    first = next(MeanField(prior, concentration).rounds(start, x_BK))
    r0 = start.responsibilities(x_BK)
    q = prior.absorb(x_BK, r0)
    alpha = (concentration + r0.sum(0)).numpy()
    expected = q.expected_log_likelihood(x_BK).numpy()
    samples, random, width = 3000, np.random.default_rng(0), 2
    weights = random.dirichlet(alpha, samples)
    total = _log_dirichlet(weights, np.full(3, concentration)) - _log_dirichlet(weights, alpha)
    log_p = np.zeros((samples, len(x_BK), 3))
    for j in range(3):
        after = stats.wishart(q.degrees_M[j].item(), q.scale_MKK[j].numpy())
        before = stats.wishart(prior.degrees, np.linalg.inv(prior.spread_KK.numpy()))
        precisions = after.rvs(samples, random_state=random)
        total += before.logpdf(np.moveaxis(precisions, 0, -1)) - after.logpdf(np.moveaxis(precisions, 0, -1))
        noise = np.linalg.solve(
            np.linalg.cholesky(precisions).transpose(0, 2, 1), random.normal(size=(samples, width, 1))
        )
        means = q.center_MK[j].numpy() + noise[..., 0] / math.sqrt(q.strength_M[j].item())
        total += _log_normal(means, prior.center_K.numpy(), prior.strength * precisions)
        total -= _log_normal(means, q.center_MK[j].numpy(), q.strength_M[j].item() * precisions)
        log_p[:, :, j] = _log_normal(x_BK.numpy()[None] - means[:, None], np.zeros(2), precisions[:, None])
    assert np.abs(log_p.mean(0) - expected).max() < 5 * (log_p.std(0) / math.sqrt(samples)).max()
    _agree(first.bound * len(x_BK), total, log_p, weights, expected, alpha)


def test_the_bound_of_beta_is_that_of_monte_carlo():
    memory, x_BK = bernoulli()
    memory, concentration = memory.prune(torch.arange(3)), 0.8
    first = next(MeanField(Beta(0.5, 0.7), concentration).rounds(memory, x_BK))
    r0 = memory.responsibilities(x_BK)
    q = Beta(0.5, 0.7).absorb(x_BK, r0)
    alpha = (concentration + r0.sum(0)).numpy()
    samples, random = 4000, np.random.default_rng(0)
    weights = random.dirichlet(alpha, samples)
    total = _log_dirichlet(weights, np.full(3, concentration)) - _log_dirichlet(weights, alpha)
    a, b = (r0.T @ x_BK).numpy() + 0.5, (r0.T @ (1 - x_BK)).numpy() + 0.7
    means = random.beta(a, b, (samples, *a.shape)).clip(1e-300, 1 - 1e-16)
    total += (stats.beta.logpdf(means, 0.5, 0.7) - stats.beta.logpdf(means, a, b)).sum((1, 2))
    x = x_BK.numpy()[None, :, None]
    log_p = (x * np.log(means)[:, None] + (1 - x) * np.log1p(-means)[:, None]).sum(-1)
    _agree(first.bound * len(x_BK), total, log_p, weights, q.expected_log_likelihood(x_BK).numpy(), alpha)


def _agree(
    bound: float, total: np.ndarray, log_p: np.ndarray, weights: np.ndarray, expected: np.ndarray, alpha: np.ndarray
):
    """E_q[log p(x, z, weights, parameters) - log q] by samples of weights and parameters, summed over z, is the bound."""
    log_rho = expected + digamma(alpha) - digamma(alpha.sum())
    r = np.exp(log_rho - log_rho.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    inside = log_p + np.log(weights)[:, None] - np.log(r.clip(1e-300))
    draws = total + (r * inside).sum((1, 2))
    error = draws.std() / math.sqrt(len(draws))
    assert error < 0.15
    assert abs(draws.mean() - bound) < 4 * error


def _log_dirichlet(weights: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return ((alpha - 1) * np.log(weights)).sum(1) + gammaln(alpha.sum()) - gammaln(alpha).sum()


def _log_normal(x: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    far = np.einsum("...i,...ij,...j->...", x - mean, precision, x - mean)
    return (np.linalg.slogdet(precision)[1] - x.shape[-1] * math.log(2 * math.pi) - far) / 2


def test_the_bound_is_below_the_evidence():
    x_BK = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    concentration, ones, zeros, terms = 0.6, 0.5, 0.7, []
    for z in itertools.product((0, 1), repeat=len(x_BK)):  # every way to divide the samples among two components
        counts = np.bincount(z, minlength=2)
        term = gammaln(2 * concentration) - gammaln(2 * concentration + len(z))
        term += (gammaln(concentration + counts) - gammaln(concentration)).sum()
        for j in (0, 1):
            mine = x_BK.numpy()[np.array(z) == j]
            term += (betaln(ones + mine.sum(0), zeros + (1 - mine).sum(0)) - betaln(ones, zeros)).sum()
        terms.append(term)
    evidence = np.logaddexp.reduce(terms) / len(x_BK)
    start = BernoulliMixture.around(x_BK, 2, torch.Generator().manual_seed(0))
    bounds = fit(start, x_BK, MeanField(Beta(ones, zeros), concentration), steps=50).bounds
    assert bounds[-1] < evidence
    assert bounds[-1] > evidence - 0.5
    assert min(np.diff(bounds)) > -1e-12


def test_components_that_the_data_do_not_need_die():
    x_BK = torch.cat([torch.randn(60, 2, dtype=torch.float64) + torch.tensor(c) for c in ((0, 0), (8, 0), (4, 8))])
    start = GaussianMixture.around(x_BK, 8, torch.Generator().manual_seed(0))
    objective = MeanField(GaussWishart.scaled_to(x_BK, share=0.1))
    found = fit(start, x_BK, objective, steps=150, tolerance=1e-8)
    assert len(found.alive()) == 3
    assert sorted(found.usage_M.round().int().tolist())[-3:] == [60, 60, 60]
    assert len(found.bounds) < 151
    assert len(fit(start, x_BK, EM(), steps=60).alive()) > 3  # maximum likelihood keeps what it is given


def test_fixed_form_reaches_the_conjugate_posterior():
    x, noise_std = torch.tensor([0.8, -1.5], dtype=torch.float64), 0.7
    shrink = 1 + noise_std**2

    def log_joint(z_BF: Tensor) -> Tensor:
        far_B = z_BF.square().sum(-1) + ((x - z_BF) / noise_std).square().sum(-1)
        return -far_B / 2 - 2 * math.log(noise_std) - 2 * math.log(2 * math.pi)

    mean_F, log_std_F = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    prior = DiagonalGaussian(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    optimiser = torch.optim.Adam([mean_F, log_std_F], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        loss = -elbo(log_joint, DiagonalGaussian(mean_F, log_std_F), torch.randn(64, 2, dtype=torch.float64)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    evidence = stats.norm.logpdf(x.numpy(), 0, math.sqrt(shrink)).sum()
    noise = torch.randn(20000, 2, dtype=torch.float64)
    assert torch.allclose(mean_F, x / shrink, atol=2e-2)
    assert torch.allclose(log_std_F.mul(2).exp(), torch.full_like(x, noise_std**2 / shrink), atol=2e-2)
    with torch.no_grad():
        assert elbo(log_joint, DiagonalGaussian(mean_F, log_std_F), noise).mean().item() == pytest.approx(
            evidence, abs=2e-3
        )
        assert elbo(log_joint, prior, noise).mean().item() < evidence - 0.5


def test_reparameterised_gradients_vary_less_than_score_function_gradients():
    mean_F, many = torch.tensor([0.3, -0.2], dtype=torch.float64), 4000
    noise_BF, grads = torch.randn(many, 2, dtype=torch.float64), {}
    for name, bound in (("reparameterised", elbo), ("score", score_function_elbo)):
        means_BF = mean_F.expand(many, -1).clone().requires_grad_()  # one for each sample, to have the gradient of each
        q = DiagonalGaussian(means_BF, torch.zeros(2, dtype=torch.float64))
        (grads[name],) = torch.autograd.grad(bound(lambda z: -(z - 1).square().sum(-1), q, noise_BF).sum(), means_BF)
    exact = 2 * (1 - mean_F)  # of -E(z - 1)^2; the entropy does not depend on the mean
    for rows in grads.values():  # both are right on average
        assert ((rows.mean(0) - exact).abs() < 5 * rows.std(0) / math.sqrt(len(rows))).all()
    assert grads["reparameterised"].var(0).max() < 0.5 * grads["score"].var(0).min()


def test_bounds_over_components_are_below_the_evidence_and_touch_it():
    memory, x_BK = bernoulli()
    log_joint_BM, evidence_B = memory.log_joint(x_BK), memory.log_likelihood(x_BK)
    log_q_BM = torch.randn(len(x_BK), COMPONENTS, dtype=torch.float64).log_softmax(-1)
    assert (enumerated_elbo(log_joint_BM, log_q_BM) < evidence_B).all()
    assert torch.allclose(enumerated_elbo(log_joint_BM, log_joint_BM.log_softmax(-1)), evidence_B)
    scores_BM, many = log_joint_BM - memory.log_prior_M, 4000
    wanted = enumerated_elbo(log_joint_BM, log_q_BM)[0].item()
    log_q = log_q_BM[:1].expand(many, -1)
    hard = gumbel_elbo(
        lambda w: (w * scores_BM[0]).sum(-1), log_q, memory.log_prior_M, Gumbel(0.5, straight_through=True)
    )
    once = reinforce_elbo(log_joint_BM[:1].expand(many, -1), log_q, 0.0, torch.Generator().manual_seed(0))
    for draws in (hard, once):  # one sampled component each: right on average
        assert abs(draws.mean().item() - wanted) < 5 * draws.std().item() / math.sqrt(many)


def test_reinforce_has_the_gradient_of_the_sum():
    logits = torch.tensor([[0.5, -0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    log_joint_BM = torch.tensor([[-1.0, -2.0, -4.0]], dtype=torch.float64)
    (exact,) = torch.autograd.grad(enumerated_elbo(log_joint_BM, logits.log_softmax(-1)).sum(), logits)
    many = 100_000
    log_q = logits.log_softmax(-1).expand(many, -1)
    bound = reinforce_elbo(log_joint_BM.expand(many, -1), log_q, -2.0, torch.Generator().manual_seed(0)).mean()
    (sampled,) = torch.autograd.grad(bound, logits)
    assert (sampled - exact).abs().max() < 0.02
    assert exact.abs().max() > 0.2


def test_gumbel_samples_have_the_frequencies_of_the_distribution():
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]).log()
    many = log_p.expand(100_000, -1)
    counts = Gumbel(0.7).weigh(many, training=True).argmax(-1).bincount(minlength=5).numpy()
    assert stats.chisquare(counts, 100_000 * log_p.double().softmax(-1).numpy()).pvalue > 1e-3
    entropies = []
    for temperature in (1e-3, 1.0, 1e4):
        weights = Gumbel(temperature).weigh(many[:2000], training=True)
        entropies.append(-(weights * weights.clamp_min(1e-30).log()).sum(-1).mean().item())
    assert entropies[0] < 0.01
    assert entropies[2] == pytest.approx(math.log(5), abs=1e-3)


def test_subnormal_responsibilities_are_gone():
    memory, _ = bernoulli(torch.float32)
    far = replace(memory, log_prior_M=torch.tensor([0.0, -50.0, -70.0, -95.0, -1000.0]), keys_MK=torch.zeros(5, BITS))
    found = fit(far, torch.zeros(3, BITS), EM(), steps=0)
    assert (found.usage_M[2:] == 0).all()
    assert found.usage_M[1] > 0
    assert found.usage_M[0] == 3


def test_errors_say_what_to_do():
    memory, x_BK = bernoulli()
    with pytest.raises(ShapeError, match="K=4, but K=9 was wanted"):
        memory.read(x_BK[:, :4])
    with pytest.raises(ConfigError, match="components=41 starts at samples, of which there are 40"):
        BernoulliMixture.around(x_BK, 41, torch.Generator())
    with pytest.raises(ConfigError, match=r"concentration=0 is not positive; 0\.001 prefers few"):
        MeanField(Beta(), 0)
    with pytest.raises(ConfigError, match="degrees=1 must be above 0 and above 1; try 1 and 2"):
        GaussWishart(torch.zeros(2), 1.0, 1, torch.eye(2))
    with pytest.raises(ConfigError, match="not a number after 0 steps; look for nan in the samples"):
        fit(memory, x_BK * float("nan"), EM())


def test_parts_that_do_not_go_together_are_refused():
    bits, x_BK = bernoulli()
    normal, real_BK = gaussian()
    few = torch.Generator().manual_seed(0)
    range_said = (
        r"samples of a BernoulliMixture are bits or shares with 0 <= x <= 1, but these go from -\d.*take GaussianM"
    )
    with pytest.raises(ConfigError, match="BernoulliMixture.around: " + range_said):
        BernoulliMixture.around(real_BK, 2, few)
    with pytest.raises(ConfigError, match="fit: " + range_said):
        fit(bits, 3 * x_BK - 1, EM())
    with pytest.raises(
        ConfigError,
        match=r"Beta is a prior of BernoulliMixture, not of GaussianMixture; use GaussWishart\.scaled_to\(x\)",
    ):
        fit(normal, real_BK, MeanField(Beta()))
    with pytest.raises(ConfigError, match=r"GaussWishart is a prior of GaussianMixture, not of Bern.*; use Beta\(\)"):
        fit(bits, x_BK, MeanField(GaussWishart.scaled_to(x_BK)))
    with pytest.raises(ShapeError, match=r"GaussWishart: x_BK is .* K=3, but K=2 was wanted"):
        fit(normal, real_BK, MeanField(GaussWishart.scaled_to(real_BK[:, :2])))
    with pytest.raises(ConfigError, match=r"center_K is torch\.float32, samples are torch\.float64; use GaussWishart"):
        fit(normal, real_BK, MeanField(GaussWishart.scaled_to(real_BK.float())))


def test_slips_of_the_hand_are_named():
    memory, x_BK = bernoulli()
    given: dict[str, Any] = {"class": EM, "no objective": "em", "numpy": x_BK.numpy(), "seed": 0, "prior": Beta}
    with pytest.raises(ConfigError, match=r"objective is the class EM; make one: EM\(\.\.\)"):
        fit(memory, x_BK, given["class"])
    with pytest.raises(ConfigError, match=r"objective='em' is no Objective; try EM\(\)"):
        fit(memory, x_BK, given["no objective"])
    with pytest.raises(ConfigError, match=r"memory=0 is no mixture; start with BernoulliMixture\.around"):
        fit(given["seed"], x_BK, EM())
    with pytest.raises(ConfigError, match=r"is no prior; try Beta\(\) or GaussWishart\.scaled_to\(x\)"):
        MeanField(given["prior"])
    for kind in (BernoulliMixture, GaussianMixture):
        with pytest.raises(
            ConfigError, match=r"generator=0 is no torch\.Generator; try torch\.Generator\(\)\.manual_seed"
        ):
            kind.around(x_BK, 2, given["seed"])
        with pytest.raises(ConfigError, match=r"around: samples are of type ndarray; make a tensor: torch\.as_tensor"):
            kind.around(given["numpy"], 2, torch.Generator())
        with pytest.raises(
            ConfigError, match=r"samples are torch\.bool, not floating point; convert them: x\.float\(\)"
        ):
            kind.around(x_BK > 0, 2, torch.Generator())
        with pytest.raises(
            ConfigError, match=r"samples are \(40, 3, 3\), not \(samples, features\); try x\.flatten\(1\)"
        ):
            kind.around(x_BK.view(40, 3, 3), 2, torch.Generator())
    with pytest.raises(ConfigError, match="fit: samples are of type ndarray; make a tensor"):
        fit(memory, given["numpy"], EM())


@KINDS
def test_precisions_are_not_mixed(make):
    memory, x_BK = make()
    for use in (lambda x: fit(memory, x, EM()), memory.read, memory.log_likelihood):
        with pytest.raises(
            ConfigError, match=r"samples are torch\.float32, the mixture is torch\.float64; convert the"
        ):
            use(x_BK.float())


def test_a_mixture_and_a_fit_are_shown_in_one_line():
    memory, x_BK = bernoulli()
    line = "BernoulliMixture(5 components of 9 features, 3 answers each, torch.float64)"
    assert repr(memory) == line
    assert repr(gaussian()[0]) == "GaussianMixture(5 components of 3 features, 3 answers each, torch.float64)"
    found = replace(fit(memory, x_BK, EM(), steps=0), bounds=[-3.0, -2.5], cpu_s=[0.0, 0.25])
    assert repr(found) == f"Fit({line}, 1 steps, -2.5 nats a sample, 0.25 CPU-s)"
