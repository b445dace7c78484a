"""Attention on GPUs: the variable-length flash kernel for the default rule, block-sparse FlexAttention for any other."""

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
from multimodal.masks import PREFIX_LM, Layout, Rule, Span, is_prefix_lm
from multimodal.shapes import ConfigError


class VarlenPlan(Plan):
    """Prefix-LM as two calls of the variable-length kernel: bidirectional tokens to each other, and causal tokens to all.

    Each call covers the whole stream, divided into sequences of queries and of keys such that queries of the other call have no
    keys, for which the kernel returns 0. So the results of both calls add up, and no row has to be moved. The sequences of a
    sample of b bidirectional tokens and c causal ones:

                                queries      keys
    bidirectional to each other b | c |      b |   | c      both directions
    causal to all               b | c          | b c        causal, aligned bottom-right

    window: the size of the window that every token's keys lie in, see `Window`; None: everywhere.
    """

    def __init__(self, rule: Rule, layout: Layout, window: int | None = None) -> None:
        if not is_prefix_lm(PREFIX_LM if window else rule, layout):
            raise ConfigError(
                "attention backend 'varlen' runs only the default rule, with bidirectional tokens at the start; use 'flex'"
            )
        sizes = _call_sizes(layout.spans)
        bounds = [list(accumulate(lengths, initial=0)) for q, k, _ in sizes for lengths in (q, k)]
        device = layout.info.sample.device
        # one asynchronous copy for all bounds, since each copy costs a launch
        flat = torch.tensor([b for each in bounds for b in each], dtype=torch.int32, pin_memory=device.type == "cuda")
        parts = flat.to(device, non_blocking=True).split([len(each) for each in bounds])
        reach = -1 if window is None else window - 1
        self.calls = [
            # for single queries causal and full are the same, and the kernel has a shortcut for full ones of grouped heads
            _Call(
                bounds_q, bounds_k, max(q), max(k), (reach, 0 if causal or max(q) == 1 else reach), _takes_enable_gqa()
            )
            for (q, k, causal), bounds_q, bounds_k in zip(sizes, parts[::2], parts[1::2], strict=True)
        ]

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_THK, k_TGK, scale = _features(mechanism, q_THK, k_TGK)
        width = v_TGK.shape[-1]
        widest = -(-max(width, k_TGK.shape[-1]) // 8) * 8  # the kernel wants one width of q, k and v, a multiple of 8
        q, k, v = (_widened(x.to(v_TGK.dtype), widest) for x in (q_THK, k_TGK, v_TGK))
        read, *others = (self._call(q, k, v, call, scale) for call in self.calls)
        for other in others:
            read = read + other
        return read if width == widest else read[..., :width]

    @staticmethod
    def _call(q: Tensor, k: Tensor, v: Tensor, call: "_Call", scale: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {"enable_gqa": True} if call.enable_gqa and q.shape[1] != k.shape[1] else {}
        out = varlen_attn(q, k, v, *call[:4], scale=scale, window_size=call.window, **grouped)
        assert isinstance(out, Tensor)
        return out


class _Call(NamedTuple):
    """One call of the kernel: the bounds of its sequences of queries and of keys, the longest of each, how many keys before and
    after its own a query sees (-1: all), and whether the kernel has an argument for grouped heads."""

    bounds_q: Tensor
    bounds_k: Tensor
    max_q: int
    max_k: int
    window: tuple[int, int]
    enable_gqa: bool


def _call_sizes(spans: Sequence[Span]) -> list[tuple[list[int], list[int], bool]]:
    """For each call, the lengths of its sequences of queries and of keys, and whether it is causal; see `VarlenPlan`."""
    totals = [span.total for span in spans]
    if not any(span.bidirectional for span in spans):
        return [(totals, totals, True)]
    if all(span.bidirectional == span.total for span in spans):
        return [(totals, totals, False)]
    both_ways, causal = [], []  # (queries, keys) of each sequence
    for first, total, _ in spans:
        after = total - first
        if first:
            both_ways.append((first, first))
            causal.append((first, 0))
        if after:
            both_ways += [(after, 0), (0, after)]
        causal.append((after, total))
    return [
        ([q for q, _ in both_ways], [k for _, k in both_ways], False),
        ([q for q, _ in causal], [k for _, k in causal], True),
    ]


@lru_cache(1)
def _takes_enable_gqa() -> bool:
    """Whether the kernel needs an argument to accept keys with fewer heads than queries; in torch 2.11 it does not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _widened(x_THK: Tensor, width: int) -> Tensor:
    """The heads padded with zeros, which change no product."""
    return x_THK if x_THK.shape[-1] == width else F.pad(x_THK, (0, width - x_THK.shape[-1]))


def _features(mechanism: Mechanism, q_THK: Tensor, k_TGK: Tensor) -> tuple[Tensor, Tensor, float]:
    """The features (T, H, K) that a bare mechanism multiplies; scores expect a batch axis, so it is added and removed."""
    assert isinstance(mechanism.score, Factored)
    q_BTHK, k_BMGK, scale = mechanism.score.features(q_THK[None], k_TGK[None], mechanism.score_weights)
    return q_BTHK[0], k_BMGK[0], scale


class FlexPlan(Plan):
    """Any rule as a block mask; compiled on CUDA, elsewhere eager and without a backward pass."""

    def __init__(self, rule: Rule, layout: Layout) -> None:
        info = layout.info
        count = len(info.sample)
        make_mask, self.flex = _flex(info.sample.is_cuda)
        self.mask = make_mask(
            lambda b, h, i, j: rule.allows(info[i], info[j]), None, None, count, count, device=info.sample.device
        )

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        q_THK, k_TGK, scale = _features(mechanism, q_THK, k_TGK)
        width = v_TGK.shape[-1]
        # the kernel's matrix products need heads of width 16 at least
        q, k, v = (_widened(x.to(v_TGK.dtype), max(x.shape[-1], 16)) for x in (q_THK, k_TGK, v_TGK))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = self.flex(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)[..., :width]


@lru_cache(2)
def _flex(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(create_block_mask, flex_attention); both are compiled on CUDA, since eager they compute the whole (T, T) matrix."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask, dynamic=True), torch.compile(flex_attention, dynamic=True)
