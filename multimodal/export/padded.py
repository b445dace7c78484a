"""Runs padded batches (B, T) through the modules of a packed model, for export.

A packed stream is described by lists of lengths, which a traced program cannot have.

inputs by name --lay_out--> Rows --core_states--> states (B, T, D)

The model's own layers run unchanged on a stream of B * T rows; `PaddedPlan` computes attention over them as (B, T).
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
from multimodal.positions import in_steps, on_axes, only_time
from multimodal.tower import TowerEmbed

LayerKeys = dict[int, tuple[Tensor, Tensor]]
"""{index of an attention layer: (keys, values), each (B, M, G, K)}."""


class ReadField(NamedTuple):
    """A field that a program reads: its name in the task, its kind, its tokenizer's step, whether its tokens are bidirectional, and
    its tokenizer's axes."""

    name: str
    kind: str
    step: tuple[float, ...]
    bidirectional: bool
    axes: tuple[str, ...]


@dataclass(frozen=True)
class TokenInfo:
    """What mask rules use of tokens (B, T). valid_BT: False for padding, whose order is 0."""

    mask_info: MaskInfo
    valid_BT: Tensor

    @classmethod
    def of(cls, order_BT: Tensor, bidirectional_BT: Tensor, segment_BT: Tensor, valid_BT: Tensor) -> "TokenInfo":
        sample_B1 = torch.arange(order_BT.shape[0], device=order_BT.device)[:, None]
        order_BT = torch.where(valid_BT, order_BT, 0)
        return cls(MaskInfo(sample_B1.expand_as(order_BT), order_BT, bidirectional_BT, segment_BT), valid_BT)

    @property
    def total_B(self) -> Tensor:
        """Number of tokens of each sample."""
        return self.valid_BT.sum(1)

    def __getitem__(self, index: slice) -> "TokenInfo":
        return TokenInfo(self.mask_info[:, index], self.valid_BT[:, index])

    def followed_by(self, other: "TokenInfo") -> "TokenInfo":
        """Concatenate with other tokens along T."""
        pairs = zip(self.mask_info.numbers, other.mask_info.numbers, strict=True)
        sample, order, bidirectional, segment = (torch.cat(pair, 1) for pair in pairs)
        info = MaskInfo(sample, order, bidirectional, segment)
        return TokenInfo(info, torch.cat([self.valid_BT, other.valid_BT], 1))

    def as_numbers(self) -> Tensor:
        """As int64 (B, T, 3): order, bidirectional, segment; the order of padding is -1."""
        order_BT = torch.where(self.valid_BT, self.mask_info.order, -1)
        return torch.stack([order_BT, self.mask_info.bidirectional, self.mask_info.segment], -1)

    @classmethod
    def from_numbers(cls, numbers: Tensor) -> "TokenInfo":
        order_BT, bidirectional_BT, segment_BT = numbers.unbind(-1)
        return cls.of(order_BT, bidirectional_BT, segment_BT, order_BT >= 0)


@dataclass(frozen=True)
class Rows:
    """Embedded tokens. position_BTA: in steps."""

    stream_BTD: Tensor
    position_BTA: Tensor
    token_info: TokenInfo

    def __getitem__(self, index: slice) -> "Rows":
        return Rows(self.stream_BTD[:, index], self.position_BTA[:, index], self.token_info[index])


def lay_out(model: Network, fields: Sequence[ReadField], start: Segment, inputs: Mapping[str, Tensor]) -> Rows:
    """Embed the fields and the start tokens after them; times, orders and segments continue from field to field as in `Packer`.

    A field that a sample lacks has the length 0.
    """
    batch = next(iter(inputs.values())).shape[0]
    zero_B = torch.zeros(batch, dtype=torch.int64)
    time_B, total_B, segment_B = zero_B.float(), zero_B, zero_B
    parts: list[tuple[Tensor, ...]] = []

    def add(stream: Tensor, position: Tensor, bidirectional: bool, length_B: Tensor) -> None:
        nonlocal time_B, total_B, segment_B
        count = stream.shape[1]
        index_BN = torch.arange(count).expand(batch, count)
        valid = index_BN < length_B[:, None]
        position = torch.where(valid[..., None], position, 0.0)
        last_B = position[..., 0].masked_fill(~valid, -torch.inf).amax(1)
        place = [position[..., 0] + time_B[:, None], *position[..., 1:].unbind(-1)]
        parts.append(
            (
                stream,
                torch.where(valid[..., None], torch.stack(place, -1), 0.0),
                total_B[:, None] + index_BN,
                torch.full_like(index_BN, int(bidirectional)),
                segment_B[:, None].expand_as(index_BN),
                valid,
            )
        )
        # rounded as in the packer, since 14.999999 means 15
        time_B = time_B + torch.where(length_B > 0, torch.round(last_B * 1000) / 1000 + 1, 0.0)
        total_B, segment_B = total_B + length_B, segment_B + (length_B > 0)

    for field in fields:
        content, length_B = inputs[field.name], inputs[f"{field.name}.length"]
        position_BNA = in_steps(inputs[f"{field.name}.place"], field.step)
        add(
            embed_padded(model.embeds[field.kind], content, position_BNA, length_B),
            on_axes(position_BNA, field.axes, model.packer.axes),
            field.bidirectional,
            length_B,
        )
    if count := len(start.tokens):
        stream = model.embed(start.kind, start.tokens.content)
        position = start.position(model.packer.axes)
        add(
            stream.expand(batch, *stream.shape),
            position.expand(batch, *position.shape),
            start.bidirectional,
            zero_B + count,
        )
    stream, position, *token_info = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return Rows(stream, position, TokenInfo.of(*token_info))


