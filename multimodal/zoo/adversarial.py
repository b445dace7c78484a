"""Two players who train against each other: the hinge losses, and the step in which they take turns.

noise --generator--> made ---+
                             +--discriminator--> real (above 0) or made (below 0)
data ------------------------+
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.train.report import bar


def discriminator_loss(real_B: Tensor, made_B: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))): Zhang et al. 2019, equation 4, the discriminator's half."""
    return (1 - real_B).relu().mean() + (1 + made_B).relu().mean()


def generator_loss(made_B: Tensor) -> Tensor:
    """-E D(G(z)): the generator's half of equation 4."""
    return -made_B.mean()


@dataclass
class Players:
    """Two players and their optimisers; each owns its own parameters.

    make: so many samples of the generator (it draws its own noise); judge: real values -> a score for each.
    """

    generator: nn.Module
    discriminator: nn.Module
    generator_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer

    def step(self, real: Tensor, noise: Callable[[int], Tensor]) -> tuple[float, float]:
        """One turn each, the discriminator first: their losses. Neither moves the other's parameters.

        real: what the discriminator should believe, one a row; noise: so many rows of what the generator starts from.
        """
        with torch.no_grad():
            made = self.generator(noise(len(real)))
        # one pass over both halves: the same weights, and half the overhead of two
        real_B, made_B = self.discriminator(torch.cat([real, made])).flatten().split(len(real))
        loss = discriminator_loss(real_B, made_B)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        learning = [p for p in self.discriminator.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
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
    """So many turns of both players over endless batches of real values: (discriminator's loss, generator's) of each.

    after: called with the number of steps done after each, to average weights or to draw what is made so far.

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
