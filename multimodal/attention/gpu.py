"""Attending a stream on a GPU: the variable-length flash kernel for the default rule, block-sparse FlexAttention for any other."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.attention.mechanism import Mechanism, Plan
from multimodal.attention.scores import Factored
from multimodal.masks import Layout, Rule, Span, is_prefix_lm
from multimodal.shapes import ConfigError


class VarlenPlan(Plan):
    """Prefix-LM as two calls of the variable-length kernel over the stream as it lies: context over context, the rest over all.

    Each call parts the whole stream into sequences, such that its own queries meet their keys and all others meet none; of those
    the kernel reads 0. So the two reads add up, and no row is moved. For a sample of f bidirectional tokens and r others:

                            queries      keys
    context over context    f | r |      f |   | r      both directions
    the rest over all       f | r          | f r        causal, aligned bottom-right
    """

    def __init__(self, rule: Rule, layout: Layout) -> None:
        if not is_prefix_lm(rule, layout):
            raise ConfigError(
                "attention backend 'varlen' runs only the default rule, with bidirectional tokens at the start; use 'flex'"
            )
        sizes = _call_sizes(layout.spans)
        bounds = [list(accumulate(lengths, initial=0)) for q, k, _ in sizes for lengths in (q, k)]
        device = layout.info.sample.device
        # one copy that does not block; one for each would make the host wait for the device as often
        flat = torch.tensor([b for each in bounds for b in each], dtype=torch.int32, pin_memory=device.type == "cuda")
        parts = flat.to(device, non_blocking=True).split([len(each) for each in bounds])
        self.calls = [
            # a lone query sees the same either way, and of grouped heads the kernel has a shortcut for one full query each
            _Call(bounds_q, bounds_k, max(q), max(k), causal or max(q) == 1, _takes_enable_gqa())
            for (q, k, causal), bounds_q, bounds_k in zip(sizes, parts[::2], parts[1::2], strict=True)
        ]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_THK, k_TGK, scale = _features(mechanism, q_THK, k_TGK)
        width = v_TGK.shape[-1]
        widest = -(-max(width, k_TGK.shape[-1]) // 8) * 8  # the kernel wants one width for all, in eights
        q, k, v = (_widened(x.to(v_TGK.dtype), widest) for x in (q_THK, k_TGK, v_TGK))
        read, *others = (self._call(q, k, v, call, scale) for call in self.calls)
        for other in others:
            read = read + other
        return read if width == widest else read[..., :width]

    @staticmethod
    def _call(q: Tensor, k: Tensor, v: Tensor, call: "_Call", scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if call.causal else (-1, -1)
        grouped: dict[str, Any] = {"enable_gqa": True} if call.enable_gqa and q.shape[1] != k.shape[1] else {}
        out = varlen_attn(q, k, v, *call[:4], scale=scale, window_size=window, **grouped)
        assert isinstance(out, Tensor)
        return out


class _Call(NamedTuple):
    """One call of the kernel: where its sequences of queries and of keys lie, the longest of each, which way they look, and
    whether it has an argument for grouped heads."""

    bounds_q: Tensor
    bounds_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    enable_gqa: bool


def _call_sizes(spans: Sequence[Span]) -> list[tuple[list[int], list[int], bool]]:
    """For each call the lengths of its sequences of queries and of keys, and whether it is causal."""
    totals = [span.total for span in spans]
    if not any(span.bidirectional for span in spans):
        return [(totals, totals, True)]
    if all(span.bidirectional == span.total for span in spans):
        return [(totals, totals, False)]
    context, rest = [], []
    for first, total, _ in spans:
        after = total - first
        if first:
            context.append((first, first))
            rest.append((first, 0))
        if after:
            context += [(after, 0), (0, after)]
        rest.append((after, total))
    return [
        ([q for q, _ in context], [k for _, k in context], False),
        ([q for q, _ in rest], [k for _, k in rest], True),
    ]


@lru_cache(1)
def _takes_enable_gqa() -> bool:
    """Whether the kernel has an argument for keys with fewer heads than queries; torch 2.11's takes them as they are."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _widened(x_THK: Tensor, width: int) -> Tensor:
    return x_THK if x_THK.shape[-1] == width else F.pad(x_THK, (0, width - x_THK.shape[-1]))


def _features(mechanism: Mechanism, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, float]:
    """What a bare mechanism multiplies, of a stream as it lies: scores are written for samples side by side."""
    assert isinstance(mechanism.score, Factored)
    q_BTHK, k_BMGK, scale = mechanism.score.features(q_THK[None], k_TGK[None], mechanism.score_weights)
    return q_BTHK[0], k_BMGK[0], scale


class FlexPlan(Plan):
    """Any rule as a block mask; compiled where CUDA is, eager (forward only) elsewhere."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        places = layout.info
        count = len(places.sample)
        make_mask, self.flex = _flex(places.sample.is_cuda)
        self.mask = make_mask(
            lambda b, h, i, j: rule.allows(places[i], places[j]), None, None, count, count, device=places.sample.device
        )

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_THK, k_TGK, scale = _features(mechanism, q_THK, k_TGK)
        width = v_TGK.shape[-1]
        # narrower matrices the kernel does not multiply
        q, k, v = (_widened(x.to(v_TGK.dtype), max(x.shape[-1], 16)) for x in (q_THK, k_TGK, v_TGK))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = self.flex(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)[..., :width]


@lru_cache(2)
def _flex(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes block masks, and what attends by them; uncompiled, both write out the whole (T, T) matrix first."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask, dynamic=True), torch.compile(flex_attention, dynamic=True)
