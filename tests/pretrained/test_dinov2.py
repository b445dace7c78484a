"""DINOv2, with registers and without, against transformers."""

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

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", {}),
    "gated": ("Dinov2Model", {"use_swiglu_ffn": True, "layer_norm_eps": 1e-5}),
    "without a mask token": ("Dinov2Model", {"use_mask_token": False, "qkv_bias": False, "mlp_ratio": 2}),
    "classes": ("Dinov2ForImageClassification", {"id2label": LABELS}),
    "registers": ("Dinov2WithRegistersModel", {}),
    "gated with registers": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "num_register_tokens": 1}),
    "classes with registers": ("Dinov2WithRegistersForImageClassification", {"id2label": LABELS}),
}
SIZES = [(16, 16), (20, 12), (8, 32)]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, settings = CASES[name]
    family = "Dinov2WithRegisters" if "Registers" in kind else "Dinov2"
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings, **more})
    return getattr(transformers, kind)(config)


def theirs(module: Any, values: list[Tensor]) -> list[Tensor]:
    """Its states, or the logits of a classifier."""
    with torch.inference_mode():
        found = [module(normalised(x)) for x in values]
    return [x.logits[0] if hasattr(x, "logits") else x.last_hidden_state[0] for x in found]


@pytest.mark.parametrize("name", CASES)
def test_equal_at_three_sizes_packed_and_alone(name: str, tmp_path: Path) -> None:
    module, values = build(name), pictures(SIZES)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    check_packed_and_alone(loaded, values, ours, theirs(module, values))
    # the mask token of training comes back too
    check_round_trip(tmp_path, tmp_path / "theirs")
    again = type(module).from_pretrained(tmp_path / "out").eval()
    assert largest(theirs(again, values), theirs(module, values)) < 1e-6


def test_vectors_are_those_of_the_class_token(tmp_path: Path) -> None:
    module, values = build("registers"), pictures(SIZES)
    loaded = pretrained(saved(module, tmp_path))
    with torch.inference_mode():
        wanted = torch.cat([module(normalised(x)).pooler_output for x in values])
    torch.testing.assert_close(vectors(loaded, values), F.normalize(wanted, dim=-1), atol=TOLERANCE, rtol=0)


def test_any_small_change_is_found(tmp_path: Path) -> None:
    values = pictures(SIZES)
    # of embedded tokens, because norms do not see one number that is added to all features
    uneven = 1e-3 * torch.tensor([1.0, -1.0]).repeat(16)
    block = "encoder.layer.1"
    for name, tensors, embedded in (
        ("gated", [f"{block}.mlp.weights_in.bias", f"{block}.layer_scale1.lambda1"], ["position_embeddings"]),
        ("registers", [f"{block}.attention.attention.value.bias"], ["register_tokens"]),
        ("classes with registers", ["classifier.bias"], []),
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
        image: Any = loaded.tokenizers["image"]
        image = dataclasses.replace(image, resample="bicubic" if "registers" in name else "antialiased")
        other = dataclasses.replace(loaded, tokenizers={**loaded.tokenizers, "image": image})
        assert largest(ours(other, values), wanted) > TOLERANCE


def test_pictures_are_prepared_as_theirs(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    module = build("classes")
    given = saved(module, tmp_path)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16}, image_mean=mean, image_std=std
    )
    processor.save_pretrained(given)
    prepared = processor(images=picture, return_tensors="pt")["pixel_values"]
    loaded = pretrained(given)
    of: Any = loaded.tokenizers["image"].of  # type: ignore[attr-defined]
    torch.testing.assert_close(of.preprocess(picture), prepared[0], atol=1e-6, rtol=0)
    with torch.inference_mode():
        wanted = module(prepared).logits[0].softmax(-1)
    answer = loaded.model().predict("image -> label", [{"image": picture}])[0]
    assert answer.value == f"class {int(wanted.argmax())}"
    assert abs(answer.confidence - float(wanted.max())) < TOLERANCE
    # without a file: as for its published weights
    (given / "preprocessor_config.json").unlink()
    of = pretrained(given).tokenizers["image"].of  # type: ignore[attr-defined]
    processor = transformers.BitImageProcessor(size={"shortest_edge": 256}, image_mean=mean, image_std=std)
    wanted = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(of.preprocess(picture), wanted, atol=1e-6, rtol=0)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("dinov2"), tmp_path)
    refused({"extra": 4}, given, r"has extra, which this version does not know")
    refused({"hidden_act": "mish"}, given, r"hidden_act='mish' is not supported")
    refused({"use_swiglu_ffn": True}, given, r"there is no tensor 'encoder.layer.0.mlp.weights_in")
    refused({"image_size": 20}, given, r"position_embeddings \(1, 17, 32\): the configuration needs .* \(26, 32\)")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 24}, do_rescale=False)
    processor.save_pretrained(given)
    refused({}, given, r"preprocessor_config.json: image_settings: do_rescale=False")


def test_the_width_of_a_small_model(tmp_path: Path) -> None:
    """DINOv2-S/14's width, heads and grid of 37 x 37, at a depth of 1, with pictures of 224 and of 140 x 98 pixels."""
    settings = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_hidden_layers": 1,
        "image_size": 518,
        "patch_size": 14,
    }
    values = pictures([(224, 224), (140, 98)])
    for name in ("dinov2", "registers"):
        module = build(name, **settings)
        loaded = pretrained(saved(module, tmp_path / name))
        check_packed_and_alone(loaded, values, ours, theirs(module, values))
