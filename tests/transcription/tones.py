"""A language of tones, each letter its own, and a model that learns it in seconds."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.masks import Chunked, SameSample, Window
from multimodal_tokenizers import AudioFrames, TextBytes

RATE = 8000
UNIT = 320  # samples a token
TONES = {"a": 400, "b": 700, "c": 1100, "d": 1700, " ": 2600}  # Hz of each letter
TASK = "sound -> text"


def text_of(words: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join("".join(random.choice(list("abcd"), size=random.integers(1, 5))) for _ in range(words))


def said(text: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each letter as its tone and a silence; and the letter of every sample, 256 where there is none."""
    random = np.random.default_rng(seed)
    waves, labels = [], []
    for letter in text:
        tone, gap = int(random.integers(640, 1100)), int(random.integers(640, 900))
        phase = random.uniform(0, 6)
        waves += [0.3 * np.sin(2 * np.pi * TONES[letter] * np.arange(tone) / RATE + phase), np.zeros(gap)]
        labels += [np.full(tone, ord(letter)), np.full(gap, 256)]
    sound_S = np.concatenate(waves)
    return (sound_S + 0.001 * random.standard_normal(len(sound_S))).astype(np.float32), np.concatenate(labels)


def frames(**settings) -> AudioFrames:
    return AudioFrames(
        **{"rate_hz": RATE, "mels": 16, "hop_ms": 20.0, "stack": 2, "normalise": "fixed"} | settings,
    )


@cache
def trained_ear() -> mm.Model:
    """Learns the letter of every token's middle, which is what CTC comes to after much longer."""
    torch.manual_seed(0)
    core = mm.Core(width=48, depth=2, heads=2, mask=SameSample() & Chunked(4) & Window(6))
    model = mm.Model({"sound": frames(), "text": TextBytes()}, core, [mm.Task(TASK, mm.CTC())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(50):
        wave_S, label_S = said(text_of(30, step), step)
        logits_NV = model.logits(model.pack(TASK, [{"sound": (wave_S, RATE)}], answers=False))[TASK]
        middle = (torch.arange(len(logits_NV)) * UNIT + UNIT // 2).clamp(max=len(label_S) - 1)
        loss = F.cross_entropy(logits_NV, torch.from_numpy(label_S)[middle])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
