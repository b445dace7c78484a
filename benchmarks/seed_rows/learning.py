"""Rows on what a core learns: residuals, look-ups in the past, size, gradients, and the read-outs of a trained posterior.

    uv run benchmarks/seeds.py residuals induction scale descent xray

Each `measure_...` returns its numbers by name; table.py has their bars. On one thread: scale about 5 CPU-minutes, induction 2,
residuals 1, the others seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multimodal as mm
from benchmarks import shakespeare
from benchmarks.data import digits_8x8
from benchmarks.seed_rows.core import WRITE, Numbers, writer, written_logits


def measure_residuals(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """scikit-learn's digits read by 16 and by 2 pre-norm blocks, with residual addition and with replacement."""
    from multimodal.layers import MLP, Replace, SelfAttention
    from multimodal_tokenizers import ImagePatches, Labels

    task, steps = "image -> label", 2 if quick else 200
    train, test = digits_8x8(seed)
    test = test[:20] if quick else test
    found: Numbers = {}
    for depth in (16, 2):
        for name, block in {
            "residual": (),
            "replaced": (SelfAttention(merge=Replace()), MLP(merge=Replace())),
        }.items():
            core = mm.Core(width=64, depth=depth, heads=4, **({"block": block} if block else {}))
            tokenizers = {"image": ImagePatches(patch=2, channels=1), "label": Labels(tuple("0123456789"))}
            model = mm.Model(tokenizers, core, [task], seed=seed)
            mm.fit(model, {task: train}, steps=steps, batch=64, lr=2e-3, seed=seed, quiet=True)
            found[f"{depth} blocks, {name}"] = mm.evaluate(model, task, test)["exact"]
    return found


@dataclass(frozen=True)
class Repeated:
    """Different symbols in random order, 8 to 24 of them, twice over; made when asked for."""

    vocab: int

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict:
        return {"symbols": twice(np.random.default_rng(np.random.randint(2**31)), self.vocab)}


def twice(random: np.random.Generator, vocab: int) -> list[int]:
    # the length is random: else one layer could look a fixed number of places back
    first = random.permutation(vocab)[: random.integers(8, 25)].tolist()
    return [*first, *first]


