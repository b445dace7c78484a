"""VisionTransformer objects of timm: ViT, DeiT, DINOv2, and the image encoders of CLIP and SigLIP."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.core import Core
from multimodal.heads.pool import Attended, First, Mean, Pool, Transformed
from multimodal.layers import Add, LayerScale
from multimodal.norm import Norm
from multimodal.pretrained.family import Blueprint, Family, Pair, Settings, affine, attention_names
from multimodal.pretrained.pictures import (
    EncoderBlock,
    classes,
    classifier_task,
    embedding_pairs,
    learned_pair,
    positions_pair,
    vector_task,
)
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import ClassTokens, ImagePatches
from multimodal_tokenizers.fit import timm_image_settings

CLASSES = ("VisionTransformer", "VisionTransformerDistilled")
ACTIVATIONS = {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
PARTS = {
    *("PatchEmbed", "Block", "Attention", "Mlp", "LayerScale", "AttentionPoolLatent", *CLASSES),
    *("Conv2d", "Linear", "LayerNorm", "Identity", "Sequential", "GELU", *ACTIVATIONS),
    *("Dropout", "DropPath", "PatchDropout"),  # only in training
}
"""Classes of submodules that are supported."""


def module_config(module: nn.Module) -> dict[str, Any]:
    """The configuration of a timm module, as JSON values.

    Raises:
        CheckpointError: a submodule or setting is not supported.
    """
    import timm.data

    vit: Any = module
    where = type(module).__name__
    for name, part in module.named_modules():
        if type(part).__name__ not in PARTS:
            raise CheckpointError(f"{where}: {name} is {type(part).__name__}, which is not supported")
    block, patch = vit.blocks[0], vit.patch_embed
    eps = sorted({part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)})
    activations = {_activation(part) for part in module.modules() if _activation(part)}
    scaled = {isinstance(getattr(one, name), nn.Identity) for one in vit.blocks for name in ("ls1", "ls2")}
    for said, found in (
        ("eps of norms", eps),
        ("activations", activations),
        ("ways to merge", scaled),
        ("shapes of blocks", {tuple((n, p.shape) for n, p in one.named_parameters()) for one in vit.blocks}),
        ("heads", {one.attn.num_heads for one in vit.blocks}),
    ):
        if len(found) != 1:
            raise CheckpointError(f"{where}: it has {len(found)} different {said}, and ours has one")
    for name, part in (
        ("patch_embed.norm", patch.norm),
        ("blocks.0.attn.norm", block.attn.norm),
        ("blocks.0.mlp.norm", block.mlp.norm),
    ):
        if not isinstance(part, nn.Identity):
            raise CheckpointError(f"{where}: {name} is {type(part).__name__}, which is not supported")
    if block.attn.gate is not None:
        raise CheckpointError(f"{where}: blocks.0.attn.gate is not supported")
    data = timm.data.resolve_model_data_config(module)
    if not vit.dynamic_img_size:
        data = {**data, "input_size": (vit.in_chans, *patch.img_size)}
    cfg = dict(vit.pretrained_cfg)
    return {
        "architecture": cfg.get("architecture"),
        "width": vit.embed_dim,
        "depth": len(vit.blocks),
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "head_width": block.attn.head_dim,
        "patch_size": list(patch.patch_size),
        "grid": list(patch.grid_size),
        "channels": vit.in_chans,
        "class_token": vit.cls_token is not None,
        "registers": vit.num_reg_tokens,
        "distilled": hasattr(vit, "dist_token"),
        "positions": vit.pos_embed is not None,
        "placed": 0 if vit.no_embed_class or vit.pos_embed is None else vit.num_prefix_tokens,
        "patch_bias": patch.proj.bias is not None,
        "first_norm": not isinstance(vit.norm_pre, nn.Identity),
        "last_norm": not isinstance(vit.norm, nn.Identity),
        "pool": vit.global_pool,
        "pool_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "pool_heads": None if vit.attn_pool is None else vit.attn_pool.num_heads,
        "pool_hidden": None if vit.attn_pool is None else vit.attn_pool.mlp.fc1.out_features,
        "eps": eps[0],
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "layer_scale": not isinstance(block.ls1, nn.Identity),
        "activation": next(iter(activations)),
        "num_classes": vit.num_classes,
        "id2label": _labels(vit, cfg),
        "data": {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()},
    }


def _activation(part: nn.Module) -> str | None:
    """Our name of an activation module; None: the module is no activation."""
    if isinstance(part, nn.GELU):
        return "gelu" if part.approximate == "none" else "gelu_tanh"
    return "gelu" if type(part).__name__ == "GELU" else ACTIVATIONS.get(type(part).__name__)


def _labels(vit: Any, cfg: Mapping[str, Any]) -> dict[str, str]:
    """{class number: class name}."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = vit.num_classes
    names = cfg.get("label_names")
    if names is None and (subset := infer_imagenet_subset(vit)):
        names = ImageNetInfo(subset).label_descriptions()
    if names is None or len(names) != count:
        names = [f"LABEL_{i}" for i in range(count)]
    return {str(i): name for i, name in enumerate(names)}


