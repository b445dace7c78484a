"""Learning a mixture: `fit(memory, data, EM())`, and the objective is the only thing that changes."""

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
    """One evaluation of all samples."""

    bound: float  # nats a sample: the log-likelihood, or what bounds it from below
    memory: Mixture  # with the parameters that have this bound
    usage_M: Tensor  # samples that each component answers for


class Objective(ABC):
    """What is climbed, and how."""

    @abstractmethod
    def rounds(self, memory: Mixture, x_BK: Tensor) -> Iterator[Round]:
        """Evaluate, yield, update, and so on without end."""

    def check(self, memory: Mixture) -> None:  # noqa: B027  most objectives take any mixture
        """Raise ConfigError where this cannot be climbed with such a mixture."""


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
    """Gradient ascent on the log-likelihood with all samples in each step; Kingma & Ba 2015 choose its length."""

    rate: float = 0.1

    def rounds(self, memory: Mixture, x_BK: Tensor) -> Iterator[Round]:
        free = {name: value.detach().clone().requires_grad_() for name, value in memory.free().items()}
        optimiser = torch.optim.Adam(free.values(), lr=self.rate)
        while True:
            evidence_B, posterior_BM = split(memory.bind(free).log_joint(x_BK))
            now = memory.bind({name: value.detach().clone() for name, value in free.items()})
            yield Round(evidence_B.detach().double().mean().item(), now, posterior_BM.sum(0))
            optimiser.zero_grad()
            (-evidence_B.mean()).backward()
            optimiser.step()


@dataclass(frozen=True, repr=False)
class Fit:
    """What came of a fit: `bounds[i]` and `cpu_s[i]` belong to the memory after i steps."""

    memory: Mixture
    usage_M: Tensor  # samples that each component answers for
    bounds: list[float] = field(default_factory=list)  # nats a sample
    cpu_s: list[float] = field(default_factory=list)  # process CPU-seconds since the start

    def __repr__(self) -> str:
        steps, bound, cpu_s = len(self.bounds) - 1, self.bounds[-1], self.cpu_s[-1]
        return f"Fit({self.memory}, {steps} steps, {bound:.6g} nats a sample, {cpu_s:.2f} CPU-s)"

    def alive(self, least: float = 1.0) -> Mixture:
        """The memory without the components that answer for `least` samples or fewer."""
        return self.memory.prune(self.usage_M > least)

    @property
    def largest_fall(self) -> float:
        """By how much the bound fell in the worst step; 0 if it never did."""
        return max([0.0, *(before - after for before, after in pairwise(self.bounds))])

    def reached(self, target: float) -> tuple[float, float]:
        """(steps, CPU-seconds) until the bound first was `target`; both infinite where it never was."""
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
    """Take `steps` steps from `memory`, or fewer when one gains less than `tolerance` nats a sample.

    watch: is called with each step and what came of it, for a progress bar or a picture.

    Raises:
        ConfigError: memory, samples and objective do not go together, or the bound is not a number.
    """
    _check_parts(memory, x_BK, objective)
    started, bounds, cpu_s = time.process_time(), [], []
    latest = None
    for step, latest in zip(range(steps + 1), objective.rounds(memory, x_BK), strict=False):
        bounds.append(latest.bound)
        cpu_s.append(time.process_time() - started)
        if latest.bound != latest.bound:
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
