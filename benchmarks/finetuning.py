"""Fine-tuning on little data, beside training from scratch and two plain baselines in the same program.

    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/finetuning.py clothing --seeds 0 1 2 --write
    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/finetuning.py sounds --seeds 0 1 2 --write

clothing: 30 photographs of each of ten classes, scored on the 341 of the official validation part, from DINOv2-S.
sounds: ESC-10, folds 1 and 2 to train (160 clips of 5 s), fold 3 to score, from Whisper-base's encoder.

The weights are those of benchmarks/fetched_weights.py.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import report, script
from benchmarks.data import recordings, records
from benchmarks.fetched_weights import ready
from multimodal import Classify, Core, Model, Task, evaluate, fit, pretrained
from multimodal.heads import FirstAndMean, Mean
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels
from multimodal_tokenizers.fit import Fit

EACH = 30  # photographs of a class to train on
SIDE = 126  # pixels at which DINOv2 reads a photograph, whose longest side is 128
Samples = list[dict[str, Any]]


class Varied:
    """Samples of which each visit shows another variant, made by `vary(value)` of one field."""

    def __init__(self, samples: Samples, field: str, vary: Callable[[Any], Any]) -> None:
        self.samples, self.field, self.vary = samples, field, vary

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = self.samples[index]
        return {**sample, self.field: self.vary(sample[self.field])}


def cropped(image: Image.Image) -> Image.Image:
    """Another part of at least a half of a picture, mirrored or not, in other brightness."""
    share = np.random.uniform(0.5, 1.0) ** 0.5
    width, height = round(image.width * share), round(image.height * share)
    x, y = np.random.randint(image.width - width + 1), np.random.randint(image.height - height + 1)
    part = image.crop((x, y, x + width, y + height)).resize(image.size, Image.Resampling.BICUBIC)
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if np.random.rand() < 0.5 else part
    factor = np.random.uniform(0.8, 1.2)
    return part.point(lambda level: min(round(level * factor), 255))


def shifted(sound: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
    """A sound that starts elsewhere, at another loudness, with a little noise."""
    wave_S, rate = sound
    wave_S = np.roll(wave_S, np.random.randint(len(wave_S))) * np.float32(np.random.uniform(0.5, 1.5))
    noise_S = np.random.standard_normal(len(wave_S)).astype(np.float32)
    return wave_S + noise_S * np.float32(np.random.uniform(0, 0.005)), rate


def photographs(seed: int) -> tuple[Samples, Samples]:
    """Training and validation photographs of clothes with their classes."""
    parts: dict[bool, Samples] = {True: [], False: []}
    for row, file in records("clothing.zip"):
        parts[row["split"] == "train"].append({"image": Image.open(file).convert("RGB"), "label": row["label"]})
    order = np.random.default_rng(seed).permutation(len(parts[True]))
    by_class: dict[str, Samples] = {}
    for i in order:
        by_class.setdefault(parts[True][i]["label"], []).append(parts[True][i])
    return [sample for some in by_class.values() for sample in some[:EACH]], parts[False]


def clips(seed: int) -> tuple[Samples, Samples]:
    """Clips of folds 1 and 2, and of fold 3, with their classes."""
    found: dict[bool, Samples] = {True: [], False: []}
    for row, wave_S, rate in recordings("esc10_folds1-3.zip"):
        wave_S = wave_S.mean(1) if wave_S.ndim > 1 else wave_S
        found[row["fold"] < 3].append({"audio": (wave_S, rate), "label": row["category"]})
    return found[True], found[False]


def classes(samples: Samples) -> Labels:
    return Labels(tuple(sorted({sample["label"] for sample in samples})))


def share(model: Model, task: str, held_out: Samples) -> float:
    """The share of right answers."""
    return evaluate(model, task, held_out)["exact"]


def forest(
    rows: Sequence[np.ndarray], labels: Sequence[str], held: Sequence[np.ndarray], wanted: Sequence[str], seed: int
) -> float:
    from sklearn.ensemble import RandomForestClassifier

    return float(
        RandomForestClassifier(500, random_state=seed).fit(list(rows), list(labels)).score(list(held), list(wanted))
    )


def regression(
    rows: Sequence[np.ndarray], labels: Sequence[str], held: Sequence[np.ndarray], wanted: Sequence[str]
) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chosen = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    return float(chosen.fit(list(rows), list(labels)).score(list(held), list(wanted)))


def clothing(seed: int) -> dict[str, float]:
    train, held_out = photographs(seed)
    labels, task = classes(train), "image -> label"
    pixels = [np.asarray(s["image"].resize((32, 32))).ravel() / 255 for s in (*train, *held_out)]
    names = [s["label"] for s in (*train, *held_out)]
    rows, held = pixels[: len(train)], pixels[len(train) :]
    found = {"random forest on 32x32 pixels": forest(rows, names[: len(train)], held, names[len(train) :], seed)}

    scratch = Model(
        {"image": ImagePatches(patch=16, mean=0.5, std=0.3, fit=Fit(size=(96, 96))), "label": labels},
        Core(width=128, depth=4, heads=4, dropout=0.1, drop_path=0.1),
        [task],
        seed=seed,
    )
    data = {task: Varied(train, "image", cropped)}
    fit(scratch, data, steps=1200, batch=64, lr=1e-3, optimizer="muon", seed=seed, quiet=True)
    found["ours from scratch"] = share(scratch, task, held_out)

    loaded = pretrained(ready("dinov2-s"))
    eyes: Any = loaded.tokenizers["image"]
    eyes = dataclasses.replace(eyes, of=dataclasses.replace(eyes.of, fit=Fit(size=(SIDE, SIDE))))
    model = dataclasses.replace(loaded, tokenizers={"image": eyes}).model(
        [Task(task, Classify(pool=FirstAndMean(), label_smoothing=0.1))], {"label": labels}, seed=seed
    )
    tuned = {"freeze": ("image", "core[:4]"), "layer_decay": 0.75, "lr": 2e-4, "warmup": 0.1, "weight_decay": 0.05}
    fit(model, data, steps=300, batch=32, seed=seed, quiet=True, **tuned)
    found["ours from DINOv2-S"] = share(model, task, held_out)
    return found


def sounds(seed: int) -> dict[str, float]:
    train, held_out = clips(seed)
    labels, task = classes(train), "audio -> label"
    frames = AudioFrames(stack=1)
    features = []
    for sample in (*train, *held_out):
        log_NF = frames(sample["audio"]).content.numpy()
        features.append(np.concatenate([log_NF.mean(0), log_NF.std(0)]))
    names = [s["label"] for s in (*train, *held_out)]
    parts = features[: len(train)], names[: len(train)], features[len(train) :], names[len(train) :]
    found = {
        "random forest on log-mel statistics": forest(*parts, seed),
        "logistic regression on them": regression(*parts),
    }

    data = {task: Varied(train, "audio", shifted)}
    scratch = Model(
        {"audio": AudioFrames(stack=4), "label": labels},
        Core(width=128, depth=4, heads=4, dropout=0.1, drop_path=0.1),
        [Task(task, Classify(pool=Mean()))],
        seed=seed,
    )
    fit(scratch, data, steps=800, batch=32, lr=1e-3, optimizer="muon", seed=seed, quiet=True)
    found["ours from scratch"] = share(scratch, task, held_out)

    loaded = pretrained(ready("whisper-base"))
    ears: Any = dataclasses.replace(loaded.tokenizers["audio"], pad_seconds=None)  # type: ignore[call-arg]
    model = dataclasses.replace(loaded, tokenizers={**loaded.tokenizers, "audio": ears}).model(
        [Task(task, Classify(pool=Mean(), label_smoothing=0.1))], {"label": labels}, seed=seed
    )
    frozen = ("audio", "text", "reader[:2]", "writer")
    tuned = {"freeze": frozen, "layer_decay": 0.7, "lr": 2e-4, "warmup": 0.1, "weight_decay": 0.05}
    fit(model, data, steps=160, batch=16, seed=seed, quiet=True, **tuned)
    found["ours from Whisper-base"] = share(model, task, held_out)
    return found


PARTS = {"clothing": clothing, "sounds": sounds}


def main() -> None:
    options = script.parser(__doc__, "seeds", "write")
    options.add_argument("part", choices=PARTS)
    args = script.parsed(options)
    found: dict[str, list[float]] = {}
    start = time.process_time()
    for seed in args.seeds:
        for name, value in PARTS[args.part](seed).items():
            found.setdefault(name, []).append(value)
            print(f"seed {seed}: {name} {100 * value:.1f} %", flush=True)
    rows = [
        [name, ", ".join(f"{100 * x:.1f}" for x in shares), f"{100 * np.mean(shares):.1f} %"]
        for name, shares in found.items()
    ]
    body = (
        script.table(["", "seeds", "right"], rows) + f"\n\n{(time.process_time() - start) / 60:.0f} CPU-minutes in all"
    )
    print(body)
    if args.write:
        command = f"benchmarks/finetuning.py {args.part} --seeds {' '.join(map(str, args.seeds))} --write"
        report.keep(f"finetuning_{args.part}", f"Fine-tuning: {args.part}", command, body)


if __name__ == "__main__":
    main()