def measure_induction(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """The share of symbols foreseen when a random sequence is repeated: two layers, one layer, an LSTM of as many parameters."""
    vocab, steps = 64, 2 if quick else 1200
    random = np.random.default_rng(seed + 1)
    tests = [twice(random, vocab) for _ in range(10 if quick else 500)]
    recipe = mm.Recipe(steps=steps, batch=64, lr=3e-3, warmup=0.1, seed=seed)
    found: Numbers = {}
    for depth in (2, 1):
        model = writer(mm.Core(width=64, depth=depth, heads=4), vocab, seed, std=0.0)
        mm.fit(model, {WRITE: Repeated(vocab)}, recipe, quiet=True)
        found[f"{depth} layers"] = share_foreseen(lambda ids, m=model: written_logits(m, ids), tests)
        found[f"parameters, {depth} layers"] = float(sum(p.numel() for p in model.parameters()))
    network = _lstm(vocab, found["parameters, 2 layers"], steps, seed)
    found["LSTM"] = share_foreseen(lambda ids: network(torch.tensor([ids]))[0], tests)
    found["parameters, LSTM"] = float(sum(p.numel() for p in network.parameters()))
    return found


@torch.no_grad()
def share_foreseen(logits: Callable[[list[int]], Tensor], tests: Sequence[list[int]]) -> float:
    """Right choices in the second half but its first symbol, which cannot be known; row i of the logits chooses symbol i."""
    right = total = 0
    for ids in tests:
        best = logits(ids).argmax(-1)[: len(ids)]
        where = slice(len(ids) // 2 + 1, len(ids))
        right += int((best[where] == torch.tensor(ids)[where]).sum())
        total += len(ids) // 2 - 1
    return right / total


class _Recurrent(nn.Module):
    """An LSTM that writes; row i of its logits chooses symbol i."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab + 1, width)  # the last one opens
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, vocab)

    def forward(self, ids_BN: Tensor) -> Tensor:
        opened = F.pad(ids_BN[:, :-1], (1, 0), value=self.embed.num_embeddings - 1)
        return self.out(self.lstm(self.embed(opened))[0])


def _lstm(vocab: int, parameters: float, steps: int, seed: int) -> nn.Module:
    """An LSTM no smaller than `parameters`, trained on the same sequences; of equal lengths in a batch, as it has no packing."""
    width = next(w for w in range(16, 512, 4) if 8 * w * w + 2 * w * vocab >= parameters)
    torch.manual_seed(seed)
    network, random = _Recurrent(vocab, width), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        size = random.integers(8, 25)
        first = np.stack([random.permutation(vocab)[:size] for _ in range(64)])
        ids_BN = torch.from_numpy(np.concatenate([first, first], 1))
        loss = F.cross_entropy(network(ids_BN).flatten(0, 1), ids_BN.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def measure_scale(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Four widths on the same characters: loss over compute; and on shuffled characters, where only their frequencies help."""
    train, test = shakespeare.parts() if not quick else ("to be or not to be " * 60, "to be or not to be " * 15)
    random = np.random.default_rng(seed)
    shuffled = ["".join(random.permutation(list(text))) for text in (train, test)]
    letters, counts = np.unique(list(shuffled[1]), return_counts=True)
    p = dict(zip(letters, counts / counts.sum(), strict=True))
    found: Numbers = {"unigram entropy": -sum(x * math.log(x) for x in p.values())}
    size, steps = (16, 2) if quick else (64, 800)
    mixed, mixed_test = shuffled[0], shuffled[1][: 1000 * size]
    test = test[: 1000 * size]
    losses, flops = [], []
    for width in (16, 32, 64, 128):
        core = mm.Core(width=width, depth=2, heads=2)
        losses.append(_nats(core, train, test, size, steps, seed))
        flops.append(3 * steps * core.flops(16 * (size + 1), size / 2))
        found[f"nats, width {width}"] = losses[-1]
    for width in (16, 64):
        core = mm.Core(width=width, depth=2, heads=2)
        found[f"nats, shuffled, width {width}"] = _nats(core, mixed, mixed_test, size, steps // 2, seed)
    found["least fall from width to width"] = min(a - b for a, b in pairwise(losses))
    found["R2 of log nats over log compute"] = float(np.corrcoef(np.log(flops), np.log(losses))[0, 1] ** 2)
    found["shuffled under the entropy"] = found["unigram entropy"] - found["nats, shuffled, width 64"]
    return found


def _nats(core: mm.Core, train: str, test: str, size: int, steps: int, seed: int) -> float:
    from multimodal_tokenizers import TextBytes

    task = shakespeare.TASK
    model = mm.Model({"text": TextBytes()}, core, [task], seed=seed)
    recipe = mm.Recipe(steps=steps, batch=16, lr=5e-3, optimizer="muon", seed=seed)
    mm.fit(model, {task: shakespeare.Windows(train, size)}, recipe, quiet=True)
    return shakespeare.score(model, test, size, size)


def measure_descent(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """A logistic head by small full-batch steps falls at every step; a core's gradients are its finite differences."""
    from sklearn.datasets import load_digits

    steps = 5 if quick else 300
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16), torch.tensor(y)
    weight, bias = torch.zeros(10, 64, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for p in (weight, bias):
        p.requires_grad_()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(x @ weight.T + bias, y)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            for p, gradient in zip((weight, bias), gradients, strict=True):
                # the curvature is at most |x|^2 / 2 on average: a step of its inverse always falls (Nesterov 2004, 1.2.3)
                p -= gradient / (0.5 * (x.square().sum(1) + 1).mean())
    rises = [b - a for a, b in pairwise(losses)]
    return {
        "largest rise of the loss": max(rises),
        "last loss": losses[-1],
        "first loss": losses[0],
        **_differences(seed),
    }


def _differences(seed: int) -> Numbers:
    """Each block's gradient along a random direction against a central difference of its loss, in float64."""
    model = writer(mm.Core(width=32, depth=2, heads=4, kv_heads=2), 8, seed, std=0.2).double()
    stream = model.pack(WRITE, [{"symbols": [1, 5, 2, 2, 7, 0]}, {"symbols": [3, 1, 4]}])
    draw, errors = torch.Generator().manual_seed(seed), []
    blocks: Any = model.core.blocks
    for part in (*blocks, model.embeds, model.readouts):
        weights = list(part.parameters())
        way = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in weights]
        slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(model.loss(stream), weights), way, strict=True))

        def moved(step: float, weights=weights, way=way) -> float:
            with torch.no_grad():
                for p, d in zip(weights, way, strict=True):
                    p += step * d
                loss = float(model.loss(stream))
                for p, d in zip(weights, way, strict=True):
                    p -= step * d
            return loss

        # fifth order: rotary turns and logits are float32 inside, so the step may not be small
        near, far = (moved(h) - moved(-h) for h in (2e-3, 4e-3))
        errors.append(abs(float(slope) - (8 * near - far) / (12 * 2e-3)) / abs(float(slope)))
    return {"largest relative error of a gradient": max(errors)}
