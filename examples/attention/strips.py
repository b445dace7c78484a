"""Every alignment score on one task whose alignment is known: write the digits of a strip, forwards or backwards.

    uv run examples/attention/strips.py                        all variants, on one thread
    uv run examples/attention/strips.py --variant additive     one of them; --quick for a reduced form, seconds each

Strips of 3 to 8 MNIST digits (test digits unseen), a GRU that reads both ways, a GRU that writes, and one cross-attention with the
variant's score, prior or read. Each direction has a learned start of its own: all else that the writer knows of the strip is what
it looks at ("none": the last state read). "align" is the share of written digits whose largest weight is on their own cell
(chance 1/8). location, which does not know the length, and local_m must not align backwards.

Measured (all numbers: benchmarks/results/seeds.json):
- content-based attention, 1.4 CPU-minutes, seed 0: n=8 string forward = 0.844 (bar >= 0.65); n=8 align forward = 0.9998
  (bar >= 0.9)
- additive attention, 1.5 CPU-minutes, seed 0: n=8 string forward = 0.888 (bar >= 0.65); n=8 align forward = 1 (bar >=
  0.9)
- location-based attention, 1.6 CPU-minutes, seed 0: n=8 align forward = 0.875 (bar >= 0.95, missed); n=8 align backward
  = 0.2993 (bar <= 0.5)
- general attention, 1.6 CPU-minutes, seed 0: n=8 string forward = 0.836 (bar >= 0.65); n=8 align forward = 1 (bar >=
  0.9)
- dot-product attention, 1.4 CPU-minutes, seed 0: n=8 string forward = 0.836 (bar >= 0.65); n=8 align forward = 1 (bar
  >= 0.9)
- scaled dot-product attention, 1.3 CPU-minutes, seed 0: n=8 string forward = 0.85 (bar >= 0.65); n=8 align forward =
  0.9992 (bar >= 0.9)
- local-m attention, 1.2 CPU-minutes, seed 0: n=8 align forward = 1 (bar >= 0.95); n=12 string forward = 0.794 (bar >=
  0.4); n=8 align backward = 0.1105 (bar <= 0.25)
- local-p attention, 1.9 CPU-minutes, seed 0: n=8 align forward = 0.9975 (bar >= 0.95); n=8 align backward = 0.9985 (bar
  >= 0.95)
- hard attention (strips), 2.0 CPU-minutes, seed 0: n=8 align forward = 0.9975 (bar >= 0.9)
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import run
from drawing import alignments
from kinds import Cells
from seq2seq import START, recurrent
from sets import mnist, shrunk, strips
from torch import Tensor

import multimodal as mm
from multimodal_tokenizers import TextBytes


@dataclass(frozen=True)
class Backwards(mm.NextToken):
    """The head of the other direction, with a learned start and weights of its own."""


TASKS = {
    "forward": mm.Task("strip -> forward:text", mm.NextToken()),
    "backward": mm.Task("strip -> backward:text", Backwards()),
}
TESTED = ((8, "forward"), (8, "backward"), (12, "forward"))
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "additive": {"score": mm.attention.Additive()},
    "dot": {"score": mm.attention.DotProduct()},
    "scaled": {"score": mm.attention.ScaledDotProduct()},
    "general": {"score": mm.attention.General()},
    "content": {"score": mm.attention.Cosine(1.0, learned=True)},
    "location": {"score": mm.attention.LocationBased(16)},
    "local_m": {"score": mm.attention.ScaledDotProduct(), "prior": mm.masks.Window(2)},
    "local_p": {"score": mm.attention.General(), "prior": mm.attention.PredictedWindow(1.0)},
    "hard": {"score": mm.attention.General(), "read": mm.attention.Hard(expected=0.5, weight=0.1, ahead=1)},
    "hard_bare": {"score": mm.attention.General(), "read": mm.attention.Hard(expected=0.0, weight=0.1, ahead=1)},
}
REMARKS = {f"none n={n} string {way}": "baseline" for n, way in TESTED}


def core(variant: str) -> mm.EncoderDecoder:
    if variant == "none":
        return recurrent(128, (START, mm.layers.Recurrent()), last=1)
    look = mm.layers.CrossAttention(**VARIANTS[variant])
    if variant == "local_m":
        # a state read both ways tells of its neighbours, which a window reads in its place: cells alone, placed
        return recurrent(128, (mm.layers.Recurrent(), look), read_by=(mm.layers.MLP(),), places=(1, 0, 0))
    return recurrent(128, (mm.layers.Recurrent(), look))


def learn(variant: str, seed: int = 0, quick: bool = False) -> tuple[dict[str, float], list[Tensor]]:
    """Numbers, and the weights (rows: digits as written, columns: cells) of one unseen strip in each direction."""
    images, labels, test, test_labels = mnist()
    moved = [shrunk(np.roll(images, (y, x), (1, 2)), 2) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    train = [s for i, m in enumerate(moved) for s in strips(m, labels, 16 if quick else 1500, 9 * seed + i)]
    cells, text = Cells(), TextBytes()
    model = mm.Model({"strip": cells, "text": text}, core(variant), list(TASKS.values()), seed=seed)
    ready = [{"strip": cells(s["strip"]), **{way: text(s[way]) for way in TASKS}} for s in train]
    recipe = mm.Recipe(steps=4 if quick else 1000, batch=64, lr=5e-3, optimizer="muon", ema=0.98, seed=seed)
    start = time.process_time()
    mm.fit(model, {task.pattern: ready for task in TASKS.values()}, recipe, quiet=quick)
    numbers, maps = {"train CPU-s": time.process_time() - start}, []
    for n, way in TESTED:
        task, samples = TASKS[way].pattern, strips(shrunk(test, 2), test_labels, 8 if quick else 500, seed, n)
        said = model.generate(task, samples, max_tokens=n + 2, batch=len(samples))
        numbers[f"n={n} string {way}"] = float(np.mean([s[way] == a.value for s, a in zip(samples, said, strict=True)]))
        if variant == "none":
            continue
        trace = mm.attention.Trace()
        with model.inference_mode():
            model(model.pack(task, samples), trace=trace)
        seen = trace.seen[-1]
        true = torch.arange(n) if way == "forward" else torch.arange(n).flip(0)
        weight = seen.weight_BHTM[:, 0, :n]
        numbers[f"n={n} align {way}"] = float((weight.argmax(-1) == true).float().mean())
        maps.append(weight[0])
        if variant == "local_p":  # the prior is a parabola of curvature 1; this is where its top lies
            centre = 0.5 + seen.log_prior_BHTM[:, 0, :n, :2].diff(dim=-1)[..., 0]
            numbers[f"n={n} centre off {way}"] = float((centre - true).abs().mean())
    if variant == "content":
        (scale,) = (p for name, p in model.named_parameters() if name.endswith("log_scale"))
        numbers["sharpness, from 1"] = scale.exp().item()
    return numbers, maps


def measure(seed: int = 0, quick: bool = False, out: Path | None = None, variant: str = "additive") -> dict[str, float]:
    numbers, maps = learn(variant, seed, quick)
    if out is not None:
        alignments({variant: maps}, list(TASKS), out / "strips.png")
    return numbers


def everything(seed: int, quick: bool, out: Path, variant: list[str]) -> dict[str, float]:
    """All of these variants, in one picture."""
    learnt = {name: learn(name, seed, quick) for name in variant}
    alignments({name: maps for name, (_, maps) in learnt.items()}, list(TASKS), out / "strips.png")
    return {f"{name} {key}": value for name, (numbers, _) in learnt.items() for key, value in numbers.items()}


if __name__ == "__main__":
    run(everything, "strips", __doc__, REMARKS, variant=list(VARIANTS))
