"""DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2023) and without, and its classifiers."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from multimodal.core import Core
from multimodal.heads.pool import First, FirstAndMean
from multimodal.layers import LayerScale
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Settings, activation
from multimodal.pretrained.pictures import (
    EncoderBlock,
    classes,
    classifier_task,
    image_processor,
    patches,
    sides,
    vector_task,
)
from multimodal.pretrained.vit import encoder_pairs
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import ClassTokens

PUBLISHED = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""The image preprocessing for the pretrained weights."""
BACKBONE = (
    "apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names", "_out_features", "_out_indices",
    "return_class_token",
)  # fmt: skip
"""Fields that choose which states a backbone of transformers returns."""


class DINOv2(Family):
    """Self-supervised image encoders with a class token, registers and LayerScale."""

    names = ("dinov2", "dinov2_with_registers")
    peers: ClassVar = {"image <-> other:image": "AutoModel", "image -> label": "AutoModelForImageClassification"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        family, width = settings.need("model_type"), settings.need("hidden_size")
        settings.ignore(*BACKBONE)
        settings.ignore(
            "layerscale_value", "use_mask_token"
        )  # an initial value; whether there is a mask token, which the tensors show
        gated, parts = settings.get("use_swiglu_ffn", False), ("query", "key", "value")
        hidden = int(width * settings.get("mlp_ratio", 4))
        act = activation(settings, "hidden_act", "gelu")
        block = EncoderBlock(
            width=width,
            heads=settings.need("num_attention_heads"),
            hidden=(int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
            activation="silu" if gated else act,
            gated=gated,
            bias=(*(parts if settings.get("qkv_bias", True) else ()), "out"),
            merge=LayerScale(),
            up=("mlp.weights_in",) if gated else ("mlp.fc1",),
            down="mlp.weights_out" if gated else "mlp.fc2",
            norms=("norm1", "norm2"),
            scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        )
        core = Core(
            width=width,
            depth=settings.need("num_hidden_layers"),
            heads=block.heads,
            mlp_width=block.hidden,
            norm=Norm(eps=settings.get("layer_norm_eps", 1e-6), centred=True, bias=True),
            qk_norm=False,
            rotary_split=(0, 0, 0),
            block=block.layers,
        )
        registers = settings.get("num_register_tokens", 4) if family == "dinov2_with_registers" else None
        of = patches(settings, image_processor(files, PUBLISHED))
        rows, columns = sides(settings, "image_size")
        image = ClassTokens(
            of,
            1 + (registers or 0),
            placed=1,
            table=(rows // of.patch, columns // of.patch),
            resample="bicubic" if registers is None else "antialiased",
        )
        learned = ["cls_token"] if registers is None else ["cls_token", "register_tokens"]
        tokenizers: dict[str, Tokenizer] = {"image": image}
        prefix = "" if "embeddings.cls_token" in names else f"{family}."
        if "classifier.weight" in names:
            tokenizers["label"] = labels = classes(settings)
            tasks, more = classifier_task("image", FirstAndMean(image.count), labels, width, "classifier")
        else:
            tasks, more = vector_task("image", First(), width)
        pairs = [*encoder_pairs("image", image, core, block, prefix, learned), *more]
        # the mask token replaces hidden patches in pretraining; nothing reads it later
        return Blueprint(tokenizers, core, tasks, pairs, spare=[r".*embeddings\.mask_token"])
