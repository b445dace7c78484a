"""Convex hulls by a pointer network: an LSTM reads points, another writes which of them lie on the hull, by pointing at them.

    uv run examples/attention/pointer_hull.py            the whole form, on one thread
    uv run examples/attention/pointer_hull.py --quick    a reduced form, seconds

Trained on 5 to 10 points; a hull runs counter-clockwise from its lowest index (Vinyals et al. 2015, section 4.1). Beside: all
points by their angle.

Measured (all numbers: benchmarks/results/seeds.json):
- Pointer Network, 5.0 CPU-minutes, seed 0: n=5 exact = 0.852 (bar >= 0.85); n=10 exact = 0.74 (bar >= 0.7); n=20 exact
  = 0.406 (bar >= 0.25); n=10 area = 0.9967 (bar >= 0.99)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import run
from drawing import blank, save

import multimodal as mm
from multimodal.attention import Additive
from multimodal.heads.pointer import Pointer
from multimodal.layers import CrossAttention, Recurrent
from multimodal.tokenizer import Tokens, at_times

TASK, TRAINED, TESTED = "points -> hull:points", range(5, 11), (5, 10, 20)
REMARKS = {f"n={n} exact {way}": "baseline" for n in TESTED for way in ("by angle", "random order")}


def turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Above 0 where b lies to the left of a; points of the plane are complex numbers here."""
    return np.imag(a.conj() * b)


def hulls(count: int, n: int, random: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Points uniform in the unit square and their hull: an edge from i to j has everything else on its left."""
    found = []
    for points in random.random((count, n, 2), dtype=np.float32):
        z = points.astype(np.float64).view(np.complex128)[:, 0]
        edge = z - z[:, None]  # from i to j
        i, j = np.nonzero((turn(edge[..., None], edge[:, None]) > 0).sum(-1) == n - 2)
        after = dict(zip(i.tolist(), j.tolist(), strict=True))
        order = [min(after)]
        while len(order) < len(after):
            order.append(after[order[-1]])
        found.append({"points": points, "hull": points[order]})
    return found


@dataclass(frozen=True)
class Points(mm.Tokenizer):
    feature_size = 2

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.as_tensor(value), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> np.ndarray:
        return tokens.content.numpy()


def covered(answer: np.ndarray, hull: np.ndarray) -> float:
    """The share of the hull's area that an answer covers; 0 where its edges cross, so that it is no simple polygon."""
    a, whole = (x.astype(np.float64).view(np.complex128).ravel() for x in (answer, hull))
    b, (i, j) = np.roll(a, -1), np.triu_indices(len(a), 2)
    ends = ((i, a[j], b[j]), (j, a[i], b[i]))  # two edges cross where each has the other's ends on both its sides
    apart = [turn((b - a)[k], x - a[k]) * turn((b - a)[k], y - a[k]) < 0 for k, x, y in ends]
    area = abs(turn(a, b).sum() / turn(whole, np.roll(whole, -1)).sum())
    return 0.0 if (apart[0] & apart[1]).any() else area


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    random = np.random.default_rng(seed)
    data = [sample for n in TRAINED for sample in hulls(10 if quick else 20000, n, random)]
    plain: dict[str, Any] = {"width": 16 if quick else 128, "depth": 1, "heads": 1, "rotary_split": (0, 0, 0)}
    reader = mm.Core(block=(Recurrent(cell="lstm", both_ways=True),), **plain)
    writer = mm.Core(block=(Recurrent(cell="lstm"), CrossAttention(score=Additive())), **plain)
    core = mm.EncoderDecoder(reader=reader, writer=writer)
    model = mm.Model({"points": Points()}, core, [mm.Task(TASK, Pointer())], seed=seed)
    recipe: dict[str, Any] = {"steps": 10, "batch": 16} if quick else {"steps": 2200, "batch": 128}
    mm.fit(model, {TASK: data}, lr=3e-3, weight_decay=0.01, seed=seed, quiet=quick, **recipe)
    numbers, shown = {}, []
    for n in TESTED:
        test = hulls(4 if quick else 500, n, np.random.default_rng([seed, n]))
        answers = [answer.value for answer in model.generate(TASK, test, max_tokens=n + 1, batch=250)]
        simple = [area for answer, s in zip(answers, test, strict=True) if (area := covered(answer, s["hull"]))]
        shown += list(zip(test, answers, strict=True))[:3]
        order = [np.argsort(np.arctan2(*(s["points"] - s["points"].mean(0)).T[::-1])) for s in test]
        by_angle = [s["points"][np.roll(o, -int(o.argmin()))] for s, o in zip(test, order, strict=True)]
        ways = {"": answers, " by angle": by_angle, " random order": [random.permutation(s["points"]) for s in test]}
        for way, given in ways.items():
            numbers[f"n={n} exact{way}"] = float(np.mean([*map(np.array_equal, given, (s["hull"] for s in test))]))
        numbers |= {f"n={n} simple": len(simple) / len(test), f"n={n} area": float(np.mean(simple or [0]))}
    if out is not None:
        draw(shown, out / "pointer_hull.png")
    return numbers


def draw(shown: list[tuple[dict[str, np.ndarray], np.ndarray]], path: Path) -> None:
    figure = blank(7.5, 7.5)
    for axes, (sample, answer) in zip(figure.subplots(3, 3).flat, shown, strict=True):
        right = "right" if np.array_equal(answer, sample["hull"]) else "wrong"
        axes.fill(*sample["hull"].T, color="0.9")
        axes.plot(*np.concatenate([answer, answer[:1]]).T, marker="o", color="C3")
        axes.scatter(*sample["points"].T, color="k", s=12, zorder=3)
        axes.set(title=f"{len(sample['points'])} points: {right}", aspect="equal", xticks=[], yticks=[])
    figure.suptitle("grey: the true hull; red: the answer; black: all points")
    save(figure, path)


if __name__ == "__main__":
    run(measure, "pointer_hull", __doc__, REMARKS)
