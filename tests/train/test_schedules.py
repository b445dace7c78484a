"""Learning rates by step, against PyTorch's own schedulers."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from multimodal.shapes import ConfigError
from multimodal.train.optimizer import rate
from multimodal.train.recipe import Recipe

LR = 3e-3


def ours(steps: int, **settings) -> list[float]:
    recipe = Recipe(steps=steps, lr=LR, **settings)
    return [rate(recipe, step) for step in range(steps)]


def of_torch(steps: int, make) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def after_a_warmup(rising: int, make):
    """torch's linear warm-up, whose last step has the full rate, and what comes after it."""

    def chained(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, 1 / rising, 1.0, total_iters=rising - 1)
        return lr_scheduler.SequentialLR(optimizer, [warm, make(optimizer)], [rising - 1])

    return chained


@pytest.mark.parametrize(("steps", "warmup", "final"), [(100, 0.1, 0.05), (37, 0.3, 0.0), (1000, 0.05, 0.01)])
def test_each_is_that_of_torch(steps, warmup, final):
    rising = round(steps * warmup)
    rest = steps - rising
    makers = {
        "cosine": after_a_warmup(rising, lambda o: lr_scheduler.CosineAnnealingLR(o, rest, eta_min=LR * final)),
        "linear": after_a_warmup(rising, lambda o: lr_scheduler.LinearLR(o, 1.0, final or 1e-300, total_iters=rest)),
        "constant": after_a_warmup(rising, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    }
    for name, make in makers.items():
        ending = {} if name == "constant" else {"final_lr": final}
        wanted = of_torch(steps, make)
        assert ours(steps, schedule=name, warmup=warmup, **ending) == pytest.approx(wanted, rel=1e-6, abs=1e-12), name


@pytest.mark.parametrize(("steps", "warmup", "final"), [(100, 0.3, 1e-4), (50, 0.1, 0.02)])
def test_one_cycle_is_that_of_torch(steps, warmup, final):
    def make(optimizer):
        ratios = {"div_factor": 25, "final_div_factor": 1 / (25 * final)}
        return lr_scheduler.OneCycleLR(
            optimizer, LR, total_steps=steps, pct_start=warmup, cycle_momentum=False, **ratios
        )

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    wanted = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):  # it refuses one step more
        optimizer.step()
        scheduler.step()
        wanted.append(optimizer.param_groups[0]["lr"])
    assert ours(steps, schedule="one-cycle", warmup=warmup, final_lr=final) == pytest.approx(wanted, rel=1e-6)


def test_wsd_stays_and_falls_in_a_line():
    # the line through (steps - falling, lr) and (steps, lr / 10), counted from 1
    found = ours(100, schedule="wsd", warmup=0.1, cooldown=0.3, final_lr=0.1)
    assert found[:10] == pytest.approx([LR * i / 10 for i in range(1, 11)])
    assert found[10:70] == [LR] * 60
    assert found[70:] == pytest.approx([LR + (LR / 10 - LR) * i / 30 for i in range(1, 31)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant", "one-cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_short_runs_have_rates_too(name, steps, warmup):
    settings = {"cooldown": 0.0} if name == "wsd" and warmup == 1 else {}
    found = ours(steps, schedule=name, warmup=warmup, **settings)
    assert all(0 < r <= LR * (1 + 1e-12) for r in found)
    assert max(found) == pytest.approx(LR) or steps == 1 or name == "wsd"


def test_the_cosine_is_bit_for_bit_what_it_was():
    def before(recipe: Recipe, step: int) -> float:
        rising = max(round(recipe.steps * recipe.warmup), 1)
        if step < rising:
            return recipe.lr * (step + 1) / rising
        least, fallen = recipe.lr * recipe.final_lr, (step + 1 - rising) / (recipe.steps - rising)
        return least + 0.5 * (recipe.lr - least) * (1 + math.cos(math.pi * fallen))

    for recipe in (Recipe(), Recipe(steps=777, lr=1.7e-4, warmup=0.13, final_lr=0.07), Recipe(steps=3, warmup=0)):
        assert [rate(recipe, s) for s in range(recipe.steps)] == [before(recipe, s) for s in range(recipe.steps)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, r"schedule='cosin' is none of cosine, linear, wsd, constant, one-cycle"),
        ({"schedule": "constant", "final_lr": 0.1}, r"final_lr=0\.1 would do nothing beside schedule='constant'"),
        ({"cooldown": 0.1}, r"cooldown=0\.1 would do nothing beside schedule='cosine'"),
        ({"schedule": "wsd", "cooldown": 1.1}, r"cooldown=1\.1 must be from 0 to 1"),
        ({"schedule": "wsd", "cooldown": float("nan")}, r"cooldown=nan must be from 0 to 1"),
        ({"schedule": "wsd", "cooldown": 0.7, "warmup": 0.5}, r"warmup=0\.5 and cooldown=0\.7 are shares of the steps"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)
