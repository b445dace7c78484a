"""The vision transformer (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021), and their classifiers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from multimodal.core import Core
from multimodal.heads.pool import First, Transformed
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, activation, affine, same
from multimodal.pretrained.pictures import (
    EncoderBlock,
    classes,
    classifier_task,
    embedding_pairs,
    image_processor,
    learned_pair,
    patches,
    positions_pair,
    sides,
    vector_task,
)
from multimodal.shapes import CheckpointError
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import ClassTokens

TOKENS = {"vit": ["cls_token"], "deit": ["cls_token", "distillation_token"]}
PROCESSORS = {"vit": "ViTImageProcessor", "deit": "DeiTImageProcessor"}


def encoder_block(settings: Settings) -> EncoderBlock:
    """The block that ViT, DeiT and AST share."""
    parts = ("query", "key", "value") if settings.get("qkv_bias", True) else ()
    return EncoderBlock(
        width=settings.need("hidden_size"),
        heads=settings.need("num_attention_heads"),
        hidden=settings.need("intermediate_size"),
        activation=activation(settings, "hidden_act", "gelu"),
        bias=(*parts, "out"),
        up=("intermediate.dense",),
        down="output.dense",
        norms=("layernorm_before", "layernorm_after"),
    )


def encoder_core(settings: Settings, block: EncoderBlock, eps: float = 1e-12) -> Core:
    """A core of these blocks. eps: the default of `layer_norm_eps`."""
    return Core(
        width=block.width,
        depth=settings.need("num_hidden_layers"),
        heads=block.heads,
        mlp_width=block.hidden,
        norm=Norm(eps=settings.get("layer_norm_eps", eps), centred=True, bias=True),
        qk_norm=False,
        rotary_split=(0, 0, 0),
        block=block.layers,
    )


class ViT(Family):
    """Image encoders with a class token and learned positions."""

    names = ("vit", "deit")
    peers: ClassVar = {"image <-> other:image": "AutoModel", "image -> label": "AutoModelForImageClassification"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        family = settings.need("model_type")
        block = encoder_block(settings)
        core = encoder_core(settings, block)
        rows, columns = sides(settings, "image_size")
        # used only by the decoder for masked image modelling, whose tensors raise an error as unknown
        settings.ignore("encoder_stride")
        default = {"image_processor_type": PROCESSORS[family], "size": {"height": rows, "width": columns}}
        if family == "deit":
            default |= {"size": {"height": rows * 8 // 7, "width": columns * 8 // 7}, "crop_size": default["size"]}
        of = patches(settings, image_processor(files, default))
        learned = TOKENS[family]
        image = ClassTokens(of, len(learned), len(learned), (rows // of.patch, columns // of.patch))

        tokenizers: dict[str, Tokenizer] = {"image": image}
        prefix = "" if "embeddings.cls_token" in names else f"{family}."
        settings.only("pooler_output_size", core.width)
        act = settings.get("pooler_act", "tanh")
        pooled = Transformed(First(), dense="tanh" if act == "tanh" else activation(settings, "pooler_act", "tanh"))
        pairs = list(encoder_pairs("image", image, core, block, prefix, learned))
        if "distillation_classifier.weight" in names:
            raise CheckpointError(
                f"{settings.where}: it averages two classifiers, and our model has one; save it as a "
                "DeiTForImageClassification"
            )
        if "classifier.weight" in names:
            tokenizers["label"] = labels = classes(settings)
            tasks, more = classifier_task("image", First(), labels, core.width, "classifier")
        elif "pooler.dense.weight" in names:
            tasks, more = vector_task("image", pooled, core.width)
            ours = "readouts.image__image_Contrast.pool.dense.linear"
            more += [same(f"{ours}.{part}", f"pooler.dense.{part}") for part in ("weight", "bias")]
        else:
            tasks, more = vector_task("image", First(), core.width)
        # the mask token replaces hidden patches in pretraining; nothing reads it later
        return Blueprint(tokenizers, core, tasks, pairs + more, spare=[r".*embeddings\.mask_token"])


def encoder_pairs(
    kind: str,
    tokens: ClassTokens,
    core: Core,
    block: EncoderBlock,
    prefix: str,
    learned: Sequence[str],
    channels: int = 3,
    linear: str = "of.linear",
) -> Iterator[Pair]:
    """The pairs of an encoder; ViT, DeiT, DINOv2 and AST share these tensor names.

    prefix: of all their names. learned: their names of the learned tokens. channels: of a patch. linear: see `embedding_pairs`.
    """
    assert tokens.table is not None
    theirs, width = f"{prefix}embeddings", core.width
    counts = [1, *[tokens.count - 1] * (len(learned) - 1)]
    patch: Any = tokens.of
    yield learned_pair(kind, [f"{theirs}.{name}" for name in learned], counts, width)
    yield positions_pair(
        kind, f"{theirs}.position_embeddings", tokens.placed + tokens.table[0] * tokens.table[1], width
    )
    yield from embedding_pairs(
        kind, f"{theirs}.patch_embeddings.projection", width, channels, patch.patch, linear=linear
    )
    for i in range(core.depth):
        yield from block.pairs(i, f"{prefix}encoder.layer.{i}")
    yield from affine("core.norm", f"{prefix}layernorm")
