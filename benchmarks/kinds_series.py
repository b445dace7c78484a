"""Time series beside ROCKET-like features with ridge regression and beside nearest neighbours, on the same splits, in the same run.

    uv run benchmarks/kinds_series.py [--only GunPoint] [--seeds 0 1 2] [--write]    about 3 CPU-minutes on one thread
    uv run benchmarks/kinds_series.py --tune [--only GunPoint]                       halves of the training parts alone

The sets are those of timeseries.npz, with their official test parts: JapaneseVowels (12 channels, 7 to 29 steps),
ItalyPowerDemand and GunPoint (one channel). The features are those of 1,000 random kernels after Dempster et al. 2020, written
below. All sets have the same recipe, which was chosen on halves of the training parts. --write writes a table for each set to
benchmarks/results.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import DATA
from multimodal_tokenizers import Labels, Series

Part = tuple[list[np.ndarray], list[str]]  # series (steps, channels), and their classes
TASK = "series -> label"
PATCH = {"JapaneseVowels": 1, "ItalyPowerDemand": 2, "GunPoint": 6}  # steps a token
NAMES = {
    "JapaneseVowels": "Japanese vowels: 12 channels of 7 to 29 steps, nine speakers, 270 and 370 cases",
    "ItalyPowerDemand": "Power demand in Italy: 24 hours, two halves of the year, 67 and 1,029 cases",
    "GunPoint": "Gun or pointing hand: 150 steps, 50 and 150 cases",
}
KERNELS = 1000
RECIPE: dict[str, Any] = {"steps": 300, "batch": 32, "lr": 3e-3, "weight_decay": 0.1, "ema": 0.98}
SHAPE: dict[str, Any] = {"width": 48, "depth": 2, "heads": 4, "dropout": 0.1}
# of training series: noise in deviations of their channels, the share of missing values
CHANGED = {"noise": 0.3, "missing": 0.3}
OTHERS: tuple[dict[str, Any], ...] = (
    {"noise": 0.1},
    {"missing": 0.0},
    {"dropout": 0.3},
    {"steps": 600},
)  # what else --tune tries


def read(name: str, split: str) -> Part:
    with np.load(DATA / "timeseries.npz", allow_pickle=False) as archive:
        x, length, y = (archive[f"{name}_{split}_{key}"] for key in ("x", "length", "y"))
    return [case[:, :count].T.astype(np.float64) for case, count in zip(x, length, strict=True)], y.tolist()


class Changed:
    """Series for training: each time with other noise and other values missing. Hours of a day do not move."""

    def __init__(self, part: Part, noise: float, missing: float) -> None:
        self.part, self.noise, self.missing = part, noise, missing

    def __len__(self) -> int:
        return len(self.part[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        random, series = script.random(), self.part[0][index]
        changed = series + self.noise * series.std(0) * random.standard_normal(series.shape)
        changed[random.random(series.shape) < self.missing] = np.nan
        return {"series": changed, "label": self.part[1][index]}


def rocket(series: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """(N, 2 KERNELS) the share of positive values and the maximum of each random convolution (Dempster et al. 2020).

    Kernels have 7, 9 or 11 weights, a dilation that is drawn evenly on a logarithmic scale up to the shortest series, padding or
    none, and read some of the channels. Series of equal length are convolved together.
    """
    random = np.random.default_rng(seed)
    channels, shortest = series[0].shape[1], min(map(len, series))
    by_length: dict[int, list[int]] = {}
    for i, one in enumerate(series):
        by_length.setdefault(len(one), []).append(i)
    groups = [(rows, np.stack([series[i] for i in rows])) for rows in by_length.values()]
    features = np.zeros((len(series), 2 * KERNELS))
    for k in range(KERNELS):
        size = min(int(random.choice([7, 9, 11])), shortest)
        read_by = random.choice(channels, int(2 ** random.uniform(0, np.log2(channels + 1))), replace=False)
        weight = random.standard_normal((len(read_by), size))
        weight -= weight.mean(1, keepdims=True)
        bias = random.uniform(-1, 1)
        dilation = int(2 ** random.uniform(0, np.log2(max((shortest - 1) / (size - 1), 1))))
        pad = (size - 1) * dilation // 2 if random.random() < 0.5 else 0
        for rows, x in groups:
            x = np.pad(x[:, :, read_by], ((0, 0), (pad, pad), (0, 0)))
            count = x.shape[1] - (size - 1) * dilation
            value = sum(x[:, j * dilation : j * dilation + count] @ weight[:, j] for j in range(size)) + bias
            features[rows, 2 * k], features[rows, 2 * k + 1] = (value > 0).mean(1), value.max(1)
    return features


def of_rocket(train: Part, test: Part, seed: int) -> float:
    together = np.concatenate(train[0])
    mean, std = together.mean(0), together.std(0)
    x = rocket([(one - mean) / std for one in train[0] + test[0]], seed)
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-3, 3, 10)))
    return float(model.fit(x[: len(train[0])], train[1]).score(x[len(train[0]) :], test[1]))


def of_neighbours(train: Part, test: Part) -> float:
    """The nearest training series by Euclidean distance, all stretched to the longest length."""
    steps = max(map(len, train[0]))

    def stretched(series: list[np.ndarray]) -> np.ndarray:
        at = [np.linspace(0, len(one) - 1, steps) for one in series]
        return np.stack(
            [np.stack([np.interp(t, np.arange(len(one)), c) for c in one.T]) for t, one in zip(at, series, strict=True)]
        ).reshape(len(series), -1)

    x, y = stretched(train[0]), stretched(test[0])
    nearest = (np.square(y).sum(1)[:, None] - 2 * y @ x.T + np.square(x).sum(1)).argmin(1)
    return float(np.mean([train[1][i] == label for i, label in zip(nearest, test[1], strict=True)]))


def ours(name: str, train: Part, test: Part, seed: int, changes: dict[str, Any] | None = None) -> float:
    """The share of test series that is right."""
    changes = changes or {}
    series = Series.of(train[0], patch=PATCH[name])
    shape = SHAPE | {key: changes[key] for key in SHAPE if key in changes}
    recipe = RECIPE | {key: changes[key] for key in RECIPE if key in changes}
    model = mm.Model({"series": series, "label": Labels.from_data(train[1])}, mm.Core(**shape), [TASK], seed=seed)
    data = Changed(train, **{key: changes.get(key, value) for key, value in CHANGED.items()})
    mm.fit(model, {TASK: data}, seed=seed, device="cpu", precision="float32", quiet=True, **recipe)
    cases = [{"series": one, "label": label} for one, label in zip(*test, strict=True)]
    return float(mm.evaluate(model, TASK, cases)["exact"])


def tune(name: str) -> None:
    """Mean accuracy of each setting on both halves of the training part, trained on the other."""
    series, labels = read(name, "train")
    halves = StratifiedKFold(2, shuffle=True, random_state=0).split(series, labels)
    parts = [[([series[i] for i in half], [labels[i] for i in half]) for half in both] for both in halves]
    print(f"{name}: ROCKET-like {np.mean([of_rocket(*part, 0) for part in parts]):.2%}", flush=True)
    for changes in ({}, *OTHERS):
        print(f"{name}: {changes} {np.mean([ours(name, *part, 0, changes) for part in parts]):.2%}", flush=True)


def main() -> None:
    options = script.parser(__doc__, "seeds", "write", seeds=[0, 1, 2])
    options.add_argument("--only", nargs="+", choices=tuple(PATCH), default=tuple(PATCH))
    options.add_argument("--tune", action="store_true", help="compare settings, and test nothing")
    args = script.parsed(options)
    for name in args.only:
        if args.tune:
            tune(name)
            continue
        train, test = (read(name, split) for split in ("train", "test"))
        found: dict[str, list[float]] = {}
        with script.cpu_time(f"{name}: {len(test[0])} test series,"):
            for seed in args.seeds:
                found.setdefault("nearest neighbour", []).append(of_neighbours(train, test))
                found.setdefault("ROCKET-like features, ridge", []).append(of_rocket(train, test, seed))
                found.setdefault("Series", []).append(ours(name, train, test, seed))
        lines = script.compared(found, "Series")
        body = script.table(["right", *(f"seed {seed}" for seed in args.seeds), "mean", "beside the best other"], lines)
        print(f"{name}\n{body}", flush=True)
        if args.write:
            command = f"uv run benchmarks/kinds_series.py --only {name} --write"
            report.keep(f"kinds_{name}", NAMES[name], command, body)


if __name__ == "__main__":
    main()
