"""Masked pretraining without labels, then ten labels a class: handwritten and spoken digits, beside starting from nothing.

    uv run benchmarks/pretraining.py [--sets digits spoken] [--write]         9 CPU-minutes a set on one thread

All training items are read without their labels; then the same architecture is fitted to 10 labelled items a class from these
weights and from fresh ones, by a learning rate and a number of steps that are chosen for each of the two alike: the best on two
further draws of labels, judged on training items. Figures are of the held-out items, means of five draws. Controls: a linear probe
(logistic regression on the mean state of what is read) of either core as it is, and the nearest labelled neighbour.
--write writes the table to benchmarks/results/pretraining.md.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import multimodal as mm
from benchmarks import data, report, script
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels

DIGITS = tuple("0123456789")
TUNING = {"150 steps, lr 3e-3": (150, 3e-3), "450 steps, lr 1e-3": (450, 1e-3), "450 steps, lr 3e-3": (450, 3e-3)}
SETTING_DRAWS = (100, 101)  # of labels, which no figure is of
Numbers = dict[str, list[float]]


@dataclass(frozen=True)
class Item:
    """One thing to read, already tokens: as it is and, for training, moved a little; its label; what neighbours are found by."""

    variants: Sequence[mm.Tokens]
    label: str
    raw: np.ndarray

    def sample(self, field: str, which: int = 0) -> dict[str, Any]:
        return {field: self.variants[which], "label": self.label}


@dataclass(frozen=True)
class Varied:
    """Items as samples, one of their variants at each asking."""

    items: Sequence[Item]
    field: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index].sample(self.field, np.random.randint(len(self.items[index].variants)))


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is read, by what, and how it is pretrained."""

    field: str
    tokenizer: mm.Tokenizer
    head: mm.Masked
    core: mm.Core
    recipe: mm.Recipe  # of pretraining
    pool: Sequence[Item]  # to train on
    test: Sequence[Item]
    each: int = 10  # labels a class
    batch: int = 50  # of fitting to labels

    @property
    def rebuild(self) -> str:
        return f"{self.field} -> {self.field}"

    @property
    def read(self) -> str:
        return f"{self.field} -> label"

    def fresh(self, seed: int) -> mm.Model:
        """What scratch starts from: the same parts that pretraining has, and the classes."""
        model = mm.Model({self.field: self.tokenizer}, self.core, [mm.Task(self.rebuild, self.head)], seed=seed)
        return model.extended({"label": Labels(DIGITS)}, [self.read])

    def pretrained(self, seed: int) -> mm.Model:
        model = mm.Model({self.field: self.tokenizer}, self.core, [mm.Task(self.rebuild, self.head)], seed=seed)
        mm.fit(model, {self.rebuild: Varied(self.pool, self.field)}, self.recipe, seed=seed, quiet=True)
        return model.extended({"label": Labels(DIGITS)}, [self.read])

    def drawn(self, draw: int, seed: int) -> tuple[list[Item], list[Item]]:
        """`each` labelled items of every class, and the others of the pool in random order."""
        random, labels = np.random.default_rng([seed, draw]), np.array([item.label for item in self.pool])
        few = {i for d in DIGITS for i in random.choice(np.flatnonzero(labels == d), self.each, replace=False).tolist()}
        others = [i for i in random.permutation(len(self.pool)).tolist() if i not in few]
        return [self.pool[i] for i in sorted(few)], [self.pool[i] for i in others]

    def tuned(self, start: mm.Model, few: Sequence[Item], steps: int, lr: float, seed: int) -> mm.Model:
        """A copy of a model, fitted to labels."""
        model = self.fresh(seed)
        model.load_state_dict(start.state_dict())
        recipe = mm.Recipe(steps=steps, batch=self.batch, lr=lr, seed=seed)
        mm.fit(model, {self.read: Varied(few, self.field)}, recipe, quiet=True)
        return model

    def share_right(self, model: mm.Model, items: Sequence[Item]) -> float:
        answers = model.predict(self.read, [item.sample(self.field) for item in items], batch=256)
        return float(np.mean([a.value == item.label for a, item in zip(answers, items, strict=True)]))

    def probed(self, model: mm.Model, few: Sequence[Item], items: Sequence[Item]) -> float:
        """A logistic regression on the mean state of each item's tokens."""
        from sklearn.linear_model import LogisticRegression

        states = [self._states(model, part) for part in (few, items)]
        probe = LogisticRegression(max_iter=1000).fit(states[0], [item.label for item in few])
        return float(probe.score(states[1], [item.label for item in items]))

    def _states(self, model: mm.Model, items: Sequence[Item]) -> np.ndarray:
        found = []
        with model.inference_mode():
            for i in range(0, len(items), 200):
                stream = model.pack(self.read, [item.sample(self.field) for item in items[i : i + 200]], answers=False)
                sample_T = stream.layout.info.sample.long()
                read_T = (stream.layout.info.segment == 0).float()
                sums = torch.zeros(stream.samples, self.core.width).index_add_(
                    0, sample_T, model(stream) * read_T[:, None]
                )
                means = sums / torch.bincount(sample_T, read_T)[:, None]
                found.append(means[torch.tensor(stream.readings[self.read].samples).argsort()].numpy())
        return np.concatenate(found)


