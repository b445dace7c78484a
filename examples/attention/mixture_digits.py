"""Attention is Bayes' rule: a mixture of binary pictures, learned by EM, is read by one call of scaled dot-product attention.

    uv run examples/attention/mixture_digits.py           the whole form, on one thread
    uv run examples/attention/mixture_digits.py --quick   a reduced form, seconds

Keys are the logits of each component's pixels, the prior its weight, the value p(digit | component) or its pixels; hidden pixels
are left out of query and key. With 100 components; half-image: from the upper half of the pixels alone.

Measured (all numbers: benchmarks/results/seeds.json):
- attention = mixture (binarised MNIST), 0.2 CPU-minutes, seeds 0 1 2: digit accuracy = 0.8673 (0.8635 to 0.8725; bar >=
  0.85; bar >= (naive Bayes)); half-image accuracy = 0.8145 (0.8125 to 0.8155; bar >= 0.78); max |SDPA - Bayes| =
  7.373e-06 (5.269e-06 to 9.022e-06; bar <= 1e-05); beside: majority 0.1145; naive Bayes 0.846
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from command import run
from drawing import blank, save
from sets import binarised_mnist
from torch import Tensor

from multimodal.zoo.mixture import EM, BernoulliMixture, fit

UPPER, LOWER = torch.arange(392), torch.arange(392, 784)  # pixels of the halves
SHOWN = 100  # components of the numbers without a prefix
REMARKS = {
    "hidden half NLL per pixel": "must beat the mean image",
    "naive Bayes": "baseline: one component a digit, with labels",
    "mean image": "baseline, NLL per pixel of the hidden half",
}


def bayes(memory: BernoulliMixture, x: Tensor) -> np.ndarray:
    """The posterior mean of the values by Bayes' rule as it stands in the book, in float64."""
    ones = 1 / (1 + np.exp(-memory.keys_MK.double().numpy()))
    x64, weights = x.double().numpy(), np.exp(memory.log_prior_M.double().numpy())
    log_joint = x64 @ np.log(ones).T + (1 - x64) @ np.log(1 - ones).T + np.log(weights)
    joint = np.exp(log_joint - log_joint.max(1, keepdims=True))
    return joint / joint.sum(1, keepdims=True) @ memory.values_MF.double().numpy()


def right(memory: BernoulliMixture, x: Tensor, digits: Tensor) -> float:
    return (memory.read(x).argmax(1) == digits).double().mean().item()


def nll(p: Tensor, x: Tensor) -> float:
    """Nats a pixel."""
    return torch.nn.functional.binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), x).item()


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    data = [torch.as_tensor(part).float() for part in binarised_mnist()]
    x, digits, test, test_digits = (part[:500] for part in data) if quick else data
    digit_BF = torch.eye(10)[digits.long()]
    per_digit = BernoulliMixture.around(x, 10, torch.Generator().manual_seed(seed)).maximise(x, digit_BF)
    values = {
        "majority": (test_digits == digits.mode().values).double().mean().item(),
        "naive Bayes": right(replace(per_digit, values_MF=torch.eye(10)), test, test_digits),
        "mean image": nll(x.mean(0).expand_as(test)[:, LOWER], test[:, LOWER]),
    }
    for components in (10, 50, 100, 200):
        start = BernoulliMixture.around(x, components, torch.Generator().manual_seed(seed))
        found = fit(start, x, EM(), steps=5 if quick else 40)
        memory = found.memory.answering(x, digit_BF)
        assert isinstance(memory, BernoulliMixture)
        half = memory.seeing(UPPER)
        paint = replace(half, values_MF=memory.means_MK[:, LOWER])
        name = "" if components == SHOWN else f"K={components} "
        values |= {
            f"{name}digit accuracy": right(memory, test, test_digits),
            f"{name}half-image accuracy": right(half, test[:, UPPER], test_digits),
            f"{name}hidden half NLL per pixel": nll(paint.read(test[:, UPPER]), test[:, LOWER]),
            f"{name}test log-likelihood": memory.log_likelihood(test).double().mean().item(),
            f"{name}max |SDPA - Bayes|": np.abs(memory.read(test).numpy() - bayes(memory, test)).max(),
            f"{name}largest fall of EM": found.largest_fall,
            f"{name}EM CPU-s": found.cpu_s[-1],
        }
        if out is not None and components == SHOWN:
            draw(memory, test[:6], out / "mixture_digits.png")
    return {name: float(value) for name, value in values.items()}


def draw(memory: BernoulliMixture, x: Tensor, path: Path, shown: int = 5) -> None:
    """Digits, the components that answer for each with their responsibilities, and what the upper half alone says of the lower."""
    figure = blank(1.15 * (shown + 3), 1.3 * len(x))
    panels = figure.subplots(len(x), shown + 3)
    half = memory.seeing(UPPER)
    painted = replace(half, values_MF=memory.means_MK).read(x[:, UPPER])
    for row, picture, upper, p, answer in zip(
        panels, x, painted, memory.responsibilities(x), memory.read(x), strict=True
    ):
        best = p.argsort(descending=True)[:shown]
        images = [picture, *memory.means_MK[best], torch.cat([picture[UPPER], torch.zeros(392)])]
        images.append(torch.cat([picture[UPPER], upper[LOWER]]))
        shares = [f"p = {p[j]:.2f}" if p[j] >= 0.01 else "p < 0.01" for j in best]
        titles = [f"read as {answer.argmax()}", *shares, "upper half", "lower half read"]
        for axes, image, title in zip(row, images, titles, strict=True):
            axes.imshow(image.view(28, 28).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    figure.suptitle(
        "test digit; the components that answer for it and p(component | digit); what its upper half says", size=9
    )
    save(figure, path)


if __name__ == "__main__":
    run(measure, "mixture_digits", __doc__, REMARKS)
