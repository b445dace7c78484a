"""A peer's weights under our names, so that both sides of a row compute the same function."""

from collections.abc import Mapping
from typing import Any


def from_llama(state: Mapping[str, Any], heads: int, kind: str = "text") -> dict[str, Any]:
    """Hugging Face Llama's weights as those of a `Model` that writes `kind`: no qk_norm, every rotary pair turned by time.

    Of its vocabulary of V + 1 the last id opens a text and stops it; its row is our head's query. It has no bias, so ours is 0.
    Llama turns pairs (i, i + K/2), we (2i, 2i + 1).
    """
    import torch

    ours: dict[str, Any] = {}
    table = state["model.embed_tokens.weight"]
    head = f"readouts.{kind}_NextToken"
    ours[f"embeds.{kind}.weight"], ours[f"{head}.query"] = table[:-1].clone(), table[-1:].clone()
    ours[f"{head}.linear.weight"] = state["lm_head.weight"]
    ours[f"{head}.linear.bias"] = torch.zeros(len(table))
    ours["core.norm.weight"] = state["model.norm.weight"]
    depth = sum(name.endswith("q_proj.weight") for name in state)
    for i in range(depth):
        theirs, block = f"model.layers.{i}", f"core.blocks.{i}.layers"
        q, k, v = (state[f"{theirs}.self_attn.{x}_proj.weight"] for x in "qkv")
        q, k = (x.view(heads, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape) for x in (q, k))
        gate, up = (state[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        ours[f"{block}.0.norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        ours[f"{block}.0.body.attention.qkv.weight"] = torch.cat([q, k, v])
        ours[f"{block}.0.body.attention.out.weight"] = state[f"{theirs}.self_attn.o_proj.weight"]
        ours[f"{block}.1.norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        ours[f"{block}.1.body.gate_up.weight"] = torch.cat([gate, up])
        ours[f"{block}.1.body.down.weight"] = state[f"{theirs}.mlp.down_proj.weight"]
    return ours


def from_timm(state: Mapping[str, Any], head: str) -> dict[str, Any]:
    """timm VisionTransformer's weights as those of a `Model` that reads `image` and keeps its head under this name.

    Theirs has RmsNorm, also on queries and keys, packed SwiGLU, no biases in its blocks, no class token and no places.
    """
    ours: dict[str, Any] = {
        "embeds.image.linear.weight": state["patch_embed.proj.weight"].flatten(1),
        "embeds.image.linear.bias": state["patch_embed.proj.bias"],
        "core.norm.weight": state["norm.weight"],
        f"readouts.{head}.linear.weight": state["head.weight"],
        f"readouts.{head}.linear.bias": state["head.bias"],
    }
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    for i in range(depth):
        theirs, block = f"blocks.{i}", f"core.blocks.{i}.layers"
        attention = f"{block}.0.body.attention"
        ours[f"{block}.0.norm.weight"] = state[f"{theirs}.norm1.weight"]
        ours[f"{attention}.qkv.weight"] = state[f"{theirs}.attn.qkv.weight"]
        ours[f"{attention}.out.weight"] = state[f"{theirs}.attn.proj.weight"]
        ours[f"{attention}.norm_q.weight"] = state[f"{theirs}.attn.q_norm.weight"]
        ours[f"{attention}.norm_k.weight"] = state[f"{theirs}.attn.k_norm.weight"]
        ours[f"{block}.1.norm.weight"] = state[f"{theirs}.norm2.weight"]
        ours[f"{block}.1.body.gate_up.weight"] = state[f"{theirs}.mlp.fc1.weight"]
        ours[f"{block}.1.body.down.weight"] = state[f"{theirs}.mlp.fc2.weight"]
    return ours
