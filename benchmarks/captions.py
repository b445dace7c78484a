"""Captions of Flickr8k photos, from scratch: one model reads photos and learns to write from more captions without photos.

    uv run benchmarks/captions.py --folder RUN           about 23 CPU-minutes on one thread

The data are flickr8k.zip (5,000 photos to train on, 242 to score, five captions each) and captions_en.txt.gz in the folder
MULTIMODAL_DATA. The 145,000 captions are those of Multi30k's training photos; the scored photos are
Multi30k *validation* photos, and none of them looks like a training photo, so nothing that is scored was seen.
--score FOLDER scores the two models of a run; --picture FILE draws some photos with what was written.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import script
from benchmarks.captions_score import Cider, scores
from benchmarks.data import lines_of, records
from multimodal import Core, Model, NextToken, Recipe, Task, fit, override
from multimodal_tokenizers import ImagePatches, TextBPE

TASK, BLIND = "image -> text", "-> text"
SIDE = 96  # pixels a photo is read at, of its 128
LEAST = 0.75  # of the side of a photo that a random crop shows
MORE = 0.5  # captions without a photo for each one with
MIRRORED = {"left": "right", "right": "left"}
RECIPE = Recipe(steps=1200, batch=96, lr=3e-3, optimizer="muon", ema=0.995, warmup=0.1, checkpoint_every=100)


def plain(caption: str) -> str:
    """Lower case, letters and digits only, as usual on this set."""
    return " ".join(re.sub("[^a-z0-9]+", " ", caption.lower()).split())


@dataclass(frozen=True)
class Photos:
    """Photos (128, 128, 3) uint8 with their captions; as training samples, each caption with a random crop, mirrored or not."""

    images: Sequence[np.ndarray]
    captions: Sequence[Sequence[str]]

    @classmethod
    def read(cls, split: str) -> "Photos":
        """The photos of "train" or "val"."""
        found = records("flickr8k.zip", lambda rows: [row for row in rows if row["split"] == split])
        pairs = [(np.asarray(Image.open(file).convert("RGB")), list(map(plain, row["en"]))) for row, file in found]
        return cls([image for image, _ in pairs], [captions for _, captions in pairs])

    @cached_property
    def pairs(self) -> list[tuple[int, str]]:
        """Every caption with its photo's number."""
        return [(i, caption) for i, captions in enumerate(self.captions) for caption in captions]

    @property
    def sentences(self) -> list[str]:
        return [caption for _, caption in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        photo, text = self.pairs[index]
        image = Image.fromarray(self.images[photo])
        width, height = np.random.uniform(LEAST, 1, 2) * image.size
        x, y = np.random.uniform(0, 1, 2) * (image.width - width, image.height - height)
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (x, y, x + width, y + height))
        if np.random.rand() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            text = " ".join(MIRRORED.get(word, word) for word in text.split())
        return {"image": image, "text": text}

    def whole(self) -> list[dict[str, Any]]:
        """Samples without captions: every photo once, uncut."""
        return [{"image": Image.fromarray(i).resize((SIDE, SIDE), Image.Resampling.BILINEAR)} for i in self.images]


def other_captions() -> list[str]:
    """145,000 captions of Multi30k's training photos."""
    return [text for line in lines_of("captions_en.txt.gz") if (text := plain(line))]


