"""The recordings of cross_modal_demo.py: our own synthetic voices, or the Free Spoken Digit Dataset."""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal import ConfigError

RATE_HZ = 8000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Clip:
    """One recorded word: its samples, float32 at RATE_HZ, and who says it."""

    wave_S: Tensor
    word: str
    speaker: str


@dataclass(frozen=True)
class SoundSet:
    """Clips to train on and to test on.

    about: who speaks in the test.
    unheard: clips of a speaker who is in neither, where the speakers of the test are those of training.
    """

    train: Sequence[Clip]
    test: Sequence[Clip]
    about: str
    unheard: Sequence[Clip] = ()


def synthetic() -> SoundSet:
    """Ten digits and six words by espeak-ng voices; the test voices speak nowhere in training. Made by make_spoken_words.py."""
    folder = Path(__file__).parent / "data"
    wave, _ = soundfile.read(folder / "spoken_words.flac", dtype="float32")
    clips: dict[str, list[Clip]] = {"train": [], "test": []}
    for row in json.loads((folder / "spoken_words.json").read_text(encoding="utf-8")):
        part = torch.from_numpy(wave[row["start"] : row["start"] + row["length"]].copy())
        clips[row["split"]].append(Clip(part, row["word"], row["voice"]))
    return SoundSet(clips["train"], clips["test"], "unseen synthetic voices")


def fsdd(path: Path, held_out: str | None) -> SoundSet:
    """Real recordings: a folder of DIGIT_SPEAKER_TAKE.wav, or a zip of one. Takes 0 to 4 are the test, as its authors say."""
    files = _wav_files(path)
    known: dict[bool, list[Clip]] = {True: [], False: []}
    unheard = []
    for name, data in files:
        digit, speaker, take = Path(name).stem.split("_")
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        if rate != RATE_HZ:
            raise ConfigError(f"{name}: {rate} Hz, but these recordings are {RATE_HZ} Hz")
        clip = Clip(torch.from_numpy(wave), DIGITS[int(digit)], speaker)
        (unheard if speaker == held_out else known[int(take) < 5]).append(clip)
    if held_out and not unheard:
        speakers = sorted({clip.speaker for clip in known[False]})
        raise ConfigError(f"--hold-out {held_out}: there is no such speaker; there are {', '.join(speakers)}")
    return SoundSet(known[False], known[True], "held-out takes of known speakers", unheard)


def _wav_files(path: Path) -> list[tuple[str, bytes]]:
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = [(name, archive.read(name)) for name in archive.namelist() if name.endswith(".wav")]
    else:
        files = [(f.name, f.read_bytes()) for f in sorted(path.glob("**/*.wav"))]
    if not files:
        raise ConfigError(f"--audio fsdd: no .wav files in {str(path)!r}; give the data set's folder or a zip of it")
    return files


def disturbed(wave_S: Tensor) -> Tensor:
    """The same word a little faster or slower (and so higher or lower), with silence around it and noise under it."""
    speed = np.random.uniform(0.85, 1.2)
    wave_S = F.interpolate(wave_S[None, None], size=int(len(wave_S) / speed), mode="linear")[0, 0]
    before, after = np.random.randint(0, RATE_HZ // 12, 2)
    wave_S = F.pad(wave_S, (int(before), int(after)))
    loudness = float(wave_S.std()) * 10 ** (-np.random.uniform(10, 45) / 20)  # 10 to 45 dB below the word
    return wave_S + loudness * torch.randn(len(wave_S))
