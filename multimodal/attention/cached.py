"""Cached attention: a prompt that fills the cache, one new token for each sample, or any number of them."""

from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.mechanism import Mechanism, Plan
from multimodal.masks import PREFIX_LM, Layout, MaskInfo, Pairs, Rule
from multimodal.shapes import StreamError


class FillingPlan(Plan):
    """A prompt: another plan attends, and its keys and values are cached."""

    def __init__(self, inner: Plan, layout: Layout, cache: Cache, beside: Plan | None = None) -> None:
        self.inner, self.cache = inner, cache
        self.where: Where = reserved(layout, cache) if beside is None else _where(beside)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        self.cache.write(layer, *self.where, k_TGK, v_TGK)
        return self.inner.attend(q_THK, k_TGK, v_TGK, mechanism, layer)


Where = tuple[Tensor | slice, Tensor | int]
"""(row, order among the stored tokens) of every token of a stream, as an index into a cache."""


def reserved(layout: Layout, cache: Cache, where: Where | None = None) -> Where:
    """Reserve the tokens of a stream in the cache, and store what rules may know of them; return their (row, order).

    where: (row, order), if the caller has it in a cheaper form than tensors.
    """
    cache.reserve([span.total for span in layout.spans])
    if where is None:
        row_T = cache.row_index(layout.info.sample)
        where = (row_T, layout.info.order.long())
        if any(cache.dropped):
            where = (row_T, where[1] - torch.tensor(cache.dropped, device=row_T.device)[row_T])
    cache.bidirectional_BM[where] = layout.info.bidirectional.to(cache.bidirectional_BM.dtype)
    cache.segment_BM[where] = layout.info.segment.to(cache.segment_BM.dtype)
    return where


def _where(plan: Plan) -> Where:
    """What another plan of the same stream has reserved."""
    assert isinstance(plan, (FillingPlan, StepPlan, AppendPlan))
    return plan.where


def check_appended(rule: Rule, layout: Layout, cache: Cache) -> None:
    """Raise a StreamError if a cached token would have had to attend to a new one: the states of cached tokens are final."""
    start = 0
    for row, span in zip(cache.rows, layout.spans, strict=False):
        info, before = layout.info[start : start + span.total], cache.stored(row)
        start += span.total
        if span.total and before and rule.allows(_cached_info(cache, row, before, info, 0)[:, None], info[None]).any():
            raise StreamError(
                f"sample {row} has {cache.length[row]} tokens in the cache that would have had to attend to the {span.total} new "
                "ones; what is read piece by piece must be causal: make its tokenizer causal, or use a rule such as Chunked"
            )


def _cached_info(cache: Cache, row: int, count: int, new: MaskInfo, added: int) -> MaskInfo:
    """What rules may know of the first `count` stored tokens of a row, whose sample has the number of the `new` tokens.

    added: how many of them, the last ones, are the new tokens. Only these have relations: the pairs of a value are between its own
    tokens, which come all at once.
    """
    order_M = torch.arange(count, dtype=new.order.dtype, device=new.order.device) + cache.dropped[row]
    links = None
    if new.links is not None:
        links = new.links.map(lambda number_N: F.pad(number_N[:added], (count - added, 0)))
    return MaskInfo(
        new.sample[:1].expand(count), order_M, cache.bidirectional_BM[row, :count], cache.segment_BM[row, :count], links
    )


