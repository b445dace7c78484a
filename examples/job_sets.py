"""The samples of one_model_four_jobs.py: scanned digits and spoken words, or the real sets of a folder."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image_sets
import numpy as np
import sound_sets
import torch
from PIL import Image

import multimodal as mm
from multimodal.demo import DIGITS, RATE_HZ, Clip, disturbed
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBytes

CLASSIFY, CAPTION = "image -> label", "photo -> caption:text"
HEAR, SPELL = "audio -> heard:text", "audio -> text"
DRAW, SAY = "text -> drawing", "text -> speech"
JOBS = {"classify": (CLASSIFY,), "transcribe": (HEAR, SPELL), "caption": (CAPTION,), "generate": (DRAW, SAY)}


@dataclass(frozen=True)
class Rows:
    """Samples made from rows when they are asked for."""

    rows: Sequence[Any]
    make: Callable[[Any], Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.make(self.rows[index])


@dataclass(frozen=True)
class JobSet:
    """Samples by task to learn from and to test on, and the tokenizers that fit them."""

    tokenizers: dict[str, mm.Tokenizer]
    train: dict[str, Any]  # Rows, of which the pictures may be Augmented
    test: dict[str, Rows]


def small(seed: int) -> JobSet:
    """What comes with the packages: scikit-learn's scanned digits, and synthetic voices that say digits and commands."""
    digits, sounds = image_sets.digits(seed), sound_sets.synthetic()
    pictures = [(np.asarray(digits.train.images[i]), digits.train.labels[i]) for i in range(len(digits.train))]
    unseen = [(np.asarray(digits.test.images[i]), digits.test.labels[i]) for i in range(len(digits.test))]
    heavy = float(np.median([x.mean() for x, _ in pictures]))

    def captioned(row: tuple[np.ndarray, str]) -> dict[str, Any]:
        weight = "heavy" if row[0].mean() > heavy else "light"
        return {"photo": row[0], "caption": f"a {weight} {DIGITS[int(row[1])]}"}

    patches = ImagePatches(patch=2, channels=1, mean=0.3, std=0.37)
    return _jobs(
        patches, pictures, unseen, sounds, Rows(pictures, captioned), Rows(unseen, captioned), digits.train.changes
    )


def real(folder: Path) -> JobSet:
    """MNIST's test part (8,000 to learn from, 2,000 to test on), the Free Spoken Digits, and Flickr8k's captions, from a folder."""
    if missing := [f for f in ("mnist_t10k", "fsdd.zip", "flickr8k.zip") if not (folder / f).exists()]:
        raise mm.ConfigError(f"--real {folder}: there is no {', '.join(missing)}")
    images, labels = (idx(folder / "mnist_t10k" / f"t10k-{n}-ubyte.gz") for n in ("images-idx3", "labels-idx1"))
    order = np.random.default_rng(0).permutation(len(images))
    pictures = [(images[i], str(labels[i])) for i in order]
    with zipfile.ZipFile(folder / "flickr8k.zip") as archive:
        lines = [json.loads(x) for x in archive.read("manifest.jsonl").decode("utf-8").splitlines() if x]
        photos = [(archive.read(row["file"]), row["en"], row["split"]) for row in lines]

    def captioned(row: tuple[bytes, list[str], str]) -> dict[str, Any]:
        photo = Image.open(io.BytesIO(row[0])).convert("RGB").resize((96, 96))
        return {"photo": photo, "caption": row[1][np.random.randint(len(row[1]))].lower()}

    return _jobs(
        ImagePatches(patch=4, channels=1),
        pictures[:8000],
        pictures[8000:],
        sound_sets.fsdd(folder / "fsdd.zip", None),
        *(Rows([p for p in photos if p[2] == split], captioned) for split in ("train", "val")),
        changes=(),
        photo=ImagePatches(patch=16),
    )


