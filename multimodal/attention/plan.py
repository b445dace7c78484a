"""Attention plans: how a packed stream is computed, made once per stream from its mask rule and layout, and used by every layer.

dense    one boolean matrix over the whole stream; slow, obviously right, the oracle of all others
runs     samples of equal shape as one batch of PyTorch's fused attention; for CPUs, float32, and mechanisms with priors
varlen   PyTorch's variable-length flash kernel (CUDA, half precision, the default rule, also within a window)
flex     PyTorch's block-sparse FlexAttention (CUDA, half precision, any rule, scores without priors)

A plan says which queries attend to which keys; the layer's mechanism (score, prior and read) says what is computed for each pair.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.cached import AppendPlan, FillingPlan, StepPlan, check_appended
from multimodal.attention.gpu import FlexPlan, VarlenPlan
from multimodal.attention.mechanism import Mechanism, Plan, Trace, rows_of
from multimodal.masks import LAW, PREFIX_LM, Alone, Layout, MaskInfo, Pairs, Rule, Span, is_prefix_lm, prefix_window
from multimodal.shapes import ConfigError, did_you_mean

LONG = 1024  # tokens from which on a prefix-LM runs as two calls without a mask; for shorter samples one call with a mask is faster
BACKENDS = ("auto", "dense", "runs", "varlen", "flex")


Backend = str | Callable[[Rule, Layout], Plan]
"""A name in BACKENDS, or a function that makes a plan of your own."""


def plan_attention(
    rule: Rule,
    layout: Layout,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    cache: Cache | None = None,
    bare: bool = True,
    trace: Trace | None = None,
    beside: Plan | None = None,
) -> Plan:
    """Choose how to compute the self-attention of a stream.

    rule: which token may attend to which; it is combined with `LAW`.
    layout: the samples of the stream.
    backend: "auto" chooses by device, precision and rule.
    dtype: the precision in which attention runs.
    cache: if its rows are empty, the stream is a prompt and fills them; else it has new tokens, any number for each sample.
    bare: whether every layer's mechanism is a factored score and nothing else, so that any kernel can run it.
    trace: collects a record of every layer.
    beside: the plan of other layers of the same stream, which has reserved the rows of the cache already.

    Raises:
        ConfigError: an unknown backend, or one that cannot run this rule here.
        StreamError: cached tokens would have had to attend to new ones.
    """
    window = prefix_window(rule)
    if rule != PREFIX_LM:
        rule = LAW & Alone(rule)  # no rule may allow attention to other samples, or to later tokens of what is written
    if cache is not None:
        rows = list(cache.rows[: len(layout.spans)])
        known = any(cache.length[row] for row in rows) if beside is None else not isinstance(beside, FillingPlan)
        if known:
            single = all(span.total == 1 for span in layout.spans) and rows == list(range(rows[0], rows[0] + len(rows)))
            cached = (StepPlan if single else AppendPlan)(rule, layout, cache, beside)
            cached.trace = trace
            return cached
    device = layout.info.sample.device
    if backend == "auto":
        half = dtype in (torch.float16, torch.bfloat16)
        standard = is_prefix_lm(PREFIX_LM if window else rule, layout)
        flash = device.type == "cuda" and half and bare and trace is None
        backend = "runs" if not flash else "varlen" if standard else "flex"
    if isinstance(backend, str) and backend not in _PLANS:
        raise ConfigError(
            f"attention backend {backend!r} is unknown; there are {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    if backend in ("varlen", "flex") and not bare:
        raise ConfigError(
            f"attention backend {backend!r} runs bare scores only, and this core has a prior, a read or a score that does not "
            "factor; use 'auto'"
        )
    make = _PLANS[backend] if isinstance(backend, str) else backend
    if backend == "varlen" and window:
        make = partial(VarlenPlan, window=window)
    # without split a sample is one call, as a trace wants; with a prior splitting saves nothing, since there is a matrix anyway
    plan = _RunsPlan(rule, layout, split=bare and trace is None) if backend == "runs" else make(rule, layout)
    plan.trace = trace
    return plan if cache is None else FillingPlan(plan, layout, cache, beside)


def plan_layers(
    rule: Rule, own: Sequence[Rule], layout: Layout, *, cache: Cache | None = None, **options: Any
) -> tuple[Plan, dict[Rule, Plan]]:
    """The plan of the layers of a core under its rule, and by rule those of the layers that have their own beside it.

    options: those of `plan_attention`.

    Raises:
        ConfigError, StreamError: as `plan_attention` does.
    """
    if (
        own and cache is not None and any(span.total > 1 for span in layout.spans)
    ):  # an error leaves the cache as it was
        for one in own:
            check_appended(LAW & Alone(rule & one), layout, cache)
    plan = plan_attention(rule, layout, cache=cache, **options)
    return plan, {one: plan_attention(rule & one, layout, cache=cache, beside=plan, **options) for one in own}


class DensePlan(Plan):
    """One matrix of all tokens of the stream with all, and no fused kernel: the oracle of the other plans."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        q, k = layout.info[None, :, None], layout.info[None, None]
        self.pairs = Pairs(q, k, rule.allows(q, k))

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        trace = Trace() if self.trace is None else self.trace  # with a trace no fused kernel runs
        return mechanism(q_THK[None], k_TGK[None], v_TGK[None], self.pairs, trace)[0]


