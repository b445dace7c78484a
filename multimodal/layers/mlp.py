"""The gated MLP, which runs on each token alone."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.layers.base import Add, Body, Context, CoreSettings, Layer, Merge, check_sizes, init_in, init_out


@dataclass(frozen=True, kw_only=True)
class MLP(Layer):
    """down(silu(gate) * up): Shazeer 2020 (SwiGLU).

    hidden: hidden width; None: the core's `mlp_width`.
    out: width of the update; None: that of the stream.
    merge: how the update joins the stream.
    """

    hidden: int | None = None
    out: int | None = None
    merge: Merge = field(default_factory=Add)

    def __post_init__(self) -> None:
        check_sizes(self, "hidden", "out")

    def build(self, core: CoreSettings, width: int) -> Body:
        return _MLP(width, self.hidden or core.hidden, self.out or width)


class _MLP(Body):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(out)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, out, bias=False)

    def fused(self) -> dict[str, list[int]]:
        """For Muon, the numbers of rows of the matrices that `gate_up` consists of."""
        return {"gate_up.weight": [self.down.in_features] * 2}

    def init_weights(self, depth: int) -> None:
        init_in(self.gate_up)
        init_out(self.down, depth)

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        gate, up = self.gate_up(stream_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
