"""DINOv3 against transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
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
from tests.pretrained.pictured import normalised, ours, pictures, vectors

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "registers": {"num_register_tokens": 3},
    "no registers": {"layer_norm_eps": 1e-6, "rope_theta": 50.0},
    "gated": {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True},
    "without biases": {"query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False},
}
SIZES = [(16, 16), (20, 12), (8, 32)]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**{**SMALL, **CASES[name], **more}))


def theirs(module: Any, values: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [module(normalised(x)).last_hidden_state[0] for x in values]


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
    module = build("gated")
    given = saved(module, tmp_path)
    wanted = theirs(module, values)
    block = "layer.1"
    tensors = [f"{block}.attention.k_proj.bias", f"{block}.attention.v_proj.bias", f"{block}.layer_scale2.lambda1"]
    core = {
        "norm": mm.core.Norm(eps=1e-3, centred=True, bias=True),
        "rotary_base": (1e4, 90.0, 90.0),
        "rotary_split": (0, 0, 0),
    }

    def difference(loaded: Pretrained) -> float:
        return largest(ours(loaded, values), wanted)

    # one number that is added to all keys of a query changes nothing, but these keys turn by their places
    check_mutations(given, difference, tensors, core)
    # norms do not see one number that is added to all features
    with changed(given, "embeddings.register_tokens", 1e-3 * torch.tensor([1.0, -1.0]).repeat(16)):
        assert difference(pretrained(given)) > TOLERANCE
    loaded = pretrained(given)
    for setting in (1.001, 0.5, None):
        image: Any = dataclasses.replace(loaded.tokenizers["image"], turns=setting)
        assert difference(dataclasses.replace(loaded, tokenizers={"image": image})) > TOLERANCE, setting


def test_pictures_are_prepared_as_theirs(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    module = build("registers")
    given = saved(module, tmp_path)
    # without a file: at the size of its processor
    for processor in (transformers.DINOv3ViTImageProcessor(size={"height": 16, "width": 24}), None):
        (given / "preprocessor_config.json").unlink(missing_ok=True)
        if processor is not None:
            processor.save_pretrained(given)
        processor = processor or transformers.DINOv3ViTImageProcessor()
        prepared = processor(images=torch.from_numpy(picture).permute(2, 0, 1), return_tensors="pt")["pixel_values"]
        loaded = pretrained(given)
        of: Any = loaded.tokenizers["image"].of  # type: ignore[attr-defined]
        torch.testing.assert_close(of.preprocess(picture), prepared[0], atol=1e-5, rtol=0)
    with torch.inference_mode():
        wanted = F.normalize(module(prepared).pooler_output, dim=-1)
    found = loaded.model().vectors("image <-> other:image", [{"image": picture, "other": None}], side="left")
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("registers"), tmp_path)
    refused({"extra": 4}, given, r"has extra, which this version does not know")
    refused({"hidden_act": "mish"}, given, r"hidden_act='mish' is not supported")
    refused({"use_gated_mlp": True}, given, r"there is no tensor 'layer.0.mlp.gate_proj.weight'")
    refused({"num_register_tokens": 2}, given, r"register_tokens \(1, 3, 32\): the configuration needs .* \(3, 32\)")
    refused({"key_bias": True}, given, r"there is no tensor 'layer.0.attention.k_proj.bias'")


def test_the_width_of_a_small_model(tmp_path: Path) -> None:
    """DINOv3-S/16's width, heads and 4 registers, at a depth of 2, with pictures of 224 and of 160 x 96 pixels."""
    settings = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 2}
    values = pictures([(224, 224), (160, 96)])
    module = build("registers", **settings, patch_size=16, num_register_tokens=4)
    loaded = pretrained(saved(module, tmp_path))
    check_packed_and_alone(loaded, values, ours, theirs(module, values))
