"""The attention layer: projections, places, a mechanism, and whatever plan the stream has."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention.layout import Plan
from multimodal.attention.mechanism import Mechanism
from multimodal.norm import RMSNorm
from multimodal.positions import rotate
from multimodal.weights import draw_in, draw_out


class Attention(nn.Module):
    """Grouped-query attention over a packed stream (Vaswani et al. 2017; Ainslie et al. 2023 for the groups).

    width: of what comes in, out: of what goes out; key_width and value_width: of one head. compiled: in training, what comes before
    the plan is one compiled piece; the plan itself goes by the lists of spans of its stream.
    """

    compiled: bool = False

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        mechanism: Mechanism,
        qk_norm: bool,
        *,
        key_width: int | None = None,
        value_width: int | None = None,
        out: int | None = None,
        turned: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.turned = heads, kv_heads, turned
        self.key_width = key_width or width // heads
        self.value_width = value_width or self.key_width
        self.mechanism = mechanism
        self.rows = [heads * self.key_width, kv_heads * self.key_width, kv_heads * self.value_width]
        self.qkv = nn.Linear(width, sum(self.rows), bias=False)
        self.out = nn.Linear(heads * self.value_width, width if out is None else out, bias=False)
        self.norm_q = RMSNorm(self.key_width) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.key_width) if qk_norm else nn.Identity()

    def fused(self) -> dict[str, list[int]]:
        """For Muon: the projections of queries, keys and values are three matrices."""
        return {"qkv.weight": self.rows}

    def draw(self, depth: int) -> None:
        """Initialise the weights, for a core of `depth` blocks."""
        draw_in(self.qkv)
        draw_out(self.out, depth)

    def forward(
        self,
        stream_TD: Tensor,
        turns: Tensor | None,
        plan: Plan,
        layer: int,
        memory: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """What every token reads: from the stream itself, or from a `memory` (M, D) with its own turns."""
        project = Attention._project
        if self.compiled and self.training:
            project, turns = _compiled(), _real(turns)
            memory = None if memory is None else (memory[0], _real(memory[1]))
        q_THK, k_TGK, v_TGK = project(self, stream_TD, turns, memory)
        read_THK = plan.attend(q_THK, k_TGK, v_TGK, self.mechanism, layer)
        return self.out(torch.flatten(read_THK, 1).to(stream_TD.dtype))

    def _project(
        self, stream_TD: Tensor, turns: Tensor | None, memory: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, K), keys and values (M, G, K), turned by their places."""
        if memory is None:
            q, k, v = self.qkv(stream_TD).split(self.rows, -1)
            k_turns = turns
        else:
            q_rows, kv_rows = self.qkv.weight.split([self.rows[0], self.rows[1] + self.rows[2]])
            q = F.linear(stream_TD, q_rows)
            k, v = F.linear(memory[0], kv_rows).split(self.rows[1:], -1)
            k_turns = memory[1]
        q_THK, k_TGK = q.view(len(q), self.heads, self.key_width), k.view(len(k), self.kv_heads, self.key_width)
        v_TGK = v.view(len(v), self.kv_heads, self.value_width)
        q_THK, k_TGK = self.norm_q(q_THK), self.norm_k(k_TGK)
        if self.turned and turns is not None and k_turns is not None:
            q_THK, k_TGK = rotate(q_THK, turns), rotate(k_TGK, k_turns)
        return q_THK.to(v_TGK.dtype), k_TGK.to(v_TGK.dtype), v_TGK


def _real(turns: Tensor | None) -> Tensor | None:
    """As the compiler takes them."""
    return None if turns is None else torch.view_as_real(turns)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(Attention._project, dynamic=True)
