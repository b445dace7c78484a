"""The encoders of CLIP and SigLIP (Zhai et al. 2023), also for models that contain one: PaliGemma and SmolVLM."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from multimodal.core import Core
from multimodal.layers import MLP, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import Pair, Settings, activation, same
from multimodal.pretrained.pictures import EncoderBlock, embedding_pairs, patches, sides
from multimodal_tokenizers import ClassTokens

BIASES = ("query", "key", "value", "out")
TOWER = {"embeds.image.": "embeds.image.frozen_part.embed.", "core.": "embeds.image.frozen_part.core."}
"""{prefix of our names in a model of this encoder alone: prefix in a tower of the kind "image"}."""


def vision_tokens(
    settings: Settings, processor: Mapping[str, Any], resample: Literal["bicubic", "nearest"] = "bicubic"
) -> ClassTokens:
    """Image patches with learned positions."""
    of = patches(settings, processor)
    rows, columns = sides(settings, "image_size")
    return ClassTokens(of, count=0, table=(rows // of.patch, columns // of.patch), resample=resample)


def encoder_core(settings: Settings, act: str = "gelu_pytorch_tanh", eps: float = 1e-6, **more: Any) -> Core:
    """The core of an image or text encoder. act, eps: the defaults of `hidden_act` and `layer_norm_eps`."""
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
    """The pairs of an image encoder; ours are named as in a model of this encoder alone. theirs: the prefix of their names."""
    of: Any = tokens.of
    yield from embedding_pairs("image", f"{theirs}embeddings.patch_embedding", core.width, 3, of.patch)
    yield same("embeds.image.positions_ND", f"{theirs}embeddings.position_embedding.weight")
    yield from encoder_pairs(core, theirs)
    for part in ("weight", "bias"):
        yield same(f"core.norm.{part}", f"{theirs}post_layernorm.{part}")


def encoder_pairs(core: Core, theirs: str) -> Iterator[Pair]:
    """The pairs of all blocks. theirs: the prefix of their names."""
    mlp: Any = core.blocks[0][1]
    block = EncoderBlock(
        width=core.width,
        heads=core.heads,
        hidden=core.hidden,
        activation=mlp.activation,
        bias=BIASES,
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        up=("mlp.fc1",),
        down="mlp.fc2",
        norms=("layer_norm1", "layer_norm2"),
    )
    for i in range(core.depth):
        yield from block.pairs(i, f"{theirs}encoder.layers.{i}")
