"""DINOv3 (Simeoni et al. 2025): relative rotary positions, a class token and registers without positions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from multimodal.core import Core
from multimodal.heads.pool import First
from multimodal.layers import LayerScale
from multimodal.norm import Norm
from multimodal.pretrained.dinov2 import BACKBONE
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, affine
from multimodal.pretrained.pictures import (
    EncoderBlock,
    embedding_pairs,
    image_processor,
    learned_pair,
    patches,
    vector_task,
)
from multimodal_tokenizers import ClassTokens

PROJECTIONS = {"query": "query_bias", "key": "key_bias", "value": "value_bias", "out": "proj_bias"}
"""{projection: the field that says whether it has a bias}."""


class DINOv3(Family):
    """Self-supervised image encoders."""

    names = ("dinov3_vit",)
    peers: ClassVar = {"image <-> other:image": "AutoModel"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        width = settings.need("hidden_size")
        settings.ignore(*BACKBONE)
        # an initial value; augmentation of positions in training; the training resolution, which rotary positions do not need
        settings.ignore("layerscale_value", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "image_size")
        gated = settings.get("use_gated_mlp", False)
        block = EncoderBlock(
            width=width,
            heads=settings.need("num_attention_heads"),
            hidden=settings.need("intermediate_size"),
            activation=activation(settings, "hidden_act", "gelu"),
            gated=gated,
            bias=tuple(name for name, field in PROJECTIONS.items() if settings.get(field, name != "key")),
            mlp_bias=settings.get("mlp_bias", True),
            merge=LayerScale(),
            rotary=True,
            projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            out="attention.o_proj",
            up=("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",),
            down="mlp.down_proj",
            norms=("norm1", "norm2"),
            scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        )
        base = float(settings.get("rope_theta", 100.0))
        core = Core(
            width=width,
            depth=settings.need("num_hidden_layers"),
            heads=block.heads,
            mlp_width=block.hidden,
            norm=Norm(eps=settings.get("layer_norm_eps", 1e-5), centred=True, bias=True),
            qk_norm=False,
            rotary_split=(0, 1, 1),
            rotary_base=(10000.0, base, base),
            block=block.layers,
        )
        registers = settings.get("num_register_tokens", 0)
        of = patches(settings, image_processor(files, {"image_processor_type": "DINOv3ViTImageProcessor"}))
        tasks, more = vector_task("image", First(), width)
        learned = [f"embeddings.{name}" for name in ("cls_token", "register_tokens")]
        pairs: list[Pair] = [
            learned_pair("image", learned, [1, registers], width),
            *embedding_pairs("image", "embeddings.patch_embeddings", width, of.channels, of.patch),
            *(pair for i in range(core.depth) for pair in block.pairs(i, f"layer.{i}")),
            *affine("core.norm", "norm"),
            *more,
        ]
        image = ClassTokens(of, 1 + registers, turns=1.0)
        # the mask token replaces hidden patches in pretraining; nothing reads it later
        return Blueprint({"image": image}, core, tasks, pairs, spare=[r"embeddings\.mask_token"])
