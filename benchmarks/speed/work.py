"""What several rows do: training steps, a tokenizer of plain ids, and Llama of one shape as Hugging Face's and as ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed.row import Job, Place


def parameter_count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def train_step(model: Any, *losses: Callable[[], Any]) -> Callable[[], None]:
    """One training step: forward and backward of each loss in turn, fused AdamW, zero_grad."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for loss in losses:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training(
    model: Any,
    loss: Callable[[], Any],
    outputs: Callable[[], Any] | None = None,
    *,
    units: float,
    unit: str,
    **facts: Any,
) -> Job:
    """A job of training steps; the number of parameters is among its facts."""
    facts = {"parameters": parameter_count(model), **facts}
    return Job(train_step(model, loss), outputs, units, unit, facts)


def ids(vocab: int, *, causal: bool = False) -> Any:
    """A tokenizer whose values are ids."""
    import torch

    from multimodal.tokenizer import Tokenizer, Tokens

    reads_causally = causal

    @dataclass(frozen=True)
    class Ids(Tokenizer):
        """Lists or tensors of ids below `vocab_size`."""

        vocab_size: int
        causal = reads_causally

        def encode(self, value: Any) -> Tokens:
            return Tokens(torch.as_tensor(value), self.places(len(value)))

        def decode(self, tokens: Tokens) -> Any:
            return tokens.content

    return Ids(vocab)


def save_weights(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, path)


def their_llama(shape: Any, vocab: int, place: Place, **settings: Any) -> Any:
    """Hugging Face's Llama of a shape, with its fused attention; its last id opens a text and stops it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(place.seed)
    edge = vocab - 1
    config: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "bos_token_id": edge,
        "eos_token_id": edge,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**config | settings))


WEIGHTS = "llama.safetensors"  # the name under which the peer leaves its weights for us


def our_llama(tokenizer: Any, kind: str, task: str, place: Place) -> Any:
    """Ours of the sizes of the row, which computes the same function; with the peer's weights if they are there."""
    from safetensors.torch import load_file

    import multimodal as mm

    shape = place.sizes
    core = mm.Core(
        width=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        mlp_width=shape.hidden,
        qk_norm=False,
        rotary_split=(1, 0, 0),
    )
    model = mm.Model({kind: tokenizer}, core, [task], seed=place.seed)
    if (path := place.folder / WEIGHTS).is_file():
        model.load_state_dict(from_llama(load_file(path), shape.heads, kind))
    return model


def from_llama(
    state: Mapping[str, Any], heads: int, kind: str, *, groups: int | None = None, tied: bool = False
) -> dict[str, Any]:
    """Hugging Face Llama's weights as those of a `Model` that writes `kind`: no qk_norm, every rotary pair turned by time.

    Of its vocabulary of V + 1 the last id opens a text and stops it; its row is our head's query. It has no bias, so ours is 0.
    With a tied head all ids are of the kind. Llama turns pairs (i, i + K/2), we (2i, 2i + 1).
    """
    import torch

    table, head = state["model.embed_tokens.weight"], f"readouts.{kind}_NextToken"
    ours: dict[str, Any] = {
        f"embeds.{kind}.weight": table[:-1].clone(),
        f"{head}.query": table[-1:].clone(),
        f"{head}.linear.weight": state["lm_head.weight"],
        f"{head}.linear.bias": torch.zeros(len(table)),
        "core.norm.weight": state["model.norm.weight"],
    }
    if tied:
        ours = {f"embeds.{kind}.weight": table, "core.norm.weight": state["model.norm.weight"]}
    depth = sum(name.endswith("q_proj.weight") for name in state)
    for i in range(depth):
        theirs, block = f"model.layers.{i}", f"core.blocks.{i}.layers"
        q, k, v = (state[f"{theirs}.self_attn.{x}_proj.weight"] for x in "qkv")
        q, k = (
            x.view(n, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape)
            for x, n in ((q, heads), (k, groups or heads))
        )
        gate, up = (state[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        ours[f"{block}.0.norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        ours[f"{block}.0.body.attention.qkv.weight"] = torch.cat([q, k, v])
        ours[f"{block}.0.body.attention.out.weight"] = state[f"{theirs}.self_attn.o_proj.weight"]
        ours[f"{block}.1.norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        ours[f"{block}.1.body.gate_up.weight"] = torch.cat([gate, up])
        ours[f"{block}.1.body.down.weight"] = state[f"{theirs}.mlp.down_proj.weight"]
    return ours


def x_transformer(shape: Any, vocab: int, longest: int, place: Place) -> Any:
    """x-transformers of a shape as its documentation advises: rotary, RMSNorm, SwiGLU without biases, flash attention."""
    import torch
    from x_transformers import Decoder, TransformerWrapper

    torch.manual_seed(place.seed)
    layers = Decoder(
        dim=shape.width,
        depth=shape.depth,
        heads=shape.heads,
        attn_dim_head=shape.width // shape.heads,
        attn_flash=True,
        rotary_pos_emb=True,
        rotary_emb_dim=shape.width // shape.heads,
        use_rmsnorm=True,
        ff_swish=True,
        ff_glu=True,
        ff_no_bias=True,
        ff_mult=shape.hidden / shape.width,
    )
    return TransformerWrapper(num_tokens=vocab, max_seq_len=longest, attn_layers=layers, use_abs_pos_emb=False)
