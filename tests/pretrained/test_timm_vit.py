"""timm's VisionTransformer against itself."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import TOLERANCE, check_packed_and_alone, largest
from tests.pretrained.pictured import normalised, ours, pictures, vectors

timm = pytest.importorskip("timm")

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
BARE = {"num_classes": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "encoder": ("vit_tiny_patch16_224", BARE),
    "mean": ("vit_base_patch16_gap_224", {}),
    "mean with class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "registers": ("vit_medium_patch16_reg4_gap_256", {"reg_tokens": 3}),
    "registers with positions": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "deit3": ("deit3_small_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", BARE),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 16}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 1}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}),
    "siglip classes": ("vit_base_patch16_siglip_224", {"init_values": 0.1}),
    "normed queries": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False, "proj_bias": False}),
    "no positions": ("vit_tiny_patch16_224", {"pos_embed": "none", "act_layer": "gelu_tanh"}),
    "no last norm": ("vit_tiny_patch16_224", {"final_norm": False}),
}
SIZES = [(16, 16), (20, 12), (8, 32)]


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind, settings = CASES[name]
    module = timm.create_model(kind, **{**SMALL, "dynamic_img_size": True, **settings, **more})
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else 0.15))
    return module.eval()


def theirs(module: Any, values: list[Tensor]) -> list[Tensor]:
    """Its states, or the logits of a classifier."""
    with torch.inference_mode():
        if module.num_classes:
            return [module(normalised(x))[0] for x in values]
        return [module.forward_features(normalised(x))[0] for x in values]


def check_round_trip(module: Any, loaded: Pretrained, folder: Path) -> None:
    """In and out again gives the same tensors under the same names, which a new module takes; and so after `Model.save`."""
    wanted = module.state_dict()
    model = loaded.model()
    model.export("timm", folder / "out")
    model.save(folder / "ours")
    mm.Model.load(folder / "ours").export("timm", folder / "again")
    pretrained(folder / "out").model().export("timm", folder / "third")
    for out in ("out", "again", "third"):
        found = load_file(folder / out / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(
        mm.ConfigError, match=r"has the layout of 'timm', not of 'hf'; use Model.export\('timm', folder\)"
    ):
        model.export("hf", folder / "hf")


@pytest.mark.parametrize("name", CASES)
def test_equal_at_three_sizes_packed_and_alone(name: str, tmp_path: Path) -> None:
    module, values = build(name), pictures(SIZES)
    loaded = pretrained(module)
    check_packed_and_alone(loaded, values, ours, theirs(module, values))
    if not module.num_classes:
        with torch.inference_mode():
            wanted = torch.cat([module(normalised(x)) for x in values])
        torch.testing.assert_close(vectors(loaded, values), F.normalize(wanted, dim=-1), atol=TOLERANCE, rtol=0)
    check_round_trip(module, loaded, tmp_path)


def test_any_small_change_is_found() -> None:
    values = pictures(SIZES)
    # norms do not see one number that is added to all features
    uneven = 1e-3 * torch.tensor([1.0, -1.0]).repeat(16)
    for name, tensors in (
        ("registers with positions", ["blocks.1.attn.qkv.bias", "reg_token", "pos_embed", "head.bias"]),
        ("siglip classes", ["attn_pool.kv.bias", "attn_pool.norm.weight", "blocks.2.ls1.gamma"]),
        ("clip", ["norm_pre.weight", "blocks.1.mlp.fc1.bias"]),
        ("normed queries", ["blocks.0.attn.q_norm.weight"]),
    ):
        module = build(name)
        wanted = theirs(module, values)
        for tensor in tensors:
            parameter = dict(module.named_parameters())[tensor]
            before = parameter.detach().clone()
            with torch.no_grad():
                by = uneven if parameter.shape[-1] == 32 and tensor != "blocks.0.attn.q_norm.weight" else 1e-3
                parameter.add_(by)
                if tensor == "blocks.1.attn.qkv.bias":
                    parameter.copy_(before).add_(1e-3 * torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(32))
            assert largest(ours(pretrained(module), values), wanted) > TOLERANCE, tensor
            with torch.no_grad():
                parameter.copy_(before)
        loaded = pretrained(module)
        other = dataclasses.replace(
            loaded, core=loaded.core.replace(norm=mm.core.Norm(eps=1e-3, centred=True, bias=True))
        )
        assert largest(ours(other, values), wanted) > TOLERANCE
        image: Any = dataclasses.replace(loaded.tokenizers["image"], resample="bicubic")
        other = dataclasses.replace(loaded, tokenizers={**loaded.tokenizers, "image": image})
        assert largest(ours(other, values), wanted) > TOLERANCE


def test_pictures_are_prepared_as_theirs() -> None:
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    for name in ("vit", "deit3", "siglip classes"):
        module = build(name, dynamic_img_size=False)
        loaded = pretrained(module)
        data = {**timm.data.resolve_model_data_config(module), "input_size": (3, 16, 16)}
        prepared = timm.data.create_transform(**data, is_training=False)(Image.fromarray(picture))[None]
        of: Any = loaded.tokenizers["image"].of  # type: ignore[attr-defined]
        torch.testing.assert_close(of.preprocess(picture), prepared[0], atol=1e-6, rtol=0)
        with torch.inference_mode():
            wanted = module(prepared)[0].softmax(-1)
        answer = loaded.model().predict("image -> label", [{"image": picture}])[0]
        assert answer.value == f"LABEL_{int(wanted.argmax())}"
        assert abs(answer.confidence - float(wanted.max())) < TOLERANCE


def test_classes_of_imagenet_have_their_names() -> None:
    labels: Any = pretrained(build("vit", num_classes=1000, depth=1)).tokenizers["label"]
    assert labels.names[1] == "goldfish, Carassius auratus"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("resnet18", {}, r"models of type 'timm:ResNet' are not supported; supported are"),
        ("eva02_tiny_patch14_224", {}, r"models of type 'timm:Eva' are not supported"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, r"global_pool='max' is not supported"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, r"global_pool='' is not supported"),
        ("vit_giant_patch14_dinov2", {"depth": 1}, r"blocks.0.mlp is GluMlp, which is not supported"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, r"blocks.0.attn.norm is LayerNorm, which is not supported"),
        ("deit_tiny_distilled_patch16_224", {}, r"it averages two classifiers.*reset_classifier\(0\)"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, r"is RmsNorm, which is not supported"),
        ("vit_relpos_small_patch16_224", {"img_size": 224, "patch_size": 16}, r"timm:VisionTransformerRelPos' are not"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(kind: str, settings: dict[str, Any], message: str) -> None:
    sizes = {} if kind == "resnet18" else {**SMALL, "depth": 1}
    module = timm.create_model(kind, **{**sizes, **settings})
    with pytest.raises(mm.CheckpointError, match=message):
        pretrained(module)


def test_the_width_of_a_small_model() -> None:
    """ViT-S/16's width and heads and DINOv2's scales, at a depth of 1, with pictures of 224 and of 160 x 96 pixels."""
    module = timm.create_model("vit_small_patch16_224", depth=1, init_values=0.5, dynamic_img_size=True).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # no bias of 0, no norm of 1, and no scale that hides a layer
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else 0.02))
    assert module.blocks[0].ls1.gamma.abs().min() > 0.05
    values = pictures([(224, 224), (160, 96)])
    check_packed_and_alone(pretrained(module), values, ours, theirs(module, values))