def _jobs(
    patches: ImagePatches,
    pictures: Sequence[tuple[np.ndarray, str]],
    unseen: Sequence[tuple[np.ndarray, str]],
    sounds: sound_sets.SoundSet,
    captions: Rows,
    unseen_captions: Rows,
    changes: tuple[mm.augment.Augmentation, ...],
    photo: ImagePatches | None = None,
) -> JobSet:
    frames = AudioFrames(rate_hz=RATE_HZ, mels=40, hop_ms=16, window_ms=32, stack=1, normalise="fixed")
    tokenizers: dict[str, mm.Tokenizer] = {
        "image": patches,
        "photo": photo or patches,
        "audio": AudioFrames(rate_hz=RATE_HZ, mels=40, stack=3),
        "text": TextBytes(),
        "label": Labels(tuple("0123456789")),
        "drawing": Codes.train(ImagePatches(patch=patches.patch, channels=1), [x for x, _ in pictures], size=256),
        "speech": Codes.train(frames, [(clip.wave_S, RATE_HZ) for clip in sounds.train], size=256),
    }

    def seen(row: tuple[np.ndarray, str]) -> dict[str, Any]:
        return {"image": row[0], "label": row[1]}

    def heard(clip: Clip) -> dict[str, Any]:
        return {"audio": (disturbed(clip.wave_S), RATE_HZ), "text": clip.word, "heard": clip.word}

    def spoken(clip: Clip) -> dict[str, Any]:
        return {"text": clip.word, "speech": (clip.wave_S, RATE_HZ)}

    def plain(clip: Clip) -> dict[str, Any]:
        return {"audio": (clip.wave_S, RATE_HZ), "text": clip.word, "heard": clip.word}

    def drawn(row: tuple[np.ndarray, str]) -> dict[str, Any]:
        return {"text": DIGITS[int(row[1])], "drawing": row[0]}

    shown = Rows(pictures, seen)
    train = {
        CLASSIFY: mm.augment.Augmented(shown, {"image": changes}) if changes else shown,
        HEAR: Rows(sounds.train, heard),
        SPELL: Rows(sounds.train, heard),
        CAPTION: captions,
        DRAW: Rows(pictures, drawn),
        SAY: Rows(sounds.train, spoken),
    }
    test = {
        CLASSIFY: Rows(unseen, seen),
        HEAR: Rows(sounds.test, plain),
        SPELL: Rows(sounds.test, plain),
        CAPTION: unseen_captions,
        DRAW: Rows(unseen, drawn),
        SAY: Rows(sounds.test, spoken),
    }
    return JobSet(tokenizers, train, test)


class Reader:
    """Names what was drawn or said by its nearest example: knows nothing of the model, and never learned from what it wrote."""

    def __init__(self, features: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self.known, self.names = torch.stack(list(features)), list(names)

    def share(self, features: Sequence[torch.Tensor], names: Sequence[str]) -> float:
        """The share that it names so."""
        nearest = torch.cdist(torch.stack(list(features)), self.known).argmin(1).tolist()
        return float(np.mean([self.names[i] == name for i, name in zip(nearest, names, strict=True)]))


def looks(image: Any) -> torch.Tensor:
    """A picture's pixels as one row in 0..1."""
    return torch.tensor(np.asarray(image)).float().flatten() / (255 if np.asarray(image).max() > 2 else 1)


def sounds_like(wave_S: torch.Tensor) -> torch.Tensor:
    """A sound's log-mel bands at 24 moments of it, as one row."""
    heard = AudioFrames(rate_hz=RATE_HZ, mels=24, stack=1, normalise="clip")((wave_S, RATE_HZ)).content
    return torch.nn.functional.interpolate(heard.T[None], size=24, mode="linear")[0].flatten()


def idx(path: Path) -> np.ndarray:
    """What an MNIST file holds."""
    with gzip.open(path) as file:
        raw = file.read()
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(np.frombuffer(raw, ">i4", raw[3], 4))
