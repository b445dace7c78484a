"""How many samples, which core, how many steps: the handwritten digits, one thing changed at a time.

    uv run benchmarks/how_much.py [--seeds 0] [--write]           20 CPU-minutes a seed (a guess)

A stratified fifth of scikit-learn's digits is the test part; of the rest as many are taken as the first column says, each class
alike. All runs have the patches, augmentation and batch of examples/train_image_classifier.py, and AdamW
instead of its Muon. --write writes benchmarks/results/how_much.md; it was not run yet.
"""

import time

import numpy as np

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import example
from multimodal_tokenizers import ImagePatches, Labels

TASK = "image -> label"
SAMPLES = (100, 400, 1437)
RUNS = (("32 x 2", 300), ("32 x 2", 1200), ("64 x 4", 300), ("64 x 4", 1200), ("128 x 6", 300))
"""(width x depth, steps)."""


def main() -> None:
    options = script.parser(__doc__, "seeds", "write")
    args = script.parsed(options)
    sets = example("image_sets")
    right: dict[tuple[str, int, int], list[float]] = {}
    spent: dict[tuple[str, int], list[float]] = {}
    for seed in args.seeds:
        found = sets.digits(seed)
        for count in SAMPLES:
            train = found.train.some(count)
            for core, steps in RUNS:
                width, depth = map(int, core.split(" x "))
                model = mm.Model(
                    {"image": ImagePatches(patch=2, channels=1, mean=0.3, std=0.37), "label": Labels(found.names)},
                    mm.Core(width=width, depth=depth, heads=4),
                    [mm.Task(TASK, mm.Classify(label_smoothing=0.1))],
                    seed=seed,
                )
                start = time.process_time()
                mm.fit(
                    model, {TASK: train.varied()}, steps=steps, batch=64, lr=4e-3 if width <= 64 else 1e-3,
                    ema=0.99, weight_decay=0.1, seed=seed, precision="float32", quiet=True,
                )  # fmt: skip
                seconds = time.process_time() - start
                exact = float(mm.evaluate(model, TASK, found.test, measures=())["exact"])
                right.setdefault((core, steps, count), []).append(exact)
                spent.setdefault((core, steps), []).append(seconds)
                print(f"{count} samples, {core}, {steps} steps, seed {seed}: {exact:.2%}, {seconds:.0f} s", flush=True)
    rows = []
    for core, steps in RUNS:
        shares = [f"{np.mean(right[core, steps, count]):.1%}" for count in SAMPLES]
        rows.append([core, f"{steps:,}", *shares, f"{np.mean(spent[core, steps]):.0f}"])
    body = script.table(["core", "steps", *(f"{count:,} samples" for count in SAMPLES), "CPU-seconds"], rows)
    print(body)
    if args.write:
        command = f"uv run benchmarks/how_much.py --seeds {' '.join(map(str, args.seeds))} --write"
        report.keep("how_much", "How many samples, which core, how many steps", command, body)


if __name__ == "__main__":
    main()
