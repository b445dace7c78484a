"""Captions of Flickr8k photos by two trained parts: DINOv2-S sees, SmolLM2-135M writes, and a linear connector joins them.

    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/captioner.py --folder RUN --write        about an hour of CPU on one thread

The eye is frozen, and its vectors are computed once and cached in RUN: a photo is one token, of its class token and the mean of its
patches. The connector starts where least squares put it: from this vector to the mean embedding of the words of the photo's
captions. From there it learns with the upper half of the language model. Photos, captions and scores are those of
benchmarks/captions.py, which trains from nothing; the weights those of benchmarks/fetched_weights.py. What else was tried is in
DECISIONS.md.
"""

import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import report, script
from benchmarks.captions import TASK, Photos
from benchmarks.captions_score import scores
from benchmarks.fetched_weights import ready
from multimodal import Model, Recipe, Tower, fit, pretrained
from multimodal.heads.pool import FirstAndMean
from multimodal.tower import Linear, Pooled
from multimodal.train import cached
from multimodal_tokenizers.fit import Fit

SIDE = 126  # pixels at which a photo is read, of its 128
PATCHES = (SIDE // 14) ** 2
RECIPE = Recipe(
    steps=1300,
    batch=16,
    lr=2e-4,
    warmup=0.05,
    layer_decay=0.95,
    freeze=("image.frozen_part", "text", "core[:15]"),
    betas=(0.9, 0.99),
)
RIDGE = 1000.0


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
    tower = Tower.of(seen, Pooled(1 + PATCHES, FirstAndMean(), Linear()), kind="image")
    return pretrained(ready("smollm2")).model([TASK], {"image": tower}, seed=seed)


@torch.inference_mode()
def start_connector(model: Model, photos: Photos) -> None:
    """Set the connector by ridge regression from the tower's vectors to words of the captions.

    The words of a photo are the mean of the embeddings of its captions' tokens, rare ones weighing more (by the logarithm of the
    inverse share of photos that have them). What is predicted is scaled to the size of an embedding.
    """
    tower: Any = model.embeds["image"]
    embedding_VD: Any = model.embeds["text"].weight
    text, seen = model.packer.tokenizers["text"], []
    ids = [torch.cat([text(caption).content for caption in captions]) for captions in photos.captions]
    counts_V = torch.bincount(torch.cat([some.unique() for some in ids]), minlength=len(embedding_VD))
    rare_V = torch.log(len(ids) / (counts_V + 1)).clamp(min=0)
    words_ND = torch.stack([rare_V[some] @ embedding_VD[some] / rare_V[some].sum() for some in ids])
    hook = tower.connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for start in range(0, len(photos.images), 50):
        part = [{"image": Image.fromarray(image)} for image in photos.images[start : start + 50]]
        model.rows(model.pack(TASK, part, answers=False))
    hook.remove()
    vector_NF = torch.cat(seen)
    words_ND = words_ND - words_ND.mean(0)
    mean_F, std_F = vector_NF.mean(0), vector_NF.std(0)
    vector_NF = (vector_NF - mean_F) / std_F
    gram_FF = vector_NF.T @ vector_NF + RIDGE * torch.eye(vector_NF.shape[1])
    weight_FD = torch.linalg.solve(gram_FF, vector_NF.T @ words_ND)
    weight_FD *= embedding_VD.norm(dim=1).mean() / (vector_NF @ weight_FD).norm(dim=1).mean()
    weight_FD /= std_F[:, None]
    tower.connector.weight.copy_(weight_FD.T)
    tower.connector.bias.copy_(-mean_F @ weight_FD)


def trained(folder: Path, photos: Photos, seed: int) -> Model:
    model, vectors = captioner(seed), str(folder / "vectors")
    with script.cpu_time("start of the connector:"), cached(model, vectors):
        start_connector(model, photos)
    with script.cpu_time("training:"):
        fit(model, {TASK: Pairs(photos)}, RECIPE, folder=folder / "run", cache=vectors, seed=seed)
    return model


def from_nothing() -> list[list[str]]:
    """The rows of benchmarks/captions.py, as its results have them."""
    lines = (report.ROOT / "benchmarks" / "results" / "captions.md").read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"  +", line) for line in lines if line.startswith(("ours, greedy", "ours, 4 beams"))]
    return [
        [f"from nothing, {name.removeprefix('ours, ')}", *(cell.split()[1] for cell in row)] for name, *row in cells
    ]


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
    rows += from_nothing()
    trained_in = "trained before" if args.score else f"{minutes:.0f} CPU-minutes of training on one thread"
    effort = f"{len(samples)} photographs; {trained_in}, seed {args.seed}"
    body = f"{script.table(head, rows)}\n{effort}"
    print(body)
    if args.write:
        command = f"benchmarks/captioner.py{' --score RUN' if args.score else ''} --seed {args.seed} --write"
        report.keep("captioner", "A captioner of two trained parts", command, body)


if __name__ == "__main__":
    main()
