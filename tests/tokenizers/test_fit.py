"""Pictures as transformers' processors and timm's transforms prepare them: equal numbers, and refusals by name."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from multimodal.check import check_tokenizer
from multimodal.declare import declaration, rebuild
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import ImagePatches
from multimodal_tokenizers.fit import Fit, image_settings, timm_image_settings
from tests.tokenizers.real_data import photographs

TOLERANCE = 1e-5  # of a normalised pixel; one level of 255 is 1.4e-2 or more
SIZES = [
    (375, 500),
    (500, 333),
    (224, 224),
    (7, 5),
    (1, 30),
    (600, 96),
    (257, 256),
    (301, 450),
    (1200, 1601),
]  # rows, columns


def synthetic() -> list[Image.Image]:
    """Noise, sharp edges and slopes of many sizes."""
    random = np.random.default_rng(0)
    pictures = []
    for i, (rows, columns) in enumerate(SIZES):
        noise = random.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        noise[: rows // 2] = np.linspace(0, 255, columns).astype(np.uint8)[None, :, None]
        noise[:, : columns // 3] = 255 * (i % 2)
        pictures.append(Image.fromarray(noise))
    return pictures


def pixels(tokenizer: ImagePatches, value: Any) -> Tensor:
    """What the tokens of a picture tile (C, Y, X)."""
    tokens = tokenizer(value)
    rows = int(tokens.position_NA[:, 1].max()) + 1
    return rearrange(tokens.content, "(y x) (c p q) -> c (y p) (x q)", y=rows, c=3, p=tokenizer.patch)


def difference(tokenizer: ImagePatches, theirs: Tensor, picture: Image.Image) -> float:
    side = tokenizer.patch
    rows, columns = (n // side * side for n in theirs.shape[1:])
    mine = pixels(tokenizer, picture)
    assert mine.shape == (3, rows, columns)
    return float((mine - theirs[:, :rows, :columns]).abs().max())


HF = [
    ("ViTImageProcessor", {}, 16),
    ("ViTImageProcessor", {"size": {"height": 384, "width": 384}, "image_mean": [0.485, 0.456, 0.406]}, 16),
    ("DeiTImageProcessor", {}, 16),
    ("BitImageProcessor", {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]}, 14),  # DINOv2
    ("DINOv3ViTImageProcessor", {}, 16),
    ("CLIPImageProcessor", {}, 32),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, 14),
    ("SiglipImageProcessor", {"size": {"height": 256, "width": 256}}, 16),
    ("SiglipImageProcessor", {"size": {"height": 384, "width": 384}}, 14),  # 384 = 27 * 14 + 6
    ("SiglipImageProcessor", {"resample": 1}, 16),
    ("ViTImageProcessor", {"do_normalize": False, "resample": 3}, 16),
]


def processor(name: str, settings: dict[str, Any]) -> Any:
    return getattr(pytest.importorskip("transformers"), name)(**settings)


def as_hf(settings: dict[str, Any], patch: int, **others: Any) -> ImagePatches:
    return ImagePatches(patch=patch, position="rotary", **image_settings(settings, **others))


@pytest.mark.parametrize(("name", "settings", "patch"), HF, ids=[f"{n[0]}-{i}" for i, n in enumerate(HF)])
def test_equal_to_processors_on_made_pictures(name: str, settings: dict[str, Any], patch: int) -> None:
    theirs = processor(name, settings)
    mine = as_hf(json.loads(theirs.to_json_string()), patch)
    for picture in synthetic():
        assert difference(mine, theirs(picture, return_tensors="pt")["pixel_values"][0], picture) < TOLERANCE


@pytest.mark.parametrize(("name", "settings", "patch"), HF, ids=[f"{n[0]}-{i}" for i, n in enumerate(HF)])
def test_equal_to_processors_on_photographs(name: str, settings: dict[str, Any], patch: int) -> None:
    theirs = processor(name, settings)
    mine = as_hf(json.loads(theirs.to_json_string()), patch)
    for picture in photographs("flickr8k.zip", 6) + photographs("clothing.zip", 6):
        assert difference(mine, theirs(picture, return_tensors="pt")["pixel_values"][0], picture) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"],
)
def test_equal_to_their_pillow_versions(name: str) -> None:
    theirs = processor(f"{name}Pil", {})
    mine = as_hf(json.loads(theirs.to_json_string()), 16, by="pillow")
    assert mine.fit is not None
    assert mine.fit.by == "pillow"
    for picture in synthetic()[:4]:
        values = torch.as_tensor(theirs(picture, return_tensors="np")["pixel_values"][0])
        assert difference(mine, values, picture) < TOLERANCE


def test_grey_palette_and_transparent_pictures() -> None:
    theirs = processor("CLIPImageProcessor", {})
    mine = as_hf(theirs.to_dict(), 32)
    random = np.random.default_rng(1)
    clear = Image.fromarray(random.integers(0, 256, (300, 270, 4), dtype=np.uint8))
    for picture in (
        clear,
        clear.convert("L"),
        clear.convert("LA"),
        clear.convert("P"),
        clear.convert("1"),
        clear.convert("CMYK"),
    ):
        assert difference(mine, theirs(picture, return_tensors="pt")["pixel_values"][0], picture) < TOLERANCE


TIMM = [
    {"crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"},
    {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"},
    {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
    {"crop_pct": 0.95, "crop_mode": "squash", "interpolation": "lanczos"},
    {"crop_pct": 0.77, "crop_mode": "center", "interpolation": "bicubic"},
]


@pytest.mark.parametrize("settings", TIMM, ids=str)
@pytest.mark.parametrize("real", [False, True])
def test_equal_to_transforms_of_timm(settings: dict[str, Any], real: bool) -> None:
    from timm.data import create_transform

    config = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **settings}
    theirs = create_transform(**config)
    mine = ImagePatches(patch=16, position="rotary", **timm_image_settings(config))
    for picture in photographs("flickr8k.zip", 8) if real else synthetic():
        assert difference(mine, theirs(picture), picture) < TOLERANCE


def test_config_of_a_model_of_timm() -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    mine = ImagePatches(patch=16, position="rotary", **timm_image_settings(config))
    picture = synthetic()[0]
    assert difference(mine, create_transform(**config)(picture), picture) < TOLERANCE


def test_the_comparison_can_fail() -> None:
    """Each field of Fit changes numbers by more than the tolerance, so that a wrong one cannot pass."""
    picture = synthetic()[7]
    right = Fit(shortest=255, crop=(224, 224), filter="bilinear")

    def made(fit: Fit) -> Tensor:
        return pixels(ImagePatches(patch=16, position="rotary", fit=fit), picture)

    for wrong in (
        Fit(size=(255, 255), crop=(224, 224), filter="bilinear"),
        Fit(shortest=256, crop=(224, 224), filter="bilinear"),
        Fit(shortest=255, crop=(224, 224), filter="bicubic"),
        Fit(shortest=255, crop=(224, 224), filter="bilinear", by="float"),
        Fit(shortest=255, crop=(224, 224), filter="bilinear", corner="even"),
    ):
        assert (made(wrong) - made(right)).abs().max() > 100 * TOLERANCE, wrong


# Settings


def test_older_files_without_most_fields() -> None:
    old = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 224,
        "crop_size": 224,
        "do_center_crop": True,
        "resample": 3,
    }
    assert image_settings(old)["fit"] == Fit(shortest=224, crop=(224, 224))
    square = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224}
    assert image_settings(square)["fit"] == Fit(size=(224, 224), filter="bilinear")
    off = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False}
    assert image_settings(off) == {"channels": 3, "mean": 0.0, "std": 1.0, "edge": "cut", "fit": None}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        {"do_resize": False},
        {"resample": 3},
    ],
    ids=str,
)
def test_equal_to_the_processor_of_idefics_without_tiles(settings: dict[str, Any]) -> None:
    theirs = processor("Idefics3ImageProcessor", {"do_image_splitting": False, **settings})
    mine = as_hf(json.loads(theirs.to_json_string()), 14)
    for picture in synthetic():
        assert difference(mine, theirs(picture, return_tensors="pt")["pixel_values"][0, 0], picture) < TOLERANCE


VIT = {"image_processor_type": "ViTImageProcessor"}
IDEFICS = {"image_processor_type": "Idefics3ImageProcessor"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "image_processor_type=None is not known; known are ViT, DeiT"),
        (
            {"image_processor_type": "Qwen2VLImageProcessor"},
            "image_processor_type='Qwen2VLImageProcessor' is not known",
        ),
        ({**VIT, "do_pad": True, "pad_size": 3}, "do_pad=True, pad_size=3 of ViTImageProcessor is not known"),
        ({**VIT, "do_flip_channel_order": True}, "do_flip_channel_order=True"),
        ({**VIT, "crop_pct": 0.9}, "crop_pct=0.9"),
        ({**VIT, "rescale_factor": 1 / 127.5}, "rescale_factor=0.00784"),
        ({**VIT, "do_rescale": False}, "do_rescale=False"),
        ({**VIT, "resample": 0}, "resample=0 is not known"),
        ({**VIT, "size": {"longest_edge": 224}}, "size={'longest_edge': 224} is not known"),
        (IDEFICS, "do_image_splitting=True of Idefics3ImageProcessor is not known here"),
        ({**VIT, "do_image_splitting": True}, "do_image_splitting=True of ViTImageProcessor is not known"),
        ({**IDEFICS, "do_image_splitting": False, "size": 9}, "size=9 of Idefics3ImageProcessor is not known"),
        (
            {**VIT, "do_center_crop": True, "crop_size": {"shortest_edge": 9}},
            "crop_size={'shortest_edge': 9} is not height",
        ),
    ],
)
def test_fields_that_are_not_known_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        image_settings(settings)
    assert str(raised.value).startswith("image_settings: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "random"}, "interpolation='random' is not one of"),
        ({"crop_mode": "border"}, "crop_mode='border'"),
        ({"input_size": (3, 224, 256)}, "input_size=(3, 224, 256)"),
        ({"naflex": True}, "naflex=True is not known"),
    ],
)
def test_fields_of_timm_that_are_not_known_are_named(settings: dict[str, Any], message: str) -> None:
    config = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, **TIMM[0], **settings}
    with pytest.raises(ConfigError) as raised:
        timm_image_settings(config)
    assert message in str(raised.value)
    del config["crop_pct"]
    config |= {"naflex": None, "crop_mode": "center"}
    with pytest.raises(ConfigError, match="crop_pct missing"):
        timm_image_settings(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "it does nothing"),
        ({"size": (3,)}, r"size=\(3,\) is not rows and columns"),
        ({"size": (224, 224), "shortest": 224}, "shortest=224 exclude each other"),
        ({"shortest": 0}, "shortest=0 must be"),
        ({"shortest": 9, "longest": 9}, "longest=9 must be a number of pixels, beside a size"),
        ({"shortest": 9, "filter": "box"}, "filter='box' must be one of bilinear"),
        ({"shortest": 9, "by": "cv2"}, "by='cv2' must be one of torchvision"),
        ({"shortest": 224, "crop": (224, 256)}, r"crop=\(224, 256\) is larger than the resized picture"),
    ],
)
def test_wrong_settings_of_a_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^Fit: .*{message}"):
        Fit(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_side": 64, "fit": Fit(shortest=32)}, "max_side=64 beside a fit"),
        ({"fit": Fit(size=(12, 12))}, "does not divide the sides"),
        ({"fit": Fit(size=(36, 36)), "edge": "error"}, "does not divide the sides"),
        ({"fit": Fit(size=(36, 36)), "size": (32, 32)}, r"not that of fitted ones, \(48, 48\)"),
        ({"fit": (224, 224)}, "is no Fit; give one such as"),
    ],
)
def test_fits_that_do_not_suit_patches(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^ImagePatches: .*{message}"):
        ImagePatches(patch=16, **settings)


def test_pictures_that_cannot_be_fitted() -> None:
    long = np.zeros((1, 3000, 3), np.uint8)
    with pytest.raises(
        MediaError, match=r"^ImagePatches.encode: image of 1x3000 pixels would be 256x768000 .*max_pixels"
    ):
        ImagePatches(fit=Fit(shortest=256))(long)
    with pytest.raises(
        MediaError, match=r"image of 1x3000 pixels would be 1x4096 with longest=9000, more than max_pixels"
    ):
        ImagePatches(fit=Fit(size=(32, 32), longest=9000), max_pixels=4000)(long)
    with pytest.raises(MediaError, match=r"image is 20x20 pixels, smaller than crop=\(32, 32\)"):
        ImagePatches(fit=Fit(crop=(32, 32)))(np.zeros((20, 20, 3), np.uint8))


def test_through_a_checkpoint_and_the_checks() -> None:
    tokenizer = ImagePatches(patch=8, fit=Fit(shortest=40, crop=(32, 36)), edge="cut")
    again = rebuild(json.loads(json.dumps(declaration(tokenizer))))
    assert again == tokenizer
    before_fit = {name: value for name, value in ImagePatches().config().items() if name != "fit"}
    assert ImagePatches.from_config(before_fit) == ImagePatches()
    slope = np.linspace(0, 1, 50)[:, None, None] * np.linspace(0.2, 1, 60)[None, :, None] * np.ones(3)
    smooth = [(slope[::a, ::b] * 255).astype(np.uint8) for a, b in ((1, 1), (-1, 1), (1, -1), (-1, -1))]
    check_tokenizer(
        tokenizer, smooth, expected_failures={"nothing_lost": "a crop leaves out the ends of long pictures"}
    )
    check_tokenizer(ImagePatches(patch=8, fit=Fit(size=(32, 32), by="float")), smooth)


def test_cut_is_what_a_strided_convolution_reads() -> None:
    picture = np.random.default_rng(0).random((11, 14, 3), np.float32)
    tokenizer = ImagePatches(patch=4, position="rotary", edge="cut")
    conv = torch.nn.Conv2d(3, 5, 4, 4)
    wanted = conv(torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1)[0].flatten(1).T
    torch.testing.assert_close(tokenizer(picture).content @ conv.weight.flatten(1).T + conv.bias, wanted)
