"""How one packed stream is attended: a plan is made once per stream from its mask rule and layout, and used by every layer.

dense    one boolean matrix over the whole stream; slow, obviously right, the oracle of all others
runs     samples of equal shape side by side through PyTorch's fused attention; what CPUs, fp32, and mechanisms with priors use
varlen   PyTorch's variable-length flash kernel (CUDA, half precision, the default rule)
flex     PyTorch's block-sparse FlexAttention (CUDA, any rule)

What a plan holds is who meets whom; what becomes of each meeting is the mechanism's: score, prior and read.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.kept import AppendPlan, FillingPlan, StepPlan
from multimodal.attention.layout import Layout, Plan
from multimodal.attention.mechanism import Mechanism, Trace
from multimodal.masks import LAW, PREFIX_LM, Pairs, Places, Rule
from multimodal.shapes import ConfigError, did_you_mean

BACKENDS = ("auto", "dense", "runs", "varlen", "flex")


Backend = str | Callable[[Rule, Layout], Plan]
"""A name in BACKENDS, or a plan of one's own."""


def plan_attention(
    rule: Rule,
    layout: Layout,
    *,
    backend: Backend = "auto",
    dtype: torch.dtype = torch.float32,
    cache: Cache | None = None,
    bare: bool = True,
    trace: Trace | None = None,
) -> Plan:
    """Choose how to attend this stream.

    bare: every layer's mechanism is a score that factors, and no more, so that any kernel runs it. trace: collects what layers do.
    With a cache whose rows are empty the stream is a prompt and fills them; otherwise it holds new tokens, any number a sample.

    Raises:
        ConfigError: an unknown backend, or one that cannot run this rule here.
        StreamError: new tokens that those in the cache would have had to see.
    """
    if rule != PREFIX_LM:
        rule = LAW & rule  # packing and the order of writing are not for a rule to give away
    if cache is not None:
        rows = list(cache.rows[: len(layout.spans)])
        if any(cache.length[row] for row in rows):
            single = all(span.total == 1 for span in layout.spans) and rows == list(range(rows[0], rows[0] + len(rows)))
            held = (StepPlan if single else AppendPlan)(rule, layout, cache)
            held.trace = trace
            return held
    device = layout.places.sample.device
    if backend == "auto":
        half = dtype in (torch.float16, torch.bfloat16)
        standard = _is_prefix_lm(rule, layout)
        apart = device.type != "cuda" or not half or not bare or trace is not None
        backend = "runs" if apart else "varlen" if standard else "flex"
    if isinstance(backend, str) and backend not in _PLANS:
        raise ConfigError(
            f"attention backend {backend!r} is unknown; there are {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    if backend in ("varlen", "flex") and not bare:
        raise ConfigError(
            f"attention backend {backend!r} runs bare scores only, and this core has a prior, a read or a score that does not "
            "factor; use 'auto'"
        )
    plan = (_PLANS[backend] if isinstance(backend, str) else backend)(rule, layout)
    plan.trace = trace
    return plan if cache is None else FillingPlan(plan, layout, cache)


def _is_prefix_lm(rule: Rule, layout: Layout) -> bool:
    return rule == PREFIX_LM and all(span.free >= 0 for span in layout.spans)


class DensePlan(Plan):
    """Everybody against everybody of the whole stream, the mechanism written out: the oracle."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        places = layout.places
        q, k = places[None, :, None], places[None, None]
        self.pairs = Pairs(q, k, rule.allows(q, k))

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        trace = Trace() if self.trace is None else self.trace
        return mechanism(q_THK[None], k_TGK[None], v_TGK[None], self.pairs, trace)[0]


class _RunsPlan(Plan):
    """Neighbouring samples of equal shape as one batch of the fused kernel; no mask at all where none is needed.

    Under a rule with a reach, long samples are cut into blocks that see no further than it, so that cost grows with length alone.
    """

    def __init__(self, rule: Rule, layout: Layout) -> None:
        standard = _is_prefix_lm(rule, layout)
        self.sizes: list[int] = []
        self.runs: list[tuple[int, Pairs, _Blocks | None]] = []
        start = 0
        for span, group in groupby(layout.spans):
            count = len(list(group))
            size = count * span.total
            here = Places(
                **{name: x.view(count, span.total) for name, x in vars(layout.places[start : start + size]).items()}
            )
            q, k = here[:, :, None], here[:, None]
            blocks = None
            if standard and span.free in (0, span.total):
                pairs = Pairs(q, k, causal=span.free == 0)
            elif standard:
                mask = torch.ones(1, span.total, span.total, dtype=torch.bool, device=layout.places.order.device).tril()
                mask[:, : span.free, : span.free] = True
                pairs = Pairs(q, k, mask)
            elif rule.reach is not None and span.total >= 4 * (rule.reach + 1):
                blocks = _Blocks(rule, here, rule.reach)
                pairs = blocks.pairs
            else:
                pairs = Pairs(q, k, rule.allows(q, k))
            self.sizes.append(size)
            self.runs.append((count, pairs, blocks))
            start += size

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        parts = [x.split(self.sizes) if len(self.sizes) > 1 else (x,) for x in (q_THK, k_TGK, v_TGK)]
        out = []
        for (count, pairs, blocks), *qkv in zip(self.runs, *parts, strict=True):
            q, k, v = (x.view(count, -1, *x.shape[1:]) for x in qkv)
            if blocks is None:
                read = mechanism(q, k, v, pairs, self.trace)
            else:
                read = blocks.join(mechanism(blocks.queries(q), blocks.keys(k), blocks.keys(v), pairs, self.trace))
            out.append(read.flatten(0, 1))
        return out[0] if len(out) == 1 else torch.cat(out)


class _Blocks:
    """Samples (B, T) cut into blocks of queries, each with the keys within reach of them as one sample of a larger batch."""

    def __init__(self, rule: Rule, places: Places, reach: int) -> None:
        self.count, self.total = places.order.shape
        self.size, self.reach = max(reach, 16), reach
        self.blocks = -(-self.total // self.size)
        q = Places(**{name: self.queries(x) for name, x in vars(places).items()})
        q = replace(q, order=self.queries(places.order + 1) - 1)  # -1 where a block is filled up
        k = Places(**{name: self.keys(x) for name, x in vars(places).items()})
        there = self.keys(torch.ones_like(places.order))[:, None] != 0  # beyond a sample's ends nothing is
        asks = self.queries(torch.ones_like(places.order))[:, :, None] != 0
        q, k = q[:, :, None], k[:, None]
        # a query that only fills a block looks at everything, so that its row is no division by 0
        self.pairs = Pairs(q, k, rule.allows(q, k) & there | ~asks)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B * blocks, size, ...)."""
        return _padded(x, 0, self.blocks * self.size - self.total).reshape(-1, self.size, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B * blocks, size + 2 * reach, ...)."""
        wide = _padded(x, self.reach, self.blocks * self.size - self.total + self.reach)
        windows = wide.unfold(1, self.size + 2 * self.reach, self.size)  # the window's axis comes last
        return windows.movedim(-1, 2).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        """(B * blocks, size, ...) -> (B, T, ...)."""
        return x.reshape(self.count, -1, *x.shape[2:])[:, : self.total]


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """More rows of 0 at both ends of the second axis."""
    return torch.cat([x.new_zeros(len(x), before, *x.shape[2:]), x, x.new_zeros(len(x), after, *x.shape[2:])], dim=1)


class _VarlenPlan(Plan):
    """Prefix-LM as two variable-length calls: context over context, then the rest over everything, aligned bottom-right."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        if not _is_prefix_lm(rule, layout):
            raise ConfigError(
                "attention backend 'varlen' runs only the default rule, with what is read freely at the start; use 'flex'"
            )
        device = layout.places.sample.device
        free = [span.free for span in layout.spans]
        rest = [span.total - span.free for span in layout.spans]
        total = [span.total for span in layout.spans]
        self.max_free, self.max_rest, self.max_total = max(free), max(rest), max(total)
        self.bounds_total = _bounds(total, device)
        self.bounds_free, self.bounds_rest = _bounds(free, device), _bounds(rest, device)
        is_free = layout.places.free != 0
        host = [flag for span in layout.spans for flag in (span.free, span.total - span.free)]
        self.free_rows = self.rest_rows = None
        if self.max_free and self.max_rest:
            kind = torch.tensor([1, 0] * len(layout.spans), device=device).repeat_interleave(
                torch.tensor(host, device=device), output_size=len(is_free)
            )
            self.free_rows, self.rest_rows = torch.tensor_split(
                torch.argsort(kind, descending=True, stable=True), [sum(free)]
            )
            self.back = torch.empty(len(is_free), dtype=torch.long, device=device)
            self.back[torch.cat([self.free_rows, self.rest_rows])] = torch.arange(len(is_free), device=device)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_THK, k_TGK, scale = _features(mechanism, q_THK, k_TGK)
        width = v_TGK.shape[-1]
        widest = -(-max(width, k_TGK.shape[-1]) // 8) * 8  # the kernel wants one width for all, in eights
        q_THK, k_TGK, v_TGK = (F.pad(x, (0, widest - x.shape[-1])) for x in (q_THK, k_TGK, v_TGK))
        return self._attend(q_THK, k_TGK, v_TGK, scale)[..., :width]

    def _attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float) -> Tensor:
        groups = q_THK.shape[1] // k_TGK.shape[1]
        if groups > 1:  # torch 2.11 has no grouped heads here
            k_TGK, v_TGK = k_TGK.repeat_interleave(groups, 1), v_TGK.repeat_interleave(groups, 1)
        if self.free_rows is None or self.rest_rows is None:
            causal = self.max_free == 0
            return self._call(
                q_THK, k_TGK, v_TGK, self.bounds_total, self.bounds_total, self.max_total, self.max_total, scale, causal
            )
        k_free, v_free = k_TGK[self.free_rows], v_TGK[self.free_rows]
        context = self._call(
            q_THK[self.free_rows],
            k_free,
            v_free,
            self.bounds_free,
            self.bounds_free,
            self.max_free,
            self.max_free,
            scale,
            False,
        )
        target = self._call(
            q_THK[self.rest_rows],
            k_TGK,
            v_TGK,
            self.bounds_rest,
            self.bounds_total,
            self.max_rest,
            self.max_total,
            scale,
            True,
        )
        return torch.cat([context, target])[self.back]

    @staticmethod
    def _call(q, k, v, bounds_q, bounds_k, max_q: int, max_k: int, scale: float, causal: bool) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)
        out = varlen_attn(q, k, v, bounds_q, bounds_k, max_q, max_k, scale=scale, window_size=window)
        assert isinstance(out, Tensor)
        return out


def _features(mechanism: Mechanism, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, float]:
    """What a bare mechanism multiplies, of a stream as it lies: scores are written for samples side by side."""
    q_BTHK, k_BMGK, scale = mechanism.features(q_THK[None], k_TGK[None])
    return q_BTHK[0], k_BMGK[0], scale


def _bounds(lengths: Sequence[int], device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


class _FlexPlan(Plan):
    """Any rule as a block mask; compiled where CUDA is, eager (forward only) elsewhere."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        places = layout.places
        count = len(places.sample)
        self.mask = create_block_mask(
            lambda b, h, i, j: rule.allows(places[i], places[j]),
            None,
            None,
            count,
            count,
            device=places.sample.device,
            _compile=places.sample.is_cuda,  # uncompiled, it writes out the whole (T, T) mask first
        )
        self.flex = torch.compile(flex_attention, dynamic=True) if places.sample.is_cuda else flex_attention

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_THK, k_TGK, scale = _features(mechanism, q_THK, k_TGK)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
        out = self.flex(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)


_PLANS: dict[str, Callable[[Rule, Layout], Plan]] = {
    "dense": DensePlan,
    "runs": _RunsPlan,
    "varlen": _VarlenPlan,
    "flex": _FlexPlan,
}
