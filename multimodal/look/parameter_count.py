"""Counts the parameters of a model by part, exactly; those of a declared core without allocating its weights."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from multimodal.core import Core
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.layers import MLP, Attention, Sublayer
from multimodal.model import Model
from multimodal.norm import RMSNorm, matrix_of

EMBEDDING, QUERY, KEY, VALUE, OUTPUT = (
    "embedding",
    "attention query",
    "attention key",
    "attention value",
    "attention output",
)
ADAPTERS, SCORE = "attention adapters of query, key and value", "attention score and prior"
MLPS, NORMS, HEADS = "MLP", "norms", "heads"
OTHERS = {"PersistentMemory": "persistent memory", "TemporalConv": "temporal convolution", "Recurrent": "recurrent"}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part, printed as a table with shares.

    counts: the number of parameters of each part that has any.
    """

    counts: dict[str, int]

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return sum(self.counts.values())

    @property
    def attention(self) -> int:
        """The parameters of all parts of attention."""
        return sum(count for part, count in self.counts.items() if part.startswith("attention"))

    def __str__(self) -> str:
        width = max(map(len, self.counts), default=0) + 2
        lines = [
            f"{part:<{width}}{count:>20,}{count / max(self.total, 1):>9.2%}" for part, count in self.counts.items()
        ]
        return "\n".join([*lines, f"{'all':<{width}}{self.total:>20,}{1:>9.2%}"])


def count_parameters(model: Model | Core | EncoderDecoder, *, vocab: int = 0, tied: bool = False) -> ParameterCount:
    """Count parameters by part.

    The weights of a declared core are not allocated, so that a core of any size can be counted. A core alone has no embedding:
    `vocab` adds one of `vocab` rows, and a head of `vocab` rows unless it is `tied` to the embedding.
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
    return ParameterCount({part: count for part, count in counts.items() if count})


def value_maps(core: Core) -> tuple[int, int]:
    """Parameters of one head's value map, as a full matrix and as the value-down factor that attention has.

    W_full = W_up W_down with rank at most K: D x D against K x D (Elhage et al. 2021 call the product the OV circuit).
    """
    return core.width**2, core.width * core.head_width


def value_map(attention: Attention, head: int) -> torch.Tensor:
    """W_up W_down of one head: the linear map (D, D) from a normalised token to what reading it adds to the stream."""
    _, width = _widths(attention)
    group = head * attention.kv_heads // attention.heads
    value_rows = matrix_of(attention.qkv)[-attention.kv_heads * width :]
    down_KD = value_rows[group * width : (group + 1) * width]
    up_DK = matrix_of(attention.out)[:, head * width : (head + 1) * width]
    return up_DK @ down_KD


def _count(module: nn.Module, part: str, counts: Counter[str]) -> None:
    """Add the parameters of a module and its children to `counts`; `part` is that of the enclosing module."""
    if isinstance(module, RMSNorm):
        part = NORMS
    elif isinstance(module, Sublayer) and not isinstance(module.layer, MLP):
        part = OTHERS.get(type(module.layer).__name__, type(module.layer).__name__)
    if isinstance(module, Attention):
        # queries, keys and values share one matrix, which is counted by its rows
        (key_width, value_width), width = _widths(module), module.qkv.in_features
        counts[QUERY] += module.heads * key_width * width
        counts[KEY] += module.kv_heads * key_width * width
        counts[VALUE] += module.kv_heads * value_width * width
        counts[OUTPUT] += _size(module.out)
        counts[ADAPTERS] += _size(module.qkv) - sum(module.rows) * width
        for name, child in module.named_children():
            if name not in ("qkv", "out"):
                _count(child, SCORE, counts)
        return
    counts[part] += sum(p.numel() for p in module.parameters(recurse=False))
    for child in module.children():
        _count(child, part, counts)


def _widths(attention: Attention) -> tuple[int, int]:
    """Width of one head's keys and of its values, from the matrices themselves."""
    value = attention.out.in_features // attention.heads
    key = (attention.qkv.out_features - attention.kv_heads * value) // (attention.heads + attention.kv_heads)
    return key, value


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
