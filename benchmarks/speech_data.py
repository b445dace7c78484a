"""The recordings of speech.py as samples {"audio", "text", "words"}, disturbed anew each time in training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.data import DATA, recordings
from multimodal.data import Samples

Sample = dict[str, Any]
Parts = tuple[Samples, Sequence[Sample]]  # to train on, to test on
STACK = 4  # frames of 10 ms a token, in all three


def digits() -> Parts:
    """Takes 5 to 49 of FSDD as strings that are made on the fly; 300 fixed strings of takes 0 to 4."""
    clips: dict[bool, list[Digit]] = {True: [], False: []}
    for row, wave_S, _ in recordings("fsdd.zip"):
        clips[row["take"] < 5].append(Digit(wave_S, str(row["digit"])))
    random = np.random.default_rng(0)
    return DigitStrings(clips[False]), [joined(clips[True], random, disturb=False) for _ in range(300)]


def ljspeech() -> Parts:
    """LJ Speech without every tenth clip, and these; lower-case letters, apostrophes and blanks."""
    clips = recordings("ljspeech.zip")
    rows = [_sample((wave_S, rate_hz), _plain(row["normalized"])) for row, wave_S, rate_hz in clips]
    return Reader([row for i, row in enumerate(rows) if i % 10]), rows[::10]


def an4() -> Parts:
    """Cepstra of AN4 without every eighth speaker, and these."""
    with np.load(DATA / "an4_mfcc.npz") as z:
        cepstra = np.split(z["mfcc"].astype(np.float32), z["offset"][1:-1])
        texts, speakers = [str(t) for t in z["text"]], [str(n).split("/")[0] for n in z["name"]]
    held_out = sorted(set(speakers))[::8]
    rows: dict[bool, list[Sample]] = {True: [], False: []}
    for frames_NF, text, speaker in zip(cepstra, texts, speakers, strict=True):
        rows[speaker in held_out].append(_sample(frames_NF, text.lower()))
    return Speakers(rows[False]), rows[True]


def _sample(audio: Any, text: str) -> Sample:
    return {"audio": audio, "text": text, "words": text}


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^a-z' ]+", " ", text.lower().replace("-", " ")).split())


def _generator() -> np.random.Generator:
    """One of its own, drawn from the global one, which `fit` seeds for every sample."""
    return np.random.default_rng(np.random.randint(2**31))


@dataclass(frozen=True)
class Digit:
    """One recorded digit at 8 kHz."""

    wave_S: np.ndarray
    name: str


@dataclass(frozen=True)
class DigitStrings:
    """Strings of 2 to 5 recordings of anybody's, made on the fly; an index means nothing."""

    clips: Sequence[Digit]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample:
        return joined(self.clips, _generator(), disturb=True)


def joined(clips: Sequence[Digit], random: np.random.Generator, *, disturb: bool) -> Sample:
    """2 to 5 recordings with gaps of up to 0.2 s, and noise 40 to 50 dB (disturbed: 10 to 50 dB) below the speech."""
    chosen = [clips[i] for i in random.integers(len(clips), size=random.integers(2, 6))]
    pieces = [np.zeros(random.integers(1600), np.float32)]  # 0.2 s x 8000 Hz
    for clip in chosen:
        wave_S = _faster(clip.wave_S, random.uniform(0.85, 1.2)) if disturb else clip.wave_S
        gain_db = random.uniform(-6, 6) if disturb else 0.0
        pieces += [wave_S * 10 ** (gain_db / 20), np.zeros(random.integers(1600), np.float32)]
    wave_S = _noisy(np.concatenate(pieces), random, random.uniform(10 if disturb else 40, 50))
    return _sample((wave_S, 8000), "".join(clip.name for clip in chosen))


def _faster(wave_S: np.ndarray, speed: float) -> np.ndarray:
    """Played faster, and so higher."""
    return np.interp(np.arange(0, len(wave_S) - 1, speed), np.arange(len(wave_S)), wave_S).astype(np.float32)


def _noisy(wave_S: np.ndarray, random: np.random.Generator, below_db: float) -> np.ndarray:
    noise_S = random.standard_normal(len(wave_S), dtype=np.float32)
    return wave_S + noise_S * float(wave_S.std()) * 10 ** (-below_db / 20)


@dataclass(frozen=True)
class Reader:
    """One voice, disturbed: speed, the room's colour (a random short filter), noise, and spans of silence (Park et al. 2019)."""

    rows: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        random, row = _generator(), self.rows[index]
        wave_S, rate = row["audio"]
        wave_S = _faster(wave_S, random.uniform(0.85, 1.1))
        taps = np.concatenate([[1], random.normal(0, 0.3, 7)]).astype(np.float32)
        wave_S = _noisy(np.convolve(wave_S, taps, "same"), random, random.uniform(15, 50))
        for _ in range(3):
            start, span = random.integers(len(wave_S)), random.integers(rate // 5)  # at most 0.2 s
            wave_S[start : start + span] *= 0.01
        return {**row, "audio": (wave_S, rate)}


@dataclass(frozen=True)
class Speakers:
    """Cepstra, disturbed: tempo, length of the vocal tract, noise, and spans replaced by the mean (Park et al. 2019)."""

    rows: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        random, row = _generator(), self.rows[index]
        frames_NF = row["audio"]
        count = max(int(len(frames_NF) * random.uniform(0.85, 1.2)), STACK * _rows_needed(row["text"]))
        at = np.linspace(0, len(frames_NF) - 1, count)
        low = np.minimum(at.astype(int), len(frames_NF) - 2)
        part = (at - low)[:, None].astype(np.float32)
        frames_NF = frames_NF[low] * (1 - part) + frames_NF[low + 1] * part
        frames_NF = frames_NF @ _tract(round(random.uniform(0.88, 1.13), 2)).T
        spread_F, mean_F = frames_NF.std(0), frames_NF.mean(0)
        frames_NF = frames_NF + random.uniform(0, 0.3) * spread_F * random.standard_normal(frames_NF.shape, np.float32)
        for _ in range(3):
            start, span = random.integers(count), random.integers(20)  # at most 0.2 s
            frames_NF[start : start + span] = mean_F
        return {**row, "audio": frames_NF}


def _rows_needed(text: str) -> int:
    """Rows that CTC needs: one a symbol, one more between equal neighbours."""
    return len(text) + sum(a == b for a, b in pairwise(text))


@lru_cache(maxsize=64)
def _tract(ratio: float, bands: int = 40, count: int = 13) -> np.ndarray:
    """The matrix (count, count) that makes cepstra those of a vocal tract `ratio` times as long.

    Cepstra are cosines over mel bands (130 to 6800 Hz): these are read at places moved in frequency, and fitted again.
    """
    low, high = 2595 * np.log10(1 + np.array([130, 6800]) / 700)
    place = (np.arange(bands) + 0.5) / bands
    hz = 700 * (10 ** ((low + place * (high - low)) / 2595) - 1)
    moved = (2595 * np.log10(1 + hz * ratio / 700) - low) / (high - low)
    order = np.pi * np.arange(count)
    cosines, moved_cosines = np.cos(np.outer(place, order)), np.cos(np.outer(moved, order))
    return (np.linalg.pinv(cosines) @ moved_cosines).astype(np.float32)
