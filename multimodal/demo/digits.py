"""Handwritten and spoken digits: scans from scikit-learn, and recordings of synthetic voices beside this file."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.shapes import ConfigError

RATE_HZ = 8000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Clip:
    """One recorded word: its samples (float32, at RATE_HZ), the word, and its speaker."""

    wave_S: Tensor
    word: str
    speaker: str


def spoken_words() -> tuple[list[Clip], list[Clip]]:
    """Return (training clips, test clips): ten digits and six other words by espeak-ng voices. No voice is in both.

    `examples/make_spoken_words.py` made the recordings.
    """
    import soundfile

    folder = Path(__file__).parent
    wave_S, _ = soundfile.read(folder / "spoken_words.flac", dtype="float32")
    clips: dict[str, list[Clip]] = {"train": [], "test": []}
    for row in json.loads((folder / "spoken_words.json").read_text(encoding="utf-8")):
        part_S = torch.from_numpy(wave_S[row["start"] : row["start"] + row["length"]].copy())
        clips[row["split"]].append(Clip(part_S, row["word"], row["voice"]))
    return clips["train"], clips["test"]


def scanned_digits() -> tuple[np.ndarray, list[int]]:
    """Return (1,797 scans of 8 x 8 pixels by 43 writers, uint8 (1797, 8, 8) in 0..255; their digits).

    Raises:
        ConfigError: scikit-learn, which contains the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the scanned digits come with scikit-learn, which is missing; pip install 'multimodal-stream[demo]'"
        ) from error
    scans, digits = (np.asarray(part) for part in load_digits(return_X_y=True))
    return (scans.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), [int(digit) for digit in digits]


def disturbed(wave_S: Tensor, pause_s: float = 1 / 12) -> Tensor:
    """A randomly changed copy of a word: other speed (and pitch), silence before and after it, and added noise.

    wave_S: at RATE_HZ. pause_s: the longest silence before the word, and after it, in seconds.
    """
    speed = np.random.uniform(0.85, 1.2)
    wave_S = F.interpolate(wave_S[None, None], size=int(len(wave_S) / speed), mode="linear")[0, 0]
    before, after = np.random.randint(0, int(RATE_HZ * pause_s), 2)
    wave_S = F.pad(wave_S, (int(before), int(after)))
    loudness = float(wave_S.std()) * 10 ** (-np.random.uniform(10, 45) / 20)  # 10 to 45 dB below the word
    return wave_S + loudness * torch.randn(len(wave_S))
