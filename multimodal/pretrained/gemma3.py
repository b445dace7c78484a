"""Gemma 3 (Gemma Team 2025), the text-only models."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from multimodal.attention import DotProduct, ScaledDotProduct
from multimodal.core import Core
from multimodal.heads import NextToken
from multimodal.layers import MLP, SandwichNorm, SelfAttention
from multimodal.masks import Window
from multimodal.norm import Norm
from multimodal.positions import Rotary
from multimodal.pretrained.family import Blueprint, Family, Settings, activation
from multimodal.pretrained.llama import decoder_pairs, scaled_rotary, stop_of, windows_of
from multimodal.pretrained.texts import adds_tokens, check_head, text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task
from multimodal.texts import short_repr

FULL, SLIDING = "full_attention", "sliding_attention"


class Gemma3(Family):
    """Causal language models with norms on both sides of each layer, most of which have sliding-window attention."""

    names = ("gemma3_text",)
    peers: ClassVar = {"text -> text": "AutoModelForCausalLM"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        width, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
        depth, key_width = settings.need("num_hidden_layers"), settings.get("head_dim", 256)
        settings.only("attn_logit_softcapping", None)
        settings.only("use_bidirectional_attention", False)
        # the size of their position tables; the class of their cache; a copy of what layer_types says
        settings.ignore("max_position_embeddings", "cache_implementation", "_sliding_window_pattern")
        bias = ("query", "key", "value", "out") if settings.get("attention_bias", False) else ()
        tied = settings.get("tie_word_embeddings", True)
        scalar = settings.get("query_pre_attn_scalar", 256)
        mlp = MLP(activation=activation(settings, "hidden_activation", "gelu_pytorch_tanh"), merge=SandwichNorm())
        rotary = rotaries_of(
            settings, {FULL: 1e6, SLIDING: 1e4}, {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}, (FULL,)
        )
        window = settings.get("sliding_window", 4096)

        def attention(window: int | None) -> SelfAttention:
            return SelfAttention(
                bias=bias,
                rotary=rotary[SLIDING if window else FULL],
                mask=None if window is None else Window(window),
                key_width=None if key_width * heads == width else key_width,
                merge=SandwichNorm(),
            )

        blocks = tuple(
            (attention(window), mlp) for window in windows_of(with_layer_types(settings, depth), depth, window)
        )
        core = Core(
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=settings.get("num_key_value_heads", 4),
            mlp_width=settings.need("intermediate_size"),
            norm=Norm(eps=settings.get("rms_norm_eps", 1e-6), around_one=True),
            qk_norm=True,
            rotary_split=(1, 0, 0),
            score=ScaledDotProduct() if scalar == key_width else DotProduct(scale=scalar**-0.5),
            block=blocks[0] if len(set(blocks)) == 1 else blocks,
        )
        # each text begins with <bos>, without which these models generate bad text
        text = text_tokenizer(settings, files, scale=math.sqrt(width), template=adds_tokens(files))
        bare = not any(name.startswith("model.") for name in names)  # saved without its head
        check_head(settings, tied=tied, bare=bare)
        cap = settings.get("final_logit_softcapping")
        head = NextToken(start_ids=(), stop_id=stop_of(settings, 1), tied=tied, bias=False, cap=cap)
        return Blueprint(
            {"text": text},
            core,
            [Task("text -> text", head)],
            list(decoder_pairs(core, "" if bare else "model.", head.tied)),
            copies={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        )


def rotaries_of(
    settings: Settings, defaults: Mapping[str, float], old: Mapping[str, str], scaled: Collection[str]
) -> dict[str, Rotary]:
    """{kind of layer: its rotary positions}.

    defaults: {kind: the base if the configuration has none}. old: {kind: the field of the base in older configurations}.
    scaled: the kinds to which "rope_scaling" applies.
    """
    given, scaling = settings.get("rope_parameters", {}), settings.get("rope_scaling", {})
    if not all(kind in defaults and isinstance(value or {}, Mapping) for kind, value in given.items()):
        raise CheckpointError(
            f"{settings.where}: rope_parameters={short_repr(given)} is not supported; wanted those of {' and '.join(defaults)}, by "
            "name"
        )
    found = {}
    for kind, default in defaults.items():
        own: dict[str, Any] = {**(given.get(kind) or {}), **(scaling if kind in scaled else {})}
        base = settings.get(old[kind], default)
        base = own.pop("rope_theta", base)
        found[kind] = scaled_rotary(settings.where, base, own) or Rotary(base=(float(base), 100.0, 100.0))
    return found


def with_layer_types(settings: Settings, depth: int) -> Settings:
    """The settings, with `layer_types` if they lack it, as older ones do: every sixth layer has full attention."""
    every = settings.get("sliding_window_pattern", 6)
    if settings.get("layer_types") is not None:
        return settings
    kinds = [FULL if (i + 1) % every == 0 else SLIDING for i in range(depth)]
    return Settings(settings.where, {"layer_types": kinds})
