"""The encoders of CLIP and SigLIP (Zhai et al. 2023) as functions, for models that have one within too: PaliGemma, SmolVLM."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from multimodal.core import Core
from multimodal.layers import MLP, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import Pair, Settings, activation, same
from multimodal.pretrained.pictures import EncoderBlock, embedding_pairs
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


def encoder_core(settings: Settings, act: str = "gelu_pytorch_tanh", eps: float = 1e-6, **more: Any) -> Core:
    """An encoder of pictures or texts; act, eps: what holds where the configuration says nothing."""
    mlp = MLP(activation=activation(settings, "hidden_act", act), gated=False, bias=True)
    return Core(
        width=settings.need("hidden_size"),
        depth=settings.need("num_hidden_layers"),
        heads=settings.need("num_attention_heads"),
        mlp_width=settings.need("intermediate_size"),
        norm=Norm(eps=settings.get("layer_norm_eps", eps), centred=True, bias=True),
        qk_norm=False,
        rotary_split=(0, 0, 0),
        block=(SelfAttention(bias=BIASES), mlp),
        **more,
    )


def vision_pairs(core: Core, tokens: ClassTokens, theirs: str) -> Iterator[Pair]:
    """The tensors, ours as those of a model of its own whose pictures are named "image"; theirs: before their names."""
    of: Any = tokens.of
    yield from embedding_pairs("image", f"{theirs}embeddings.patch_embedding", core.width, 3, of.patch)
    yield same("embeds.image.positions_ND", f"{theirs}embeddings.position_embedding.weight")
    yield from encoder_pairs(core, theirs)
    for part in ("weight", "bias"):
        yield same(f"core.norm.{part}", f"{theirs}post_layernorm.{part}")


def encoder_pairs(core: Core, theirs: str) -> Iterator[Pair]:
    """The tensors of all blocks."""
    mlp: Any = core.blocks[0][1]
    block = EncoderBlock(
        width=core.width,
        heads=core.heads,
        hidden=core.hidden,
        activation=mlp.activation,
        bias=BIASES,
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        out="self_attn.out_proj",
        up=("mlp.fc1",),
        down="mlp.fc2",
        norms=("layer_norm1", "layer_norm2"),
    )
    for i in range(core.depth):
        yield from block.pairs(i, f"{theirs}encoder.layers.{i}")
