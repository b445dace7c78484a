"""Fits mixtures: `fit(memory, data, EM())`; the methods differ in their objective alone."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from multimodal.shapes import ConfigError
from multimodal.zoo.mixture.memory import Mixture, split


@dataclass(frozen=True)
class Round:
    """One evaluation of all samples.

    bound: nats a sample: the log-likelihood, or a lower bound of it.
    memory: the mixture with the parameters that have this bound.
    usage_M: sum over samples of each component's responsibility.
    """

    bound: float
    memory: Mixture
    usage_M: Tensor


class Objective(ABC):
    """What a fit maximises, and how."""

    @abstractmethod
    def rounds(self, memory: Mixture, x_BK: Tensor) -> Iterator[Round]:
        """Evaluates, yields, updates, without end."""

    def check(self, memory: Mixture) -> None:  # noqa: B027  most objectives take any mixture
        """Raises a ConfigError unless such a mixture can be fitted by this objective."""


@dataclass(frozen=True)
class EM(Objective):
    """Expectation maximisation: responsibilities, then weighted means. Dempster, Laird & Rubin 1977; never falls."""

    def rounds(self, memory: Mixture, x_BK: Tensor) -> Iterator[Round]:
        while True:
            evidence_B, posterior_BM = split(memory.log_joint(x_BK))
            yield Round(evidence_B.double().mean().item(), memory, posterior_BM.sum(0))
            memory = memory.maximise(x_BK, posterior_BM)


@dataclass(frozen=True)
class Adam(Objective):
    """Gradient ascent by Adam (Kingma & Ba 2015) on the log-likelihood of all samples.

    rate: the learning rate.
    """

    rate: float = 0.1

    def rounds(self, memory: Mixture, x_BK: Tensor) -> Iterator[Round]:
        parameters = {name: value.detach().clone().requires_grad_() for name, value in memory.unconstrained().items()}
        optimiser = torch.optim.Adam(parameters.values(), lr=self.rate)
        while True:
            evidence_B, posterior_BM = split(memory.constrained(parameters).log_joint(x_BK))
            now = memory.constrained({name: value.detach().clone() for name, value in parameters.items()})
            yield Round(evidence_B.detach().double().mean().item(), now, posterior_BM.sum(0))
            optimiser.zero_grad()
            (-evidence_B.mean()).backward()
            optimiser.step()


@dataclass(frozen=True, repr=False)
class Fit:
    """The result of a fit.

    memory: the fitted mixture.
    usage_M: sum over samples of each component's responsibility.
    bounds: nats a sample after 0, 1, 2, .. steps.
    cpu_s: CPU-seconds of this process after 0, 1, 2, .. steps.
    """

    memory: Mixture
    usage_M: Tensor
    bounds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        steps, bound, cpu_s = len(self.bounds) - 1, self.bounds[-1], self.cpu_s[-1]
        return f"Fit({self.memory}, {steps} steps, {bound:.6g} nats a sample, {cpu_s:.2f} CPU-s)"

    def alive(self, least: float = 1.0) -> Mixture:
        """The mixture without the components whose usage is at most `least` samples."""
        return self.memory.prune(self.usage_M > least)

    @property
    def largest_fall(self) -> float:
        """The largest decrease of the bound in one step; 0 if it never decreased."""
        return max([0.0, *(before - after for before, after in pairwise(self.bounds))])

    def reached(self, target: float) -> tuple[float, float]:
        """(steps, CPU-seconds) until the bound first reached `target`; both infinite where it never did."""
        for step, bound in enumerate(self.bounds):
            if bound >= target:
                return step, self.cpu_s[step]
        return math.inf, math.inf


def fit(
    memory: Mixture,
    x_BK: Tensor,
    objective: Objective,
    *,
    steps: int = 40,
    tolerance: float = 0.0,
    watch: Callable[[int, Round], None] | None = None,
) -> Fit:
    """Take `steps` steps from `memory`; stops early when a step gains less than `tolerance` nats a sample.

    watch: called after each step with its number and the evaluation, for a progress bar or a picture.

    Raises:
        ConfigError: memory, samples and objective do not go together, or the bound is not a number.
    """
    _check_parts(memory, x_BK, objective)
    started, bounds, cpu_s = time.process_time(), [], []
    latest = None
    for step, latest in zip(range(steps + 1), objective.rounds(memory, x_BK), strict=False):
        bounds.append(latest.bound)
        cpu_s.append(time.process_time() - started)
        if latest.bound != latest.bound:  # true of NaN alone
            raise ConfigError(f"fit: the bound is not a number after {step} steps; look for nan in the samples")
        if watch is not None:
            watch(step, latest)
        if tolerance and step and bounds[-1] - bounds[-2] < tolerance:
            break
    assert latest is not None
    return Fit(latest.memory, latest.usage_M, bounds, cpu_s)


def _check_parts(memory: Mixture, x_BK: Tensor, objective: Objective) -> None:
    if not isinstance(memory, Mixture):
        raise ConfigError(f"fit: memory={memory!r} is no mixture; start with BernoulliMixture.around(x, 50, generator)")
    if isinstance(objective, type):
        raise ConfigError(f"fit: objective is the class {objective.__name__}; make one: {objective.__name__}(..)")
    if not isinstance(objective, Objective):
        raise ConfigError(f"fit: objective={objective!r} is no Objective; try EM()")
    objective.check(memory)
    memory.check_samples("fit", x_BK)
