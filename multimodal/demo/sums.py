"""The demo model, which adds a drawn digit and a spoken digit: its samples, declaration and training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multimodal.core import Core
from multimodal.data import Samples
from multimodal.demo.digits import DIGITS, RATE_HZ, Clip, disturbed, scanned_digits, spoken_words
from multimodal.model import Model
from multimodal.train import Recipe, TrainingJob

SEE, HEAR, ADD = "image -> text", "audio -> text", "image audio -> text"
NUMBERS = (*DIGITS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
TENTH = 10  # one scan in ten is held out
PAUSE_S = 0.4  # the longest silence before and after a word, as when somebody presses a button to record
SIDE = 16  # side of a picture in pixels, twice that of a scan: room for digits that are small or off-centre


@dataclass(frozen=True)
class DigitSamples:
    """Samples of one task: pictures with their digit, clips with their word, or both with their sum.

    pictures: samples {"image", "label"}; the label is a digit. None: no picture field.
    clips: spoken words. None: no audio field.
    disturb: augmentation of clips, applied at each access; the clip for a picture is then random at each access too.
    seed: chooses the clip for each picture if there is no augmentation.
    """

    pictures: Samples | None
    clips: Sequence[Clip] | None
    disturb: Callable[[Tensor], Tensor] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.pictures) if self.pictures is not None else len(self.clips or ())

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {}
        seen = 0
        if self.pictures is not None:
            picture = self.pictures[index]
            seen = int(picture["label"])
            sample |= {"image": picture["image"], "text": DIGITS[seen]}
        if self.clips is not None:
            both = self.pictures is not None
            draw = np.random if self.disturb else np.random.default_rng([self.seed, index])
            clip = self.clips[int(draw.random() * len(self.clips)) if both else index]
            wave_S = self.disturb(clip.wave_S) if self.disturb else clip.wave_S
            sample |= {"audio": (wave_S, RATE_HZ), "text": clip.word}
            if both:
                heard = DIGITS.index(clip.word)
                sample["text"] = f"{DIGITS[seen]} plus {clip.word} is {NUMBERS[seen + heard]}"
        return sample


@dataclass(frozen=True)
class Sheets:
    """Scans resized to pictures of SIDE x SIDE pixels.

    moved: whether to augment them at each access, to look more like drawings: smaller, rotated, off-centre, with thicker strokes.
    """

    scans: np.ndarray
    digits: Sequence[int]
    moved: bool = False

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image
        from torchvision.transforms import ColorJitter, InterpolationMode, RandomAffine

        sheet = Image.fromarray(self.scans[index]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        if self.moved:
            sheet = RandomAffine(15, (0.12, 0.12), (0.55, 1.1), 12, interpolation=InterpolationMode.BILINEAR)(sheet)
            sheet = ColorJitter(brightness=(1.0, 2.5))(sheet)  # makes the grey edges of strokes white too
        return {"image": sheet, "label": str(self.digits[index])}


def sums_model(seed: int = 0) -> Model:
    """The untrained model. It accepts pictures of any size, such as a drawing on the web page."""
    from multimodal_tokenizers import AudioFrames, ImagePatches, TextBytes
    from multimodal_tokenizers.fit import Fit

    fit_sheet = Fit(size=(SIDE, SIDE), filter="bilinear")
    return Model(
        {
            "image": ImagePatches(patch=4, channels=1, mean=0.3, std=0.37, fit=fit_sheet),
            "audio": AudioFrames(rate_hz=RATE_HZ, mels=40, stack=3),
            "text": TextBytes(),
        },
        Core(width=96, depth=4, heads=4),
        [ADD, SEE, HEAR],
        seed=seed,
    )


def sums_job(steps: int) -> TrainingJob:
    """The training of the demo model on nine tenths of the scans and on the training voices; sums of the other scans and voices are
    held out.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    scans, digits = scanned_digits()
    unseen = np.arange(len(digits)) % TENTH == 0
    clips, unheard = ([clip for clip in part if clip.word in DIGITS] for part in spoken_words())
    pictures = Sheets(scans[~unseen], list(np.compress(~unseen, digits)), moved=True)
    speak = partial(disturbed, pause_s=PAUSE_S)
    data = {
        ADD: DigitSamples(pictures, clips, speak),
        SEE: DigitSamples(pictures, None),
        HEAR: DigitSamples(None, clips, speak),
    }
    held_out = {ADD: DigitSamples(Sheets(scans[unseen], list(np.compress(unseen, digits))), unheard)}
    recipe = Recipe(steps=steps, batch=96, lr=3e-3, optimizer="muon", ema=0.98, weight_decay=0.1, workers=1)
    # more samples of handwriting: it is the hardest of the three, and its samples are the shortest
    return TrainingJob(
        model=sums_model(), data=data, evaluation=held_out, mix={ADD: 1, SEE: 3, HEAR: 0.7}, recipe=recipe
    )


def write_examples(folder: Path) -> None:
    """Write a held-out picture and a held-out sound of each digit to a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    import soundfile
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    scans, digits = scanned_digits()
    for digit, word in enumerate(DIGITS):
        row = next(i for i in range(0, len(digits), TENTH) if digits[i] == digit)
        Image.fromarray(scans[row]).resize((128, 128), Image.Resampling.NEAREST).save(folder / f"{word}.png")
    for clip in {clip.word: clip for clip in spoken_words()[1] if clip.word in DIGITS}.values():
        soundfile.write(folder / f"{clip.word}.wav", clip.wave_S.numpy(), RATE_HZ)
