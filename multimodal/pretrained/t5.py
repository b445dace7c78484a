"""T5 (Raffel et al. 2020), versions 1.0 and 1.1: encoder and decoder, or the encoder alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from multimodal.attention import BucketedBias, DotProduct
from multimodal.core import Core
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.heads import NextToken
from multimodal.heads.pool import Mean
from multimodal.layers import MLP, CrossAttention, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import (
    Blueprint,
    Family,
    Pair,
    Settings,
    activation,
    attention_pairs,
    same,
    stacked,
    transposed,
)
from multimodal.pretrained.llama import stop_of
from multimodal.pretrained.pictures import vector_task
from multimodal.pretrained.texts import adds_tokens, text_tokenizer
from multimodal.shapes import CheckpointError
from multimodal.task import Task


class T5(Family):
    """Encoder-decoders with a bucketed relative position bias, which all layers share.

    An encoder alone has the task "text <-> other:text", whose vector is the mean of all states.
    """

    names = ("t5",)
    peers: ClassVar = {"text -> text": "AutoModelForSeq2SeqLM", "text <-> other:text": "T5EncoderModel"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        width = settings.need("d_model")
        # two copies of what feed_forward_proj says, the size of a table, and generation settings
        settings.ignore("dense_act_fn", "is_gated_act", "n_positions", "output_past", "task_specific_params")
        settings.only("is_decoder", False)
        settings.ignore("is_encoder_decoder")  # the tensors say it
        tie = settings.get("tie_word_embeddings", True)
        scaled = settings.get("scale_decoder_outputs", tie)
        start = settings.get("decoder_start_token_id", settings.get("pad_token_id", 0))
        depth, stop = settings.need("num_layers"), stop_of(settings, 1)
        reader = core_of(settings, depth, writes=False)
        writer = core_of(settings, settings.get("num_decoder_layers", depth), writes=True)
        text = text_tokenizer(settings, files, causal=False, template=adds_tokens(files))
        copies = {f"{part}.embed_tokens.weight": "shared.weight" for part in ("encoder", "decoder")}
        pairs = [same("embeds.text.weight", "shared.weight")]
        if not any(name.startswith("decoder.") for name in names):
            tasks, more = vector_task("text", Mean(), width)
            pairs += [*core_pairs(reader, "core", "encoder"), *more]
            return Blueprint({"text": text}, reader, tasks, pairs, copies)
        pairs += [*core_pairs(reader, "core.reader", "encoder"), *core_pairs(writer, "core.writer", "decoder")]
        # version 1.1 has a head of its own, even if a newer configuration says that it is tied
        tied = scaled or "lm_head.weight" not in names
        if tied:
            copies["lm_head.weight"] = "shared.weight"
        else:
            pairs.append(same("readouts.text_NextToken.linear.weight", "lm_head.weight"))
        scale = width**-0.5 if scaled else 1.0
        head = NextToken(start_ids=(start,), stop_id=stop, tied=tied, bias=False, scale=scale)
        # a table in the original files that no layer reads
        spare = [r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"]
        core = EncoderDecoder(reader=reader, writer=writer)
        return Blueprint({"text": text}, core, [Task("text -> text", head)], pairs, copies, spare=spare)


def core_of(settings: Settings, depth: int, *, writes: bool) -> Core:
    """The encoder or the decoder."""
    width, heads, key_width = settings.need("d_model"), settings.need("num_heads"), settings.need("d_kv")
    bias = BucketedBias(
        buckets=settings.get("relative_attention_num_buckets", 32),
        reach=settings.get("relative_attention_max_distance", 128),
        directed=not writes,
    )
    # in some models the number of heads does not divide the width
    divides = width % (2 * heads) == 0
    own: dict[str, Any] = {
        "heads": None if divides else heads,
        "key_width": None if divides and key_width * heads == width else key_width,
    }
    gate, _, name = settings.get("feed_forward_proj", "relu").rpartition("-")
    if gate not in ("", "gated"):
        raise CheckpointError(
            f"{settings.where}: feed_forward_proj={gate!r}-{name} is not supported; wanted 'gated-{name}'"
        )
    kind = activation(Settings(settings.where, {"feed_forward_proj": name}), "feed_forward_proj", "relu")
    mlp = MLP(activation="gelu_tanh" if gate and kind == "gelu" else kind, gated=bool(gate))
    attention = SelfAttention(prior=bias, **own)
    return Core(
        width=width,
        depth=depth,
        heads=heads if divides else 1,
        mlp_width=settings.need("d_ff"),
        norm=Norm(eps=settings.get("layer_norm_epsilon", 1e-6)),
        qk_norm=False,
        rotary_split=(0, 0, 0),
        score=DotProduct(),
        block=(attention, CrossAttention(**own), mlp) if writes else (attention, mlp),
    )


def core_pairs(core: Core, ours: str, theirs: str) -> Iterator[Pair]:
    """The pairs of the encoder or the decoder. ours, theirs: the prefixes of the names."""
    yield same(f"{ours}.norm.weight", f"{theirs}.final_layer_norm.weight")
    table = "body.attention.mechanism.prior_weights.0.table"
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield transposed(f"{ours}.blocks.0.layers.0.{table}", bias)
    for i, block in enumerate(core.blocks):
        for j, layer in enumerate(block):
            body, other = f"{ours}.blocks.{i}.layers.{j}", f"{theirs}.block.{i}.layer.{j}"
            yield same(f"{body}.norm.weight", f"{other}.layer_norm.weight")
            if isinstance(layer, MLP):
                up, parts = ("gate_up", ["wi_0", "wi_1"]) if layer.gated else ("up", ["wi"])
                names = [f"{other}.DenseReluDense.{part}.weight" for part in parts]
                yield stacked(f"{body}.body.{up}.weight", names, [core.hidden] * len(parts))
                yield same(f"{body}.body.down.weight", f"{other}.DenseReluDense.wo.weight")
                continue
            assert isinstance(layer, (SelfAttention, CrossAttention))
            rows = (layer.heads or core.heads) * (layer.key_width or core.head_width)
            kind = "SelfAttention" if isinstance(layer, SelfAttention) else "EncDecAttention"
            names = [f"{other}.{kind}.{part}" for part in "qkv"]
            yield from attention_pairs(f"{body}.body.attention", names, f"{other}.{kind}.o", [rows] * 3, ())
