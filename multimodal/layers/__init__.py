"""What a core's blocks can be made of."""

from multimodal.layers.attend import CrossAttention, PersistentMemory, SelfAttention
from multimodal.layers.base import (
    Add,
    Body,
    Concat,
    Context,
    CoreSettings,
    Gated,
    Keys,
    Layer,
    Merge,
    Replace,
    Sequences,
    Sublayer,
)
from multimodal.layers.mlp import MLP
from multimodal.layers.recurrent import Recurrent

__all__ = [
    "MLP",
    "Add",
    "Body",
    "Concat",
    "Context",
    "CoreSettings",
    "CrossAttention",
    "Gated",
    "Keys",
    "Layer",
    "Merge",
    "PersistentMemory",
    "Recurrent",
    "Replace",
    "SelfAttention",
    "Sequences",
    "Sublayer",
]