def nearest(few: Sequence[Item], items: Sequence[Item]) -> float:
    """The share that the nearest labelled item names rightly."""
    x, y = (torch.tensor(np.stack([item.raw.ravel() for item in part])).double() for part in (few, items))
    found = torch.cdist(y, x).argmin(1).tolist()
    return float(np.mean([few[i].label == item.label for i, item in zip(found, items, strict=True)]))


def chosen(study: Study, pretrained: mm.Model, seed: int) -> dict[str, Numbers]:
    """For each start, the share right of every setting on items of the pool that were not labelled."""
    found: dict[str, Numbers] = {"pretrained": {}, "scratch": {}}
    for draw in SETTING_DRAWS:
        few, others = study.drawn(draw, seed)
        for name, start in (("pretrained", pretrained), ("scratch", study.fresh(seed + draw))):
            for setting, (steps, lr) in TUNING.items():
                model = study.tuned(start, few, steps, lr, seed + draw)
                found[name].setdefault(setting, []).append(study.share_right(model, others[:400]))
    return found


def compared(
    study: Study, pretrained: mm.Model, settings: Mapping[str, tuple[int, float]], seed: int, draws: int = 5
) -> Numbers:
    """For each draw of labels the share right of the held-out items, by name. settings: of each start (steps, lr)."""
    found: Numbers = {}
    for draw in range(draws):
        few, _ = study.drawn(draw, seed)
        for name, start in (("pretrained", pretrained), ("scratch", study.fresh(seed + draw))):
            found.setdefault(f"probe, {name}", []).append(study.probed(start, few, study.test))
            model = study.tuned(start, few, *settings[name], seed + draw)
            found.setdefault(name, []).append(study.share_right(model, study.test))
        found.setdefault("1 nearest neighbour", []).append(nearest(few, study.test))
    return found


def shifted(image_YX: np.ndarray, most: int, least: float) -> list[np.ndarray]:
    """As it is, and moved by up to `most` pixels up, down, and to the sides, with `least` where nothing was."""
    padded = np.pad(image_YX, most, constant_values=least)
    (y, x), steps = image_YX.shape, sorted(range(2 * most + 1), key=lambda i: abs(i - most))
    return [padded[i : i + y, j : j + x] for i in steps for j in steps]


def digits(quick: bool = False) -> Study:
    """scikit-learn's 1,797 scans of 8 x 8 pixels; a stratified fifth, 360, is held out, as in benchmarks/digits.py."""
    tokenizer = ImagePatches(patch=2, channels=1, mean=0.3, std=0.37)
    parts = [
        [Item([tokenizer(v) for v in shifted(row["image"], moves, 0)], row["label"], row["image"]) for row in rows]
        for rows, moves in zip(data.digits_8x8(0), (0 if quick else 1, 0), strict=True)
    ]
    recipe = mm.Recipe(steps=2 if quick else 2500, batch=64, lr=3e-3)
    return Study(
        field="image", tokenizer=tokenizer, head=mm.Masked(0.75), core=mm.Core(width=48, depth=3, heads=4),
        recipe=recipe, pool=parts[0], test=parts[1],
    )  # fmt: skip


def spoken(quick: bool = False) -> Study:
    """The 3,000 recordings of the Free Spoken Digit Dataset, 8 kHz; takes 0 to 4 of each speaker and digit, 300, are held out."""
    tokenizer = AudioFrames(rate_hz=8000, mels=40, stack=4)

    def item(row: dict[str, Any]) -> Item:
        tokens = tokenizer(row["audio"])
        x = tokens.content.numpy()
        return Item([tokens], row["label"], np.concatenate([x.mean(0), x.std(0)]))

    train, test = ([item(row) for row in rows] for rows in data.spoken(quick))
    recipe = mm.Recipe(steps=2 if quick else 2500, batch=64, lr=3e-3)
    return Study(
        field="audio", tokenizer=tokenizer, head=mm.Masked(0.5, span=3), core=mm.Core(width=48, depth=3, heads=4),
        recipe=recipe, pool=train, test=test, each=1 if quick else 10,
    )  # fmt: skip


SETS = {"digits": digits, "spoken": spoken}
NEIGHBOUR = {"digits": "on raw pixels", "spoken": "on the mean and spread of each band"}


def table(name: str, study: Study, seed: int) -> str:
    """Everything of one set, measured."""
    start = time.process_time()
    pretrained = study.pretrained(seed)
    spent = time.process_time() - start
    tried = chosen(study, pretrained, seed)
    best = {of: max(by, key=lambda setting: np.mean(by[setting])) for of, by in tried.items()}
    found = compared(study, pretrained, {of: TUNING[setting] for of, setting in best.items()}, seed)
    gain = np.array(found["pretrained"]) - np.array(found["scratch"])
    names = {
        "pretrained": f"pretrained, then {best['pretrained']}",
        "scratch": f"from scratch, {best['scratch']}",
        "probe, pretrained": "linear probe, frozen pretrained core",
        "probe, scratch": "linear probe, frozen random core",
        "1 nearest neighbour": f"nearest labelled neighbour, {NEIGHBOUR[name]}",
    }
    lines = script.table(
        [f"{len(study.test)} held-out items of {name}", *(f"draw {i}" for i in range(5)), "mean"],
        ([title, *(f"{x:.1%}" for x in found[key]), f"**{np.mean(found[key]):.1%}**"] for key, title in names.items()),
    )
    settings = script.table(
        ["fitted to labels by", "pretrained", "from scratch"],
        ([setting, *(f"{np.mean(tried[of][setting]):.1%}" for of in ("pretrained", "scratch"))] for setting in TUNING),
    )
    return (
        f"## {name}\n\n{lines}\n"
        f"Gain over scratch: **{100 * gain.mean():+.1f} points** (least {100 * gain.min():+.1f} of a draw). Pretrained on "
        f"{len(study.pool)} items without labels by `{study.head}`, {study.recipe.steps} steps of {study.recipe.batch}, in "
        f"{spent / 60:.1f} CPU-minutes; all of this took {(time.process_time() - start) / 60:.1f}.\n\n"
        f"What was tried, on 400 training items that were not labelled, mean of two other draws:\n\n{settings}"
    )


def main() -> None:
    options = script.parser(__doc__, "seed", "write")
    options.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    args = script.parsed(options)
    parts = []
    for i, name in enumerate(args.sets, 1):
        parts.append(table(name, SETS[name](), args.seed))
        print(parts[-1], flush=True)
        if args.write:  # after each set: the next one takes minutes
            command = f"uv run benchmarks/pretraining.py --sets {' '.join(args.sets[:i])} --write"
            report.keep("pretraining", "Pretraining without labels", command, "\n".join(parts))


if __name__ == "__main__":
    main()
