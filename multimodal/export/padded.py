"""Padded samples (B, T) through the modules of a packed model: a packed stream is described by lists, which no program can have.

inputs by name --laid_out--> Rows --core_states--> states (B, T, D)

The layers are those of the model and are called as ever, with B * T rows as one stream and with a plan that sees them as (B, T).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multimodal.attention import Layout, Mechanism, Plan, Trace
from multimodal.core import Transformer
from multimodal.encoder_decoder import TwoCores
from multimodal.heads.base import Segment
from multimodal.layers import Crossing
from multimodal.masks import MaskInfo, Pairs, Rule
from multimodal.network import Network
from multimodal.tower import PLACED, TowerEmbed

LayerKeys = dict[int, tuple[Tensor, Tensor]]
"""By the index of a layer, its keys and values (B, M, G, K)."""


class ReadField(NamedTuple):
    """A field that a program reads: its name in the task, its kind, its step, and whether its tokens are bidirectional."""

    name: str
    kind: str
    step: tuple[float, float, float]
    bidirectional: bool


@dataclass(frozen=True)
class Known:
    """What rules may know of tokens (B, T) side by side; a row that is no token has `there_BT` False and the order 0."""

    info: MaskInfo
    there_BT: Tensor

    @classmethod
    def of(cls, order_BT: Tensor, bidirectional_BT: Tensor, segment_BT: Tensor, there_BT: Tensor) -> "Known":
        sample_B1 = torch.arange(order_BT.shape[0], device=order_BT.device)[:, None]
        order_BT = torch.where(there_BT, order_BT, 0)
        return cls(MaskInfo(sample_B1.expand_as(order_BT), order_BT, bidirectional_BT, segment_BT), there_BT)

    @property
    def total_B(self) -> Tensor:
        """Number of tokens of each sample."""
        return self.there_BT.sum(1)

    def __getitem__(self, index: slice) -> "Known":
        return Known(self.info[:, index], self.there_BT[:, index])

    def then(self, other: "Known") -> "Known":
        """These tokens and others behind them."""
        pairs = zip(vars(self.info).values(), vars(other.info).values(), strict=True)
        return Known(MaskInfo(*(torch.cat(pair, 1) for pair in pairs)), torch.cat([self.there_BT, other.there_BT], 1))

    def as_numbers(self) -> Tensor:
        """(B, T, 3): order, bidirectional, segment; the order of what is no token is -1."""
        order_BT = torch.where(self.there_BT, self.info.order, -1)
        return torch.stack([order_BT, self.info.bidirectional, self.info.segment], -1)

    @classmethod
    def from_numbers(cls, numbers: Tensor) -> "Known":
        order_BT, bidirectional_BT, segment_BT = numbers.unbind(-1)
        return cls.of(order_BT, bidirectional_BT, segment_BT, order_BT >= 0)


@dataclass(frozen=True)
class Rows:
    """Embedded tokens with their positions in steps."""

    stream_BTD: Tensor
    position_BTA: Tensor
    known: Known

    def __getitem__(self, index: slice) -> "Rows":
        return Rows(self.stream_BTD[:, index], self.position_BTA[:, index], self.known[index])


def laid_out(model: Network, fields: Sequence[ReadField], start: Segment, inputs: Mapping[str, Tensor]) -> Rows:
    """What `Packer` makes of fields and the start behind them: for each sample, times and numbers that go on from field to field.

    A field that a sample lacks has a length of 0.
    """
    batch = next(iter(inputs.values())).shape[0]
    zero_B = torch.zeros(batch, dtype=torch.int64)
    time_B, total_B, segment_B = zero_B.float(), zero_B, zero_B
    parts: list[tuple[Tensor, ...]] = []

    def add(stream: Tensor, position: Tensor, bidirectional: bool, length_B: Tensor) -> None:
        nonlocal time_B, total_B, segment_B
        count = stream.shape[1]
        index_BN = torch.arange(count).expand(batch, count)
        there = index_BN < length_B[:, None]
        position = torch.where(there[..., None], position, 0.0)
        last_B = position[..., 0].masked_fill(~there, -torch.inf).amax(1)
        place = [position[..., 0] + time_B[:, None], *position[..., 1:].unbind(-1)]
        parts.append(
            (
                stream,
                torch.where(there[..., None], torch.stack(place, -1), 0.0),
                total_B[:, None] + index_BN,
                torch.full_like(index_BN, int(bidirectional)),
                segment_B[:, None].expand_as(index_BN),
                there,
            )
        )
        # as the packer rounds: 14.999999 is 15
        time_B = time_B + torch.where(length_B > 0, torch.round(last_B * 1000) / 1000 + 1, 0.0)
        total_B, segment_B = total_B + length_B, segment_B + (length_B > 0)

    for field in fields:
        content, length_B = inputs[field.name], inputs[f"{field.name}.length"]
        position_BNA = inputs[f"{field.name}.place"] / torch.tensor(field.step)
        add(
            embedded(model.embeds[field.kind], content, position_BNA, length_B),
            position_BNA,
            field.bidirectional,
            length_B,
        )
    if count := len(start.tokens):
        stream = model.embed(start.kind, start.tokens.content)
        position = start.tokens.position_NA / torch.tensor(start.step)
        add(
            stream.expand(batch, *stream.shape),
            position.expand(batch, *position.shape),
            start.bidirectional,
            zero_B + count,
        )
    stream, position, *known = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return Rows(stream, position, Known.of(*known))


def embedded(module: nn.Module, content: Tensor, position_BNA: Tensor, length_B: Tensor) -> Tensor:
    """The embedded tokens (B, N, D) of values side by side, of which each has `length_B` tokens.

    position_BNA: their positions in steps, within the value.
    """
    if isinstance(module, TowerEmbed):
        found = _embedded_by_tower(module, content, length_B)
    elif getattr(module, "reads_places", False):
        padded: Any = module.padded
        found = padded(content, position_BNA, length_B)
    else:
        return module(content.flatten(0, 1)).view(*content.shape[:2], -1)
    # padding may be anything, such as the mean of no tokens, and NaN would come through a mask
    there_BN = torch.arange(content.shape[1]) < length_B[:, None]
    return torch.where(there_BN[..., None], found, 0.0)


def _embedded_by_tower(module: TowerEmbed, content_BNF: Tensor, length_B: Tensor) -> Tensor:
    """What a tower makes of values: its inner tokens side by side, through its inner core, and together again."""
    inner, (batch, count) = module.frozen_part, content_BNF.shape[:2]
    tower, slots = inner.tower, inner.tower.connector.slots
    slot_BMF = content_BNF.view(batch, count * slots, -1)
    there_BN = torch.arange(count) < length_B[:, None]
    filled_BM = (slot_BMF[..., -1] > -0.5) & there_BN[..., None].expand(-1, -1, slots).flatten(1)
    total_B = filled_BM.sum(1)
    # an inner token comes to the place that its slot names, and what is none to one behind all others
    index_BM = torch.where(filled_BM, slot_BMF[..., -1].round().long(), count * slots)
    ordered_BMF = slot_BMF.new_zeros(batch, count * slots + 1, slot_BMF.shape[-1])
    ordered_BMF = ordered_BMF.scatter(1, index_BM[..., None].expand_as(slot_BMF), slot_BMF)[:, :-1]
    content, position_BMA = ordered_BMF[..., :-PLACED], ordered_BMF[..., -PLACED:-1]
    if tower.tokenizer.vocab_size is not None:
        content = content[..., 0].round().long().clamp(0, tower.tokenizer.vocab_size - 1)
    order_BM = torch.arange(count * slots).expand(batch, -1)
    inside_BM = order_BM < total_B[:, None]
    bidirectional_BM = torch.full_like(order_BM, int(not tower.tokenizer.causal))
    known = Known.of(order_BM, bidirectional_BM, torch.zeros_like(order_BM), inside_BM)
    position_BMA = torch.where(inside_BM[..., None], position_BMA, 0.0)
    stream_BMD = embedded(inner.embed, content, position_BMA, total_B)
    state_BMD = _transformed(inner.core, Rows(stream_BMD, position_BMA, known), Cached({}, {}))
    found_BMD = state_BMD.gather(
        1, index_BM.clamp(max=count * slots - 1)[..., None].expand(-1, -1, state_BMD.shape[-1])
    )
    found_NTD = found_BMD.masked_fill(~filled_BM[..., None], 0.0).view(batch * count, slots, -1)
    vector_NF = tower.connector.padded(found_NTD, filled_BM.view(batch * count, slots), inner.pool)
    return module.connector(vector_NF).view(batch, count, -1)


class PaddedPlan(Plan):
    """Attention of rows that are samples of equal length side by side; what is no token is masked out.

    rule: which query may attend to which key; None: to every key.
    keys: what is known of the keys, the cached ones first.
    before: by layer, the cached keys.
    joined: by layer, filled by `attend`: the cached keys and the new ones.
    fixed: whether nothing is added to the cached keys.
    """

    def __init__(
        self, rule: Rule | None, queries: Known, keys: Known, before: LayerKeys, joined: LayerKeys, fixed: bool = False
    ) -> None:
        self.before, self.joined, self.fixed = before, joined, fixed
        self.batch, self.count = queries.there_BT.shape
        q, k = queries.info[:, :, None], keys.info[:, None]
        allowed = keys.there_BT[:, None].expand(-1, self.count, -1)
        if rule is not None:
            allowed = rule.allows(q, k) & allowed
        self.sees_BT = allowed.any(-1)
        # a query that sees nothing gets every key, lest its softmax be NaN; `attend` sets its result to 0
        self.pairs = Pairs(q, k, allowed | ~self.sees_BT[..., None])

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_BTHK = q_THK.view(self.batch, self.count, *q_THK.shape[1:])
        if self.fixed:
            k_BMGK, v_BMGK = self.before[layer]
        else:
            k_BMGK, v_BMGK = (x.view(self.batch, -1, *x.shape[1:]) for x in (k_TGK, v_TGK))
            if layer in self.before:
                pairs = zip(self.before[layer], (k_BMGK, v_BMGK), strict=True)
                k_BMGK, v_BMGK = (torch.cat(pair, 1) for pair in pairs)
        self.joined[layer] = k_BMGK, v_BMGK
        # a kernel that groups heads would tie sizes to one another
        if (groups := q_BTHK.shape[2] // k_BMGK.shape[2]) > 1:
            k_BMGK, v_BMGK = k_BMGK.repeat_interleave(groups, 2), v_BMGK.repeat_interleave(groups, 2)
        # with a trace the matrix is written out in one piece, and not by blocks whose number depends on its size
        read = mechanism(q_BTHK, k_BMGK, v_BMGK, self.pairs, None if mechanism.fused else Trace())
        return read.masked_fill(~self.sees_BT[..., None, None], 0.0).flatten(0, 1)


@dataclass
class Cached:
    """What earlier tokens left: keys and values of the layers, and of a reader's states those that the writer attends to.

    known, memory_known: what is known of the tokens that these keys are of; None: there are none.
    """

    keys: LayerKeys
    memory: LayerKeys
    known: Known | None = None
    memory_known: Known | None = None


def core_states(core: nn.Module, rows: Rows, context: int, cached: Cached) -> Tensor:
    """The states (B, T, D) of rows, of which the first `context` were read; new keys are added to the cache.

    If the cache holds tokens, the rows follow them: one newly written token for each sample.
    """
    if not isinstance(core, TwoCores):
        assert isinstance(core, Transformer)
        return _transformed(core, rows, cached)
    if cached.known is not None:
        assert cached.memory_known is not None
        plan = PaddedPlan(None, rows.known, cached.memory_known, cached.memory, {}, fixed=True)
        crossing = Crossing(
            rows.stream_BTD[:0].flatten(0, 1), core.writer.rotations(rows.position_BTA[:0].flatten(0, 1)), plan
        )
        return _transformed(core.writer, rows, cached, crossing)
    read, written = rows[:context], rows[context:]
    encoded_BMD = _transformed(core.reader, read, Cached({}, {}))
    if not written.stream_BTD.shape[1]:
        return encoded_BMD
    memory, total_B1 = read.known, read.known.total_B[:, None]
    if core.core.last is not None:  # the last states are numbered from 0
        first_B1 = (total_B1 - core.core.last).clamp(min=0)
        info, late = memory.info, memory.there_BT & (memory.info.order >= first_B1)
        memory = Known.of(info.order - first_B1, info.bidirectional, info.segment, late)
    info = written.known.info
    order_BT = info.order - total_B1
    known = Known.of(order_BT, torch.zeros_like(order_BT), info.segment, written.known.there_BT)
    origin_BA = written.position_BTA[:, :1] * torch.tensor([1.0, 0.0, 0.0])
    plan = PaddedPlan(None, known, memory, {}, cached.memory)
    rotations = core.writer.rotations(read.position_BTA.flatten(0, 1))
    crossing = Crossing(encoded_BMD.flatten(0, 1), rotations, plan)
    cached.memory_known = memory
    decoded_BTD = _transformed(
        core.writer, Rows(written.stream_BTD, written.position_BTA - origin_BA, known), cached, crossing
    )
    return torch.cat([encoded_BMD, decoded_BTD], 1)


def _transformed(core: Transformer, rows: Rows, cached: Cached, crossing: Crossing | None = None) -> Tensor:
    known = rows.known if cached.known is None else cached.known.then(rows.known)
    before, joined = cached.keys, LayerKeys()
    layout = Layout((), MaskInfo(**{name: x.flatten(0, 1) for name, x in vars(rows.known.info).items()}))

    def plan(rule: Rule, layout: Layout) -> Plan:
        return PaddedPlan(rule, rows.known, known, before, joined)

    state_TD = core(
        rows.stream_BTD.flatten(0, 1), rows.position_BTA.flatten(0, 1), layout, backend=plan, crossing=crossing
    )
    cached.keys, cached.known = joined, known
    return state_TD.view(*rows.stream_BTD.shape[:2], -1)
