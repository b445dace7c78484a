"""Cross-attention of an encoder-decoder: the written tokens of a stream attend to the states of its context."""

from itertools import groupby

import torch
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.cached import reserved
from multimodal.attention.mechanism import Mechanism, Plan, Trace
from multimodal.masks import Layout, MaskInfo, Pairs


class _CrossPlan(Plan):
    """The written tokens of each sample attend to all of its context; neighbours of equal shape run as one batch."""

    def __init__(self, written: Layout, context: Layout) -> None:
        shapes = zip((s.total for s in written.spans), (s.total for s in context.spans), strict=True)
        self.runs: list[tuple[int, int, int, Pairs | None]] = []
        q_start = k_start = 0
        for (q_size, k_size), group in groupby(shapes):
            count = len(list(group))
            pairs = None
            if q_size and k_size:
                q = _side_by_side(written.info[q_start : q_start + count * q_size], count)
                k = _side_by_side(context.info[k_start : k_start + count * k_size], count)
                pairs = Pairs(q[:, :, None], k[:, None])
            self.runs.append((count, count * q_size, count * k_size, pairs))
            q_start, k_start = q_start + count * q_size, k_start + count * k_size

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        out = []
        k_sizes = [size for _, _, size, _ in self.runs]
        split = zip(
            self.runs,
            q_THK.split([size for _, size, _, _ in self.runs]),
            k_TGK.split(k_sizes),
            v_TGK.split(k_sizes),
            strict=True,
        )
        for (count, _, _, pairs), *qkv in split:
            if pairs is None:  # no context to attend to
                out.append(qkv[0].new_zeros(*qkv[0].shape[:2], v_TGK.shape[-1]))
                continue
            q_BTHK, k_BMGK, v_BMGK = (x.view(count, -1, *x.shape[1:]) for x in qkv)
            out.append(mechanism(q_BTHK, k_BMGK, v_BMGK, pairs, self.trace).flatten(0, 1))
        return torch.cat(out)


def _side_by_side(info: MaskInfo, count: int) -> MaskInfo:
    """(B * T,) -> (B, T) for B = `count` samples of equal length."""
    return info.map(lambda x: x.reshape(count, -1))


class _DenseCrossPlan(Plan):
    """The oracle of `_CrossPlan`: one matrix of all written tokens and all of the context, with samples masked."""

    def __init__(self, written: Layout, context: Layout) -> None:
        q, k = written.info[None, :, None], context.info[None, None]
        self.pairs = Pairs(q, k, q.sample == k.sample)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        if not len(k_TGK):
            return q_THK.new_zeros(*q_THK.shape[:2], v_TGK.shape[-1])
        trace = Trace() if self.trace is None else self.trace  # with a trace no fused kernel runs
        return mechanism(q_THK[None], k_TGK[None], v_TGK[None], self.pairs, trace)[0]


class _CachedCrossPlan(Plan):
    """Cached cross-attention: a prompt attends by `inner` and caches the keys of its context, to which later tokens attend."""

    def __init__(self, written: Layout, memory: Cache, inner: Plan | None, context: Layout | None) -> None:
        self.memory, self.inner = memory, inner
        if inner is not None and context is not None:
            self.where = reserved(context, memory)
            return
        q = written.info[:, None, None]
        row_T = memory.row_index(written.info.sample)
        rows = row_T.tolist()
        length_T = torch.tensor([memory.length[row] for row in rows], device=row_T.device)
        self.longest = max(1, int(length_T.max()))
        neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
        self.rows = slice(rows[0], rows[0] + len(rows)) if neighbours else row_T  # a slice copies no keys
        self.empty_T = length_T == 0
        order_M = torch.arange(self.longest, device=row_T.device)
        k = MaskInfo(
            q.sample[:, :, 0].expand(-1, self.longest),
            order_M.expand(len(rows), -1),
            memory.bidirectional_BM[self.rows, : self.longest],
            memory.segment_BM[self.rows, : self.longest],
        )[:, None]
        exists = order_M < length_T[:, None, None]
        # a query without context gets every key, lest its softmax be NaN; `attend` sets its result to 0
        self.pairs = Pairs(q, k, exists | self.empty_T[:, None, None])

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        if self.inner is not None:
            self.memory.write(layer, *self.where, k_TGK, v_TGK)
            return self.inner.attend(q_THK, k_TGK, v_TGK, mechanism, layer)
        k_BMGK = self.memory.k[layer][self.rows, : self.longest]
        v_BMGK = self.memory.v[layer][self.rows, : self.longest]
        out = mechanism(q_THK[:, None].to(k_BMGK.dtype), k_BMGK, v_BMGK, self.pairs, self.trace)[:, 0]
        return out.masked_fill(self.empty_T[:, None, None], 0.0)


def plan_cross_attention(
    written: Layout, context: Layout | None, *, backend: object, cache: Cache | None, trace: Trace | None = None
) -> Plan:
    """Plan the cross-attention of a stream: every written token attends to the whole context of its own sample.

    written: the layout of the written tokens. A sample that has none has a span of 0 tokens.
    context: the layout of the context, with as many samples; None: the tokens follow a prompt whose context is in the cache.
    backend: "dense" is the oracle; every other one runs samples of equal shape as one batch.
    cache: if given, the prompt fills its `memory`.
    trace: collects a record of every layer.
    """
    inner = None
    if context is not None:
        inner = (_DenseCrossPlan if backend == "dense" else _CrossPlan)(written, context)
        inner.trace = trace
    if cache is None or cache.memory is None:
        assert inner is not None
        return inner
    plan = _CachedCrossPlan(written, cache.memory, inner, context)
    plan.trace = trace
    return plan
