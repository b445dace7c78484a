"""Augmentations to start with: changes under which the answers of most data of a sort stay what they are."""

from multimodal.augment.base import Augmentation, Sometimes
from multimodal.augment.pictures import ColorJitter, HorizontalFlip, PictureNoise, RandomAffine, RandomScale
from multimodal.augment.sounds import Equaliser, Noise, Pause, Speed
from multimodal.augment.tokens import FrequencyWarp, SpecAugment


def for_pictures(*, smallest: int = 16, flip: bool = False) -> tuple[Augmentation, ...]:
    """Changes of pictures whose answer does not depend on size, angle, light or noise.

    smallest: no side is made smaller than this many pixels: the patch of the model, or more.
    flip: whether left and right may change places: so for photographs, not for letters and digits.

    Examples:
        >>> from multimodal import augment
        >>> varied = augment.Augmented(samples, {"image": augment.for_pictures(smallest=4)})
    """
    return (
        *((HorizontalFlip(),) if flip else ()),
        RandomAffine(degrees=18.0, shift=0.1, scale=(0.85, 1.15)),
        ColorJitter(brightness=(0.3, 1.2), contrast=0.3, saturation=0.3),
        RandomScale(0.4, 2.2, smallest=smallest),
        Sometimes(PictureNoise(0.0, 0.15), share=0.5),
    )


def for_sounds() -> tuple[Augmentation, ...]:
    """Changes of speech and other sounds whose answer does not depend on the speaker, the microphone or the room.

    They need a kind of log-mel frames, such as `AudioFrames`.

    Examples:
        >>> from multimodal import augment
        >>> len(augment.for_sounds())
        6
    """
    return (
        Speed(0.8, 1.25),
        Equaliser(5.0),
        Pause(0.1, 0.1),
        Noise(10.0, 45.0),
        FrequencyWarp(0.85, 1.18),
        SpecAugment(),
    )
