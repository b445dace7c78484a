"""Adversarial training of a generator and a discriminator with hinge losses, which take turns (SAGAN, Zhang et al. 2019).

noise --generator--> fake ---+
                             +--discriminator--> real (above 0) or fake (below 0)
data ------------------------+
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.train.display import bar


def discriminator_loss(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))): Zhang et al. 2019, equation 4, the discriminator's half."""
    return (1 - real_B).relu().mean() + (1 + fake_B).relu().mean()


def generator_loss(fake_B: Tensor) -> Tensor:
    """-E D(G(z)): the generator's half of equation 4."""
    return -fake_B.mean()


@dataclass
class Players:
    """The generator, the discriminator and their optimisers, each of which owns the parameters of its network.

    generator: noise -> samples, one a row.
    discriminator: samples -> a score for each, above 0 for real.
    generator_optimizer: steps the generator's parameters.
    discriminator_optimizer: steps the discriminator's parameters.
    """

    generator: nn.Module
    discriminator: nn.Module
    generator_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer

    def step(self, real: Tensor, noise: Callable[[int], Tensor]) -> tuple[float, float]:
        """One step of the discriminator, then one of the generator; returns their losses. Neither changes the other's parameters.

        real: samples of the data, one a row; noise: n -> n rows of noise for the generator.
        """
        with torch.no_grad():
            fake = self.generator(noise(len(real)))
        # one pass over both halves: the same weights, and half the overhead of two
        real_B, fake_B = self.discriminator(torch.cat([real, fake])).flatten().split(len(real))
        loss = discriminator_loss(real_B, fake_B)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        learning = [p for p in self.discriminator.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)  # gradients pass through the discriminator, and none is accumulated in it
        try:
            against = generator_loss(self.discriminator(self.generator(noise(len(real)))).flatten())
            self.generator_optimizer.zero_grad(set_to_none=True)
            against.backward()
            self.generator_optimizer.step()
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
        return float(loss.detach()), float(against.detach())


def alternate(
    players: Players,
    batches: Iterator[Tensor],
    noise: Callable[[int], Tensor],
    steps: int,
    *,
    after: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> list[tuple[float, float]]:
    """Take `steps` steps of both players over endless batches of real samples: (discriminator's loss, generator's) of each.

    after: called after each step with the number of steps done, to average weights or to draw samples.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    history = []
    clock, values = time.perf_counter(), 0
    with bar(steps, 0, quiet) as show:
        for step in range(1, steps + 1):
            real = next(batches)
            history.append(players.step(real, noise))
            if not all(abs(loss) < float("inf") for loss in history[-1]):
                raise FloatingPointError(
                    f"alternate: the losses are {history[-1]} at step {step}; lower the learning rates"
                )
            if after is not None:
                after(step)
            values += len(real)
            speed = round(values / (time.perf_counter() - clock))
            show({"step": step, "loss": history[-1][0], "tokens_per_s": speed})
    return history
