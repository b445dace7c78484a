"""A tiny folder in the layout of Llama, made without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def tiny_llama(folder: Path) -> Path:
    """The folder, with random weights."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (40, 16), "model.norm": (16,)}
    for i in range(2):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.{name}_layernorm": (16,) for name in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{name}_proj": (16, 16) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj": (8, 16) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj": (24, 16) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj": (16, 24)}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder
