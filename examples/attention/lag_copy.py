"""Temporal convolutions know where things lie: copy the symbol five steps back, with no positional encoding.

    uv run examples/attention/lag_copy.py            the whole form, on one thread
    uv run examples/attention/lag_copy.py --quick    a reduced form, seconds

Causal attention without places sees a bag of symbols, so it can only guess; SNAIL's temporal convolutions (Mishra et al. 2018,
section 3) bring the order in, alone or with attention behind them.

Measured (all numbers: benchmarks/results/seeds.json):
- SNAIL's temporal convolutions, 0.3 CPU-minutes, seed 0: TC share right = 1 (bar >= 0.99); attention share right =
  0.2823 (bar <= 0.4); TC future leak = 0 (bar == 0); attention future leak = 0 (bar == 0); beside: two attentions share
  right 0.2906; TC and attention share right 1; chance 0.125
"""

import sys
from pathlib import Path

import numpy as np
import torch
from command import run
from drawing import blank, save
from kinds import Numbers

import multimodal as mm
from multimodal.heads.each_row import EachRow
from multimodal.layers import Concat, Layer, SelfAttention
from multimodal.task import Task
from multimodal.zoo import TemporalConv

TASK, SYMBOLS, LAG, LENGTH = "seen -> copied", 8, 5, 24
ATTENTION = SelfAttention(heads=1, key_width=32, value_width=32, out=32, merge=Concat())
CONVOLUTIONS = tuple(TemporalConv(filters=32, dilation=dilation) for dilation in (1, 2, 4))
BLOCKS: dict[str, tuple[Layer, ...]] = {
    "TC": CONVOLUTIONS,
    "attention": (ATTENTION,),
    "two attentions": (ATTENTION, ATTENTION),
    "TC and attention": (*CONVOLUTIONS, ATTENTION),
}


def samples(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Strings of random symbols; the answer to each row is the symbol LAG before it, from the first that has one."""
    rows = np.random.default_rng(seed).integers(0, SYMBOLS, (count, LENGTH))
    return [{"seen": row, "copied": row[:-LAG]} for row in rows]


def model_of(block: tuple[Layer, ...], seed: int) -> mm.Model:
    core = mm.Core(width=32, depth=1, heads=1, rotary_split=(0, 0, 0), block=block)
    kind = Numbers(SYMBOLS)
    return mm.Model({"seen": kind, "copied": kind}, core, [Task(TASK, EachRow(last=LENGTH - LAG))], seed=seed)


def leak(model: mm.Model, count: int = 16) -> float:
    """How much the logits of rows up to the middle change when all later symbols do; 0 for what is causal."""
    before = samples(count, 7)
    after = [
        {**s, "seen": np.concatenate([s["seen"][: LENGTH // 2], SYMBOLS - 1 - s["seen"][LENGTH // 2 :]])}
        for s in before
    ]
    with model.inference_mode():
        one, other = (model.logits(model.pack(TASK, x))[TASK].view(count, LENGTH - LAG, -1) for x in (before, after))
    assert not torch.equal(one, other)
    return float((one - other)[:, : LENGTH // 2 - LAG].abs().max())


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    steps, test = (4, samples(8, 10**6)) if quick else (400, samples(500, 10**6))
    numbers = {"chance": 1 / SYMBOLS}
    by_row: dict[str, np.ndarray] = {}
    for name, block in BLOCKS.items():
        model = model_of(block, seed)
        settings = {"batch": 32, "lr": 1e-2, "weight_decay": 0.0, "precision": "float32", "device": "cpu", "seed": seed}
        mm.fit(model, {TASK: samples(32 * steps, seed)}, quiet=not sys.stdout.isatty(), steps=steps, **settings)
        found = np.stack([answer.value for answer in model.predict(TASK, test)])
        by_row[name] = (found == np.stack([s["copied"] for s in test])).mean(0)
        numbers[f"{name} share right"] = float(by_row[name].mean())
        numbers[f"{name} future leak"] = leak(model)
    if out is not None:
        draw(by_row, out / "lag_copy.png")
    return numbers


def draw(by_row: dict[str, np.ndarray], path: Path) -> None:
    figure = blank(6, 3.5)
    axes = figure.subplots()
    for name, right in by_row.items():
        axes.plot(range(LAG, LENGTH), right, marker=".", label=name)
    axes.axhline(1 / SYMBOLS, color="grey", linestyle=":", label="chance")
    axes.set(
        xlabel="position in the string",
        ylabel="share right",
        title=f"copy the symbol {LAG} steps back (TC: temporal convolutions)",
        ylim=(0, 1.05),
    )
    axes.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    run(measure, "lag_copy", __doc__)
