"""How one packed stream is attended: a plan is made once per stream from its mask rule and layout, and used by every layer.

dense    one boolean matrix over the whole stream; slow, obviously right, the oracle of all others
runs     samples of equal shape side by side through PyTorch's fused attention; what CPUs and fp32 use
varlen   PyTorch's variable-length flash kernel (CUDA, half precision, the default rule)
flex     PyTorch's block-sparse FlexAttention (CUDA, any rule)
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from multimodal.attention.cache import Cache
from multimodal.attention.kept import AppendPlan, FillingPlan, StepPlan
from multimodal.attention.layout import Layout, Plan, sdpa
from multimodal.masks import LAW, PREFIX_LM, Places, Rule
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
) -> Plan:
    """Choose how to attend this stream.

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
            return (StepPlan if single else AppendPlan)(rule, layout, cache)
    device = layout.places.sample.device
    if backend == "auto":
        half = dtype in (torch.float16, torch.bfloat16)
        standard = _is_prefix_lm(rule, layout)
        backend = "runs" if device.type != "cuda" or not half else "varlen" if standard else "flex"
    if isinstance(backend, str) and backend not in _PLANS:
        raise ConfigError(
            f"attention backend {backend!r} is unknown; there are {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    plan = (_PLANS[backend] if isinstance(backend, str) else backend)(rule, layout)
    return plan if cache is None else FillingPlan(plan, layout, cache)


def _is_prefix_lm(rule: Rule, layout: Layout) -> bool:
    return rule == PREFIX_LM and all(span.free >= 0 for span in layout.spans)


class DensePlan(Plan):
    """Softmax over one (T, T) matrix, written out: the oracle; a list `kept` gets each layer's responsibilities (H, T, M)."""

    def __init__(self, rule: Rule, layout: Layout, kept: list[Tensor] | None = None) -> None:
        places = layout.places
        self.mask_TM = rule.allows(places[:, None], places[None, :])
        self.kept = kept

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        groups = q_THK.shape[1] // k_TGK.shape[1]
        k_THK, v_THK = k_TGK.repeat_interleave(groups, 1), v_TGK.repeat_interleave(groups, 1)
        score_HTM = torch.einsum("thk,mhk->htm", q_THK, k_THK).float() * scale
        posterior_HTM = score_HTM.masked_fill(~self.mask_TM, float("-inf")).softmax(-1)
        if self.kept is not None:
            self.kept.append(posterior_HTM)
        return torch.einsum("htm,mhk->thk", posterior_HTM.to(v_THK.dtype), v_THK)


class _RunsPlan(Plan):
    """Neighbouring samples of equal shape as one batch of the fused kernel; no mask at all where none is needed."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        standard = _is_prefix_lm(rule, layout)
        self.sizes: list[int] = []
        self.runs: list[tuple[int, bool, Tensor | None]] = []
        start = 0
        for span, group in groupby(layout.spans):
            count = len(list(group))
            size = count * span.total
            if standard and span.free == span.total:
                causal, mask = False, None
            elif standard and span.free == 0:
                causal, mask = True, None
            elif standard:
                mask = torch.ones(span.total, span.total, dtype=torch.bool, device=layout.places.order.device).tril()
                mask[: span.free, : span.free] = True
                causal = False
            else:
                here = Places(
                    **{name: x.view(count, span.total) for name, x in vars(layout.places[start : start + size]).items()}
                )
                causal, mask = False, rule.allows(here[:, :, None], here[:, None, :])[:, None]
            self.sizes.append(size)
            self.runs.append((count, causal, mask))
            start += size

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        parts = [x.split(self.sizes) if len(self.sizes) > 1 else (x,) for x in (q_THK, k_TGK, v_TGK)]
        out = []
        for (count, causal, mask), q, k, v in zip(self.runs, *parts, strict=True):
            q_BTHK, k_BMGK, v_BMGK = (x.view(count, -1, *x.shape[1:]) for x in (q, k, v))
            read = sdpa(q_BTHK, k_BMGK, v_BMGK, scale, mask, causal)
            out.append(read.reshape(q.shape))
        return out[0] if len(out) == 1 else torch.cat(out)


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

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
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

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float, layer: int) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
        out = self.flex(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)


_PLANS: dict[str, Callable[[Rule, Layout], Plan]] = {
    "dense": DensePlan,
    "runs": _RunsPlan,
    "varlen": _VarlenPlan,
    "flex": _FlexPlan,
}
