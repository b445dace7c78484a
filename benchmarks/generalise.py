"""How well a model answers what it was not trained on: other speakers; other sizes, angles, noise and light of pictures.

    uv run benchmarks/generalise.py --write                     an hour of CPU time or more (estimated)
    uv run benchmarks/generalise.py --only digits --seed 1

speakers: spoken digits of FSDD; each of the four speakers is left out in turn, and the model is trained on all clips of the other
three. digits: scikit-learn's, a stratified fifth held out. clothing: photographs of ten classes, the official validation part. The
pictures of the test are shown as they are, and changed. Each model is trained twice: without augmentation, and with the defaults
`mm.augment.for_sounds()` and `mm.augment.for_pictures()`; all else is the same; with --augmented only with the defaults. FSDD and
clothing are in the folder MULTIMODAL_DATA.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import Rows, digits_8x8, recordings, records
from multimodal import augment
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels

HEAR, SEE = "audio -> label", "image -> label"
Row = tuple[str, list[str], float]  # name, cells, seconds
Ways = tuple[bool, ...]  # whether models are trained with augmentation, one row each
PLAIN: dict[str, Any] = {"device": "cpu", "precision": "float32", "quiet": True}


def trained(
    task: str, train: Any, kind: mm.Tokenizer, core: mm.Core, changes: Any, seed: int, **settings: Any
) -> mm.Model:
    """A classifier; `changes` are the augmentations of what it reads, or None."""
    field = task.split()[0]
    labels = Labels.from_data(sample["label"] for sample in train)
    head = mm.Task(task, mm.Classify(label_smoothing=0.1))
    model = mm.Model({field: kind, "label": labels}, core, [head], seed=seed)
    data = augment.Augmented(train, {field: changes}) if changes else train
    if not mm.fit(model, {task: data}, seed=seed, **settings, **PLAIN).finished:
        raise RuntimeError("the training was stopped, so there is nothing to measure")
    return model


def right(model: mm.Model, task: str, samples: Rows) -> float:
    return float(mm.evaluate(model, task, samples, measures=())["exact"])


# speakers
def clips() -> dict[str, Rows]:
    """The samples of each speaker."""
    found: dict[str, Rows] = {}
    for row, wave_S, rate_hz in recordings("fsdd.zip"):
        found.setdefault(row["speaker"], []).append({"audio": (wave_S, rate_hz), "label": str(row["digit"])})
    return found


def heard(train: Rows, changes: Any, seed: int, steps: int) -> mm.Model:
    kind = AudioFrames(rate_hz=8000, mels=40, stack=3, trim_db=20.0, stem_channels=16)
    core = mm.Core(width=64, depth=2, heads=4, dropout=0.1)
    return trained(HEAR, train, kind, core, changes, seed, steps=steps, batch=48, lr=2e-3, optimizer="muon", ema=0.99)


SPEAKERS = ("george", "jackson", "lucas", "theo")


def speaker(augmented: bool, left_out: str, seed: int, steps: int | None) -> tuple[float, float]:
    """The share right of the clips of a speaker who was left out, and CPU-seconds."""
    torch.set_num_threads(1)
    start, by = time.process_time(), clips()
    train = [sample for name, some in by.items() if name != left_out for sample in some]
    model = heard(train, augment.for_sounds() if augmented else None, seed, steps or 700)
    share = right(model, HEAR, by[left_out])
    print(f"  {'augmented' if augmented else 'plain'}, without {left_out}: {share:.2%}", flush=True)
    return share, time.process_time() - start


def speakers(ways: Ways, seed: int, steps: int | None, pool: Executor) -> Iterator[Row]:
    jobs = {
        (augmented, name): pool.submit(speaker, augmented, name, seed, steps) for augmented in ways for name in SPEAKERS
    }
    for augmented in ways:
        title = "augment.for_sounds()" if augmented else "no augmentation"
        shares, seconds = zip(*(jobs[augmented, name].result() for name in SPEAKERS), strict=True)
        yield title, [f"{share:.1%}" for share in (*shares, float(np.mean(shares)), min(shares))], sum(seconds)


# pictures
def at_size(image_CYX: torch.Tensor, factor: float) -> torch.Tensor:
    size = [round(side * factor) for side in image_CYX.shape[1:]]
    return torch.nn.functional.interpolate(image_CYX[None], size, mode="bilinear", antialias=True)[0]


def turned(image_CYX: torch.Tensor, degrees: float) -> torch.Tensor:
    """By Pillow, so that the test does not use what the training uses."""
    planes = [Image.fromarray(plane.numpy()).rotate(degrees, Image.Resampling.BICUBIC) for plane in image_CYX]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).clamp(0, 1)


def noisy(image_CYX: torch.Tensor) -> torch.Tensor:
    noise = np.random.default_rng(0).standard_normal(tuple(image_CYX.shape), np.float32)
    return (image_CYX + torch.from_numpy(noise) * 0.1).clamp(0, 1)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "half": lambda x: at_size(x, 0.5),
    "double": lambda x: at_size(x, 2.0),
    "turned by 15°": lambda x: turned(x, 15),
    "by -15°": lambda x: turned(x, -15),
    "noise of 0.1": noisy,
    "half as bright": lambda x: x * 0.5,
}


def of_digits(seed: int) -> tuple[Rows, Rows, ImagePatches, bool, dict[str, Any]]:
    """Samples to train and to test on, their kind, whether they may be mirrored, and settings of training."""
    kind = ImagePatches(patch=2, channels=1, mean=0.3, std=0.37)
    return *digits_8x8(seed), kind, False, {"steps": 1200, "batch": 64}


def of_clothing(seed: int) -> tuple[Rows, Rows, ImagePatches, bool, dict[str, Any]]:
    """As `of_digits`."""
    parts: dict[bool, Rows] = {True: [], False: []}
    for row, file in records("clothing.zip"):
        parts[row["split"] == "train"].append({"image": Image.open(file).convert("RGB"), "label": row["label"]})
    return parts[True], parts[False], ImagePatches(patch=16), True, {"steps": 800, "batch": 32}


def seen(name: str, augmented: bool, seed: int, steps: int | None) -> tuple[list[float], float]:
    """The shares right of each of CHANGES, and CPU-seconds."""
    torch.set_num_threads(1)
    start = time.process_time()
    train, test, kind, flip, settings = {"digits": of_digits, "clothing": of_clothing}[name](seed)
    shown = [{**row, "image": augment.PictureAugmentation.read(row["image"])} for row in test]
    changes = augment.for_pictures(smallest=2 * kind.patch, flip=flip) if augmented else None
    settings |= {"lr": 3e-3, "optimizer": "muon", "ema": 0.99, "weight_decay": 0.1} | (
        {"steps": steps} if steps else {}
    )
    model = trained(SEE, train, kind, mm.Core.tiny(), changes, seed, **settings)
    shares = [
        right(model, SEE, [{**row, "image": change(row["image"])} for row in shown]) for change in CHANGES.values()
    ]
    print(f"  {name}, {'augmented' if augmented else 'plain'}: {', '.join(f'{x:.2%}' for x in shares)}", flush=True)
    return shares, time.process_time() - start


def pictures(name: str, ways: Ways, seed: int, steps: int | None, pool: Executor) -> Iterator[Row]:
    jobs = {augmented: pool.submit(seen, name, augmented, seed, steps) for augmented in ways}
    for augmented in ways:
        title = "augment.for_pictures()" if augmented else "no augmentation"
        shares, seconds = jobs[augmented].result()
        worst = f"{100 * (min(shares[1:]) - shares[0]):+.1f}"
        yield title, [*(f"{share:.1%}" for share in shares), worst], seconds


HEAD = ["trained with", *CHANGES, "worst change"]
SECTIONS: dict[str, tuple[str, list[str], Callable[[Ways, int, int | None, Executor], Iterator[Row]]]] = {
    "speakers": (
        "Spoken digits of a speaker who was left out",
        ["trained with", *SPEAKERS, "mean", "worst"],
        speakers,
    ),
    "digits": ("Handwritten digits, changed", HEAD, partial(pictures, "digits")),
    "clothing": ("Photographs of clothes, changed", HEAD, partial(pictures, "clothing")),
}


def main() -> None:
    options = script.parser(__doc__, "seed", "steps", "write")
    options.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    options.add_argument("--processes", type=int, default=1, help="models that are trained at a time")
    options.add_argument("--augmented", action="store_true", help="leave the models without augmentation out")
    args = script.parsed(options)
    ways = (True,) if args.augmented else (False, True)
    for name in args.only:
        title, head, rows = SECTIONS[name]
        with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
            lines = [[way, *cells, f"{seconds:.0f}"] for way, cells, seconds in rows(ways, args.seed, args.steps, pool)]
        body = script.table([*head, "CPU-seconds"], lines)
        print(f"{name}\n{body}", flush=True)
        if args.write:
            more = (" --augmented" if args.augmented else "") + ("" if args.steps is None else f" --steps {args.steps}")
            command = f"uv run benchmarks/generalise.py --only {name} --seed {args.seed}{more} --write"
            report.keep(f"generalise_{name}", title, command, body)


if __name__ == "__main__":
    main()
