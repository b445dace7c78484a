"""What the recurrent examples of this folder share: a GRU that reads both ways, and a GRU that writes and may look back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import multimodal as mm


@dataclass(frozen=True)
class Opening(mm.masks.Prior):
    """The first written token looks at the last that was read, whose state the writer so starts from; no other looks anywhere."""

    def log_prior(self, pairs: Any, q_BTHK: Tensor, weights: Any) -> Tensor:
        allowed = (pairs.q.order == 0) & (pairs.k.order == pairs.count - 1)
        return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]


START = mm.layers.CrossAttention(prior=Opening())


def recurrent(
    width: int,
    block: tuple[mm.layers.Layer, ...],
    *,
    last: int | None = None,
    dropout: float = 0.0,
    read_by: tuple[mm.layers.Layer, ...] = (mm.layers.Recurrent(both_ways=True),),
    places: tuple[int, int, int] = (0, 0, 0),
) -> mm.EncoderDecoder:
    """A GRU that reads both ways, and a writer of these layers; neither has (rotary) places unless given.

    (START, Recurrent(), CrossAttention(..)) is RNNsearch (Bahdanau et al. 2015); (START, Recurrent()) with last=1 has nothing but
    the last state (Sutskever et al. 2014).
    """
    rest: dict[str, Any] = {"width": width, "depth": 1, "heads": 1, "qk_norm": False, "rotary_split": places}
    reader = mm.Core(**rest, dropout=dropout, block=read_by)
    return mm.EncoderDecoder(reader=reader, writer=mm.Core(**rest, dropout=dropout, block=block), last=last)
