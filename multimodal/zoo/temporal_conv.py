"""SNAIL's causal dilated convolution over packed streams, in which no sample sees another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from multimodal.layers.base import Body, Concat, Context, CoreSettings, Layer, Merge, check_sizes


@dataclass(frozen=True, kw_only=True)
class TemporalConv(Layer):
    """tanh(x * f) sigmoid(x * g) with kernels of 2 tokens, `dilation` apart: Mishra et al. 2018, figure 2a (the dense block).

    SNAIL's TC block is a sequence of these with dilations 1, 2, 4, ..

    filters: width of the update, which is concatenated to the stream unless `merge` says otherwise.
    dilation: distance in tokens of the two that a kernel sees.
    merge: how the update joins the stream.
    """

    filters: int
    dilation: int = 1
    merge: Merge = field(default_factory=Concat)

    def __post_init__(self) -> None:
        check_sizes(self, "filters", "dilation")

    def build(self, core: CoreSettings, width: int) -> Body:
        return _TemporalConv(width, self.filters, self.dilation)

    def state(self, core: CoreSettings, width: int) -> int | None:
        return self.dilation * width


class _TemporalConv(Body):
    def __init__(self, width: int, filters: int, dilation: int) -> None:
        super().__init__(filters)
        self.dilation = dilation
        self.now = nn.Linear(width, 2 * filters)
        self.before = nn.Linear(width, 2 * filters, bias=False)

    def fused(self) -> dict[str, list[int]]:
        """For Muon: signal and gate are two matrices."""
        return dict.fromkeys(("now.weight", "before.weight"), [self.out_width] * 2)

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        count, width = len(context.layout.spans), stream_TD.shape[1]
        held_BD = context.state(self.index, self.dilation * width, stream_TD).view(count, self.dilation, width)
        totals = torch.tensor([span.total for span in context.layout.spans], device=stream_TD.device)
        start_B = totals.cumsum(0) - totals
        sample_T = torch.arange(count, device=stream_TD.device).repeat_interleave(totals)
        order_T = torch.arange(len(stream_TD), device=stream_TD.device) - start_B[sample_T]
        # each sample's last `dilation` tokens before this stream, then its tokens of this stream
        rows = torch.cat([held_BD.flatten(0, 1), stream_TD])
        back_T = order_T - self.dilation
        old_T = sample_T * self.dilation + back_T + self.dilation
        new_T = count * self.dilation + start_B[sample_T] + back_T
        before_TD = rows[torch.where(back_T < 0, old_T, new_T)]
        signal, gate = (self.now(stream_TD) + self.before(before_TD)).chunk(2, -1)
        if context.cache is not None:
            last = torch.arange(self.dilation, device=stream_TD.device) + totals[:, None] - self.dilation
            old = torch.arange(count, device=stream_TD.device)[:, None] * self.dilation + last + self.dilation
            new = count * self.dilation + start_B[:, None] + last
            context.save_state(self.index, rows[torch.where(last < 0, old, new)].flatten(1))
        return signal.tanh() * gate.sigmoid()
