"""GPT-2 (Radford et al. 2019)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from multimodal.core import Core
from multimodal.heads import NextToken
from multimodal.layers import MLP, SelfAttention
from multimodal.norm import Norm
from multimodal.pretrained.family import (
    Blueprint,
    Family,
    Pair,
    Settings,
    activation,
    affine,
    attention_names,
    same,
    transposed,
    unstacked,
)
from multimodal.pretrained.llama import stop_of
from multimodal.pretrained.texts import check_head, text_tokenizer
from multimodal.task import Task


class GPT2(Family):
    """Causal language models with learned positions, LayerNorm and biases everywhere."""

    names = ("gpt2",)
    peers: ClassVar = {"text -> text": "AutoModelForCausalLM"}

    def read(self, settings: Settings, files: Mapping[str, bytes], names: Sequence[str]) -> Blueprint:
        width = settings.need("n_embd")
        # settings of a classification head; the rounding of the softmax in half precision; generation settings
        settings.ignore(*(name for name in settings.config if name.startswith("summary_")))
        settings.ignore("reorder_and_upcast_attn", "task_specific_params", "n_ctx")
        settings.only("scale_attn_weights", True)
        settings.only("scale_attn_by_inverse_layer_idx", False)
        settings.only("add_cross_attention", False)
        tied = settings.get("tie_word_embeddings", True)
        mlp = MLP(activation=activation(settings, "activation_function", "gelu_new"), gated=False, bias=True)
        core = Core(
            width=width,
            depth=settings.need("n_layer"),
            heads=settings.need("n_head"),
            mlp_width=settings.get("n_inner", 4 * width),
            norm=Norm(eps=settings.get("layer_norm_epsilon", 1e-5), centred=True, bias=True),
            qk_norm=False,
            rotary_split=(0, 0, 0),
            learned_times=settings.need("n_positions"),
            block=(SelfAttention(bias=("query", "key", "value", "out")), mlp),
        )
        prefix = "transformer." if any(name.startswith("transformer.") for name in names) else ""
        check_head(settings, tied=tied, bare=not prefix)
        head = NextToken(start_ids=(), stop_id=stop_of(settings, 50256), tied=tied, bias=False)
        return Blueprint(
            {"text": text_tokenizer(settings, files)},
            core,
            [Task("text -> text", head)],
            list(self._pairs(core, prefix, head.tied)),
            copies={"lm_head.weight": f"{prefix}wte.weight"} if head.tied else {},
            derived=[r".*\.attn\.(bias|masked_bias)"],  # the causal mask
        )

    def _pairs(self, core: Core, prefix: str, tied: bool) -> Iterator[Pair]:
        yield same("embeds.text.weight", f"{prefix}wte.weight")
        yield same("core.times.weight", f"{prefix}wpe.weight")
        yield from affine("core.norm", f"{prefix}ln_f")
        if not tied:
            yield same("readouts.text_NextToken.linear.weight", "lm_head.weight")
        for i in range(core.depth):
            ours, theirs, attention = f"core.blocks.{i}.layers", f"{prefix}h.{i}", attention_names(i)
            yield transposed(f"{attention}.qkv.weight", f"{theirs}.attn.c_attn.weight")
            biases = [f"{attention}.biases.{name}" for name in ("query", "key", "value")]
            yield from unstacked(biases, f"{theirs}.attn.c_attn.bias", [core.width] * 3)
            for name, other in (
                (f"{attention}.out", "attn.c_proj"),
                (f"{ours}.1.body.up", "mlp.c_fc"),
                (f"{ours}.1.body.down", "mlp.c_proj"),
            ):
                yield transposed(f"{name}.weight", f"{theirs}.{other}.weight")
                yield same(f"{name}.bias", f"{theirs}.{other}.bias")
            for layer in range(2):
                yield from affine(f"{ours}.{layer}.norm", f"{theirs}.ln_{layer + 1}")
