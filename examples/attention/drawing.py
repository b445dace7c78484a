"""Pictures of the examples in this folder that take more than a few lines, and how all are saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(width: float, height: float) -> "Figure":
    """An empty figure, inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def alignments(maps: Mapping[str, Sequence[Tensor]], ways: Sequence[str], path: Path) -> None:
    """A column for each variant, a row for each direction: weights of each written digit (rows) over the cells (columns)."""
    maps = {variant: weights for variant, weights in maps.items() if weights}
    if not maps:
        return
    figure = blank(1.6 * len(maps) + 1, 4)
    for column, (variant, weights) in zip(
        figure.subplots(len(ways), len(maps), squeeze=False).T, maps.items(), strict=True
    ):
        for axes, way, weight in zip(column, ways, weights, strict=False):
            axes.imshow(weight.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(title=f"{variant}\n{way}", xlabel="cell read", ylabel="digit written")
    figure.suptitle("weights on an unseen strip\n(white 0, black 1)", fontsize=9)
    save(figure, path)


def looks(shown: Sequence[tuple[dict[str, Any], Tensor, str]], title: str, path: Path) -> None:
    """Canvases with what the model said, each beside where it looks while each of the true digits is named."""
    figure = blank(9, 7.6)
    for row, (sample, weights, said) in zip(figure.subplots(len(shown), 4), shown, strict=True):
        row[0].imshow(sample["canvas"], cmap="gray_r")
        row[0].set_title("the model says:\n" + said.replace(" top", "\ntop").replace(" bottom", "\nbottom"), fontsize=8)
        words = sample["caption"].split()
        for axes, place, name, weight in zip(row[1:], words[0::2], words[1::2], weights, strict=False):
            axes.imshow(sample["canvas"], cmap="gray_r")
            axes.imshow(weight.view(6, 6).numpy(), cmap="Reds", alpha=0.6, extent=(-0.5, 47.5, 47.5, -0.5), vmin=0)
            axes.set_title(f'looks here for "{name}"\n(truth: {place})', fontsize=8)
        for axes in row:
            axes.axis("off")
    figure.suptitle(title)
    save(figure, path)


def sheet(images: Tensor, weight_BHTM: Tensor, path: Path) -> None:
    """100 digits, and where three cells of the first one's feature map of 7 x 7 look."""
    figure = blank(9, 6.6)
    grid, side = figure.add_gridspec(3, 4), images.shape[-1]
    digits, *maps = (figure.add_subplot(grid[at]) for at in (np.s_[:, :3], np.s_[0, 3], np.s_[1, 3], np.s_[2, 3]))
    digits.imshow(images.view(10, 10, side, side).transpose(1, 2).reshape(10 * side, -1).numpy(), cmap="gray")
    digits.set(title="made from noise", xticks=[], yticks=[])
    for axes, cell in zip(maps, (16, 24, 38), strict=True):
        axes.imshow(weight_BHTM[0, 0, cell].view(7, 7).numpy(), cmap="magma")
        axes.plot(cell % 7, cell // 7, "wx")
        axes.set_title(f"what cell {cell // 7}, {cell % 7} (x) of the\nfirst digit reads", fontsize=9)
    save(figure, path)


def dying(x_BK: Tensor, seen: Sequence[Any], steps: Sequence[int], path: Path) -> None:
    """Components on samples (N, 2) at some steps: two standard deviations, as opaque as they are used; and usage over steps."""
    from matplotlib import colormaps

    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    figure = blank(3 * len(steps) + 3.4, 3.4)
    panels = figure.subplots(1, len(steps) + 1)
    turn = torch.linspace(0, 2 * np.pi, 60, dtype=x_BK.dtype)
    for axes, step in zip(panels[:-1], steps, strict=True):
        axes.plot(*x_BK.T.numpy(), ".", markersize=2, color="grey")
        for j in (seen[step].usage_M > 0.5).nonzero()[:, 0].tolist():
            root = torch.linalg.cholesky(torch.linalg.inv(seen[step].memory.precision_MKK[j]))
            ring = seen[step].memory.means_MK[j, :, None] + 2 * root @ torch.stack([turn.cos(), turn.sin()])
            axes.fill(*ring, alpha=min(0.6, 0.1 + float(seen[step].usage_M[j]) / 200), color=colors[j % 20])
        axes.set_title(f"step {step}: {int((seen[step].usage_M > 1).sum())} alive")
        if axes is not panels[0]:
            axes.sharex(panels[0])
            axes.sharey(panels[0])
    for j, usage in enumerate(torch.stack([latest.usage_M for latest in seen]).T.numpy()):
        panels[-1].plot(usage, color=colors[j % 20])
    panels[-1].set(title="usage of each component", xlabel="step", ylabel="samples", xscale="symlog", xlim=(0, None))
    save(figure, path)
