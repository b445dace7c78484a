"""Captions of canvases with soft and hard attention (Xu et al. 2015), and whether the model looks at what it names.

    uv run examples/attention/captions.py          soft, hard and the mean-pooled twin, about 3 CPU-minutes each on one thread

1 to 3 MNIST digits in a jittered 2 x 2 layout, test digits unseen; synthetic captions name quarters and digits in reading order.
"pointing": share of the attention that lies in the right quarter while a digit is named; chance is .25. The twin sees the mean
of the annotation vectors; "blind" always says what captions say most often.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sets import WORDS, Canvases, mnist, run
from torch import Tensor, nn

import multimodal as mm

TASK = "canvas -> caption"
BARS = {
    "soft exact": ">= .90, and .20 above mean",
    "soft pointing": ">= .95",
    "hard exact": ">= .85",
    "hard pointing": ">= .95",
    "hard reads one value": "== 1",
}


@dataclass(frozen=True)
class Caption(mm.Tokenizer):
    """Words of the captions."""

    causal: bool = True
    vocab_size = len(WORDS)

    def encode(self, value: str) -> mm.Tokens:
        ids = [WORDS.index(word) for word in value.split()]
        return mm.Tokens(torch.tensor(ids), self.places(len(ids)))

    def decode(self, tokens: mm.Tokens) -> str:
        return " ".join(WORDS[i] for i in tokens.content.tolist())


@dataclass(frozen=True)
class Canvas(mm.Tokenizer):
    """A canvas as 36 annotation vectors, 6 x 6 squares of 8 pixels that a convolutional net sees together; or as their mean."""

    mean: bool = False

    @property
    def feature_size(self) -> int:
        return 64 * 36 if self.mean else 64

    def encode(self, value: np.ndarray) -> mm.Tokens:
        squares = torch.from_numpy(value).unflatten(0, (6, 8)).unflatten(2, (6, 8)).transpose(1, 2)
        tokens = squares.reshape(-1, self.feature_size)
        return mm.Tokens(tokens, torch.zeros(len(tokens), 3))

    def embed(self, width: int) -> nn.Module:
        return Annotations(width, self.mean)


class Annotations(nn.Module):
    """Squares of whole canvases -> annotation vectors; the net also sees how far down and right each pixel lies."""

    where: Tensor

    def __init__(self, width: int, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.convs = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 5, 2, 2), nn.ReLU(), nn.Conv2d(64, width, 1)),
        )
        side = torch.linspace(-1, 1, 48)
        self.register_buffer("where", torch.stack(torch.meshgrid(side, side, indexing="ij")), persistent=False)

    def forward(self, content: Tensor) -> Tensor:
        canvas = content.view(-1, 6, 6, 8, 8).transpose(2, 3).reshape(-1, 1, 48, 48)
        seen = self.convs(torch.cat([canvas, self.where.expand(len(canvas), -1, -1, -1)], 1)).flatten(2)
        return seen.mean(2) if self.mean else seen.transpose(1, 2).flatten(0, 1)


def learn(read: str, seed: int, quick: bool, out: Path | None) -> dict[str, float]:
    """Train with this read ("soft", "hard", "mean") and measure on test digits."""
    images, labels, test, test_labels = mnist()
    rest: dict[str, Any] = {"width": 128, "depth": 1, "heads": 1, "qk_norm": False, "rotary_split": (0, 0, 0)}
    look = mm.CrossAttention(score=mm.Additive(), read=mm.Hard(weight=0.1, ahead=1) if read == "hard" else None)
    core = mm.EncoderDecoder(
        reader=mm.Core(**rest, block=(mm.MLP(),)), writer=mm.Core(**rest, block=(mm.Recurrent(), look, mm.MLP()))
    )
    model = mm.Model({"canvas": Canvas(read == "mean"), "caption": Caption()}, core, [TASK], seed=seed)
    train, steps = Canvases(images, labels, 10**5, None), 3 if quick else 1200
    mm.fit(model, {TASK: train}, steps=steps, batch=64, lr=3e-3, optimizer="muon", ema=0.98, seed=seed, quiet=quick)
    right: dict[str, list[float]] = {"exact": [], "digit word": [], "pointing": [], "reads one value": []}
    shown = []
    for digits in (1, 2, 3):
        fixed = Canvases(test, test_labels, 6 if quick else 200, seed, digits)
        samples, named = [fixed[i] for i in range(len(fixed))], slice(1, 2 * digits, 2)
        said = model.generate(TASK, samples, max_tokens=8, batch=len(samples))
        right["exact"] += [a.value == s["caption"] for a, s in zip(said, samples, strict=True)]
        trace, stream = mm.Trace(), model.pack(TASK, samples)
        with model.resting():
            model(stream, trace=trace)
            ids = model.logits(stream)[TASK].argmax(-1).view(len(samples), -1)
        true = torch.tensor([[WORDS.index(word) for word in s["caption"].split()] for s in samples])
        right["digit word"] += (ids[:, named] == true[:, named]).flatten().tolist()
        if read == "mean":
            continue
        seen = trace.seen[-1]
        quarter = seen.weight_BHTM[:, 0, named].unflatten(-1, (2, 3, 2, 3)).sum((-3, -1)).flatten(2)
        right["pointing"] += quarter.gather(2, true[:, 0::2, None]).flatten().tolist()
        shown.append((samples[0], seen.weight_BHTM[0, 0, named]))
        if seen.choice is not None:
            key_BTK = seen.choice.key_BHT[:, 0, :, None].expand(-1, -1, seen.value_BMHK.shape[-1])
            right["reads one value"].append(
                torch.equal(seen.value_BMHK[:, :, 0].gather(1, key_BTK), seen.read_BTHK[:, :, 0])
            )
    if out is not None and shown:
        draw(shown, out / "captions.png")
    return {name: float(np.mean(values)) for name, values in right.items() if values}


def measure(seed: int = 0, quick: bool = False, out: Path | None = None, read: str = "soft") -> dict[str, float]:
    """One read, beside its mean-pooled twin and a blind guess."""
    twin = {f"mean-pooled {name}": value for name, value in learn("mean", seed, quick, None).items()}
    return {**learn(read, seed, quick, out), **twin, **blind(seed)}


def everything(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """All reads; the picture is that of the hard one."""
    all_reads = {read: learn(read, seed, quick, out) for read in ("mean", "soft", "hard")}
    return {f"{read} {name}": v for read, values in all_reads.items() for name, v in values.items()} | blind(seed)


def blind(seed: int) -> dict[str, float]:
    """What the commonest caption and the commonest digit get."""
    images, labels, test, test_labels = mnist()
    known, unknown = Canvases(images, labels, 3000, seed + 1), Canvases(test, test_labels, 600, seed)
    usual = Counter(known[i]["caption"] for i in range(len(known))).most_common(1)[0][0]
    exact = float(np.mean([unknown[i]["caption"] == usual for i in range(len(unknown))]))
    return {"blind exact": exact, "blind digit word": float(np.bincount(labels).max() / len(labels))}


def draw(shown: list[tuple[dict[str, Any], Tensor]], path: Path) -> None:
    """Canvases, each with where it looks while each of its digits is named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    for row, (sample, weights) in zip(figure.subplots(3, 4), shown, strict=True):
        row[0].imshow(sample["canvas"], cmap="gray_r")
        for axes, name, weight in zip(row[1:], sample["caption"].split()[1::2], weights, strict=False):
            axes.imshow(sample["canvas"], cmap="gray_r")
            axes.imshow(weight.view(6, 6).numpy(), cmap="Reds", alpha=0.6, extent=(-0.5, 47.5, 47.5, -0.5), vmin=0)
            axes.set_title(name)
        for axes in row:
            axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(everything, "captions", __doc__, BARS)