def train(photos: Photos, folder: Path, recipe: Recipe) -> None:
    """Two models with the same core: one reads the photos; the blind one gets half as many steps, having less to learn."""
    text = TextBPE.train(photos.sentences, vocab_size=3000)
    tokenizers = {"image": ImagePatches(patch=16, mean=0.45, std=0.27), "text": text}
    core = Core(width=192, depth=4, heads=4, dropout=0.15)
    head = NextToken(label_smoothing=0.1)
    others = other_captions()
    alone = [{"text": caption} for caption in others]
    model = Model(tokenizers, core, [Task(TASK, head), Task(BLIND, head, weight=MORE)], seed=recipe.seed)
    mix = {TASK: 1, BLIND: MORE}
    print(model.report())
    with script.cpu_time("with photos:"):
        fit(model, {TASK: photos, BLIND: alone}, recipe, mix=mix, folder=folder / "photos", resume=True)
    times = round(len(others) / len(photos) / MORE)  # so that blind captions come in the same mix
    alone += [{"text": caption} for caption in photos.sentences] * times
    model = Model({"text": text}, core, [Task(BLIND, head)], seed=recipe.seed)
    with script.cpu_time("blind:"):
        fit(model, {BLIND: alone}, recipe, folder=folder / "blind", resume=True, steps=recipe.steps // 2)


def written(model: Model, photos: Photos, **options: Any) -> list[str]:
    """The model's captions."""
    return [str(answer) for answer in model.generate(TASK, photos.whole(), max_tokens=40, **options)]


def thumbnails(photos: Photos) -> np.ndarray:
    """8 x 8 mean colours."""
    return np.stack([image.reshape(8, 16, 8, 16, 3).mean((1, 3)).ravel() for image in photos.images])


def histograms(photos: Photos) -> np.ndarray:
    """Roots of the shares of 8 x 8 x 8 colours: their distance is Hellinger's."""
    colours = [(image // 32 @ np.array([64, 8, 1])).ravel() for image in photos.images]
    return np.sqrt([np.bincount(colour, minlength=512) / colour.size for colour in colours])


def neighbours(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The nearest training row of every test row."""
    return ((train**2).sum(1) - 2 * test @ train.T).argmin(1)


def answers(folder: Path, train: Photos, test: Photos) -> dict[str, list[str]]:
    """The captions of the test photos by each method, ours first."""
    model = Model.load(folder / "photos" / "model")
    ours = written(model, test)
    blind_model = Model.load(folder / "blind" / "model")
    blind, unseen = (str(m.generate(BLIND, [{}], max_tokens=40)[0]) for m in (blind_model, model))
    cider = Cider(train.captions)
    consensual = cider.consensual(dict.fromkeys(train.sentences), train.sentences)
    print(f"  blind: {blind}\n  ours, without a photo: {unseen}\n  most consensual training caption: {consensual}")
    found = {
        "ours, greedy": ours,
        "ours, 4 beams": written(model, test, beams=4, length_penalty=1.0),
        "blind, 4 beams": [str(blind_model.generate(BLIND, [{}], max_tokens=40, beams=4)[0])] * len(ours),
        "ours, of the next photo": ours[1:] + ours[:1],
        "ours, without a photo": [unseen] * len(ours),
        "blind, greedy": [blind] * len(ours),
        "most consensual caption": [consensual] * len(ours),
    }
    best = [cider.consensual(captions, captions) for captions in train.captions]
    for name, features in (("thumbnail", thumbnails), ("histogram", histograms)):
        found[f"nearest {name}"] = [best[i] for i in neighbours(features(train), features(test))]
    return found


def draw(photos: Photos, captions: Sequence[str], path: Path) -> None:
    """Photos with captions, two rows."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    figure: Figure = pyplot.figure(figsize=(14, 8))
    for place, (image, caption) in enumerate(zip(photos.images, captions, strict=False), start=1):
        axes = figure.add_subplot(2, 4, place)
        axes.imshow(image)
        axes.set_axis_off()
        axes.set_title(textwrap.fill(caption, 40), fontsize=11)
        if place == 8:
            break
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    options = script.parser(__doc__, "folder", "score", "steps", "seed", folder=Path("captions_run"), steps=1200)
    options.add_argument("--picture", type=Path)
    args = script.parsed(options)
    photos, test = Photos.read("train"), Photos.read("val")
    if not args.score:
        train(photos, args.folder, override(RECIPE, steps=args.steps, seed=args.seed))
    found = answers(args.score or args.folder, photos, test)
    for name, captions in found.items():
        print(f"{name:<26}", "  ".join(f"{key} {value:.2f}" for key, value in scores(captions, test.captions).items()))
    ours = next(iter(found.values()))
    every = len(ours) // 8
    for captions, caption in list(zip(test.captions, ours, strict=True))[::every][:8]:
        print(f"  {caption}\n  ~ {captions[0]}")
    if args.picture:
        draw(Photos(test.images[::every], []), ours[::every], args.picture)


if __name__ == "__main__":
    main()
