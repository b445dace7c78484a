"""Augmentations of pictures, beside torchvision, Pillow, numpy and counts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

import multimodal as mm
from multimodal import augment as A
from tests.augment.draws import Largest

EVERY = (
    A.HorizontalFlip(),
    A.VerticalFlip(),
    A.RandomScale(0.5, 2.0, smallest=4),
    A.RandomCrop(8, 8, pad=3),
    A.RandomPart(smallest=4),
    A.RandomAffine(20.0, 0.2, (0.8, 1.2), 10.0),
    A.RandomAffine(outside="edge"),
    A.ColorJitter(hue=0.2),
    A.PictureNoise(0.05, 0.1),
    A.Blur(2.0),
    A.RandomErasing(1.0),
    A.RandAugment(),
    A.TrivialAugmentWide(),
    A.Sometimes(A.Blur(2.0), 0.5),
)


def picture(channels: int = 3, height: int = 20, width: int = 14) -> torch.Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("augmentation", EVERY, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_numbers_come_from_the_generator_alone(augmentation: A.Augmentation, channels: int):
    value = picture(channels)
    before, torch_before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = augmentation(value, np.random.default_rng(3))
    assert np.random.get_state()[1].tolist() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(augmentation(value, np.random.default_rng(3)), found)
    others = [augmentation(value, np.random.default_rng(seed)) for seed in range(20)]
    assert any(other.shape != found.shape or not torch.equal(other, found) for other in others)
    for other in others:
        assert other.dtype == torch.float32
        assert -1e-6 <= float(other.min()) <= float(other.max()) <= 1 + 1e-6
        # a policy of torchvision does not know transparency
        policy = isinstance(augmentation, (A.RandAugment, A.TrivialAugmentWide))
        assert len(other) == (3 if policy and channels == 4 else channels)
    # without a generator they come from numpy's global one
    np.random.seed(5)
    first = augmentation(value)
    np.random.seed(5)
    assert torch.equal(augmentation(value), first)


def test_whatever_is_a_picture_is_read(tmp_path: Path):
    levels_YXC = (picture().permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(levels_YXC).save(tmp_path / "a.png")
    wanted = torch.from_numpy(levels_YXC).permute(2, 0, 1).flip(2) / 255
    values = (
        levels_YXC,
        Image.fromarray(levels_YXC),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        torch.from_numpy(levels_YXC).permute(2, 0, 1),
    )
    for value in values:
        assert torch.equal(A.HorizontalFlip(1.0)(value), wanted)
    assert A.HorizontalFlip(1.0)(None) is None
    grey = Image.fromarray(levels_YXC[:, :, 0])
    assert A.HorizontalFlip(1.0)(grey).shape == (1, 20, 14)


def test_flips_change_sides():
    value = picture()
    assert np.array_equal(A.HorizontalFlip(1.0)(value).numpy(), value.numpy()[:, :, ::-1])
    assert np.array_equal(A.VerticalFlip(1.0)(value).numpy(), value.numpy()[:, ::-1])
    assert torch.equal(A.HorizontalFlip(0.0)(value), value)
    draw = np.random.default_rng(0)
    flipped = sum(not torch.equal(A.HorizontalFlip(0.3)(value, draw), value) for _ in range(2000))
    assert abs(flipped - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)


def test_a_scale_is_that_of_pillow_and_its_logarithm_is_uniform():
    image = Image.fromarray((picture(3, 40, 28) * 255).byte().permute(1, 2, 0).numpy())
    for factor in (0.5, 2.0):
        found = A.RandomScale(0.5, factor, smallest=1)(image, Largest())  # type: ignore[arg-type]
        wanted = np.asarray(image.resize((int(28 * factor), int(40 * factor)), Image.Resampling.BILINEAR)) / 255
        assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() < 1.01 / 255
    draw = np.random.default_rng(0)
    factors = [A.RandomScale(0.5, 2.0)(picture(1, 100, 100), draw).shape[1] / 100 for _ in range(400)]
    assert 0.5 <= min(factors) < 0.52
    assert 1.95 < max(factors) <= 2
    assert abs(np.mean([math.log2(factor) for factor in factors])) < 4 * 2 / math.sqrt(12 * 400)
    assert min(A.RandomScale(0.1, 0.2, smallest=8)(picture(1, 30, 60), draw).shape[1:]) == 8
    assert A.RandomScale(0.1, 0.2, smallest=16)(picture(1, 8, 12), draw).shape == (1, 8, 12)  # is smaller already


def test_a_longest_side_is_that_of_pillow_and_smaller_pictures_stay():
    value = picture(3, 40, 28)
    image = Image.fromarray((value * 255).byte().permute(1, 2, 0).numpy())
    found = A.LongestSide(20)(image)
    wanted = np.asarray(image.resize((14, 20), Image.Resampling.BILINEAR)) / 255
    assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() < 1.01 / 255
    assert torch.equal(A.LongestSide(40)(value), value)
    assert A.LongestSide(32, smallest=8)(picture(1, 320, 16)).shape == (1, 32, 8)
    assert A.LongestSide(32, smallest=8)(picture(1, 320, 4)).shape == (1, 32, 4)  # is smaller already


def test_a_crop_is_each_part_of_the_padded_picture_equally_often():
    value = torch.arange(12.0).reshape(1, 3, 4) / 12
    for edge in ("reflect", "edge", "constant"):
        padded = np.pad(value[0].numpy(), 1, mode=edge)
        parts = {padded[y : y + 3, x : x + 3].tobytes(): 0 for y in range(3) for x in range(4)}
        assert len(parts) == 12
        draw = np.random.default_rng(0)
        for _ in range(1200):
            parts[A.RandomCrop(3, 3, pad=1, edge=edge)(value, draw)[0].numpy().tobytes()] += 1
        assert min(parts.values()) > 100 - 4 * 10
        assert max(parts.values()) < 100 + 4 * 10


def test_a_part_has_its_share_of_the_area_at_its_own_size():
    draw, found = np.random.default_rng(0), []
    for _ in range(300):
        part = A.RandomPart((0.25, 0.5), (1.0, 1.0), smallest=1)(picture(1, 100, 60), draw)
        found.append(part.shape[1] * part.shape[2] / 6000)
        assert abs(part.shape[1] / part.shape[2] - 100 / 60) < 0.1
    assert 0.24 < min(found) < 0.27
    assert 0.48 < max(found) < 0.51
    assert A.RandomPart((0.01, 0.01), smallest=16)(picture(1, 40, 12), draw).shape == (1, 16, 12)


@pytest.mark.parametrize("shear", [0.0, 12.0])
@pytest.mark.parametrize("size", [(24, 24), (16, 32)])
def test_an_affine_map_is_that_of_torchvision(shear: float, size: tuple[int, int]):
    value = picture(3, *size)
    found = A.RandomAffine(25.0, 0.125, (1.2, 1.2), shear)(value, Largest())  # type: ignore[arg-type]
    shift, bilinear = [size[1] // 8, size[0] // 8], InterpolationMode.BILINEAR
    wanted = functional.affine(value, 25.0, shift, 1.2, [shear, 0.0], interpolation=bilinear, fill=[0.0])
    # torchvision blends with the fill where a pixel lies half outside, by a mask
    inside = wanted > 0
    assert float((found - wanted).abs()[inside & (found > 0)].quantile(0.9)) < 1e-4
    assert abs(float(inside.float().mean()) - float((found > 0).float().mean())) < 0.05


def test_what_comes_in_from_outside_is_as_declared():
    value = torch.full((1, 10, 10), 0.5)
    moved = {out: A.RandomAffine(0.0, 0.5, (1.0, 1.0), 0.0, out)(value, Largest()) for out in (0.0, 1.0, "edge")}  # type: ignore[arg-type]
    assert [float(image[0, 0, 0]) for image in moved.values()] == [0.0, 1.0, 0.5]


def test_brightness_contrast_and_saturation_are_those_of_pillow():
    image = Image.fromarray((picture() * 255).byte().permute(1, 2, 0).numpy())
    for name, enhance in (
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ):
        none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
        for factor in (0.5, 1.5):
            found = A.ColorJitter(**{**none, name: (factor, factor)})(image, Largest())  # type: ignore[arg-type]
            wanted = np.asarray(enhance(image).enhance(factor)) / 255
            assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() < 2.5 / 255


def test_colours_change_without_the_transparency_and_grey_stays_grey():
    value = picture(4)
    for augmentation in (A.ColorJitter(), A.PictureNoise(0.1, 0.2)):
        changed = augmentation(value, np.random.default_rng(0))
        assert torch.equal(changed[3], value[3])
        assert not torch.equal(changed[:3], value[:3])
        assert augmentation(value[:1], np.random.default_rng(0)).shape == (1, 20, 14)
    assert torch.equal(A.HorizontalFlip(1.0)(value)[3], value[3].flip(1))


def test_noise_has_its_deviation():
    value = torch.full((1, 100, 100), 0.5)
    assert abs(float((A.PictureNoise(0.1, 0.1)(value) - 0.5).std()) - 0.1) < 0.005


def test_a_blur_has_its_width():
    value = torch.zeros(1, 41, 41)
    value[0, 20, 20] = 1
    found = A.Blur(2.0)(value, Largest())[0]  # type: ignore[arg-type]
    place = torch.arange(41.0) - 20
    assert abs(float(found.sum()) - 1) < 1e-5
    assert abs(float((found.sum(0) * place**2).sum()) - 4) < 0.1
    assert A.Blur(2.0)(torch.rand(1, 1, 5)).shape == (1, 1, 5)
    assert A.Blur(5.0)(torch.rand(3, 2, 2)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (A.RandomErasing(0.8, (0.1, 0.3), (0.5, 2.0), 0.2), v2.RandomErasing(0.8, (0.1, 0.3), (0.5, 2.0), 0.2)),
        (A.RandAugment(2, 9), v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR)),
        (A.TrivialAugmentWide(), v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)),
    ],
)
def test_policies_are_those_of_torchvision(ours: A.Augmentation, theirs: v2.Transform):
    changed = 0
    for seed in range(10):
        found = ours(picture(), np.random.default_rng(seed))
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**63)))
        assert torch.equal(found, theirs(picture()))
        changed += not torch.equal(found, picture())
    assert changed > 5


def test_a_share_of_values_is_changed():
    draw = np.random.default_rng(0)
    often = A.Sometimes(A.VerticalFlip(1.0), 0.25)
    count = sum(not torch.equal(often(picture(), draw), picture()) for _ in range(1000))
    assert abs(count - 250) < 4 * math.sqrt(1000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: A.HorizontalFlip(1.5), "HorizontalFlip: share=1.5 must be a number from 0 to 1"),
        (lambda: A.HorizontalFlip(True), "share=True must be a number"),
        (lambda: A.HorizontalFlip(float("nan")), "share=nan must be a number"),
        (lambda: A.RandomScale(2.0, 0.5), r"RandomScale: factors=\(2.0, 0.5\) must be a pair \(least, largest\)"),
        (lambda: A.RandomScale(0.0, 1.0), r"factors=\(0.0, 1.0\)"),
        (lambda: A.RandomScale(smallest=0), "smallest=0 must be a whole number, 1 or more"),
        (lambda: A.LongestSide(0), "pixels=0 must be a whole number, 1 or more"),
        (lambda: A.RandomCrop(0, 4), "rows=0 must be a whole number, 1 or more"),
        (lambda: A.RandomCrop(4, 4, edge="wrap"), "edge='wrap' must be"),  # type: ignore[arg-type]
        (lambda: A.RandomPart(area=(0.5, 2.0)), "area="),
        (lambda: A.RandomAffine(outside="mirror"), "outside='mirror'"),  # type: ignore[arg-type]
        (lambda: A.RandomAffine("15"), "degrees='15' must be a number"),  # type: ignore[arg-type]
        (lambda: A.ColorJitter(brightness=-1), "brightness=-1 must be"),
        (lambda: A.ColorJitter(hue=0.7), "hue=0.7 must be a number from 0 to 0.5"),
        (lambda: A.RandAugment(0), "number=0 must be"),
        (lambda: A.RandAugment(2, 31), "magnitude=31 must be"),
        (lambda: A.Sometimes("flip"), "Sometimes: augmentation='flip' is no Augmentation"),  # type: ignore[arg-type]
        (lambda: A.Sometimes(A.HorizontalFlip), "call it"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused(make, words: str):
    with pytest.raises(mm.ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("augmentation", "value", "words"),
    [
        (A.RandomCrop(32, 32), picture(), "the picture is 20x14 pixels, smaller than the part of 32x32; make the part smaller"),
        (A.RandomCrop(32, 32, pad=4), picture(), "and pad=4"),
        (A.RandomCrop(8, 8, pad=14), picture(), "cannot be reflected by pad=14; use edge='edge'"),
        (A.HorizontalFlip(), (torch.zeros(80), 8000), "wanted a file, a PIL image, an array or a tensor, not tuple"),
        (A.HorizontalFlip(), 7, "not int 7"),
        (A.HorizontalFlip(), torch.full((1, 4, 4), float("nan")), "not finite"),
        (A.HorizontalFlip(), "nowhere.png", "nowhere.png"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_changed_are_refused(augmentation: A.Augmentation, value, words: str):
    with pytest.raises(mm.MediaError, match=words):
        augmentation(value)
