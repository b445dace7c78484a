"""The attention layer: projections, places, score, and whatever plan the stream has."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention.layout import Plan
from multimodal.attention.scores import Score
from multimodal.norm import RMSNorm
from multimodal.positions import rotate


class Attention(nn.Module):
    """Grouped-query attention over a packed stream (Vaswani et al. 2017; Ainslie et al. 2023 for the groups)."""

    def __init__(self, width: int, heads: int, kv_heads: int, score: Score, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.score = score
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_q = RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head_width) if qk_norm else nn.Identity()

    def forward(
        self, stream_TD: Tensor, turns: Tensor, plan: Plan, layer: int, memory: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """What every token reads: from the stream itself, or from a `memory` (M, D) with its own turns."""
        if memory is None:
            qkv = self.qkv(stream_TD).unflatten(-1, (-1, self.head_width))
            q_THK, k_TGK, v_TGK = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            k_turns = turns
        else:
            q_rows, kv_rows = self.qkv.weight.tensor_split([self.heads * self.head_width])
            q_THK = F.linear(stream_TD, q_rows).unflatten(-1, (-1, self.head_width))
            k_TGK, v_TGK = F.linear(memory[0], kv_rows).unflatten(-1, (-1, self.head_width)).chunk(2, dim=1)
            k_turns = memory[1]
        q_THK = rotate(self.norm_q(q_THK), turns).to(v_TGK.dtype)
        k_TGK = rotate(self.norm_k(k_TGK), k_turns).to(v_TGK.dtype)
        q_THK, k_TGK, scale = self.score.features(q_THK, k_TGK)
        read_THK = plan.attend(q_THK, k_TGK, v_TGK, scale, layer)
        return self.out(torch.flatten(read_THK, 1).to(stream_TD.dtype))
