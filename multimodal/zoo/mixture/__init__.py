"""Mixture models as memories that attention reads: Bernoulli and Gaussian components, and the objectives that learn them."""

from multimodal.zoo.mixture.bounds import (
    DiagonalGaussian,
    elbo,
    enumerated_elbo,
    gumbel_elbo,
    reinforce_elbo,
    score_function_elbo,
)
from multimodal.zoo.mixture.fitting import EM, Adam, Fit, Objective, fit
from multimodal.zoo.mixture.meanfield import Beta, Conjugate, GaussWishart, MeanField
from multimodal.zoo.mixture.memory import BernoulliMixture, GaussianMixture, Mixture

__all__ = [
    "EM",
    "Adam",
    "BernoulliMixture",
    "Beta",
    "Conjugate",
    "DiagonalGaussian",
    "Fit",
    "GaussWishart",
    "GaussianMixture",
    "MeanField",
    "Mixture",
    "Objective",
    "elbo",
    "enumerated_elbo",
    "fit",
    "gumbel_elbo",
    "reinforce_elbo",
    "score_function_elbo",
]
