"""The Neural Turing Machine's external memory as a layer: a controller that reads and writes slots, step by step."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Cosine, reweighted
from multimodal.attention.reads import mean_of
from multimodal.layers.base import Add, Body, Context, CoreSettings, Layer, Merge, check_sizes
from multimodal.shapes import ConfigError

CONTENT = Cosine(sharpness=1.0)  # the head's own sharpness beta multiplies it


@dataclass(frozen=True, kw_only=True)
class TuringMachine(Layer):
    """An external memory with one head that reads and one that writes: Graves et al. 2014, "Neural Turing Machines", section 3.

    slots: N of the paper; they are not in the parameters, so a model may be rebuilt with more of them than it was trained with.
    slot_width: numbers of a slot.
    hidden: width of the feed-forward controller.
    shifts: how many shifts around its place a head can choose from.
    out: width of the update; None: that of the stream.
    merge: how the update joins the stream.

    There is no kernel for it: the loop over steps is plain.
    """

    slots: int = 128
    slot_width: int = 20
    hidden: int = 100
    shifts: int = 3
    out: int | None = None
    merge: Merge = field(default_factory=Add)

    def __post_init__(self) -> None:
        check_sizes(self, "slots", "slot_width", "hidden", "shifts", "out")
        if self.shifts < 1 or self.shifts % 2 == 0:
            raise ConfigError(f"TuringMachine: shifts={self.shifts} has no middle; use 1, 3, 5, ..")
        if self.slots < self.shifts:
            raise ConfigError(f"TuringMachine: slots={self.slots} are fewer than shifts={self.shifts}; use more slots")

    def build(self, core: CoreSettings, width: int) -> Body:
        return _TuringMachine(self, width)

    def state(self, core: CoreSettings, width: int) -> int | None:
        return sum(_sizes(self))


def _sizes(layer: TuringMachine) -> list[int]:
    """Of the parts of the state: whether anything was read, the memory, both heads' weights, the last read."""
    return [1, layer.slots * layer.slot_width, 2 * layer.slots, layer.slot_width]


class _Tape(NamedTuple):
    """The state after a step: the memory, the weights of the head that reads and of the one that writes, and what was read."""

    memory_BMK: Tensor
    weight_BHM: Tensor
    read_BK: Tensor

    def first(self, count: int) -> "_Tape":
        return _Tape(*(part[:count] for part in self))

    def after(self, count: int) -> "_Tape":
        return _Tape(*(part[count:] for part in self))


class _TuringMachine(Body):
    def __init__(self, layer: TuringMachine, width: int) -> None:
        super().__init__(layer.out or width)
        self.layer = layer
        slot, hidden = layer.slot_width, layer.hidden
        self.seen = nn.Linear(width, hidden)
        self.recalled = nn.Linear(slot, hidden, bias=False)
        # of each head: key, sharpness beta, gate, shifts, sharpening gamma; then what is erased and what is added
        self.parts = [slot, 1, 1, layer.shifts, 1]
        self.heads = nn.Linear(hidden, 2 * sum(self.parts) + 2 * slot)
        self.update = nn.Linear(hidden + slot, self.out_width)
        self.slot_K = nn.Parameter(torch.randn(slot) * slot**-0.5)  # every slot's first content

    def fused(self) -> dict[str, list[int]]:
        """For Muon: the parameters of each head come from many small matrices."""
        return {"heads.weight": [*self.parts, *self.parts, self.layer.slot_width, self.layer.slot_width]}

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        sizes = context.sequences.sizes.tolist()
        state_BS = context.state(self.index, sum(_sizes(self.layer)), stream_TD)
        # the loop multiplies weights by one another step after step, which loses too many digits in half precision
        with torch.autocast(stream_TD.device.type, enabled=False):
            rows_TD = stream_TD.to(self.slot_K.dtype)[context.sequences.order_T]
            tape = self._begin(state_BS[context.sequences.sample_B].to(rows_TD.dtype))
            out, ended = [], []
            # samples are sorted by length, so that those that have ended are the last rows of the tape
            for seen_BF in self.seen(rows_TD).split(sizes):
                if len(seen_BF) < len(tape.read_BK):
                    ended.append(tape.after(len(seen_BF)))
                    tape = tape.first(len(seen_BF))
                hidden_BF, tape = self._step(seen_BF, tape)
                out.append(torch.cat([hidden_BF, tape.read_BK], 1))
            update_TD = self.update(torch.cat(out) if out else rows_TD.new_zeros(0, self.update.in_features))
        if context.cache is not None:
            end = _Tape(*(torch.cat(part) for part in zip(tape, *reversed(ended), strict=True)))
            started = [end.read_BK.new_ones(len(end.read_BK), 1)]
            state_BF = torch.cat(started + [part.flatten(1) for part in end], 1).to(state_BS.dtype)
            context.save_state(self.index, state_BS.index_copy(0, context.sequences.sample_B, state_BF))
        return update_TD[context.sequences.back_T].to(stream_TD.dtype)

    def _begin(self, state_BF: Tensor) -> _Tape:
        """The tape that the cache holds; of a sample of which nothing was read yet: equal slots, both heads at slot 0."""
        started, memory, weight, read = state_BF.split(_sizes(self.layer), 1)
        new = started == 0
        slots, slot = self.layer.slots, self.layer.slot_width
        at_first = F.one_hot(torch.zeros(2, dtype=torch.long, device=started.device), slots).to(started.dtype)
        return _Tape(
            torch.where(new[..., None], self.slot_K, memory.view(-1, slots, slot)),
            torch.where(new[..., None], at_first, weight.view(-1, 2, slots)),
            torch.where(new, self.slot_K, read),
        )

    def _step(self, seen_BF: Tensor, tape: _Tape) -> tuple[Tensor, _Tape]:
        """The controller's state and the tape after a token of each sample: both heads find their slots, one writes, one reads."""
        slot = self.layer.slot_width
        hidden_BF = (seen_BF + self.recalled(tape.read_BK)).tanh()
        heads, changes = self.heads(hidden_BF).split([2 * sum(self.parts), 2 * slot], 1)
        key, beta, gate, shift, gamma = heads.unflatten(1, (2, -1)).split(self.parts, 2)
        q, k, _ = CONTENT.features(key.tanh()[:, None], tape.memory_BMK[:, :, None], None)
        cosine_BHM = q[:, 0] @ k[:, :, 0].transpose(1, 2)
        weight = reweighted(
            (F.softplus(beta) * cosine_BHM).softmax(-1).flatten(0, 1),
            tape.weight_BHM.flatten(0, 1),
            gate.sigmoid().flatten(),
            shift.softmax(-1).flatten(0, 1),
            1 + F.softplus(gamma).flatten(),
        )
        weight_BHM = weight.unflatten(0, (-1, 2))
        erase, add = changes.split(slot, 1)
        write_BMK = weight_BHM[:, 1, :, None]
        memory_BMK = tape.memory_BMK * (1 - write_BMK * erase.sigmoid()[:, None]) + write_BMK * add.tanh()[:, None]
        read_BK = mean_of(memory_BMK[:, :, None], weight_BHM[:, :1, None])[:, 0, 0]
        return hidden_BF, _Tape(memory_BMK, weight_BHM, read_BK)
