"""ModernBERT (Warner et al. 2024)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from multimodal.core import Core
from multimodal.heads import EachRow
from multimodal.heads.pool import First, Mean, Transformed
from multimodal.layers import MLP, SelfAttention
from multimodal.layers.base import Add
from multimodal.masks import Window
from multimodal.norm import Norm
from multimodal.positions import Rotary
from multimodal.pretrained.family import (
    Blueprint,
    Family,
    Pair,
    Settings,
    activation,
    attention_names,
    attention_pairs,
    same,
)
from multimodal.pretrained.gemma3 import FULL, SLIDING, rotaries_of
from multimodal.pretrained.pictures import classes, classifier_task, vector_task
from multimodal.pretrained.texts import mlm_head_pairs, text_tokenizer, transformed_pairs
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer


class ModernBert(Family):
    """Text encoders with rotary positions and, in two of three layers, sliding-window attention.

    Tasks: "text -> label" if there is a classifier. Else "text <-> other:text", whose vector is the mean of all states, and
    "text -> text" if there is a masked-language-modelling head.
    """

    names = ("modernbert",)
    peers: ClassVar = {
        "text <-> other:text": "AutoModel",
        "text -> text": "AutoModelForMaskedLM",
        "text -> label": "AutoModelForSequenceClassification",
    }

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        width, depth = settings.need("hidden_size"), settings.need("num_hidden_layers")
        for name in ("attention_bias", "mlp_bias", "norm_bias"):
            settings.only(name, False)
        # the size of their position tables, settings of their kernels, and settings of training
        settings.ignore(
            "max_position_embeddings", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"
        )
        settings.ignore("embedding_dropout", "mlp_dropout", "initializer_cutoff_factor")
        settings.ignore("sparse_prediction", "sparse_pred_ignore_index", "position_embedding_type")
        settings.ignore("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "layer_norm_eps")
        norm = Norm(eps=settings.get("norm_eps", 1e-5), centred=True)
        mlp = MLP(activation=activation(settings, "hidden_activation", "gelu"))
        bases = {FULL: 160000.0, SLIDING: 10000.0}
        rotary = rotaries_of(settings, bases, {FULL: "global_rope_theta", SLIDING: "local_rope_theta"}, tuple(bases))
        # half of local_attention on each side, plus the token itself
        window = Window(settings.get("local_attention", 128) // 2 + 1)
        blocks = tuple(
            (attention(rotary[kind], window if kind == SLIDING else None, first=i == 0), mlp)
            for i, kind in enumerate(kinds_of(settings, depth))
        )
        core = Core(
            width=width,
            depth=depth,
            heads=settings.need("num_attention_heads"),
            mlp_width=settings.need("intermediate_size"),
            norm=norm,
            first_norm=True,
            qk_norm=False,
            rotary_split=(1, 0, 0),
            block=blocks[0] if depth == 1 else blocks,
        )
        tokenizers: dict[str, Tokenizer] = {"text": text_tokenizer(settings, files, causal=False, template=True)}
        prefix = "model." if any(name.startswith("model.") for name in names) else ""
        pairs = list(self._pairs(core, prefix))
        pooling = settings.only("classifier_pooling", "cls", "mean")
        dense = activation(settings, "classifier_activation", "gelu")
        bias = {"dense": settings.get("classifier_bias", False), "decoder": settings.get("decoder_bias", True)}
        tied = settings.get("tie_word_embeddings", True)
        transform = Transformed(First(), dense=dense, bias=bias["dense"], last_norm=norm)
        copies = {}
        if "classifier.weight" in names:
            tokenizers["label"] = labels = classes(settings)
            # the mean is taken before the dense layer
            pool = (
                transform if pooling == "cls" else Transformed(Mean(), dense=dense, bias=bias["dense"], last_norm=norm)
            )
            tasks, more = classifier_task("text", pool, labels, width, "classifier")
            more += transformed_pairs(transform, "readouts.label_Classify.pool", "head.dense", "head.norm")
        else:
            tasks, more = vector_task("text", Mean(), width)
            if "head.dense.weight" in names:
                head = EachRow(transform=transform, tied=tied, bias=bias["decoder"])
                tasks.append(Task("text -> text", head))
                more += mlm_head_pairs(head, "head.dense", "head.norm", "decoder.weight", "decoder.bias")
                copies = {"decoder.weight": f"{prefix}embeddings.tok_embeddings.weight"} if tied else {}
        return Blueprint(tokenizers, core, tasks, pairs + more, copies=copies)

    def _pairs(self, core: Core, prefix: str) -> Iterator[Pair]:
        key_width = core.head_width
        yield same("embeds.text.weight", f"{prefix}embeddings.tok_embeddings.weight")
        yield same("core.first_norm.weight", f"{prefix}embeddings.norm.weight")
        yield same("core.norm.weight", f"{prefix}final_norm.weight")
        for i in range(core.depth):
            ours, theirs, attention = f"core.blocks.{i}.layers", f"{prefix}layers.{i}", attention_names(i)
            rows, rotary_widths = [core.width] * 3, [key_width, key_width, None]
            yield from attention_pairs(attention, [f"{theirs}.attn.Wqkv"], f"{theirs}.attn.Wo", rows, (), rotary_widths)
            yield same(f"{ours}.1.body.gate_up.weight", f"{theirs}.mlp.Wi.weight")
            yield same(f"{ours}.1.body.down.weight", f"{theirs}.mlp.Wo.weight")
            if i > 0:  # the embedding ends with a norm, so the first block has none before its attention
                yield same(f"{ours}.0.norm.weight", f"{theirs}.attn_norm.weight")
            yield same(f"{ours}.1.norm.weight", f"{theirs}.mlp_norm.weight")


def attention(rotary: Rotary, window: Window | None, *, first: bool) -> SelfAttention:
    """The attention of one block."""
    return SelfAttention(rotary=rotary, mask=window, merge=Add(normed=not first))


def kinds_of(settings: Settings, depth: int) -> list[str]:
    """For each block, full or sliding attention; older configurations have a period instead of the list."""
    every = settings.get("global_attn_every_n_layers", 3)
    kinds = settings.get("layer_types") or [SLIDING if i % every else FULL for i in range(depth)]
    if len(kinds) != depth or set(kinds) - {FULL, SLIDING}:
        raise CheckpointError(
            f"{settings.where}: layer_types={kinds} is not supported; wanted {FULL} or {SLIDING} for each of {depth} layers"
        )
    return kinds