class TimmViT(Family):
    """timm's VisionTransformer. `Model.export("timm", folder)` writes timm's tensor names, for its `load_state_dict`."""

    names = tuple(f"timm:{name}" for name in CLASSES)
    peers: ClassVar = {"image <-> other:image": "timm", "image -> label": "timm"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        settings.ignore("architecture")
        width, heads = settings.need("width"), settings.need("heads")
        settings.only("head_width", width // heads)
        biased = settings.need("proj_bias")
        scaled = settings.need("layer_scale")
        block = EncoderBlock(
            width=width,
            heads=heads,
            hidden=settings.need("hidden"),
            activation=settings.need("activation"),
            bias=(*(("query", "key", "value") if settings.need("qkv_bias") else ()), *(["out"] if biased else [])),
            mlp_bias=biased,
            merge=LayerScale() if scaled else Add(),
            projections=("attn.qkv",),
            out="attn.proj",
            up=("mlp.fc1",),
            down="mlp.fc2",
            norms=("norm1", "norm2"),
            scales=("ls1.gamma", "ls2.gamma") if scaled else (),
        )
        norm = Norm(eps=settings.need("eps"), centred=True, bias=True)
        core = Core(
            width=width,
            depth=settings.need("depth"),
            heads=heads,
            mlp_width=block.hidden,
            norm=norm,
            first_norm=settings.need("first_norm"),
            last_norm=settings.need("last_norm"),
            qk_norm=settings.need("qk_norm"),
            rotary_split=(0, 0, 0),
            block=block.layers,
        )
        image = self._image(settings)
        learned = {"cls_token": int(settings.need("class_token"))}
        learned |= {"dist_token": int(settings.need("distilled")), "reg_token": settings.need("registers")}
        pool = self._pool(settings, norm, block, image.count)
        tokenizers: dict[str, Tokenizer] = {"image": image}
        labels = classes(settings)
        if settings.need("num_classes"):
            tokenizers["label"] = labels
            tasks, more = classifier_task("image", pool, labels, width, "head")
            readout = "readouts.label_Classify.pool"
        else:
            tasks, more = vector_task("image", pool, width)
            readout = "readouts.image__image_Contrast.pool"
        pairs = [
            *self._embedding(image, learned, settings.need("patch_bias"), width),
            *(pair for i in range(core.depth) for pair in block.pairs(i, f"blocks.{i}")),
            *(pair for i in range(core.depth) if core.qk_norm for pair in _query_key_norms(i)),
            *(affine("core.first_norm", "norm_pre") if core.first_norm else ()),
            *(affine("core.norm", "norm") if core.last_norm else ()),
            *_pool_pairs(pool, readout),
            *more,
        ]
        return Blueprint(tokenizers, core, tasks, pairs)

    def _image(self, settings: Settings) -> ClassTokens:
        """The image tokenizer, with the preprocessing of timm's evaluation transform."""
        rows, columns = settings.need("patch_size")
        settings.only("channels", 3, 1)
        if rows != columns:
            raise CheckpointError(f"{settings.where}: patches of {rows} x {columns} pixels are not supported")
        try:
            prepared = timm_image_settings(settings.need("data"))
            of = ImagePatches(patch=rows, position="rotary", bias=settings.need("patch_bias"), **prepared)
        except ConfigError as error:
            raise CheckpointError(f"{settings.where}: {error}") from None
        count = settings.need("class_token") + settings.need("distilled") + settings.need("registers")
        grid = tuple(settings.need("grid"))
        table = grid if settings.need("positions") else None
        return ClassTokens(of, int(count), settings.need("placed"), table, "antialiased")

    def _pool(self, settings: Settings, norm: Norm, block: EncoderBlock, learned: int) -> Pool:
        """The pool before the last linear layer."""
        kind, classified = settings.get("pool"), settings.need("num_classes")
        if settings.need("distilled"):
            if classified:
                raise CheckpointError(
                    f"{settings.where}: it averages two classifiers, and our model has one; "
                    "call its reset_classifier(0) first"
                )
            pool: Pool = First(2)
        elif kind == "map":
            if learned and not settings.need("pool_include_prefix"):
                raise CheckpointError(
                    f"{settings.where}: its attention pool leaves out the {learned} learned tokens, which ours cannot"
                )
            heads, hidden = settings.need("pool_heads"), settings.need("pool_hidden")
            pool = Attended(heads, hidden, block.activation, norm)
        elif kind == "avg":
            pool = Mean(0 if settings.need("pool_include_prefix") else learned)
        elif kind == "token" or (not kind and not classified):
            # without a pool, timm's module returns all states
            pool = First() if learned else Mean()
        else:
            raise CheckpointError(f"{settings.where}: global_pool={kind!r} is not supported")
        settings.ignore("pool_include_prefix", "pool_heads", "pool_hidden")
        return Transformed(pool, last_norm=norm) if settings.need("pool_norm") else pool

    def _embedding(self, image: ClassTokens, learned: Mapping[str, int], bias: bool, width: int) -> Iterator[Pair]:
        of: Any = image.of
        yield from embedding_pairs("image", "patch_embed.proj", width, of.channels, of.patch, bias=bias)
        if image.count:
            counts = {name: count for name, count in learned.items() if count}
            yield learned_pair("image", list(counts), list(counts.values()), width)
        if image.table is not None:
            rows, columns = image.table
            yield positions_pair("image", "pos_embed", image.placed + rows * columns, width)


def _query_key_norms(i: int) -> list[Pair]:
    return [p for name in "qk" for p in affine(f"{attention_names(i)}.norm_{name}", f"blocks.{i}.attn.{name}_norm")]


def _pool_pairs(pool: Pool, ours: str) -> Iterator[Pair]:
    """The pairs of a pool. ours: the prefix of our names."""
    if isinstance(pool, Transformed):
        yield from affine(f"{ours}.last_norm", "fc_norm")
        yield from _pool_pairs(pool.of, f"{ours}.of")
    if not isinstance(pool, Attended):
        return
    theirs, attention = "attn_pool", f"{ours}.attention"
    yield Pair(f"{ours}.query", (f"{theirs}.latent",), lambda x: x[0], lambda x: [x[None]])
    for kind in ("weight", "bias"):
        parts = (f"{theirs}.q.{kind}", f"{theirs}.kv.{kind}")
        yield Pair(f"{attention}.in_proj_{kind}", parts, _joined, _divided)
    for name, other in (("attention.out_proj", "proj"), ("up", "mlp.fc1"), ("down", "mlp.fc2"), ("norm", "norm")):
        yield from affine(f"{ours}.{name}", f"{theirs}.{other}")


def _joined(query: Tensor, both: Tensor) -> Tensor:
    return torch.cat([query, both])


def _divided(x: Tensor) -> list[Tensor]:
    width = len(x) // 3
    return [x[:width], x[width:]]
