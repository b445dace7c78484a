"""Cross-attention: what a stream writes looks at what it has read, where the two halves have cores of their own."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.kept import reserved
from multimodal.attention.layout import Layout, Plan, sdpa


class _CrossPlan(Plan):
    """Written tokens of each sample against all that the same sample read; neighbours of equal shape as one batch."""

    def __init__(self, written: Sequence[int], read: Sequence[int]) -> None:
        groups = [(shape, len(list(group))) for shape, group in groupby(zip(written, read, strict=True))]
        self.counts = [count for _, count in groups]
        self.q_sizes = [count * q for (q, _), count in groups]
        self.k_sizes = [count * k for (_, k), count in groups]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        out = []
        split = zip(
            self.counts, q_THK.split(self.q_sizes), k_TGK.split(self.k_sizes), v_TGK.split(self.k_sizes), strict=True
        )
        for count, q, k, v in split:
            if not len(q) or not len(k):
                out.append(torch.zeros_like(q))
                continue
            q_BTHK, k_BMGK, v_BMGK = (x.view(count, -1, *x.shape[1:]) for x in (q, k, v))
            out.append(sdpa(q_BTHK, k_BMGK, v_BMGK, scale).reshape(q.shape))
        return torch.cat(out)


class _DenseCrossPlan(Plan):
    """The same by one (T, M) matrix: the oracle."""

    def __init__(self, sample_T: Tensor, sample_M: Tensor) -> None:
        self.mask_TM = sample_T[:, None] == sample_M[None]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        groups = q_THK.shape[1] // k_TGK.shape[1]
        k_THK, v_THK = k_TGK.repeat_interleave(groups, 1), v_TGK.repeat_interleave(groups, 1)
        score_HTM = torch.einsum("thk,mhk->htm", q_THK, k_THK).float() * scale
        posterior_HTM = score_HTM.masked_fill(~self.mask_TM, float("-inf")).softmax(-1).nan_to_num()
        return torch.einsum("htm,mhk->thk", posterior_HTM.to(v_THK.dtype), v_THK)


class _KeptCrossPlan(Plan):
    """Cross-attention to a memory that is kept: a prompt's `inner` plan fills it, later tokens find it there."""

    def __init__(self, layout: Layout, memory: Cache, inner: Plan | None, read: Layout | None) -> None:
        self.memory, self.inner = memory, inner
        if inner is not None and read is not None:
            self.where = reserved(read, memory)
        else:
            row_T = memory.row_index(layout.places.sample)
            length_T = torch.tensor([memory.length[row] for row in row_T.tolist()], device=row_T.device)
            self.longest = max(1, int(length_T.max()))
            rows = row_T.tolist()
            step = rows == list(range(rows[0], rows[0] + len(rows)))
            self.rows = slice(rows[0], rows[0] + len(rows)) if step else row_T
            self.empty_T = length_T == 0
            mask_TM = torch.arange(self.longest, device=row_T.device) < length_T[:, None]
            self.mask = (mask_TM | self.empty_T[:, None])[:, None, None]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        if self.inner is not None:
            self.memory.write(layer, *self.where, k_TGK, v_TGK)
            return self.inner.attend(q_THK, k_TGK, v_TGK, scale, layer)
        k_BMGK = self.memory.k_LBMGK[layer, self.rows, : self.longest]
        v_BMGK = self.memory.v_LBMGK[layer, self.rows, : self.longest]
        out = sdpa(q_THK[:, None].to(k_BMGK.dtype), k_BMGK, v_BMGK, scale, self.mask)[:, 0]
        return out.masked_fill(self.empty_T[:, None, None], 0.0)


def plan_cross_attention(written: Layout, read: Layout | None, *, backend: object, cache: Cache | None) -> Plan:
    """How what a stream writes looks at what it has read: all of its own sample's, no other's.

    written, read: the two halves of one stream, sample by sample (spans of 0 tokens where a sample lacks one); read is None for
    tokens written later, whose memory is in the cache.
    """
    inner = None
    if read is not None:
        if backend == "dense":
            inner = _DenseCrossPlan(written.places.sample, read.places.sample)
        else:
            inner = _CrossPlan([s.total for s in written.spans], [s.total for s in read.spans])
    if cache is None or cache.memory is None:
        assert inner is not None
        return inner
    return _KeptCrossPlan(written, cache.memory, inner, read)
