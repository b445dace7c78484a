"""Superposition: five sparse features share two dimensions as a pentagon, where dense ones keep the two that matter most.

    uv run examples/attention/superposition.py            the whole form, on one thread
    uv run examples/attention/superposition.py --quick    a reduced form, seconds

x' = relu(W^T W x + b), five features of importance 0.9^i, each absent with chance S, 16 runs a setting (Elhage et al. 2022, "Toy
Models of Superposition"). A feature counts if |W_i| > 0.5; a regular pentagon has 72 degrees between neighbours. "linear" is
without the relu.

Measured (all numbers: benchmarks/results/seeds.json):
- superposition, 0.5 CPU-minutes, seed 0: S=0 features = 2 (bar == 2); S=0.97 features = 5 (bar == 5); S=0.97 linear
  features = 2 (bar == 2); S=0.97 largest gap off 72 degrees = 1.032 (bar <= 5)
"""

import sys
import time
from pathlib import Path

import torch
from command import run
from drawing import blank, save
from torch import Tensor

from multimodal.train.display import bar

RUNS, FEATURES, WIDTH = 16, 5, 2
SETTINGS = {"S=0": (0.0, True), "S=0.97": (0.97, True), "S=0.99": (0.99, True), "S=0.97 linear": (0.97, False)}
REMARKS = {"S=0.99 features": "5 wanted", "S=0.99 largest gap off 72 degrees": "at most 5 wanted"}


def batch_of(count: int, features: int, absent: float, generator: torch.Generator, runs: int = RUNS) -> Tensor:
    """Features (runs, N, features): uniform in 0..1, each absent (0) with this chance."""
    value = torch.rand(runs, count, features, generator=generator)
    return value * (torch.rand(runs, count, features, generator=generator) >= absent)


def train_toy(
    absent: float, *, relu: bool = True, features: int = FEATURES, width: int = WIDTH, decay: float = 0.9,
    runs: int = RUNS, steps: int = 4000, batch: int = 512, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The directions (runs, features, width) of the features, and each run's loss on fresh data; runs share nothing."""
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(runs, features, width, generator=generator) * (2 / (features + width)) ** 0.5
    ).requires_grad_()
    bias = torch.zeros(runs, 1, features, requires_grad=True)
    importance = decay ** torch.arange(features)
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)

    def error(count: int) -> Tensor:
        x = batch_of(count, features, absent, generator, runs)
        made = x @ weight @ weight.transpose(1, 2) + bias
        return (importance * (x - (made.relu() if relu else made)).square()).mean((1, 2))

    with bar(steps, 0, quiet=not sys.stdout.isatty()) as show:
        clock = time.perf_counter()
        for step in range(1, steps + 1):
            loss = error(batch)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            speed = round(step * batch * runs / (time.perf_counter() - clock))
            show({"step": step, "loss": float(loss.detach().mean()), "tokens_per_s": speed})
    with torch.no_grad():
        return weight.detach(), error(16 * batch)


def gaps(directions: Tensor) -> Tensor:
    """Angles between neighbours of directions (N, 2) round the circle, in degrees."""
    angle = torch.atan2(directions[:, 1], directions[:, 0]).rad2deg().sort().values
    return torch.cat([angle.diff(), angle[:1] + 360 - angle[-1:]])


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    numbers: dict[str, float] = {}
    best: dict[str, Tensor] = {}
    for name, (absent, relu) in SETTINGS.items():
        weight, loss = train_toy(absent, relu=relu, steps=100 if quick else 4000, seed=seed)
        here = (weight.norm(dim=-1) > 0.5).sum(1)
        least = int(loss.argmin())
        best[name] = weight[least]
        numbers[f"{name} features"] = float(here[least])
        numbers[f"{name} share of runs with as many"] = float((here == here[least]).float().mean())
        numbers[f"{name} loss"] = float(loss[least])
    for name in ("S=0.97", "S=0.99"):
        off = gaps(best[name]).sub(72).abs().max()
        numbers[f"{name} largest gap off 72 degrees"] = float(off)
    if out is not None:
        draw(best, out / "superposition.png")
    return numbers


def draw(best: dict[str, Tensor], path: Path) -> None:
    figure = blank(3 * len(best), 4)
    for axes, (name, weight) in zip(figure.subplots(1, len(best)), best.items(), strict=True):
        for i, (x, y) in enumerate(weight.tolist()):
            axes.plot([0, x], [0, y], marker="o", color=f"C{i}", label=f"feature {i}")
        axes.set(title=name, xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=FEATURES, fontsize=8)
    figure.suptitle("directions of the features in the two dimensions; S: how often a feature is absent")
    save(figure, path)


if __name__ == "__main__":
    run(measure, "superposition", __doc__, REMARKS)