def embed_padded(module: nn.Module, content: Tensor, position_BNA: Tensor, length_B: Tensor) -> Tensor:
    """The embeddings (B, N, D) of padded values. content: ids (B, N) or features (B, N, F).

    position_BNA: positions within the value, in steps. length_B: number of tokens of each value.
    """
    if isinstance(module, TowerEmbed):
        found = _embed_tower(module, content, length_B)
    elif getattr(module, "reads_places", False):
        padded: Any = module.padded
        found = padded(content, position_BNA, length_B)
    else:
        return module(content.flatten(0, 1)).view(*content.shape[:2], -1)
    # padding may be NaN, for example the mean of no tokens, and a mask does not stop NaN
    valid_BN = torch.arange(content.shape[1]) < length_B[:, None]
    return torch.where(valid_BN[..., None], found, 0.0)


def _embed_tower(module: TowerEmbed, content_BNF: Tensor, length_B: Tensor) -> Tensor:
    """The embeddings (B, N, D) of a tower: puts inner tokens in order, runs the inner core, and gathers states by slot."""
    inner, (batch, count) = module.frozen_part, content_BNF.shape[:2]
    tower, slots = inner.tower, inner.tower.connector.slots
    slot_BMF = content_BNF.view(batch, count * slots, -1)
    valid_BN = torch.arange(count) < length_B[:, None]
    filled_BM = (slot_BMF[..., -1] > -0.5) & valid_BN[..., None].expand(-1, -1, slots).flatten(1)
    total_B = filled_BM.sum(1)
    # scatter each inner token to its index; empty slots go to an extra row at the end
    index_BM = torch.where(filled_BM, slot_BMF[..., -1].round().long(), count * slots)
    ordered_BMF = slot_BMF.new_zeros(batch, count * slots + 1, slot_BMF.shape[-1])
    ordered_BMF = ordered_BMF.scatter(1, index_BM[..., None].expand_as(slot_BMF), slot_BMF)[:, :-1]
    content, position_BMA = ordered_BMF[..., : -tower.placed], ordered_BMF[..., -tower.placed : -1]
    if tower.tokenizer.vocab_size is not None:
        content = content[..., 0].round().long().clamp(0, tower.tokenizer.vocab_size - 1)
    order_BM = torch.arange(count * slots).expand(batch, -1)
    inside_BM = order_BM < total_B[:, None]
    bidirectional_BM = torch.full_like(order_BM, int(not tower.tokenizer.causal))
    token_info = TokenInfo.of(order_BM, bidirectional_BM, torch.zeros_like(order_BM), inside_BM)
    position_BMA = torch.where(inside_BM[..., None], position_BMA, 0.0)
    stream_BMD = embed_padded(inner.embed, content, position_BMA, total_B)
    position_BMA = on_axes(position_BMA, tower.axes, tower.core.axes)
    state_BMD = _run_core(inner.core, Rows(stream_BMD, position_BMA, token_info), Cached({}, {}))
    found_BMD = state_BMD.gather(
        1, index_BM.clamp(max=count * slots - 1)[..., None].expand(-1, -1, state_BMD.shape[-1])
    )
    found_NTD = found_BMD.masked_fill(~filled_BM[..., None], 0.0).view(batch * count, slots, -1)
    vector_NF = tower.connector.padded(found_NTD, filled_BM.view(batch * count, slots), inner.pool)
    return module.connector(vector_NF).view(batch, count, -1)


