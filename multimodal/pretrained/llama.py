"""Llama (Touvron et al. 2023) and models with its tensor names: SmolLM2, Mistral, Qwen2.5 and Qwen3."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from multimodal.core import Core
from multimodal.heads import NextToken
from multimodal.layers import MLP, SandwichNorm, SelfAttention
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
    stacked,
)
from multimodal.pretrained.texts import check_head, text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task


class Llama(Family):
    """Causal language models with RMSNorm, a gated MLP and rotary positions."""

    names = ("llama", "mistral", "qwen2", "qwen3")
    peers: ClassVar = {"text -> text": "AutoModelForCausalLM"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        family = settings.need("model_type")
        width, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
        depth, hidden = settings.need("num_hidden_layers"), settings.need("intermediate_size")
        groups = settings.get("num_key_value_heads", heads)
        key_width = settings.get("head_dim", width // heads)
        # Qwen2 always has biases on queries, keys and values; its configuration does not say so
        bias: tuple[str, ...] = ("query", "key", "value") if family == "qwen2" else ()
        if settings.get("attention_bias", False):
            bias = ("query", "key", "value", "out")
        tied = settings.get("tie_word_embeddings", False)
        # the size of their position tables; rotary positions need none
        settings.ignore("max_position_embeddings")
        # SmolLM2 notes the framework that trained it; the tensors are stored as all others are
        settings.ignore("is_llama_config")
        settings.only("rope_interleaved", False)
        mlp = MLP(activation=activation(settings, "hidden_act", "silu"), bias=settings.get("mlp_bias", False))
        base, rotary = rotary_of(settings)
        windows = windows_of(settings, depth, *window_of(settings, family))

        def attention(window: int | None) -> SelfAttention:
            return SelfAttention(
                bias=bias,
                rotary=rotary,
                mask=None if window is None else Window(window),
                key_width=None if key_width * heads == width else key_width,
            )

        blocks = tuple((attention(window), mlp) for window in windows)
        core = Core(
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=groups,
            mlp_width=hidden,
            norm=Norm(eps=settings.get("rms_norm_eps", 1e-6)),
            qk_norm=family == "qwen3",
            rotary_split=(1, 0, 0),
            rotary_base=(base, 100.0, 100.0),
            block=blocks[0] if len(set(blocks)) == 1 else blocks,
        )
        text = text_tokenizer(settings, files)
        bare = not any(name.startswith("model.") for name in names)  # saved without its head
        check_head(settings, tied=tied, bare=bare)
        head = NextToken(
            start_ids=(),
            stop_id=stop_of(settings, 2 if family in ("llama", "mistral") else None),
            tied=tied,
            bias=False,
        )
        return Blueprint(
            {"text": text},
            core,
            [Task("text -> text", head)],
            list(decoder_pairs(core, "" if bare else "model.", head.tied)),
            copies={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
            derived=[r".*rotary_emb\.inv_freq"],
        )


def decoder_pairs(core: Core, prefix: str, tied: bool) -> Iterator[Pair]:
    """The pairs of a language model; Llama, Qwen and Gemma share these tensor names.

    prefix: of all their names except that of the head. tied: whether the head shares the embedding table.
    """
    yield same("embeds.text.weight", f"{prefix}embed_tokens.weight")
    yield same("core.norm.weight", f"{prefix}norm.weight")
    if not tied:
        yield same("readouts.text_NextToken.linear.weight", "lm_head.weight")
    for i in range(core.depth):
        yield from decoder_block(core, i, f"{prefix}layers.{i}")


def decoder_block(core: Core, i: int, theirs: str) -> Iterator[Pair]:
    """The pairs of block i of a core. theirs: the prefix of their names."""
    attends, mlp = core.blocks[i]
    assert isinstance(attends, SelfAttention)
    assert isinstance(mlp, MLP)
    ours, attention = f"core.blocks.{i}.layers", attention_names(i)
    width = attends.key_width or core.head_width
    rows, rotary_widths = [core.heads * width, core.groups * width, core.groups * width], [width, width, None]
    projections = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    yield from attention_pairs(attention, projections, f"{theirs}.self_attn.o_proj", rows, attends.bias, rotary_widths)
    if core.qk_norm:
        for name in "qk":
            norm = f"{theirs}.self_attn.{name}_norm.weight"
            yield stacked(f"{attention}.norm_{name}.weight", [norm], [width], [width])
    for kind in ("weight", "bias") if mlp.bias else ("weight",):
        both = [f"{theirs}.mlp.gate_proj.{kind}", f"{theirs}.mlp.up_proj.{kind}"]
        yield stacked(f"{ours}.1.body.gate_up.{kind}", both, [core.hidden] * 2)
        yield same(f"{ours}.1.body.down.{kind}", f"{theirs}.mlp.down_proj.{kind}")
    # if a layer also has a norm at its output, they name the norm at its input differently
    norms = {"0.norm": "input", "1.norm": "post_attention"}
    if isinstance(attends.merge, SandwichNorm):
        norms = {"0.norm": "input", "0.merge_weights": "post_attention"}
        norms |= {"1.norm": "pre_feedforward", "1.merge_weights": "post_feedforward"}
    for name, other in norms.items():
        yield same(f"{ours}.{name}.weight", f"{theirs}.{other}_layernorm.weight")


def rotary_of(settings: Settings) -> tuple[float, Rotary | None]:
    """Return (the base of rotary positions, the scaled rotary positions or None)."""
    # if a file has both, transformers uses the older field
    given, old = settings.get("rope_parameters", {}), settings.get("rope_scaling", {})
    scaling = dict(old or given)
    base = scaling.pop("rope_theta", settings.get("rope_theta", 10000.0))
    return base, scaled_rotary(settings.where, base, scaling)


def scaled_rotary(where: str, base: float, scaling: Mapping[str, Any]) -> Rotary | None:
    """Rotary positions with the scaling in "rope_parameters"; None: there is no scaling.

    Raises:
        CheckpointError: the type of scaling, or one of its fields, is not supported.
    """
    scaling = {name: value for name, value in scaling.items() if value is not None}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    factor, fraction = scaling.pop("factor", 1.0), scaling.pop("partial_rotary_factor", 1.0)
    bands = None
    if kind == "llama3":
        fields = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [name for name in fields if name not in scaling]:
            raise CheckpointError(f"{where}: rope_parameters have no {missing[0]!r}, which rope_type='llama3' needs")
        low, high, tokens = (scaling.pop(name) for name in fields)
        bands = (low, high, tokens)
    elif kind not in ("default", "linear"):
        raise CheckpointError(
            f"{where}: rope_type={kind!r} is not supported; there are 'default', 'linear' and 'llama3'"
        )
    if scaling or fraction != 1.0:
        names = [*scaling, *(["partial_rotary_factor"] if fraction != 1.0 else [])]
        raise CheckpointError(f"{where}: rope_parameters have {', '.join(names)}, which this version does not know")
    if kind == "default":
        return None
    return Rotary(base=(float(base), 100.0, 100.0), factor=float(factor), bands=bands)


def window_of(settings: Settings, family: str) -> tuple[int | None, int]:
    """Return (the size of the attention window or None, how many of the first layers have no window).

    Llama has no window. Mistral has one in every layer. Qwen has one only if `use_sliding_window` is true.
    """
    used, first = settings.get("use_sliding_window", False), settings.get("max_window_layers", 28)
    window = settings.stated("sliding_window", 4096)
    if family == "llama" or (family != "mistral" and not used):
        return None, 0
    return window, 0 if family == "mistral" else first


def windows_of(settings: Settings, depth: int, window: int | None, first: int = 0) -> list[int | None]:
    """For each block, the size of its attention window in tokens, including the query itself; None: no window.

    window: the size in layers that have one; None: no layer has one. first: how many of the first layers have none, if there is no
        "layer_types".
    """
    kinds = settings.get("layer_types")
    if window is None:
        return [None] * depth
    if kinds is None:
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(depth)]
    if len(kinds) != depth:
        raise CheckpointError(f"{settings.where}: layer_types has {len(kinds)} layers, but there are {depth}")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise CheckpointError(f"{settings.where}: layer_types has {kind!r}; there are {', '.join(known)}")
    return [known[kind] for kind in kinds]


def stop_of(settings: Settings, default: int | None = None) -> int:
    """The id that ends a text, or the first one of several. default: the id if the field is missing."""
    stop, begin = settings.stated("eos_token_id", default), settings.get("bos_token_id")
    if isinstance(stop, (list, tuple)):
        stop = next(iter(stop), None)
    # our head needs a stop id: without eos_token_id it is bos_token_id, or id 0
    return next((i for i in (stop, begin) if isinstance(i, int)), 0)
