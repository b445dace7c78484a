"""Cached attention: a prompt that fills the cache, one new token a sample, and any number of new tokens a sample."""

from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.mechanism import Mechanism, Plan
from multimodal.masks import PREFIX_LM, Layout, MaskInfo, Pairs, Rule
from multimodal.shapes import StreamError


class FillingPlan(Plan):
    """A prompt: attend it by another plan and cache its keys and values."""

    def __init__(self, inner: Plan, layout: Layout, cache: Cache) -> None:
        self.inner, self.cache = inner, cache
        self.where = reserved(layout, cache)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        self.cache.write(layer, *self.where, k_TGK, v_TGK)
        return self.inner.attend(q_THK, k_TGK, v_TGK, mechanism, layer)


Where = tuple[Tensor | slice, Tensor | int]
"""(row, order) in a cache of every token of a stream, as an index."""


def reserved(layout: Layout, cache: Cache, where: Where | None = None) -> Where:
    """Make room for a stream's tokens and note what rules ask of them: their (row, order) in the cache, if it is not known."""
    cache.reserve([span.total for span in layout.spans])
    if where is None:
        where = (cache.row_index(layout.info.sample), layout.info.order.long())
    cache.bidirectional_BM[where] = layout.info.bidirectional.to(cache.bidirectional_BM.dtype)
    cache.segment_BM[where] = layout.info.segment.to(cache.segment_BM.dtype)
    return where


def _held(cache: Cache, row: int, count: int, places: MaskInfo) -> MaskInfo:
    """What rules may ask about the first `count` tokens of a row, for the sample of these places."""
    order_M = torch.arange(count, dtype=places.order.dtype, device=places.order.device)
    return MaskInfo(
        places.sample[:1].expand(count), order_M, cache.bidirectional_BM[row, :count], cache.segment_BM[row, :count]
    )


class StepPlan(Plan):
    """One new token a sample, in neighbouring rows, against everything that each row holds: one call, no copy of the cache."""

    def __init__(self, rule: Rule, layout: Layout, cache: Cache) -> None:
        places = layout.info
        self.cache = cache
        first, count = cache.rows[0], len(layout.spans)
        rows = slice(first, first + count)
        lengths = cache.length[rows]
        if lengths.count(lengths[0]) == count:
            self.where = reserved(layout, cache, (rows, lengths[0]))
        else:
            self.where = reserved(layout, cache)
        self.window = (rows, slice(0, max(cache.length[rows])))
        self.rule, self.info = rule, places
        # rows of equal length hold nothing that comes later, and the default rule hides nothing else
        self.full = rule == PREFIX_LM and isinstance(self.where[1], int)

    @cached_property
    def pairs(self) -> Pairs:
        """Who meets whom."""
        places, cache = self.info, self.cache
        order_M = torch.arange(self.window[1].stop, device=places.order.device)
        q = places[:, None]
        k = MaskInfo(
            q.sample.expand(-1, len(order_M)),
            order_M.expand(len(places.order), -1),
            cache.bidirectional_BM[self.window],
            cache.segment_BM[self.window],
        )
        q, k = q[:, :, None], k[:, None]
        return Pairs(q, k, None if self.full else self.rule.allows(q, k) & (k.order <= q.order))

    @cached_property
    def mask(self) -> Tensor | None:
        """The same for a kernel, (B, 1, 1, M); None: all meet."""
        return None if self.full or self.pairs.allowed is None else self.pairs.allowed[:, None]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        self.cache.write(layer, *self.where, k_TGK, v_TGK)
        k_BMGK, v_BMGK = self.cache.k[layer][self.window], self.cache.v[layer][self.window]
        return mechanism(q_THK[:, None].to(k_BMGK.dtype), k_BMGK, v_BMGK, self.pairs, self.trace)[:, 0]


class AppendPlan(Plan):
    """Any number of new tokens a sample, against what its row holds and each other; sample after sample."""

    def __init__(self, rule: Rule, layout: Layout, cache: Cache) -> None:
        self.cache = cache
        sizes = [span.total for span in layout.spans]
        self.sizes = [size for size in sizes if size]  # a sample may have nothing new
        rows = [row for row, size in zip(cache.rows, sizes, strict=False) if size]
        new = [layout.info[stop - size : stop] for stop, size in zip(accumulate(self.sizes), self.sizes, strict=True)]
        for row, places in zip(rows, new, strict=True):
            before, size = cache.length[row], len(places.order)
            if before and rule.allows(_held(cache, row, before, places)[:, None], places[None]).any():
                raise StreamError(
                    f"sample {row} has {before} tokens in the cache that would have had to see the {size} new ones; what is read "
                    "piece by piece must not be looked ahead at: let its kind be causal, or use a rule such as Chunked"
                )
        self.where = reserved(layout, cache)  # only now: a refusal leaves the cache as it was
        self.parts: list[tuple[int, int, Pairs]] = []
        for row, places in zip(rows, new, strict=True):
            total = cache.length[row]
            q, k = places[None, :, None], _held(cache, row, total, places)[None, None]
            self.parts.append((row, total, Pairs(q, k, rule.allows(q, k))))

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        self.cache.write(layer, *self.where, k_TGK, v_TGK)
        out = []
        for (row, total, pairs), q in zip(self.parts, q_THK.split(self.sizes), strict=True):
            k_MGK, v_MGK = self.cache.k[layer][row, :total], self.cache.v[layer][row, :total]
            out.append(mechanism(q[None].to(k_MGK.dtype), k_MGK[None], v_MGK[None], pairs, self.trace)[0])
        return torch.cat(out)
