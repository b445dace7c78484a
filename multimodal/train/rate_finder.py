"""`find_lr`: a short training with a rising learning rate, which shows the rates at which the loss falls (Smith 2015, "Cyclical
learning rates")."""

import copy
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from multimodal.data import Source
from multimodal.files import save_figure
from multimodal.model import Model
from multimodal.notebook import data_url
from multimodal.shapes import ConfigError, check_whole
from multimodal.train.callbacks import Callback, View
from multimodal.train.loop import train
from multimodal.train.recipe import Recipe

DECAY = 0.9  # of the smoothed loss, per step
DIVERGED = 4.0  # times the lowest smoothed loss: the run ends
SKIPPED = 10  # of the first smoothed losses, which are of one or two steps
FEWEST = 20  # steps


@dataclass(frozen=True)
class FoundRate:
    """The losses of a training with a rising rate, and the rate that they suggest. `repr` gives one line, a notebook the picture.

    suggestion: a good peak for `Recipe(lr=..)`; None: the loss did not fall at any rate.
    rates: the rate of each step, rising.
    losses: the loss of each step.
    smoothed: their exponential mean.
    """

    suggestion: float | None
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    def __repr__(self) -> str:
        span = f"{len(self.rates)} rates from {self.rates[0]:.1e} to {self.rates[-1]:.1e}" if self.rates else "no rates"
        said = "the loss fell at no rate" if self.suggestion is None else f"lr={self.suggestion:.1e}"
        return f"FoundRate({said}, of {span})"

    def _repr_html_(self) -> str:
        """For notebooks: the curve."""
        return f'<b>{self!r}</b><br><img alt="loss over learning rate" src="{data_url("image/png", self.picture())}">'

    def picture(self) -> bytes:
        """The loss over the rate as a PNG."""
        data = io.BytesIO()
        self._figure().savefig(data, dpi=90, format="png")
        return data.getvalue()

    def save(self, path: str | Path) -> None:
        """Draw the loss over the rate, as a PNG, SVG or PDF."""
        save_figure(path, self._figure(), 110)

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(self.rates, self.smoothed, color="tab:blue", linewidth=1.5, label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="tab:orange", label=f"suggestion {self.suggestion:.1e}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats a target")
        if self.smoothed:
            low, high = min(self.smoothed), max(self.smoothed[: SKIPPED + 1])
            axes.set_ylim(low - 0.1 * (high - low + 1e-9), high + 0.5 * (high - low + 1e-9))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return figure


class _Watch(Callback):
    """Notes rate and loss of each step, and ends the run when the loss has grown."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.mean = 0.0

    def on_step(self, view: View) -> None:
        loss = view.row["loss"]
        self.mean = DECAY * self.mean + (1 - DECAY) * loss
        self.rates.append(view.row["lr"])
        self.losses.append(loss)
        self.smoothed.append(self.mean / (1 - DECAY ** len(self.rates)))
        if len(self.rates) > SKIPPED and self.smoothed[-1] > DIVERGED * min(self.smoothed):
            view.stop("the loss has grown")


def find_lr(
    model: Model,
    data: Mapping[str, Source],
    recipe: Recipe | None = None,
    *,
    first: float = 1e-6,
    last: float = 1.0,
    steps: int = 120,
    mix: Mapping[str, float] | float | None = None,
    quiet: bool = True,
) -> FoundRate:
    """Train a copy of the model while the learning rate rises from step to step, and suggest a peak rate. The model stays as it is.

    recipe: batch, optimiser and all else that matters to the rate; its lr, its schedule and what it evaluates or saves do not.
    first, last: the rates of the first and the last step; each step multiplies the rate by the same factor.
    steps: of the whole; it ends earlier when the loss has grown fourfold.
    mix, quiet: as of `fit`.

    Raises:
        ConfigError, TaskError: as of `fit`; rates that do not rise; fewer than 20 steps.

    Examples:
        >>> found = mm.train.find_lr(model, {"image -> label": samples}, mm.Recipe(batch=4), steps=20)
        >>> len(found.rates) <= 20
        True
    """
    check_whole("find_lr", least=FEWEST, steps=steps)
    if not 0 < first < last < math.inf:
        raise ConfigError(f"find_lr: first={first} and last={last} must be rates above 0 that rise")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("find_lr: several processes were started, and it runs in one; start it by itself")
    recipe = recipe or Recipe()
    # of a whole run, none of which has a meaning here
    whole = ("epochs", "schedule", "cooldown", "final_lr", "warmup", "ema", "patience", "best", "keep", "spike")
    reset = {name: getattr(Recipe(), name) for name in (*whole, "evaluate_every", "checkpoint_every")}
    recipe = replace(recipe, lr=last, steps=steps, **reset)
    watch, growth = _Watch(), (last / first) ** (1 / (steps - 1))
    copied = copy.deepcopy(model)
    given = {"mix": mix, "callbacks": [watch], "quiet": quiet}
    try:
        train(copied, data, recipe, rates=lambda _, step: first * growth**step, **given)
    except FloatingPointError:  # the loss is not finite any more, at a rate that is much too high
        if not watch.rates:
            raise
    finally:
        del copied
    return FoundRate(
        suggested(watch.rates, watch.smoothed), tuple(watch.rates), tuple(watch.losses), tuple(watch.smoothed)
    )


def suggested(rates: list[float], smoothed: list[float]) -> float | None:
    """The rate at which the smoothed loss falls most steeply over the logarithm of the rate; None: it never falls."""
    if len(rates) <= SKIPPED:
        return None
    lowest = min(range(SKIPPED, len(smoothed)), key=smoothed.__getitem__)
    start = max(smoothed[: SKIPPED + 1])
    if not smoothed[lowest] < start - 0.02 * abs(start):
        return None
    values = torch.tensor(smoothed, dtype=torch.float64)
    # the slope over 5 steps on either side, which the noise of single batches does not decide
    reach = 5
    slopes = {i: float(values[min(i + reach, lowest)] - values[i - reach]) for i in range(SKIPPED, lowest + 1)}
    return rates[min(slopes, key=slopes.__getitem__)] if slopes else None
