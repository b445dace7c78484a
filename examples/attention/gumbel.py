"""Gumbel-softmax against its alternatives: a network learns to choose one of 50 components by four estimators of the same bound.

    uv run examples/attention/gumbel.py                   the whole form, on one thread
    uv run examples/attention/gumbel.py --quick           a reduced form, seconds

q(component | picture) is an MLP of 784-128-50, log p(picture | component) a Bernoulli mixture; both learn together. The mixture's
exact log p is a sum over 50, so every bound can be checked. Each estimator has 12 CPU-s; beside REINFORCE stands enumeration, which
needs all components in each step.

Measured (all numbers: benchmarks/results/seeds.json):
- Gumbel-softmax, 0.9 CPU-minutes, seed 0: ELBO = -148.1 (bar >= -152; bar >= (REINFORCE ELBO) +20); clusters used = 45
  (bar >= 35); ELBO - log p, largest = 1.421e-14 (bar <= 1e-09); beside: one component -206.4; EM -142.1; REINFORCE ELBO
  -178.9
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from command import run
from drawing import blank, save
from sets import binarised_mnist
from torch import Tensor, nn

from multimodal.attention.reads import Gumbel
from multimodal.zoo.mixture import EM, BernoulliMixture, enumerated_elbo, fit, gumbel_elbo, reinforce_elbo

COMPONENTS, BATCH, RATE, CPU_S = 50, 100, 3e-3, 12.0
HOT, COLD = 1.0, 0.3  # the temperature falls from one to the other
ESTIMATORS = ("Gumbel-softmax", "straight-through Gumbel", "enumeration", "REINFORCE")


def trained(kind: str, x: Tensor, seed: int, cpu_s: float) -> tuple[nn.Module, BernoulliMixture, int]:
    """Encoder, mixture and the number of steps within a budget of CPU-seconds."""
    torch.manual_seed(seed)  # of the encoder and of Gumbel's noise
    generator = torch.Generator().manual_seed(seed)
    start = BernoulliMixture.around(x, COMPONENTS, generator)
    encoder = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, COMPONENTS), nn.LogSoftmax(-1))
    parameters = {name: value.clone().requires_grad_() for name, value in start.unconstrained().items()}
    optimiser = torch.optim.Adam([*encoder.parameters(), *parameters.values()], lr=RATE)
    baseline, steps, started = -200.0, 0, time.process_time()
    while (gone := (time.process_time() - started) / cpu_s) < 1:
        x_BK = x[torch.randint(len(x), (BATCH,), generator=generator)]
        memory, log_q_BM = start.constrained(parameters), encoder(x_BK)
        if kind == "enumeration":
            bound_B = enumerated_elbo(memory.log_joint(x_BK), log_q_BM)
        elif kind == "REINFORCE":
            bound_B = reinforce_elbo(memory.log_joint(x_BK), log_q_BM, baseline, generator)
            baseline += 0.01 * (bound_B.mean().item() - baseline)
        else:
            read = Gumbel(HOT * (COLD / HOT) ** gone, straight_through=kind == "straight-through Gumbel")
            bound_B = gumbel_elbo(lambda weights: painted(memory, weights, x_BK), log_q_BM, memory.log_prior_M, read)  # noqa: B023
        optimiser.zero_grad()
        (-bound_B.mean()).backward()
        optimiser.step()
        steps += 1
    return encoder, start.constrained({name: value.detach() for name, value in parameters.items()}), steps


def painted(memory: BernoulliMixture, weights_BM: Tensor, x_BK: Tensor) -> Tensor:
    """log p(x) under the pixels that such weights read from the memory: (B,)."""
    p_BK = (weights_BM @ memory.means_MK).clamp(1e-4, 1 - 1e-4)
    return -F.binary_cross_entropy(p_BK, x_BK, reduction="none").sum(-1)


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    x, _, test, _ = (torch.as_tensor(part) for part in binarised_mnist())
    values, memories = {}, {}
    worst = -math.inf
    for kind in ESTIMATORS:
        encoder, memory, steps = trained(kind, x, seed, 0.5 if quick else CPU_S)
        with torch.no_grad():
            log_q_BM = encoder(test).double().log_softmax(-1)  # sums to 1 beyond what float32 can
            log_joint_BM = memory.log_joint(test).double()
        bound_B, exact_B = enumerated_elbo(log_joint_BM, log_q_BM), log_joint_BM.logsumexp(-1)
        worst = max(worst, (bound_B - exact_B).max().item())
        used_M = log_q_BM.exp().sum(0)
        title = f"{kind}: ELBO {bound_B.mean():.1f}, {(used_M > 1).sum()} of {COMPONENTS} used"
        memories[title] = memory.prune(used_M.argsort(descending=True))
        name = "" if kind == ESTIMATORS[0] else f"{kind} "
        values |= {
            f"{name}ELBO": bound_B.mean().item(),
            f"{name}exact log p(x)": exact_B.mean().item(),
            f"{name}gap": (exact_B - bound_B).mean().item(),
            f"{name}clusters used": float((used_M > 1).sum()),
            f"{name}steps": float(steps),
        }
    values["ELBO - log p, largest"] = worst
    for name, count in (("EM", COMPONENTS), ("one component", 1)):
        start = BernoulliMixture.around(x, count, torch.Generator().manual_seed(seed))
        best = fit(start, x, EM(), steps=3 if quick else 40).memory
        values[name] = best.log_likelihood(test).double().mean().item()
    if out is not None:
        draw(memories, out / "gumbel.png")
    return values


def draw(memories: dict[str, BernoulliMixture], path: Path, shown: int = 20) -> None:
    """The components of each estimator, most used first."""
    figure = blank(shown * 0.5, len(memories) * 0.9)
    for axes, (title, memory) in zip(figure.subplots(len(memories), 1), memories.items(), strict=True):
        axes.imshow(torch.cat([*memory.means_MK[:shown].view(-1, 28, 28)], 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    save(figure, path)


if __name__ == "__main__":
    run(measure, "gumbel", __doc__)
