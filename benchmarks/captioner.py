"""Captions of Flickr8k photos by two trained parts: DINOv2-S sees, SmolLM2-135M writes, and a linear connector joins them.

    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/captioner.py --folder RUN --write        about 55 CPU-minutes on one thread

The eye is frozen, and its vectors are computed once and cached in RUN. First the connector learns alone, then with the language
model. Photos, captions and scores are those of benchmarks/captions.py, which trains from nothing; the weights those of
benchmarks/fetched_weights.py.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import report, script
from benchmarks.captions import TASK, Photos
from benchmarks.captions_score import scores
from benchmarks.fetched_weights import ready
from multimodal import Model, Recipe, Tower, fit, pretrained
from multimodal.tower import Dropped, PixelShuffle
from multimodal_tokenizers.fit import Fit

SIDE = 126  # pixels at which a photo is read, of its 128: 9 x 9 patches of 14
SQUARE = 3  # patches along the side of a square that is one token
FROM_NOTHING = {"BLEU-4": 10.4, "CIDEr": 0.27}  # what benchmarks/captions.py reaches
ALONE = Recipe(steps=60, batch=48, lr=2e-3, warmup=0.2, freeze=("image.frozen_part", "text", "core"))
TOGETHER = Recipe(steps=190, batch=48, lr=3e-4, warmup=0.1, freeze=("image.frozen_part", "text"))


class Pairs:
    """Every caption with its whole photo, as samples."""

    def __init__(self, photos: Photos) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        photo, text = self.photos.pairs[index]
        return {"image": Image.fromarray(self.photos.images[photo]), "text": text}


def captioner(seed: int) -> Model:
    """The two trained parts in one model."""
    seen = pretrained(ready("dinov2-s"))
    eye: Any = seen.tokenizers["image"]
    eye = dataclasses.replace(eye, of=dataclasses.replace(eye.of, fit=Fit(size=(SIDE, SIDE))))
    seen = dataclasses.replace(seen, tokenizers={"image": eye})
    tower = Tower.of(seen, Dropped(1, PixelShuffle(SQUARE)), kind="image")
    return pretrained(ready("smollm2")).model([TASK], {"image": tower}, seed=seed)


def trained(folder: Path, photos: Photos, seed: int) -> Model:
    model, data, cache = captioner(seed), {TASK: Pairs(photos)}, str(folder / "vectors")
    for name, recipe in (("connector", ALONE), ("together", TOGETHER)):
        with script.cpu_time(f"{name}:"):
            fit(model, data, recipe, folder=folder / name, cache=cache, seed=seed)
    return model


def main() -> None:
    options = script.parser(__doc__, "folder", "score", "seed", "write", folder=Path("captioner_run"))
    args = script.parsed(options)
    start = time.process_time()
    test = Photos.read("val")
    model = Model.load(args.score) if args.score else trained(args.folder, Photos.read("train"), args.seed)
    minutes = (time.process_time() - start) / 60
    samples = [{"image": Image.fromarray(image)} for image in test.images]
    found = {}
    for name, more in (("greedy", {}), ("4 beams", {"beams": 4, "length_penalty": 1.0})):
        written = [str(answer) for answer in model.generate(TASK, samples, max_tokens=40, **more)]
        found[name] = scores(written, test.captions)
        for caption, wanted in list(zip(written, test.captions, strict=True))[:: len(written) // 8][:8]:
            print(f"  {caption}\n  ~ {wanted[0]}")
    rows = [
        [f"DINOv2-S and SmolLM2-135M, {name}", *(f"{value[key]:.2f}" for key in value)] for name, value in found.items()
    ]
    head = ["", *next(iter(found.values()))]
    rows.append(
        ["from nothing (captions.py)", *(f"{FROM_NOTHING[key]:.2f}" if key in FROM_NOTHING else "" for key in head[1:])]
    )
    effort = f"{len(samples)} photographs; {minutes:.0f} CPU-minutes of training on one thread, seed {args.seed}"
    body = f"{script.table(head, rows)}\n{effort}"
    print(body)
    if args.write:
        command = f"benchmarks/captioner.py --seed {args.seed} --write"
        report.keep("captioner", "A captioner of two trained parts", command, body)


if __name__ == "__main__":
    main()
