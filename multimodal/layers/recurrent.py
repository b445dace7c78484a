"""Recurrent layers of torch.nn over packed streams: each sample starts with a state of zeros, or with the cached one."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from multimodal.layers.base import Add, Body, Context, CoreSettings, Layer, Merge, Sequences, check_sizes
from multimodal.shapes import ConfigError, StreamError


@dataclass(frozen=True, kw_only=True)
class Recurrent(Layer):
    """A GRU (Cho et al. 2014) or an LSTM (Hochreiter & Schmidhuber 1997) over the tokens of each sample.

    cell: "gru" or "lstm".
    hidden: width of the state; None: that of the stream, of which each of two directions has half.
    both_ways: whether a second network runs over the bidirectional tokens from last to first; causal ones get zeros from it.
    merge: how the update joins the stream.
    """

    cell: Literal["gru", "lstm"] = "gru"
    hidden: int | None = None
    both_ways: bool = False
    merge: Merge = field(default_factory=Add)

    def __post_init__(self) -> None:
        if self.cell not in ("gru", "lstm"):
            raise ConfigError(f"Recurrent: cell={self.cell!r} is unknown; there are 'gru' and 'lstm'")
        check_sizes(self, "hidden")

    def _hidden(self, width: int) -> int:
        return self.hidden or (width // 2 if self.both_ways else width)

    def build(self, core: CoreSettings, width: int) -> Body:
        return _Recurrent(self.cell, width, self._hidden(width), self.both_ways)

    def state(self, core: CoreSettings, width: int) -> int | None:
        return self._hidden(width) * (2 if self.cell == "lstm" else 1)


class _Recurrent(Body):
    def __init__(self, cell: str, width: int, hidden: int, both_ways: bool) -> None:
        super().__init__(hidden * (2 if both_ways else 1))
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.size = hidden * (2 if cell == "lstm" else 1)
        self.forwards = kind(width, hidden)
        self.backwards = kind(width, hidden) if both_ways else None

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        state_BF = context.state(self.index, self.size, stream_TD)
        out_TD, state_BF = _run(self.forwards, stream_TD, context.sequences, state_BF)
        context.save_state(self.index, state_BF)
        if self.backwards is None:
            return out_TD
        return torch.cat([out_TD, self._from_the_end(self.backwards, stream_TD, context)], -1)

    def _from_the_end(self, cell: nn.RNNBase, stream_TD: Tensor, context: Context) -> Tensor:
        spans = context.layout.spans
        if any(span.bidirectional < 0 for span in spans):
            raise StreamError(
                "Recurrent(both_ways=True): a bidirectional field comes after a causal one; "
                "name the bidirectional fields first in the task"
            )
        lengths = [span.bidirectional for span in spans]  # of the bidirectional tokens, at the start of each sample
        out_TD = stream_TD.new_zeros(len(stream_TD), cell.hidden_size)
        if not any(lengths):
            return out_TD
        if not context.fresh:
            raise StreamError(
                "Recurrent(both_ways=True) also runs from the last token, so all must be read together, not piece by piece"
            )
        order_T = context.layout.info.order
        length_T = torch.tensor(lengths, device=stream_TD.device).repeat_interleave(
            torch.tensor([span.total for span in spans], device=stream_TD.device)
        )
        # token i of the n first ones is replaced by token n - 1 - i, and the states are put back the same way
        (row_N,) = (order_T < length_T).nonzero(as_tuple=True)
        mirror_N = row_N - order_T[row_N] + length_T[row_N] - 1 - order_T[row_N]
        sequences = Sequences(lengths, stream_TD.device)
        start = stream_TD.new_zeros(len(lengths), self.size)
        state_ND, _ = _run(cell, stream_TD[mirror_N], sequences, start)
        return out_TD.index_copy(0, mirror_N, state_ND.to(out_TD.dtype))


def _run(cell: nn.RNNBase, stream_TD: Tensor, sequences: Sequences, state_BF: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs (T, hidden), states (B, F) after each sample's last token), from the state with which each sample starts.

    The state of an LSTM is its hidden state and its cell state, concatenated.
    """
    count = int(sequences.sizes[0]) if len(sequences.sizes) else 0  # samples with at least one token
    if not count:
        return stream_TD.new_zeros(len(stream_TD), cell.hidden_size), state_BF
    rows = sequences.sample_B[:count]
    start = tuple(part[None].contiguous() for part in state_BF[rows].split(cell.hidden_size, -1))
    lstm = isinstance(cell, nn.LSTM)
    # without gradients autocast runs an LSTM in bfloat16, which CPUs without AMX tiles refuse
    device = stream_TD.device.type
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not (lstm and device == "cpu")):
        packed, end = cell(sequences.packed(stream_TD), start if lstm else start[0])
    end_BS = torch.cat([part[0] for part in end], -1) if lstm else end[0]
    return packed.data[sequences.back_T], state_BF.index_copy(0, rows, end_BS.to(state_BF.dtype))
