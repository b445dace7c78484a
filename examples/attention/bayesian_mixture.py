"""A memory that finds its number of components: mean-field variational inference with a sparse prior on the weights.

    uv run examples/attention/bayesian_mixture.py          the whole form, on one thread
    uv run examples/attention/bayesian_mixture.py --quick  a reduced form, seconds

Three clusters from a start of 12 components, iris from 10, and binary digits from 400, of which the half with the highest usage is
compared with random halves. The number found depends on the prior on the components, which is therefore pinned: an expected
variance of a tenth of the data's; Beta(1/2, 1/2) on every pixel.

Measured (all numbers: benchmarks/results/seeds.json):
- Bayesian GMM, free-form VI, 0.1 CPU-minutes, seeds 0 1: largest fall of the ELBO = 0 (bar <= 1e-06); three clusters
  found = 1 (bar >= 0.9); iris components = 3 (bar == 3); iris ARI = 0.9039 (bar >= 0.85); beside: iris ARI of
  scikit-learn 0.5651 (0.5285 to 0.6017); iris components of EM 10
- components learned dynamically, 0.2 CPU-minutes, seeds 0 1: components kept of 400 = 235 (226 to 244; bar <= 320);
  digit accuracy = 0.8927 (0.891 to 0.8945; bar >= 0.87); kept by usage = 0.8598 (0.852 to 0.8675; bar >= (kept at
  random) +0.03, missed with seed 1); largest fall of the ELBO = 0 (bar <= 1e-06); beside: kept at random 0.8294 (0.8277
  to 0.8312)
"""

from pathlib import Path

import numpy as np
import torch
from command import run
from drawing import dying
from sets import binarised_mnist
from sklearn.datasets import load_iris
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import BayesianGaussianMixture
from torch import Tensor

from multimodal.zoo.mixture import (
    EM,
    BernoulliMixture,
    Beta,
    Fit,
    GaussianMixture,
    GaussWishart,
    MeanField,
    Mixture,
    fit,
)

CENTERS, RESTARTS, SPARSE = ((0, 0), (6, 0), (3, 6)), 10, 1e-3


def restarts(x: Tensor, components: int, objective: MeanField | EM, seed: int, quick: bool) -> list[Fit]:
    """Ten fits, the best first."""
    draws = (torch.Generator().manual_seed(RESTARTS * seed + i) for i in range(RESTARTS))
    starts = (GaussianMixture.around(x, components, draw) for draw in draws)
    fits = (fit(start, x, objective, steps=20 if quick else 300, tolerance=1e-7) for start in starts)
    return sorted(fits, key=lambda found: -found.bounds[-1])


def scaled(x: Tensor) -> MeanField:
    return MeanField(GaussWishart.scaled_to(x, share=0.1), SPARSE)


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    random = np.random.default_rng(seed)
    clusters = torch.tensor(np.concatenate([random.normal(center, 1, (100, 2)) for center in CENTERS]))
    flowers, kinds = (np.asarray(part) for part in load_iris(return_X_y=True))
    flowers = torch.tensor((flowers - flowers.mean(0)) / flowers.std(0))
    of_clusters = restarts(clusters, 12, scaled(clusters), seed, quick)
    of_iris = restarts(flowers, 10, scaled(flowers), seed, quick)
    plain = {count: restarts(flowers, count, EM(), seed, quick) for count in (3, 10)}
    theirs = BayesianGaussianMixture(
        n_components=10, weight_concentration_prior_type="dirichlet_distribution", weight_concentration_prior=SPARSE,
        n_init=1 if quick else 10, max_iter=1000, tol=1e-2 if quick else 1e-3, random_state=seed,
    ).fit_predict(flowers)  # fmt: skip
    if out is not None:
        draw(clusters, seed, out / "bayesian_mixture.png")
    return {
        "largest fall of the ELBO": max(found.largest_fall for found in of_clusters + of_iris),
        "three clusters found": float(np.mean([len(found.alive()) == 3 for found in of_clusters])),
        "iris components": float(len(of_iris[0].alive())),
        "iris ARI": adjusted_rand_score(kinds, of_iris[0].memory.responsibilities(flowers).argmax(1)),
        "iris ELBO": of_iris[0].bounds[-1],
        "iris components of scikit-learn": float(len(set(theirs))),
        "iris ARI of scikit-learn": adjusted_rand_score(kinds, theirs),
        "iris components of EM": float(min(len(found.alive()) for found in plain[10])),
        **{f"iris log-likelihood of EM with {count}": fits[0].bounds[-1] for count, fits in plain.items()},
    }


def measure_dynamic(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """400 components of binary digits, what is left of them, and what is lost by keeping half of those."""
    data = [torch.as_tensor(part).float() for part in binarised_mnist()]
    x, labels, test, test_labels = (part[:300] for part in data) if quick else data
    digit_BF, draw, steps = torch.eye(10)[labels.long()], torch.Generator().manual_seed(seed), 5 if quick else 40
    start = BernoulliMixture.around(x, 20 if quick else 400, draw)
    found, plain = (fit(start, x, objective, steps=steps) for objective in (MeanField(Beta(0.5, 0.5), SPARSE), EM()))
    memory = found.alive().answering(x, digit_BF)
    half = len(memory) // 2
    by_usage = memory.prune(memory.usage(x).argsort(descending=True)[:half])
    by_chance = [memory.prune(torch.randperm(len(memory), generator=draw)[:half]) for _ in range(40)]

    def right(memory: Mixture) -> float:
        return (memory.read(test).argmax(1) == test_labels).double().mean().item()

    return {
        "components kept of 400": float(len(found.alive())),
        "digit accuracy": right(memory),
        "kept by usage": right(by_usage),
        "kept at random": float(np.mean([right(memory) for memory in by_chance])),
        "largest fall of the ELBO": found.largest_fall,
        "test log-likelihood": memory.log_likelihood(test).double().mean().item(),
        "fit CPU-s": found.cpu_s[-1],
        "components kept by EM": float(len(plain.alive())),
        "digit accuracy by EM": right(plain.memory.answering(x, digit_BF)),
    }


def draw(x: Tensor, seed: int, path: Path) -> None:
    """Twelve components on three clusters while they die."""
    seen = []
    start = GaussianMixture.around(x, 12, torch.Generator().manual_seed(RESTARTS * seed))
    fit(start, x, scaled(x), steps=80, watch=lambda step, latest: seen.append(latest))
    dying(x, seen, (0, 5, 20, 80), path)


if __name__ == "__main__":
    run(lambda *given: measure(*given) | measure_dynamic(*given[:2]), "bayesian_mixture", __doc__)
