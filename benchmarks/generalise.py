"""How well a model answers what it was not trained on: other speakers; other sizes, angles, noise and light of pictures.

    uv run benchmarks/generalise.py --write                     about 40 CPU-minutes on one thread
    uv run benchmarks/generalise.py --only speakers --tune      with other augmentations: compare them on training speakers only

speakers: spoken digits of FSDD; each of the four speakers is left out in turn, and the model is trained on all clips of the other
three. digits: scikit-learn's, a stratified fifth held out. clothing: photographs of ten classes, the official validation part. The
pictures of the test are shown as they are, and changed. Each model is trained twice: without augmentation, and with the defaults
`mm.augment.for_sounds()` and `mm.augment.for_pictures()`; all else is the same. FSDD and clothing are in the folder
MULTIMODAL_DATA.
"""

import time
from collections.abc import Callable, Iterator, Mapping
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
    mm.fit(model, {task: data}, seed=seed, **settings, **PLAIN)
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
    kind, core = AudioFrames(rate_hz=8000, mels=40, stack=3), mm.Core(width=96, depth=4, heads=4, dropout=0.1)
    return trained(HEAR, train, kind, core, changes, seed, steps=steps, batch=48, lr=2e-3, optimizer="muon", ema=0.99)


def speakers(seed: int, steps: int | None) -> Iterator[Row]:
    by = clips()
    for name, changes in (("no augmentation", None), ("augment.for_sounds()", augment.for_sounds())):
        start, shares = time.process_time(), []
        for left_out in by:
            train = [sample for speaker, some in by.items() if speaker != left_out for sample in some]
            shares.append(right(heard(train, changes, seed, steps or 1500), HEAR, by[left_out]))
            print(f"  {name}, without {left_out}: {shares[-1]:.2%}", flush=True)
        cells = [f"{share:.1%}" for share in (*shares, float(np.mean(shares)), min(shares))]
        yield name, cells, (time.process_time() - start) / len(by)
