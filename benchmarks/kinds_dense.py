"""The class of each pixel: digits among clutter, beside what is learned from the pixels around.

    uv run benchmarks/kinds_dense.py [--seeds 0 1 2] [--write]    about 13 CPU-minutes on one thread
    uv run benchmarks/kinds_dense.py --tune                       on a part of the training data alone

Canvases of 32 x 32 pixels with four of scikit-learn's 8 x 8 digits, at any place but not over each other, with noise, and with
three pieces of clutter: digits whose quarters are exchanged and turned. Which of the ten digits is a pixel's, or none? Ink is its
digit's, faint ink (a tenth to four tenths) is not known, all else is background. The digits of the test canvases are in no training
canvas. The forest sees 11 x 11 pixels around each of 80,000 known pixels of these canvases; "background" is the answer that reads
nothing. --write writes the table to benchmarks/results/kinds_dense.md.
"""

from typing import Any

import numpy as np

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import Rows, digits_8x8
from multimodal_tokenizers import ImagePatches, Segments

SIDE, WINDOW, PIXELS = 32, 11, 80_000
CLASSES = ("background", *map(str, range(10)))


def canvases(digits: Rows, count: int, seed: int) -> Rows:
    """Samples {"image", "map"}: where two things would touch, the second is drawn again elsewhere."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        image, said = draw.normal(0, 0.15, (SIDE, SIDE)), np.zeros((SIDE, SIDE), int)
        free = np.ones((SIDE, SIDE), bool)
        for i in range(7):
            digit = digits[draw.integers(len(digits))]
            ink = np.asarray(digit["image"], float) / 255
            for _ in range(50):
                y, x = draw.integers(0, SIDE - 8, 2, endpoint=True)
                if free[y : y + 8, x : x + 8].all():
                    break
            else:
                continue
            free[y : y + 8, x : x + 8] = False
            if i < 4:
                number = 1 + int(digit["label"])
                said[y : y + 8, x : x + 8] = np.where(ink > 0.4, number, np.where(ink > 0.1, -1, 0))
            else:
                quarters = [np.rot90(ink[a : a + 4, b : b + 4], draw.integers(4)) for a in (0, 4) for b in (0, 4)]
                quarters = [quarters[j] for j in draw.permutation(4)]
                ink = np.block([quarters[:2], quarters[2:]])
            image[y : y + 8, x : x + 8] += ink
        found.append({"image": image.clip(0, 1).astype(np.float32), "map": said})
    return found


def scores(answers: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """The mean over classes of intersection over union, and the share of known pixels that are right."""
    count = len(CLASSES)
    known = said >= 0
    table = np.bincount(said[known] * count + answers[known], minlength=count**2).reshape(count, count)
    right = np.diag(table)
    return float(np.mean(right / (table.sum(0) + table.sum(1) - right))), right.sum() / table.sum()


def windows(samples: Rows, chosen: np.ndarray) -> np.ndarray:
    """The pixels around these pixels (pixels, WINDOW * WINDOW), numbered through all canvases."""
    beside = WINDOW // 2
    padded = np.pad(np.stack([one["image"] for one in samples]), ((0, 0), (beside, beside), (beside, beside)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW), (1, 2))
    return views[np.unravel_index(chosen, (len(samples), SIDE, SIDE))].reshape(-1, WINDOW**2)


def measured(seed: int, tune: bool) -> dict[str, tuple[float, float]]:
    from sklearn.ensemble import RandomForestClassifier

    digits, test_digits = digits_8x8(seed)
    if tune:
        cut = len(digits) * 4 // 5
        digits, test_digits = digits[:cut], digits[cut:]
    train, test = canvases(digits, 3000, seed), canvases(test_digits, 200, seed + 100)
    said = np.stack([one["map"] for one in test])
    found = {"background": scores(np.zeros_like(said), said)}

    target = np.stack([one["map"] for one in train]).ravel()
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(target >= 0))[:PIXELS]
    x, y, test_x = windows(train, chosen), target[chosen], windows(test, np.arange(said.size))
    forest = RandomForestClassifier(100, random_state=seed).fit(x, y)
    found[name := f"random forest, {WINDOW} x {WINDOW} pixels"] = scores(
        forest.predict(test_x).reshape(said.shape), said
    )
    print(f"seed {seed}: {name} {found[name][0]:.2%} {found[name][1]:.2%}", flush=True)

    image = ImagePatches(patch=4, channels=1)
    task = mm.Task("image -> map", mm.EachRow(of="image"))
    model = mm.Model(
        {"image": image, "map": Segments(CLASSES, image)}, mm.Core(width=96, depth=4, heads=4), [task], seed=seed
    )
    plain: dict[str, Any] = {"device": "cpu", "precision": "float32", "quiet": True}
    recipe = {"steps": 1500, "batch": 16, "lr": 2e-3, "ema": 0.99}
    mm.fit(model, {task.pattern: train}, seed=seed, **plain, **recipe)
    answers = model.predict(task.pattern, [{"image": one["image"]} for one in test])
    found["Segments"] = scores(np.stack([answer.value for answer in answers]), said)
    # what `evaluate` calls rows is the share of pixels
    assert abs(mm.evaluate(model, task.pattern, test)["rows"] - found["Segments"][1]) < 1e-9
    print(f"seed {seed}: Segments {found['Segments'][0]:.2%} {found['Segments'][1]:.2%}", flush=True)
    return found


def main() -> None:
    options = script.parser(__doc__, "seeds", "write", seeds=[0, 1, 2])
    options.add_argument("--tune", action="store_true", help="hold out a part of the training data, and test nothing")
    args = script.parsed(options)
    with script.cpu_time("all:"):
        found = [measured(seed, args.tune) for seed in args.seeds]
    bodies = []
    for i, what in enumerate(("mean intersection over union", "pixels that are right")):
        by_method = {name: [one[name][i] for one in found] for name in found[0]}
        head = [what, *(f"seed {seed}" for seed in args.seeds), "mean", "beside the best other"]
        bodies.append(script.table(head, script.compared(by_method, "Segments")))
    body = "\n".join(bodies)
    print(body)
    if args.write:
        report.keep("kinds_dense", "The class of each pixel", "uv run benchmarks/kinds_dense.py --write", body)


if __name__ == "__main__":
    main()
