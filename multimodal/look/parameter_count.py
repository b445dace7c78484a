"""Where a model's parameters are: a table by role, exact, and for a declared core without building its weights."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from multimodal.attention import Attention
from multimodal.core import Core
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.layers import MLP, Sublayer
from multimodal.model import Model
from multimodal.norm import RMSNorm

EMBEDDING, QUERY, KEY, VALUE, OUTPUT = (
    "embedding",
    "attention query",
    "attention key",
    "attention value",
    "attention output",
)
SCORE, MLPS, NORMS, HEADS = "attention score and prior", "MLP", "norms", "heads"
OTHERS = {"PersistentMemory": "persistent memory", "TemporalConv": "temporal convolution", "Recurrent": "recurrent"}


@dataclass(frozen=True)
class Roles:
    """Parameters by role. Printed, it is a table with shares."""

    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def attention(self) -> int:
        """All that is of attention's own."""
        return sum(count for role, count in self.counts.items() if role.startswith("attention"))

    def __str__(self) -> str:
        width = max(map(len, self.counts), default=0) + 2
        lines = [
            f"{role:<{width}}{count:>20,}{count / max(self.total, 1):>9.2%}" for role, count in self.counts.items()
        ]
        return "\n".join([*lines, f"{'all':<{width}}{self.total:>20,}{1:>9.2%}"])


def roles(model: Model | Core | EncoderDecoder, *, vocab: int = 0, tied: bool = False) -> Roles:
    """Count parameters by role.

    A `Core` is counted without making its weights, so that any size can be. A core alone has no embedding; `vocab` adds one of
    that many rows, and a head of as many unless it is `tied` to the embedding.
    """
    counts: Counter[str] = Counter(dict.fromkeys((EMBEDDING, QUERY, KEY, VALUE, OUTPUT, SCORE, MLPS, NORMS, HEADS), 0))
    if isinstance(model, Model):
        counts[EMBEDDING] += _size(model.embeds)
        counts[HEADS] += _size(model.readouts)
        core = model.core
    else:
        with torch.device("meta"):  # shapes without memory
            core = model.build()
        counts[EMBEDDING] += vocab * model.width
        counts[HEADS] += 0 if tied else vocab * model.width
    _count(core, MLPS, counts)
    return Roles({role: count for role, count in counts.items() if count})


def value_maps(core: Core) -> tuple[int, int]:
    """Parameters of one head's map of values: of a full matrix from stream to stream, and of the factored one's value-down half.

    W_full = W_up W_down with rank at most K: D x D against K x D (Elhage et al. 2021 call the product the OV circuit).
    """
    return core.width**2, core.width * core.head_width


def value_map(attention: Attention, head: int) -> torch.Tensor:
    """W_up W_down of one head: the whole linear map (D, D) from a token's norm to what its read adds to the stream."""
    _, width = _widths(attention)
    group = head * attention.kv_heads // attention.heads
    value_rows = attention.qkv.weight[-attention.kv_heads * width :]
    down_KD = value_rows[group * width : (group + 1) * width]
    up_DK = attention.out.weight[:, head * width : (head + 1) * width]
    return up_DK @ down_KD


def _count(module: nn.Module, role: str, counts: Counter[str]) -> None:
    """Add what a module holds, by the role of the part that it stands in."""
    if isinstance(module, RMSNorm):
        role = NORMS
    elif isinstance(module, Sublayer) and not isinstance(module.layer, MLP):
        role = OTHERS.get(type(module.layer).__name__, type(module.layer).__name__)
    if isinstance(module, Attention):
        (key_width, value_width), width = _widths(module), module.qkv.in_features
        counts[QUERY] += module.heads * key_width * width
        counts[KEY] += module.kv_heads * key_width * width
        counts[VALUE] += module.kv_heads * value_width * width
        counts[OUTPUT] += _size(module.out)
        for name, child in module.named_children():
            if name not in ("qkv", "out"):
                _count(child, SCORE, counts)
        return
    counts[role] += sum(p.numel() for p in module.parameters(recurse=False))
    for child in module.children():
        _count(child, role, counts)


def _widths(attention: Attention) -> tuple[int, int]:
    """Width of one head's keys and of its values, from the matrices themselves."""
    value = attention.out.in_features // attention.heads
    key = (attention.qkv.out_features - attention.kv_heads * value) // (attention.heads + attention.kv_heads)
    return key, value


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
