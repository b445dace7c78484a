"""Cross-attention: what a stream writes looks at what it has read, where the two halves have cores of their own."""

from itertools import groupby

import torch
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.cached import reserved
from multimodal.attention.mechanism import Mechanism, Plan, Trace
from multimodal.masks import Layout, MaskInfo, Pairs


class _CrossPlan(Plan):
    """Written tokens of each sample against all that the same sample read; neighbours of equal shape as one batch."""

    def __init__(self, written: Layout, read: Layout) -> None:
        shapes = zip((s.total for s in written.spans), (s.total for s in read.spans), strict=True)
        self.runs: list[tuple[int, int, int, Pairs | None]] = []
        q_start = k_start = 0
        for (q_size, k_size), group in groupby(shapes):
            count = len(list(group))
            pairs = None
            if q_size and k_size:
                q = _side_by_side(written.info[q_start : q_start + count * q_size], count)
                k = _side_by_side(read.info[k_start : k_start + count * k_size], count)
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
            if pairs is None:
                out.append(qkv[0].new_zeros(*qkv[0].shape[:2], v_TGK.shape[-1]))
                continue
            q_BTHK, k_BMGK, v_BMGK = (x.view(count, -1, *x.shape[1:]) for x in qkv)
            out.append(mechanism(q_BTHK, k_BMGK, v_BMGK, pairs, self.trace).flatten(0, 1))
        return torch.cat(out)


def _side_by_side(places: MaskInfo, count: int) -> MaskInfo:
    return MaskInfo(**{name: x.reshape(count, -1) for name, x in vars(places).items()})


class _DenseCrossPlan(Plan):
    """The same, everybody against everybody, written out: the oracle."""

    def __init__(self, written: Layout, read: Layout) -> None:
        q, k = written.info[None, :, None], read.info[None, None]
        self.pairs = Pairs(q, k, q.sample == k.sample)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        if not len(k_TGK):
            return q_THK.new_zeros(*q_THK.shape[:2], v_TGK.shape[-1])
        trace = Trace() if self.trace is None else self.trace
        return mechanism(q_THK[None], k_TGK[None], v_TGK[None], self.pairs, trace)[0]


class _CachedCrossPlan(Plan):
    """Cached cross-attention: a prompt's `inner` plan fills the memory, and later tokens read it."""

    def __init__(self, written: Layout, memory: Cache, inner: Plan | None, read: Layout | None) -> None:
        self.memory, self.inner = memory, inner
        if inner is not None and read is not None:
            self.where = reserved(read, memory)
            return
        q = written.info[:, None, None]
        row_T = memory.row_index(written.info.sample)
        rows = row_T.tolist()
        length_T = torch.tensor([memory.length[row] for row in rows], device=row_T.device)
        self.longest = max(1, int(length_T.max()))
        step = rows == list(range(rows[0], rows[0] + len(rows)))
        self.rows = slice(rows[0], rows[0] + len(rows)) if step else row_T
        self.empty_T = length_T == 0
        order_M = torch.arange(self.longest, device=row_T.device)
        k = MaskInfo(
            q.sample[:, :, 0].expand(-1, self.longest),
            order_M.expand(len(rows), -1),
            memory.bidirectional_BM[self.rows, : self.longest],
            memory.segment_BM[self.rows, : self.longest],
        )[:, None]
        there = order_M < length_T[:, None, None]
        self.pairs = Pairs(q, k, there | self.empty_T[:, None, None])

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        if self.inner is not None:
            self.memory.write(layer, *self.where, k_TGK, v_TGK)
            return self.inner.attend(q_THK, k_TGK, v_TGK, mechanism, layer)
        k_BMGK = self.memory.k[layer][self.rows, : self.longest]
        v_BMGK = self.memory.v[layer][self.rows, : self.longest]
        out = mechanism(q_THK[:, None].to(k_BMGK.dtype), k_BMGK, v_BMGK, self.pairs, self.trace)[:, 0]
        return out.masked_fill(self.empty_T[:, None, None], 0.0)


def plan_cross_attention(
    written: Layout, read: Layout | None, *, backend: object, cache: Cache | None, trace: Trace | None = None
) -> Plan:
    """How what a stream writes looks at what it has read: all of its own sample's, no other's.

    written, read: the two halves of one stream, sample by sample (spans of 0 tokens where a sample lacks one); read is None for
    tokens written later, whose memory is in the cache.
    """
    inner = None
    if read is not None:
        inner = (_DenseCrossPlan if backend == "dense" else _CrossPlan)(written, read)
        inner.trace = trace
    if cache is None or cache.memory is None:
        assert inner is not None
        return inner
    plan = _CachedCrossPlan(written, cache.memory, inner, read)
    plan.trace = trace
    return plan
