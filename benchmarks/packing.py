"""How full packs are on a mixture of real pictures, sound and text, beside greedy packing and padding; and what it costs.

uv run benchmarks/packing.py [--steps 500] [--write]          about 3 CPU-minutes; at least 98.5 % wanted

Five tasks with equal shares: CIFAR-10 pictures, Flickr8k photos with captions, FSDD digits, LJ Speech sentences, paragraphs of
Shakespeare. Every sample is fetched, decoded and encoded as in training.
"""

import io
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import DATA, manifest, text_of
from multimodal.data import Packs
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

TASKS = ("image -> label", "photo:image -> text", "audio -> text", "speech:audio -> text", "-> text")


class Zipped:
    """Records of a zip, read when they are asked for; opened in each process anew."""

    def __init__(self, path: Path, sample: Callable[[zipfile.ZipFile, dict], Mapping[str, Any]]):
        self.path, self.sample, self.opened = path, sample, (0, None)
        with zipfile.ZipFile(path) as z:
            self.rows = manifest(z)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if self.opened[0] != os.getpid():
            self.opened = os.getpid(), zipfile.ZipFile(self.path)
        return self.sample(self.opened[1], self.rows[index])  # type: ignore[arg-type]


class Cifar:
    def __init__(self) -> None:
        with np.load(DATA / "cifar10_train.npz") as z:
            self.jpeg, self.offset, self.label = z["jpeg"], z["offset"], z["label"]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        file = io.BytesIO(self.jpeg[self.offset[index] : self.offset[index + 1]].tobytes())
        return {"image": file, "label": str(self.label[index])}


def sources() -> dict[str, Any]:
    """Each task's data."""
    play = text_of("tinyshakespeare.txt.gz").split("\n\n")
    sound = {"fsdd.zip": "digit", "ljspeech.zip": "normalized"}
    digits, speech = (
        Zipped(
            DATA / file,
            lambda z, row, key=key, name=name: {name: io.BytesIO(z.read(row["file"])), "text": str(row[key])},
        )
        for (file, key), name in zip(sound.items(), ("audio", "speech"), strict=True)
    )
    photos = Zipped(
        DATA / "flickr8k.zip", lambda z, row: {"photo": io.BytesIO(z.read(row["file"])), "text": row["en"][0]}
    )
    return dict(zip(TASKS, (Cifar(), photos, digits, speech, [{"text": text} for text in play]), strict=True))


def greedy(lengths: list[int], budget: int, ahead: int, *, largest_first: bool) -> list[float]:
    """Packs made by taking what still fits, in order or the largest first, among the next `ahead` samples."""
    fills, waiting, coming = [], lengths[:ahead], lengths[ahead:]
    while len(waiting) == ahead:
        left, chosen = budget - waiting[0], {0}
        for i in sorted(range(1, ahead), key=lambda i: -waiting[i]) if largest_first else range(1, ahead):
            if waiting[i] <= left:
                left -= waiting[i]
                chosen.add(i)
        fills.append(1 - left / budget)
        waiting = [x for i, x in enumerate(waiting) if i not in chosen]
        taken, coming = coming[: ahead - len(waiting)], coming[ahead - len(waiting) :]
        waiting += taken
    return fills


def in_order(lengths: list[int], budget: int) -> list[float]:
    """Packs that are closed by the first sample that does not fit."""
    fills, used = [], 0
    for length in lengths:
        if used + length > budget:
            fills.append(used / budget)
            used = 0
        used += length
    return fills


def row(name: str, fills: list[float]) -> list[str]:
    numbers = (np.mean(fills), min(fills), np.percentile(fills, 1), np.percentile(fills, 50))
    return [name, *(f"{100 * number:.2f} %" for number in numbers)]


def main() -> None:
    options = script.parser(__doc__, "steps", "write", steps=500)
    options.add_argument("--budget", type=int, default=4096)
    args = script.parsed(options)
    kinds = {
        "image": ImagePatches(patch=4),
        "audio": AudioFrames(rate_hz=8000, mels=40),
        "text": TextBytes(),
        "label": Labels(tuple("0123456789")),
    }
    model = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), TASKS)
    feed = Packs(model.packer, sources(), tokens=args.budget, look_ahead=256)
    fills, lengths, started = [], [], time.process_time()
    for batch in feed.loader(0, args.steps, 0):
        fills.append(batch.filled)
        lengths += [span.total for span in batch.streams[0].layout.spans]
    seconds = time.process_time() - started
    drawn = torch.Generator().manual_seed(0)
    mixed = [lengths[i] for i in torch.randperm(len(lengths), generator=drawn)]  # packs lay their samples by length
    per_batch = [mixed[i : i + 64] for i in range(0, len(mixed) - 63, 64)]
    padded = [sum(part) / (64 * max(part)) for part in per_batch]
    rows = [
        row("ours: best subset, the oldest always in", [f for f in fills if f]),
        row("greedy, largest that fits, same look-ahead", greedy(mixed, args.budget, 256, largest_first=True)),
        row("greedy, first that fits, same look-ahead", greedy(mixed, args.budget, 256, largest_first=False)),
        row("in order, closed when one does not fit", in_order(mixed, args.budget)),
        row("batches of 64 padded to their longest", padded),
    ]
    body = (
        f"{len(lengths):,} samples of {min(lengths)} to {max(lengths)} tokens (mean {np.mean(lengths):.0f}) in {args.steps} "
        f"packs of {args.budget}, look-ahead 256; {1000 * seconds / args.steps:.0f} CPU-ms a pack, with decoding and encoding.\n\n"
        + script.table(["", "mean", "least", "1st percentile", "median"], rows)
        + f"\nPacks filled to the last token: {sum(f == 1 for f in fills)} of {len(fills)}."
    )
    print(body)
    if args.write:
        report.keep("packing", "How full packs are", f"uv run benchmarks/packing.py --steps {args.steps} --write", body)


if __name__ == "__main__":
    main()
