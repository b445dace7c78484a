"""A self-attention GAN writes digits: attention over the 7 x 7 feature maps of both players, who take turns under the hinge loss.

    uv run examples/attention/sagan.py            about 5 CPU-minutes on one thread

Zhang et al. 2019 on MNIST at 14 x 14. A small judge (a CNN of ours, so the Frechet distance here is no FID) compares 5,000 made
digits with the held-out ones. Expected: FD at most 40 (untrained about 300), IS at least 5.5, every class, both gammas off 0.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from multimodal.adversarial import Players, alternate
from multimodal.attention import Trace

sys.path.insert(0, str(Path(__file__).parent))
from command import run
from judge import Judge
from maps import MapAttention, reach
from sets import mnist

NOISE, WIDTH, SIDE, BATCH = 64, 48, 14, 64


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
    kept = AveragedModel(makes, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
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
        after=lambda _: kept.update_parameters(makes), quiet=not sys.stdout.isatty(),
    )  # fmt: skip
    numbers["SAGAN CPU-s of training"] = time.process_time() - start
    images, seen = made(kept.module, fixed), {}
    numbers |= judge.score("SAGAN", images)
    for name, net, value in (("generator", kept.module, fixed[:64]), ("discriminator", judges, images[:64])):
        attention = next(part for part in net.modules() if isinstance(part, MapAttention))
        attention.trace = Trace()
        with torch.no_grad():
            net(value)
        seen[name] = attention.trace.seen[0].weight_BHTM
        numbers[f"gamma of the {name}"] = float(attention.gate.get_parameter("gamma").detach())
        numbers[f"cells to what the {name} reads"] = reach(seen[name])
    if out is not None:
        draw(images[:100], seen["generator"], out / "sagan.png")
    return numbers


@torch.no_grad()
def made(net: nn.Module, noise: Tensor) -> Tensor:
    net.eval()
    images = torch.cat([net(some) for some in noise.split(500)])
    net.train()
    return images


def draw(images: Tensor, weight_BHTM: Tensor, path: Path) -> None:
    """100 digits, and where three cells of the first one's feature map look."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    grid = figure.add_gridspec(3, 4)
    sheet, *maps = (figure.add_subplot(grid[at]) for at in (np.s_[:, :3], np.s_[0, 3], np.s_[1, 3], np.s_[2, 3]))
    sheet.imshow(images.view(10, 10, SIDE, SIDE).transpose(1, 2).reshape(10 * SIDE, -1).numpy(), cmap="gray")
    for axes, cell in zip(maps, (16, 24, 38), strict=True):
        axes.imshow(weight_BHTM[0, 0, cell].view(7, 7).numpy(), cmap="magma")
        axes.plot(cell % 7, cell // 7, "wx")
        axes.set_title(f"what cell {cell // 7}, {cell % 7} reads", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    bars = "SAGAN FD at most 40, IS at least 5.5, smallest class at least 0.01, both gammas further than 0.01 from 0"
    run(measure, __doc__, "sagan", bars)