class PaddedPlan(Plan):
    """Attention over a padded batch, with padding masked out.

    rule: which query may attend to which key; None: every query to every key.
    queries, keys: information about the tokens; cached keys come first.
    before: the cached keys and values of each layer.
    joined: filled by `attend`: cached and new keys and values of each layer.
    fixed: whether to use only the cached keys, as in cross-attention.
    """

    def __init__(
        self,
        rule: Rule | None,
        queries: TokenInfo,
        keys: TokenInfo,
        before: LayerKeys,
        joined: LayerKeys,
        fixed: bool = False,
    ) -> None:
        self.before, self.joined, self.fixed = before, joined, fixed
        self.batch, self.count = queries.valid_BT.shape
        q, k = queries.mask_info[:, :, None], keys.mask_info[:, None]
        allowed = keys.valid_BT[:, None].expand(-1, self.count, -1)
        if rule is not None:
            allowed = rule.allows(q, k) & allowed
        self.sees_BT = allowed.any(-1)
        # a query without any allowed key gets all keys, to avoid NaN in the softmax; `attend` sets its result to 0
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
        # repeated here, because a kernel with grouped heads would make dynamic sizes depend on one another
        if (groups := q_BTHK.shape[2] // k_BMGK.shape[2]) > 1:
            k_BMGK, v_BMGK = k_BMGK.repeat_interleave(groups, 2), v_BMGK.repeat_interleave(groups, 2)
        # with a Trace, scores are one matrix; without it, they are computed in blocks whose number depends on the sizes
        read = mechanism(q_BTHK, k_BMGK, v_BMGK, self.pairs, None if mechanism.fused else Trace())
        return read.masked_fill(~self.sees_BT[..., None, None], 0.0).flatten(0, 1)


@dataclass
class Cached:
    """The KV cache. keys: of self-attention. memory: of cross-attention to the reader's states.

    token_info, memory_info: information about the tokens of these keys; None: there are none.
    """

    keys: LayerKeys
    memory: LayerKeys
    token_info: TokenInfo | None = None
    memory_info: TokenInfo | None = None


def core_states(core: nn.Module, rows: Rows, context: int, cached: Cached) -> Tensor:
    """The states (B, T, D) of rows; adds their keys and values to the cache.

    context: the number of rows that the task reads; the others are start tokens. If the cache is not empty, the rows are one new
    token of each sample.
    """
    if not isinstance(core, TwoCores):
        assert isinstance(core, Transformer)
        return _run_core(core, rows, cached)
    if cached.token_info is not None:
        assert cached.memory_info is not None
        plan = PaddedPlan(None, rows.token_info, cached.memory_info, cached.memory, {}, fixed=True)
        crossing = Crossing(
            rows.stream_BTD[:0].flatten(0, 1), core.writer.rotations(rows.position_BTA[:0].flatten(0, 1)), plan
        )
        return _run_core(core.writer, rows, cached, crossing)
    read, written = rows[:context], rows[context:]
    encoded_BMD = _run_core(core.reader, read, Cached({}, {}))
    if not written.stream_BTD.shape[1]:
        return encoded_BMD
    memory, total_B1 = read.token_info, read.token_info.total_B[:, None]
    if core.core.last is not None:  # the writer attends to the last states only, and numbers them from 0
        first_B1 = (total_B1 - core.core.last).clamp(min=0)
        info, recent_BM = memory.mask_info, memory.valid_BT & (memory.mask_info.order >= first_B1)
        memory = TokenInfo.of(info.order - first_B1, info.bidirectional, info.segment, recent_BM)
    info = written.token_info.mask_info
    order_BT = info.order - total_B1
    token_info = TokenInfo.of(order_BT, torch.zeros_like(order_BT), info.segment, written.token_info.valid_BT)
    origin_BA = only_time(written.position_BTA[:, :1])
    plan = PaddedPlan(None, token_info, memory, {}, cached.memory)
    rotations = core.writer.rotations(read.position_BTA.flatten(0, 1))
    crossing = Crossing(encoded_BMD.flatten(0, 1), rotations, plan)
    cached.memory_info = memory
    decoded_BTD = _run_core(
        core.writer, Rows(written.stream_BTD, written.position_BTA - origin_BA, token_info), cached, crossing
    )
    return torch.cat([encoded_BMD, decoded_BTD], 1)


def _run_core(core: Transformer, rows: Rows, cached: Cached, crossing: Crossing | None = None) -> Tensor:
    token_info = rows.token_info if cached.token_info is None else cached.token_info.followed_by(rows.token_info)
    before, joined = cached.keys, LayerKeys()
    layout = Layout((), rows.token_info.mask_info.map(lambda x: x.flatten(0, 1)))

    def plan(rule: Rule, layout: Layout) -> Plan:
        return PaddedPlan(rule, rows.token_info, token_info, before, joined)

    state_TD = core(
        rows.stream_BTD.flatten(0, 1), rows.position_BTA.flatten(0, 1), layout, backend=plan, crossing=crossing
    )
    cached.keys, cached.token_info = joined, token_info
    return state_TD.view(*rows.stream_BTD.shape[:2], -1)
