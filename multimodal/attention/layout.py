"""What every way of attending a stream shares: who lies where in it, the verb, and PyTorch's fused kernel with our axes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from multimodal.masks import Places


class Span(NamedTuple):
    """One sample of a pack: its tokens, how many at its start are read freely (-1: not only at its start), and how many are read
    at all, freely or in order, before what is written (only a core that reads and writes apart asks)."""

    free: int
    total: int
    read: int = 0


@dataclass(frozen=True)
class Layout:
    """Who lies where in a stream: spans on the host, places (T,) on the device."""

    spans: tuple[Span, ...]
    places: Places


class Plan(ABC):
    """One way to attend a stream."""

    @abstractmethod
    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        """The read of every query: (T, H, K)."""


def sdpa(
    q_BTHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    q, k, v = q_BTHK.transpose(1, 2), k_BMGK.transpose(1, 2), v_BMGK.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
