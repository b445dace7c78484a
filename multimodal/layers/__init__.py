"""The layers of which a core's blocks are made, and the merges that add their updates to the stream."""

from multimodal.layers.attend import Attention, CrossAttention, PersistentMemory, SelfAttention
from multimodal.layers.base import (
    Add,
    Body,
    Concat,
    Context,
    CoreSettings,
    Crossing,
    Gated,
    Keys,
    Layer,
    LayerScale,
    Merge,
    PostNorm,
    Replace,
    SandwichNorm,
    Sequences,
    Sublayer,
)
from multimodal.layers.mlp import MLP
from multimodal.layers.recurrent import Recurrent
from multimodal.old_names import moved

__all__ = [
    "MLP",
    "Add",
    "Attention",
    "Body",
    "Concat",
    "Context",
    "CoreSettings",
    "CrossAttention",
    "Crossing",
    "Gated",
    "Keys",
    "Layer",
    "LayerScale",
    "Merge",
    "PersistentMemory",
    "PostNorm",
    "Recurrent",
    "Replace",
    "SandwichNorm",
    "SelfAttention",
    "Sequences",
    "Sublayer",
]

__getattr__ = moved(__name__)  # goes with version 0.3