class _RunsPlan(Plan):
    """Neighbouring samples of equal shape run as one batch of the fused kernel, without a mask where none is needed.

    Under a rule with a reach, long samples are cut into blocks with the keys within reach, so that cost grows linearly with length.
    """

    def __init__(self, rule: Rule, layout: Layout, split: bool = True) -> None:
        standard = is_prefix_lm(rule, layout)
        self.sizes: list[int] = []
        self.runs: list[tuple[int, Pairs, _Blocks | _Split | None]] = []
        start = 0
        for span, group in groupby(layout.spans):
            count = len(list(group))
            size = count * span.total
            info = layout.info[start : start + size].map(partial(_side_by_side, count=count))
            q, k = info[:, :, None], info[:, None]
            blocks: _Blocks | _Split | None = None
            if standard and span.bidirectional in (0, span.total):
                pairs = Pairs(q, k, causal=span.bidirectional == 0)
            elif standard and split and is_split(span):
                pairs, blocks = Pairs(q, k, causal=True), _Split(q, k, span.bidirectional)
            elif standard:
                # equal spans have equal masks, so one matrix serves the whole batch
                mask = torch.ones(1, span.total, span.total, dtype=torch.bool, device=layout.info.order.device).tril()
                mask[:, : span.bidirectional, : span.bidirectional] = True
                pairs = Pairs(q, k, mask)
            elif rule.reach is not None and span.total >= 4 * (rule.reach + 1):
                blocks = _Blocks(rule, info, rule.reach)
                pairs = blocks.pairs
            else:
                pairs = Pairs(q, k, rule.allows(q, k))
            self.sizes.append(size)
            self.runs.append((count, pairs, blocks))
            start += size
        self.query_sizes = self.sizes  # fewer than those of the keys after `narrowed`

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        sizes = ((q_THK, self.query_sizes), (k_TGK, self.sizes), (v_TGK, self.sizes))
        parts = [x.split(each) if len(each) > 1 else (x,) for x, each in sizes]
        out = []
        for (count, pairs, blocks), *qkv in zip(self.runs, *parts, strict=True):
            q, k, v = (x.view(count, -1, *x.shape[1:]) for x in qkv)
            if blocks is None:
                read = mechanism(q, k, v, pairs, self.trace)
            elif isinstance(blocks, _Split):
                read = blocks.read(mechanism, q, k, v)
            else:
                read = blocks.join(mechanism(blocks.queries(q), blocks.keys(k), blocks.keys(v), pairs, self.trace))
            out.append(read.flatten(0, 1))
        return out[0] if len(out) == 1 else torch.cat(out)

    def narrowed(self, row_N: Tensor) -> Plan | None:
        """A plan if the rows are ascending, and at the same positions in every sample of a run; else None."""
        if self.trace is not None or row_N.device.type != "cpu" or not bool((row_N.diff() > 0).all()):
            return None  # on a GPU the host would have to wait for the device to know the rows
        plan = copy(self)
        plan.runs, plan.query_sizes = [], []
        *starts, _ = accumulate(self.sizes, initial=0)
        parts = row_N.tensor_split(torch.searchsorted(row_N, torch.tensor(starts[1:])))
        for (count, pairs, blocks), size, start, rows in zip(self.runs, self.sizes, starts, parts, strict=True):
            order = rows[: len(rows) // count] - start
            each = start + torch.arange(count)[:, None] * (size // count) + order
            if blocks is not None or not len(rows) or not torch.equal(rows, each.flatten()):
                return None
            some = rows_of(pairs, order)
            # the kernel's causal flag assumes that queries are the last rows, so a mask takes its place if it masks anything
            closed = some.closed
            allowed = None if closed is None or not closed.any() else ~closed
            plan.runs.append((count, Pairs(some.q, some.k, allowed), None))
            plan.query_sizes.append(len(rows))
        return plan


def _side_by_side(x: Tensor, count: int) -> Tensor:
    """(B * T,) -> (B, T) for B = `count` samples."""
    return x.view(count, -1)


def is_split(span: Span) -> bool:
    """Whether a prefix-LM sample runs as two calls instead of one with a mask: it is long, and at most 2/3 bidirectional."""
    return span.total >= LONG and 0 < 3 * span.bidirectional <= 2 * span.total


class _Split:
    """Long prefix-LM samples (B, T) as two calls without a mask, whose size would be T x T.

    The first call is full attention among the `first` bidirectional tokens. The second is causal over all tokens; its rows after
    the first ones are used.
    """

    def __init__(self, q: MaskInfo, k: MaskInfo, first: int) -> None:
        self.first = first
        self.context, self.causal = Pairs(q[:, :first], k[:, :, :first]), Pairs(q, k, causal=True)

    def read(self, mechanism: Mechanism, q_BTHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor) -> Tensor:
        some = slice(self.first)
        context = mechanism(q_BTHK[:, some], k_BMGK[:, some], v_BMGK[:, some], self.context)
        return torch.cat([context, mechanism(q_BTHK, k_BMGK, v_BMGK, self.causal)[:, self.first :]], 1)


class _Blocks:
    """Samples (B, T) cut into blocks of queries; each block with the keys within its reach is a sample of a larger batch."""

    def __init__(self, rule: Rule, info: MaskInfo, reach: int) -> None:
        self.count, self.total = info.order.shape
        self.size, self.reach = max(reach, 16), reach
        self.blocks = -(-self.total // self.size)
        q = info.map(self.queries)
        q = replace(q, order=self.queries(info.order + 1) - 1)  # the order of padding is -1
        k = info.map(self.keys)
        key_exists = self.keys(torch.ones_like(info.order))[:, None] != 0  # no padding beyond the ends of a sample
        query_exists = self.queries(torch.ones_like(info.order))[:, :, None] != 0
        q, k = q[:, :, None], k[:, None]
        # a query that is padding attends to everything, lest its softmax be NaN
        self.pairs = Pairs(q, k, rule.allows(q, k) & key_exists | ~query_exists)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B * blocks, size, ...)."""
        return _padded(x, 0, self.blocks * self.size - self.total).reshape(-1, self.size, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B * blocks, size + 2 * reach, ...)."""
        wide = _padded(x, self.reach, self.blocks * self.size - self.total + self.reach)
        windows = wide.unfold(1, self.size + 2 * self.reach, self.size)  # unfold puts the axis of the window last
        return windows.movedim(-1, 2).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """(B * blocks, size, ...) -> (B, T, ...)."""
        return x.reshape(self.count, -1, *x.shape[2:])[:, : self.total]


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """The tensor with rows of zeros before and after, along its second axis."""
    return torch.cat([x.new_zeros(len(x), before, *x.shape[2:]), x, x.new_zeros(len(x), after, *x.shape[2:])], dim=1)


_PLANS: dict[str, Callable[[Rule, Layout], Plan]] = {
    "dense": DensePlan,
    "runs": _RunsPlan,
    "varlen": VarlenPlan,
    "flex": FlexPlan,
}
