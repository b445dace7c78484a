"""Augmentation as declarations: random changes of pictures, sounds, texts and tokens that do not change the answer.

pictures.py   size, place, colour, noise of pictures: torchvision computes them
sounds.py     speed, pitch, noise, pauses, other microphones
texts.py      words and characters that are left out or changed
tokens.py     masks in spectrograms, other series, tokens that are left out: after encoding
sources.py    Augmented, Mixup, CutMix: sources of samples that make these changes whenever a sample is read
presets.py    for_pictures, for_sounds
"""

from multimodal.augment.base import Augmentation, Sometimes, TokenAugmentation
from multimodal.augment.pictures import (
    Blur,
    ColorJitter,
    HorizontalFlip,
    LongestSide,
    PictureAugmentation,
    PictureNoise,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomPart,
    RandomScale,
    TrivialAugmentWide,
    VerticalFlip,
)
from multimodal.augment.presets import for_pictures, for_sounds
from multimodal.augment.sounds import (
    Equaliser,
    Gain,
    Gaps,
    Noise,
    Pause,
    Pitch,
    RandomPiece,
    SoundAugmentation,
    Speed,
    Tempo,
    TimeShift,
)
from multimodal.augment.sources import Augmented, CutMix, Mixup
from multimodal.augment.texts import TextAugmentation, TypingErrors, WordDropout
from multimodal.augment.tokens import FrequencyWarp, SeriesJitter, SpecAugment, TokenDropout

__all__ = [
    "Augmentation",
    "Augmented",
    "Blur",
    "ColorJitter",
    "CutMix",
    "Equaliser",
    "FrequencyWarp",
    "Gain",
    "Gaps",
    "HorizontalFlip",
    "LongestSide",
    "Mixup",
    "Noise",
    "Pause",
    "PictureAugmentation",
    "PictureNoise",
    "Pitch",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomPart",
    "RandomPiece",
    "RandomScale",
    "SeriesJitter",
    "Sometimes",
    "SoundAugmentation",
    "SpecAugment",
    "Speed",
    "Tempo",
    "TextAugmentation",
    "TimeShift",
    "TokenAugmentation",
    "TokenDropout",
    "TrivialAugmentWide",
    "TypingErrors",
    "VerticalFlip",
    "WordDropout",
    "for_pictures",
    "for_sounds",
]
