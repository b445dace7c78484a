"""The recordings of cross_modal_demo.py: our own synthetic voices, or the Free Spoken Digit Dataset."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch

from multimodal import ConfigError
from multimodal.demo import DIGITS, RATE_HZ, Clip, spoken_words


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
    """Ten digits and six words by espeak-ng voices; the test voices speak nowhere in training. They come with multimodal."""
    return SoundSet(*spoken_words(), "unseen synthetic voices")


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
