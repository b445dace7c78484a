"""Augmentations to start with: changes under which the answers of most data of a sort stay what they are."""

from multimodal.augment.base import Augmentation, Sometimes, check_share
from multimodal.augment.pictures import ColorJitter, HorizontalFlip, PictureNoise, RandomAffine, RandomScale
from multimodal.augment.sounds import Equaliser, Noise, Pause, Tempo
from multimodal.augment.tokens import FrequencyWarp, SpecAugment


def for_pictures(*, smallest: int = 16, flip: bool = False, strength: float = 1.0) -> tuple[Augmentation, ...]:
    """Changes of pictures whose answer does not depend on size, angle, light or noise.

    smallest: no side is made smaller than this many pixels: the patch of the model, or more.
    flip: whether left and right may change places: so for photographs, not for letters and digits.
    strength: of all other changes, from 0 to 1; stronger ones need more steps and a wider core.

    Examples:
        >>> from multimodal import augment
        >>> varied = augment.Augmented(samples, {"image": augment.for_pictures(smallest=4)})
    """
    check_share("for_pictures", strength=strength)
    return (
        *((HorizontalFlip(),) if flip else ()),
        RandomAffine(degrees=18.0 * strength, shift=0.1 * strength, scale=(0.85**strength, 1.15**strength)),
        ColorJitter(
            brightness=(1 - 0.7 * strength, 1 + 0.2 * strength), contrast=0.3 * strength, saturation=0.3 * strength
        ),
        RandomScale(0.4**strength, 2.2**strength, smallest=smallest),
        Sometimes(PictureNoise(0.0, 0.15 * strength), share=0.5),
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
        Tempo(0.8, 1.25),
        Equaliser(4.0, octaves=3.0),
        Pause(0.1, 0.1),
        Noise(10.0, 45.0),
        FrequencyWarp(0.85, 1.18),
        SpecAugment(),
    )
