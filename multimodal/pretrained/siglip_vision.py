"""The vision tower of SigLIP (Zhai et al. 2023) as functions, for models that have one within: PaliGemma, Idefics 3, SmolVLM."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from multimodal.core import Core
from multimodal.layers import MLP, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import Pair, Settings, activation, attention_names, same, shaped, stacked
from multimodal.shapes import CheckpointError, ConfigError
from multimodal_tokenizers import ClassTokens, ImagePatches
from multimodal_tokenizers.fit import image_settings

BIASES = ("query", "key", "value", "out")
TOWER = {"embeds.image.": "embeds.image.frozen_part.embed.", "core.": "embeds.image.frozen_part.core."}
"""By the beginning of a name of our tensors in a model of its own, that in a tower for pictures."""


def image_processor(files: Mapping[str, bytes], default: Mapping[str, Any]) -> Mapping[str, Any]:
    """How pictures are prepared, as the files beside the weights say; default: where they say nothing."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if name in files:
            found = json.loads(files[name])
            # newer versions write one file for all processors of a model
            found = found.get("image_processor", found if name.startswith("pre") else None)
            if found:
                return found
    return default


def vision_tokens(
    settings: Settings, processor: Mapping[str, Any], resample: Literal["bicubic", "nearest"] = "bicubic"
) -> ClassTokens:
    """Patches of pictures with learned positions."""
    image, patch = settings.get("image_size", 224), settings.get("patch_size", 16)
    settings.only("num_channels", 3)
    if not isinstance(image, int) or not isinstance(patch, int):
        raise CheckpointError(
            f"{settings.where}: image_size={image} and patch_size={patch} are not supported; wanted squares"
        )
    try:
        of = ImagePatches(patch=patch, position="rotary", **image_settings(processor))
    except ConfigError as error:
        raise CheckpointError(f"{settings.where}: the processor of pictures: {error}") from None
    return ClassTokens(of, count=0, table=(image // patch, image // patch), resample=resample)


def vision_core(settings: Settings) -> Core:
    """The encoder."""
    mlp = MLP(activation=activation(settings, "hidden_act", "gelu_pytorch_tanh"), gated=False, bias=True)
    return Core(
        width=settings.need("hidden_size"),
        depth=settings.need("num_hidden_layers"),
        heads=settings.need("num_attention_heads"),
        mlp_width=settings.need("intermediate_size"),
        norm=Norm(eps=settings.get("layer_norm_eps", 1e-6), centred=True, bias=True),
        qk_norm=False,
        rotary_split=(0, 0, 0),
        block=(SelfAttention(bias=BIASES), mlp),
    )


def vision_pairs(core: Core, tokens: ClassTokens, theirs: str) -> Iterator[Pair]:
    """The tensors, ours as those of a model of its own whose pictures are named "image"; theirs: before their names."""
    of: Any = tokens.of
    patch, width = of.patch, core.width
    linear, square = (width, 3 * patch**2), (width, 3, patch, patch)
    yield shaped("embeds.image.of.linear.weight", f"{theirs}embeddings.patch_embedding.weight", linear, square)
    yield same("embeds.image.of.linear.bias", f"{theirs}embeddings.patch_embedding.bias")
    yield same("embeds.image.positions_ND", f"{theirs}embeddings.position_embedding.weight")
    for i in range(core.depth):
        yield from _block(core, i, f"{theirs}encoder.layers.{i}")
    for part in ("weight", "bias"):
        yield same(f"core.norm.{part}", f"{theirs}post_layernorm.{part}")


def _block(core: Core, i: int, theirs: str) -> Iterator[Pair]:
    ours, attention, width = f"core.blocks.{i}.layers", attention_names(i), core.width
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    yield stacked(f"{attention}.qkv.weight", [f"{theirs}.self_attn.{p}.weight" for p in parts[:3]], [width] * 3)
    for name, part in zip(BIASES[:3], parts[:3], strict=True):
        yield same(f"{attention}.biases.{name}", f"{theirs}.self_attn.{part}.bias")
    for kind in ("weight", "bias"):
        yield same(f"{attention}.out.{kind}", f"{theirs}.self_attn.out_proj.{kind}")
        yield same(f"{ours}.1.body.up.{kind}", f"{theirs}.mlp.fc1.{kind}")
        yield same(f"{ours}.1.body.down.{kind}", f"{theirs}.mlp.fc2.{kind}")
        yield same(f"{ours}.0.norm.{kind}", f"{theirs}.layer_norm1.{kind}")
        yield same(f"{ours}.1.norm.{kind}", f"{theirs}.layer_norm2.{kind}")
