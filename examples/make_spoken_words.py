"""Make the small set of spoken words that the demo, the examples and tests learn from.

The set is sixteen English words (ten digits and six commands), each said once by forty synthetic speakers.
A speaker is an espeak-ng accent with a voice variant, a pitch and a speed, and no two speakers share a variant.
The split is by speaker: a test speaker's voice never occurs in training, its accent does.

Run it with:

    python examples/make_spoken_words.py

It needs the espeak-ng program (the stored set was made with version 1.51), takes under a minute, and writes two
files into multimodal/demo, about 1.7 MB together: ``spoken_words.flac``, all clips one after another (mono, 8000 Hz),
and ``spoken_words.json``, a list with each clip's word, voice, split, and start and length in samples.
The same version of espeak-ng gives the same set. The program is needed only to remake the set, never to read it.
"""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

WORDS = "zero one two three four five six seven eight nine yes no left right stop go"

# Accent + variant - pitch - speed (words a minute). Variants that sound alike belong to the same split.
# British English is called "en" here, since espeak-ng 1.51 silently ignores the variant after "en-gb".
TRAIN = """
    en+m1-p45-s165 en-us+m3-p55-s170 en-gb-scotland+m4-p50-s180 en-gb-x-rp+m6-p40-s175 en-us+m8-p50-s160
    en-029+Alex-p45-s170 en-gb-x-gbclan+Mike-p55-s175 en-us-nyc+Michael-p50-s180 en-us+gustave-p60-s170
    en+max-p45-s185 en-gb-x-gbcwmd+sandro-p50-s175 en-us+rob-p55-s180 en-gb-x-rp+robert-p45-s170
    en-029+quincy-p60-s180 en-gb-scotland+adam-p50-s175 en-us+david-p55-s165 en+iven-p50-s160
    en-us-nyc+john-p40-s170 en-gb-x-rp+victor-p55-s185 en-gb-x-gbclan+Denis-p50-s170 en-us+Diogo-p45-s180
    en-gb-x-gbcwmd+Gene-p50-s155 en+ed-p50-s160
    en-us+f2-p50-s180 en-gb-scotland+f4-p45-s190 en+f5-p55-s185 en-us-nyc+Annie-p40-s170
    en-gb-x-rp+aunty-p45-s180 en-us+linda-p40-s185 en-029+belinda-p40-s175 en-gb-x-gbclan+grandma-p45-s170
"""
TEST = """
    en-us+m2-p45-s180 en-gb-scotland+m5-p55-s165 en+m7-p50-s170 en-us-nyc+Nguyen-p40-s185
    en-gb-x-rp+paul-p60-s165 en-029+edward-p50-s175
    en+f1-p45-s175 en-us+f3-p55-s170 en-gb-x-gbcwmd+steph-p50-s165
"""
SPLITS = {"train": TRAIN.split(), "test": TEST.split()}
RATE = 8000
MARGIN = RATE // 40  # 25 ms before and after each word
QUIET = 0.005  # of the peak: what counts as silence at the ends; more would cut the softest final consonants
PEAK = 0.3  # of full scale, the same for every clip
STEP = 16  # samples are multiples of this (12 bits): some 50 dB below the speech, and a much smaller file


def espeak(text: str, voice: str, pitch: str = "50", speed: str = "175") -> bytes:
    """The WAV file in which espeak-ng says the text."""
    command = ["espeak-ng", "-v", voice, "-p", pitch, "-s", speed, "--stdout", text]
    return subprocess.run(command, check=True, capture_output=True).stdout


def split_voice(voice: str) -> tuple[str, str, str]:
    """'en-us+m3-p55-s170' -> ('en-us+m3', '55', '170')."""
    name, pitch, speed = voice.rsplit("-", 2)
    return name, pitch.removeprefix("p"), speed.removeprefix("s")


def check_voices(voices: list[str]) -> None:
    """Stop where espeak-ng does not know an accent or a variant: it then speaks in another voice and says nothing."""
    accents = sorted({voice.split("+")[0] for voice in voices})
    if len({espeak("zero four nine right stop", accent) for accent in accents}) < len(accents):
        raise SystemExit(f"espeak-ng speaks two of these accents alike: {', '.join(accents)}")
    for voice in voices:
        name, pitch, speed = split_voice(voice)
        if espeak("seven", name, pitch, speed) == espeak("seven", name.split("+")[0], pitch, speed):
            raise SystemExit(f"espeak-ng ignores the variant of the voice {name}")


def say(word: str, voice: str) -> np.ndarray:
    """One clip: the word at 8000 Hz as 16-bit samples, its ends trimmed and its peak set."""
    wave, rate = soundfile.read(io.BytesIO(espeak(word, *split_voice(voice))), dtype="float32")
    wave = resample(torch.from_numpy(wave), rate, RATE, lowpass_filter_width=32).numpy()
    wave = np.pad(wave * (PEAK / np.abs(wave).max()), MARGIN)
    loud = np.flatnonzero(np.abs(wave) > QUIET * PEAK)
    wave = wave[loud[0] - MARGIN : loud[-1] + 1 + MARGIN]
    if not 0.2 <= len(wave) / RATE <= 0.9:
        raise SystemExit(f"'{word}' by {voice} lasts {len(wave) / RATE:.2f} s, not 0.2 to 0.9 s")
    return (np.round(wave * (32768 / STEP)) * STEP).astype(np.int16)


def main() -> None:
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng was not found: install it (Debian, Ubuntu: apt-get install espeak-ng)")
    check_voices([voice for voices in SPLITS.values() for voice in voices])
    clips, rows, start = [], [], 0
    for split, voices in SPLITS.items():
        for voice in voices:
            for word in WORDS.split():
                clip = say(word, voice)
                clips.append(clip)
                row = {"word": word, "voice": voice, "split": split, "start": start, "length": len(clip)}
                rows.append(json.dumps(row, separators=(",", ":")))
                start += len(clip)
    base = Path(__file__).resolve().parents[1] / "multimodal" / "demo" / "spoken_words"
    flac, index = base.with_suffix(".flac"), base.with_suffix(".json")
    soundfile.write(flac, np.concatenate(clips), RATE, subtype="PCM_16", compression_level=1.0)
    index.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    size = (flac.stat().st_size + index.stat().st_size) / 1e6
    print(f"{len(clips)} clips, {start / RATE:.0f} s, {size:.2f} MB: {flac.name}, {index.name}")


if __name__ == "__main__":
    main()
