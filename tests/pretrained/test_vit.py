"""ViT and DeiT against transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    changed,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    largest,
    refused,
    saved,
)
from tests.pretrained.pictured import LABELS, normalised, ours, pictures, vectors

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViTModel", {}, {}),
    "vit without pooler": (
        "ViTModel",
        {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
        {"add_pooling_layer": False},
    ),
    "vit with a mask token": ("ViTModel", {"image_size": [16, 16]}, {"use_mask_token": True}),
    "vit classes": ("ViTForImageClassification", {"id2label": LABELS}, {}),
    "vit classes without biases": ("ViTForImageClassification", {"qkv_bias": False, "pooler_act": "gelu"}, {}),
    "deit": ("DeiTModel", {}, {}),
    "deit classes": ("DeiTForImageClassification", {"id2label": LABELS}, {}),
}
SIZES = [(16, 16), (20, 12), (32, 8)]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, settings, arguments = CASES[name]
    family = "DeiT" if kind.startswith("DeiT") else "ViT"
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings, **more})
    return getattr(transformers, kind)(config, **arguments)


def theirs(module: Any, values: list[Tensor]) -> list[Tensor]:
    """Its states, or the logits of a classifier."""
    with torch.inference_mode():
        found = [module(normalised(x), interpolate_pos_encoding=True) for x in values]
    return [x.logits[0] if hasattr(x, "logits") else x.last_hidden_state[0] for x in found]


@pytest.mark.parametrize("name", CASES)
def test_equal_at_three_sizes_packed_and_alone(name: str, tmp_path: Path) -> None:
    module, values = build(name), pictures(SIZES)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, values, ours, theirs(module, values))
    check_round_trip(tmp_path, tmp_path / "theirs")
    again = type(module).from_pretrained(tmp_path / "out").eval()
    assert largest(theirs(again, values), theirs(module, values)) < 1e-6


def test_vectors_are_the_pooled_states(tmp_path: Path) -> None:
    values = pictures(SIZES)
    for name in ("vit", "deit", "vit without pooler"):
        module = build(name)
        loaded = pretrained(saved(module, tmp_path / name))
        with torch.inference_mode():
            found = [module(normalised(x), interpolate_pos_encoding=True) for x in values]
        wanted = [x.last_hidden_state[0, 0] if x.pooler_output is None else x.pooler_output[0] for x in found]
        torch.testing.assert_close(
            vectors(loaded, values), F.normalize(torch.stack(wanted), dim=-1), atol=TOLERANCE, rtol=0
        )


def test_any_small_change_is_found(tmp_path: Path) -> None:
    values = pictures(SIZES)
    # of embedded tokens, because norms do not see one number that is added to all features
    uneven = 1e-3 * torch.tensor([1.0, -1.0]).repeat(16)
    for name, tensors, embedded in (
        ("vit", ["encoder.layer.1.attention.attention.value.bias"], ["cls_token", "position_embeddings"]),
        ("vit classes", ["vit.encoder.layer.2.intermediate.dense.bias", "classifier.bias"], []),
        ("deit", ["encoder.layer.0.layernorm_before.weight"], ["distillation_token"]),
    ):
        module = build(name)
        given = saved(module, tmp_path / name)
        wanted = theirs(module, values)
        core = {"norm": mm.core.Norm(eps=1e-3, centred=True, bias=True)}
        check_mutations(given, lambda loaded, w=wanted: largest(ours(loaded, values), w), tensors, core)
        for token in embedded:
            with changed(given, f"embeddings.{token}", uneven):
                assert largest(ours(pretrained(given), values), wanted) > TOLERANCE, token
        # another way to resize the learned positions
        loaded = pretrained(given)
        image: Any = dataclasses.replace(loaded.tokenizers["image"], resample="antialiased")
        other = dataclasses.replace(loaded, tokenizers={**loaded.tokenizers, "image": image})
        assert largest(ours(other, values), wanted) > TOLERANCE


def test_pictures_are_prepared_as_theirs(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    for name, processor in (
        ("vit", transformers.ViTImageProcessor(size={"height": 16, "width": 16})),
        (
            "vit classes",
            transformers.ViTImageProcessor(size={"height": 20, "width": 12}, resample=3, image_mean=[0.4] * 3),
        ),
        (
            "deit",
            transformers.DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 16}),
        ),
    ):
        module = build(name)
        given = saved(module, tmp_path / name)
        processor.save_pretrained(given)
        loaded = pretrained(given)
        prepared = processor(images=picture, return_tensors="pt")["pixel_values"]
        of: Any = loaded.tokenizers["image"].of  # type: ignore[attr-defined]
        torch.testing.assert_close(of.preprocess(picture), prepared[0], atol=1e-6, rtol=0)
        model = loaded.model()
        assert loaded.origin["files"]["preprocessor_config.json"] == (given / "preprocessor_config.json").read_text()
        if "label" in loaded.tokenizers:
            with torch.inference_mode():
                wanted = module(prepared, interpolate_pos_encoding=True).logits[0].softmax(-1)
            answer = model.predict("image -> label", [{"image": picture}])[0]
            assert answer.value == f"class {int(wanted.argmax())}"
            assert abs(answer.confidence - float(wanted.max())) < TOLERANCE
    # without a file: the processor of the family, at the size of the configuration
    (given / "preprocessor_config.json").unlink()
    of = pretrained(given).tokenizers["image"].of  # type: ignore[attr-defined]
    sizes = {"size": {"height": 18, "width": 18}, "crop_size": {"height": 16, "width": 16}}
    wanted = transformers.DeiTImageProcessor(**sizes)(images=picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(of.preprocess(picture), wanted, atol=1e-6, rtol=0)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("vit"), tmp_path / "vit")
    refused({"extra": 4}, given, r"has extra, which this version does not know")
    refused({"hidden_act": "mish"}, given, r"hidden_act='mish' is not supported")
    refused({"pooler_act": "mish"}, given, r"pooler_act='mish' is not supported")
    refused({"pooler_output_size": 16}, given, r"pooler_output_size=16 is not supported; wanted 32")
    refused({"num_channels": 1}, given, r"num_channels=1 is not supported; wanted 3")
    refused({"patch_size": [4, 2]}, given, r"patch_size=\(4, 2\) is not supported; wanted squares")
    refused({"image_size": 20}, given, r"position_embeddings \(1, 17, 32\): the configuration needs .* \(26, 32\)")
    config = transformers.DeiTConfig(**SMALL)
    teacher = saved(transformers.DeiTForImageClassificationWithTeacher(config), tmp_path / "teacher")
    with pytest.raises(mm.CheckpointError, match=r"two classifiers.*DeiTForImageClassification"):
        pretrained(teacher)
    masked = saved(
        transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, encoder_stride=4)), tmp_path / "m"
    )
    with pytest.raises(mm.CheckpointError, match=r"nothing uses the tensor 'decoder.0"):
        pretrained(masked)


def test_names_of_classes_that_occur_twice(tmp_path: Path) -> None:
    given = saved(build("vit classes", id2label={"0": "crane", "1": "cat", "2": "crane"}), tmp_path)
    assert pretrained(given).tokenizers["label"].names == ("crane (0)", "cat", "crane (2)")  # type: ignore[attr-defined]


def test_the_width_of_a_small_model(tmp_path: Path) -> None:
    """ViT-S/16's width and heads, at a depth of 1, with pictures of 224 and of 160 x 96 pixels."""
    settings = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 1}
    module = build("vit classes", **settings, image_size=224, patch_size=16)
    values = pictures([(224, 224), (160, 96)])
    loaded = pretrained(saved(module, tmp_path))
    check_packed_and_alone(loaded, values, ours, theirs(module, values))