class StepPlan(Plan):
    """One new token for each sample, in neighbouring rows, attends to all tokens of its row: one call, no copy of the cache."""

    def __init__(self, rule: Rule, layout: Layout, cache: Cache, beside: Plan | None = None) -> None:
        self.cache = cache
        first, count = cache.rows[0], len(layout.spans)
        rows = slice(first, first + count)
        lengths = [cache.stored(row) for row in range(first, first + count)]
        self.where: Where
        if beside is not None:
            self.where = _where(beside)
        elif (
            lengths.count(lengths[0]) == count
        ):  # equal lengths: a slice and an int index the cache faster than tensors
            self.where = reserved(layout, cache, (rows, lengths[0]))
        else:
            self.where = reserved(layout, cache)
        self.window = (rows, slice(0, max(cache.stored(row) for row in range(first, first + count))))
        self.rule, self.info = rule, layout.info
        # rows of equal length have no tokens after the new one, and the default rule masks nothing else
        self.full = rule == PREFIX_LM and isinstance(self.where[1], int)

    @cached_property
    def pairs(self) -> Pairs:
        """The new tokens as queries, and the tokens of their rows as keys."""
        info, cache = self.info, self.cache
        order_BM = torch.arange(self.window[1].stop, device=info.order.device).expand(len(info.order), -1)
        if any(cache.dropped):
            order_BM = order_BM + torch.tensor(cache.dropped[self.window[0]], device=order_BM.device)[:, None]
        q = info[:, None]
        k = MaskInfo(
            q.sample.expand(-1, order_BM.shape[1]),
            order_BM,
            cache.bidirectional_BM[self.window],
            cache.segment_BM[self.window],
            None if info.links is None else info.links.map(self._among_cached),
        )
        q, k = q[:, :, None], k[:, None]
        # a shorter row has no tokens from its length on, which is what `<=` masks
        return Pairs(q, k, None if self.full else self.rule.allows(q, k) & (k.order <= q.order))

    def _among_cached(self, number_B: Tensor) -> Tensor:
        """(B,) numbers of the new tokens -> (B, M), with 0 for the tokens before them: their pairs are those of other values."""
        number_BM = torch.zeros_like(self.cache.segment_BM)
        number_BM[self.where] = number_B
        return number_BM[self.window]

    @cached_property
    def mask(self) -> Tensor | None:
        """The mask of a kernel, (B, 1, 1, M), True where a query may attend; None: it may everywhere."""
        return None if self.full or self.pairs.allowed is None else self.pairs.allowed[:, None]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        self.cache.write(layer, *self.where, k_TGK, v_TGK)
        k_BMGK, v_BMGK = self.cache.k[layer][self.window], self.cache.v[layer][self.window]
        return mechanism(q_THK[:, None].to(k_BMGK.dtype), k_BMGK, v_BMGK, self.pairs, self.trace)[:, 0]


class AppendPlan(Plan):
    """Any number of new tokens for each sample attend to the tokens of their row and to each other; sample after sample."""

    def __init__(self, rule: Rule, layout: Layout, cache: Cache, beside: Plan | None = None) -> None:
        self.cache = cache
        sizes = [span.total for span in layout.spans]
        self.sizes = [size for size in sizes if size]  # a sample may have no new tokens
        rows = [row for row, size in zip(cache.rows, sizes, strict=False) if size]
        new = [layout.info[stop - size : stop] for stop, size in zip(accumulate(self.sizes), self.sizes, strict=True)]
        if beside is None:
            check_appended(rule, layout, cache)
        # after the check, so that an error leaves the cache unchanged
        self.where: Where = reserved(layout, cache) if beside is None else _where(beside)
        self.parts: list[tuple[int, int, Pairs]] = []
        for row, info in zip(rows, new, strict=True):
            total = cache.stored(row)
            q, k = info[None, :, None], _cached_info(cache, row, total, info, len(info.order))[None, None]
            self.parts.append((row, total, Pairs(q, k, rule.allows(q, k))))

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        self.cache.write(layer, *self.where, k_TGK, v_TGK)
        out = []
        for (row, total, pairs), q in zip(self.parts, q_THK.split(self.sizes), strict=True):
            k_MGK, v_MGK = self.cache.k[layer][row, :total], self.cache.v[layer][row, :total]
            out.append(mechanism(q[None].to(k_MGK.dtype), k_MGK[None], v_MGK[None], pairs, self.trace)[0])
        return torch.cat(out)
