"""A self-attention GAN writes digits: attention over the 7 x 7 feature maps of both players, who take turns under the hinge loss.

    uv run examples/attention/sagan.py            the whole form, on one thread
    uv run examples/attention/sagan.py --quick    a reduced form, seconds

Zhang et al. 2019 on MNIST at 14 x 14. A small judge (a CNN of ours, so the Frechet distance here is no FID) compares 5,000 made
digits with the held-out ones. Every class must be made, and both gammas must leave 0.

Measured (all numbers: benchmarks/results/seeds.json):
- Self-Attention GAN, 4.0 CPU-minutes, seed 0: SAGAN FD = 3.477 (bar <= 40); SAGAN IS = 6.581 (bar >= 5.5); SAGAN
  smallest class = 0.083 (bar >= 0.01); gamma of the generator = -0.1526 (bar size >= 0.01); gamma of the discriminator
  = 0.3932 (bar size >= 0.01); cells to what the generator reads = 3.271 (bar >= 1.5)
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from command import run
from drawing import sheet
from judge import Judge
from maps import MapAttention, reach
from sets import mnist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from multimodal.attention import Trace
from multimodal.zoo.adversarial import Players, alternate

NOISE, WIDTH, SIDE, BATCH = 64, 48, 14, 64
REMARKS = {f"{name} FD": "baseline" for name in ("untrained", "pixel marginals", "mean digit")}


def conv(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(before, after, size, stride, (size - 1) // 2))


def generator() -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Linear(NOISE, WIDTH * 49)), nn.Unflatten(1, (WIDTH, 7, 7)), nn.BatchNorm2d(WIDTH), nn.ReLU(),
        conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU(), MapAttention(WIDTH),
        nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU(), conv(WIDTH, 1), nn.Tanh(),
    )  # fmt: skip


def discriminator() -> nn.Sequential:
    return nn.Sequential(
        conv(1, WIDTH // 2), nn.LeakyReLU(0.1), conv(WIDTH // 2, WIDTH, 4, 2), nn.LeakyReLU(0.1), MapAttention(WIDTH),
        conv(WIDTH, WIDTH), nn.LeakyReLU(0.1), nn.Flatten(), spectral_norm(nn.Linear(WIDTH * 49, 1)),
    )  # fmt: skip


def endless(images: Tensor) -> Iterator[Tensor]:
    while True:
        yield from images[torch.randperm(len(images))].split(BATCH)


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    steps, count = (3, 100) if quick else (1800, 5000)
    torch.manual_seed(seed)
    pixels, labels, test_pixels, _ = (torch.from_numpy(x) for x in mnist())
    train, test = (F.avg_pool2d(x[:, None] / 127.5 - 1, 2) for x in (pixels, test_pixels))
    judge = Judge(train, labels.long(), test, epochs=0 if quick else 4)
    makes, judges = generator(), discriminator()
    # the vectors of spectral norms are buffers and are not averaged
    averaged = AveragedModel(makes, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    fixed = torch.randn(count, NOISE)
    drawn = torch.randint(len(train), (count, SIDE * SIDE))
    numbers = {
        **judge.score("real digits", train),
        **judge.score("untrained", made(makes, fixed)),
        **judge.score("pixel marginals", train.flatten(1).gather(0, drawn).view(count, 1, SIDE, SIDE)),
        **judge.score("noise", torch.rand(count, 1, SIDE, SIDE) * 2 - 1),
        **judge.score("mean digit", train.mean(0, keepdim=True).expand(count, -1, -1, -1)),
    }
    slow, fast = (torch.optim.Adam(net.parameters(), lr, (0.0, 0.9)) for net, lr in ((makes, 3e-4), (judges, 1.2e-3)))
    start = time.process_time()
    alternate(
        Players(makes, judges, slow, fast), endless(train), lambda size: torch.randn(size, NOISE), steps,
        after=lambda _: averaged.update_parameters(makes), quiet=not sys.stdout.isatty(),
    )  # fmt: skip
    numbers["SAGAN CPU-s of training"] = time.process_time() - start
    images, seen = made(averaged.module, fixed), {}
    numbers |= judge.score("SAGAN", images)
    for name, net, value in (("generator", averaged.module, fixed[:64]), ("discriminator", judges, images[:64])):
        attention = next(part for part in net.modules() if isinstance(part, MapAttention))
        attention.trace = Trace()
        with torch.no_grad():
            net(value)
        seen[name] = attention.trace.seen[0].weight_BHTM
        numbers[f"gamma of the {name}"] = float(attention.gate.get_parameter("gamma").detach())
        numbers[f"cells to what the {name} reads"] = reach(seen[name])
    if out is not None:
        sheet(images[:100], seen["generator"], out / "sagan.png")
    return numbers


@torch.no_grad()
def made(net: nn.Module, noise: Tensor) -> Tensor:
    net.eval()
    images = torch.cat([net(some) for some in noise.split(500)])
    net.train()
    return images


if __name__ == "__main__":
    run(measure, "sagan", __doc__, REMARKS)
