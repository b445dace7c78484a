"""Two players: the hinge losses against their formula, and turns in which each moves its own parameters only."""

import math

import pytest
import torch
from torch import nn

from multimodal.zoo.adversarial import Players, alternate, discriminator_loss, generator_loss


def test_the_losses_are_the_hinges_of_the_paper():
    real, made = [2.0, 0.5, -1.0, 1.0], [-3.0, 0.25, 1.5]
    wanted = sum(max(0.0, 1 - x) for x in real) / 4 + sum(max(0.0, 1 + x) for x in made) / 3
    assert float(discriminator_loss(torch.tensor(real), torch.tensor(made))) == pytest.approx(wanted)
    assert float(generator_loss(torch.tensor(made))) == pytest.approx(-sum(made) / 3)


def players(lr: float = 0.1) -> Players:
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(2, 3), nn.Linear(3, 1)
    return Players(
        generator,
        discriminator,
        torch.optim.SGD(generator.parameters(), lr),
        torch.optim.SGD(discriminator.parameters(), 2 * lr),
    )


def test_a_turn_is_one_step_of_each_on_its_own_loss():
    both, real = players(), torch.randn(4, 3)
    noises = [torch.randn(4, 2), torch.randn(4, 2)]
    w, b = (p.detach().clone() for p in both.generator.parameters())
    u, c = (p.detach().clone() for p in both.discriminator.parameters())
    drawn = iter(noises)
    losses = both.step(real, lambda count: next(drawn))

    made = noises[0] @ w.T + b
    pull, push = ((real @ u.T + c) < 1).float(), ((made @ u.T + c) > -1).float()  # where the hinges slope
    assert pull.sum() > 0
    assert push.sum() > 0
    u_after = u - 0.2 * (-(pull * real).mean(0) + (push * made).mean(0))
    c_after = c - 0.2 * (push.mean() - pull.mean())
    torch.testing.assert_close(both.discriminator.weight, u_after)
    torch.testing.assert_close(both.discriminator.bias, c_after)
    torch.testing.assert_close(both.generator.weight, w + 0.1 * u_after.T * noises[1].mean(0))
    torch.testing.assert_close(both.generator.bias, b + 0.1 * u_after[0])
    scores = (real @ u.T + c, made @ u.T + c)
    assert losses[0] == pytest.approx(float((1 - scores[0]).clamp(min=0).mean() + (1 + scores[1]).clamp(min=0).mean()))
    assert losses[1] == pytest.approx(-float(((noises[1] @ w.T + b) @ u_after.T + c_after).mean()))
    assert all(p.requires_grad for p in both.discriminator.parameters())


def test_players_find_the_middle_of_what_is_real():
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    both = Players(
        generator,
        discriminator,
        torch.optim.Adam(generator.parameters(), 5e-3, (0.0, 0.9)),
        torch.optim.Adam(discriminator.parameters(), 2e-2, (0.0, 0.9)),
    )

    def real():
        while True:
            yield 3 + 0.5 * torch.randn(64, 1)

    counted = []
    history = alternate(both, real(), lambda count: torch.randn(count, 1), 600, after=counted.append, quiet=True)
    assert counted == list(range(1, 601))
    assert len(history) == 600
    made = generator(torch.randn(1000, 1)).detach()
    assert float(made.mean()) == pytest.approx(3, abs=0.4)


def test_a_loss_that_is_not_finite_stops_with_both_losses():
    both = players()
    with pytest.raises(
        FloatingPointError, match=r"alternate: the losses are \(nan, nan\) at step 1; lower the learning rates"
    ):
        alternate(both, iter([torch.full((2, 3), math.nan)]), lambda count: torch.randn(count, 2), 3, quiet=True)
