"""SNAIL learns to learn: five characters of an alphabet that it has never seen, one drawing of each, then five to be named.

    uv run examples/attention/snail.py            the whole form, on one thread
    uv run examples/attention/snail.py --quick    a reduced form, seconds

An episode is one sample: five drawings with their labels, five without. Attention and temporal convolutions are concatenated
(Mishra et al. 2018, figure 1). Omniglot, trained on 5 alphabets (179 characters, 4 rotations each), tested on 3 others. Beside: the
model without its convolutions, the model without attention, and the nearest neighbour by pixels.

Measured (all numbers: benchmarks/results/seeds.json):
- SNAIL, 7.1 CPU-minutes, seed 0: SNAIL share right = 0.6545 (bar >= 0.72, missed); without attention share right =
  0.2052 (bar <= 0.3); beside: pixel 1-NN L2 share right 0.4497; pixel 1-NN cosine share right 0.461; without TC share
  right 0.824; chance 0.2
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from command import run
from drawing import blank, save
from kinds import Episode, Numbers
from sets import Episodes, few_shot_characters

import multimodal as mm
from multimodal.heads.each_row import EachRow
from multimodal.layers import Concat, Layer, SelfAttention
from multimodal.task import Task
from multimodal.zoo import TemporalConv

TASK, WAYS = "episode -> names", 5


def model_of(block: tuple[Layer, ...], seed: int) -> mm.Model:
    core = mm.Core(width=64 + WAYS + 1, depth=1, heads=1, rotary_split=(0, 0, 0), block=block)
    return mm.Model(
        {"episode": Episode(WAYS), "names": Numbers(WAYS)}, core, [Task(TASK, EachRow(last=WAYS))], seed=seed
    )


def blocks() -> dict[str, tuple[Layer, ...]]:
    """Att(64, 32) TC(10, 32) Att(64, 64) and what is left without its convolutions or its attention."""
    near, far = (SelfAttention(heads=1, key_width=64, value_width=v, out=v, merge=Concat()) for v in (32, 64))
    convolutions = tuple(TemporalConv(filters=32, dilation=d) for d in (1, 2, 4, 8))
    return {"SNAIL": (near, *convolutions, far), "without TC": (near, far), "without attention": convolutions}


def nearest(samples: list[dict[str, Any]], *, cosine: bool) -> float:
    """Share right of the class of the drawing whose pixels are nearest."""
    right = []
    for sample in samples:
        pixels, labels = sample["episode"][0].reshape(2, WAYS, -1), sample["episode"][1]
        if cosine:
            pixels = pixels / np.linalg.norm(pixels, axis=-1, keepdims=True)
        distance = ((pixels[1][:, None] - pixels[0][None]) ** 2).sum(-1)
        right.append(labels[distance.argmin(1)] == sample["names"])
    return float(np.mean(right))


def measure(seed: int = 0, quick: bool = False, out: Path | None = None) -> dict[str, float]:
    train, test = few_shot_characters()
    steps, count = (2, 20) if quick else (2000, 800)
    episodes = [Episodes(test, WAYS, count, 10**6)[i] for i in range(count)]
    numbers = {"chance": 1 / WAYS}
    for name in ("L2", "cosine"):
        numbers[f"pixel 1-NN {name} share right"] = nearest(episodes, cosine=name == "cosine")
    settings = {"batch": 16, "lr": 5e-3, "optimizer": "muon", "precision": "float32", "device": "cpu", "seed": seed}
    answers = []
    for name, block in blocks().items():
        model, start = model_of(block, seed), time.process_time()
        data = {TASK: Episodes(train, WAYS, 16 * steps, seed, shift=2)}
        mm.fit(model, data, quiet=not sys.stdout.isatty(), steps=steps, **settings)
        numbers[f"{name} CPU-s of training"] = time.process_time() - start
        answers.append([answer.value for answer in model.predict(TASK, episodes)])
        numbers[f"{name} share right"] = float(
            np.mean([a == e["names"] for a, e in zip(answers[-1], episodes, strict=True)])
        )
    if out is not None:
        draw(episodes[:4], answers[0], out / "snail.png")
    return numbers


def draw(episodes: list[dict[str, Any]], answers: list[np.ndarray], path: Path) -> None:
    """Each row an episode: five drawings with their labels, five with what they were called (red: wrong)."""
    figure = blank(10, 1.2 * len(episodes))
    panels = figure.subplots(len(episodes), 2 * WAYS)
    for row, episode, answer in zip(panels, episodes, answers, strict=False):
        images, labels = episode["episode"]
        right = [*[True] * WAYS, *(answer == episode["names"])]
        for axes, image, label, good in zip(row, images, [*labels, *answer], right, strict=True):
            axes.imshow(image, cmap="gray_r")
            axes.set_title(int(label), fontsize=9, color="black" if good else "red", pad=2)
            axes.axis("off")
    save(figure, path)


if __name__ == "__main__":
    run(measure, "snail", __doc__)
