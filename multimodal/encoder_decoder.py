"""Encoder and decoder in the place of one core: the reader encodes the context, and the writer decodes and cross-attends to it.

    stream = [ context | written ]  --reader-->  states of the context
                        \\------------writer (cross-attention)-->  states of what is written

Blocks, streams, tasks and heads are those of the single core; only the declaration of the core differs.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from multimodal.attention import Backend, Cache, Layout, Span, Trace, plan_cross_attention
from multimodal.core import Core, Transformer
from multimodal.declare import Declared, check_part, override
from multimodal.layers import Crossing
from multimodal.masks import MaskInfo
from multimodal.positions import only_time
from multimodal.shapes import ConfigError, StreamError


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Declared):
    """An encoder and a decoder (Vaswani et al. 2017), in the place of a `Core`.

    The fields that a task reads go through `reader`; what it writes, from the head's learned start on, goes through `writer`, which
    cross-attends to the reader's states of its own sample. Time in the writer starts at its first token.

    reader: the core that encodes the context.
    writer: the core that decodes; it has the reader's width.
    last: the writer attends only to the last n states of the context, where 1 is the fixed vector of the time before attention
        (Sutskever et al. 2014); None: to all.
    """

    reader: Core
    writer: Core
    last: int | None = None

    def __post_init__(self) -> None:
        check_part("EncoderDecoder: reader", self.reader, Core, "Core.small()")
        check_part("EncoderDecoder: writer", self.writer, Core, "Core.small()")
        if self.reader.width != self.writer.width:
            raise ConfigError(
                f"EncoderDecoder: reader has width={self.reader.width} and writer width={self.writer.width}; "
                "the tokenizers feed both, so make them equal"
            )
        if self.reader.axes != self.writer.axes:
            raise ConfigError(
                f"EncoderDecoder: reader has axes={self.reader.axes} and writer axes={self.writer.axes}; both get the positions of "
                "one stream, so make them equal"
            )
        if self.last is not None and self.last < 1:
            raise ConfigError(
                f"EncoderDecoder: last={self.last} leaves nothing to attend to; use 1 or more, or None for all"
            )
        self.reader.layers()
        self.writer.layers(crosses=True)

    @property
    def width(self) -> int:
        """D, size of each token's state, in both cores."""
        return self.writer.width

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the position axes, in both cores."""
        return self.writer.axes

    @property
    def depth(self) -> int:
        """L, number of blocks of the writer."""
        return self.writer.depth

    @property
    def mask(self):
        """The mask rule of the reader."""
        return self.reader.mask

    @property
    def parameters(self) -> int:
        """Exact number of parameters of both cores."""
        return sum(
            p.numel() for core in (self.reader, self.writer) for p in core.outline(core is self.writer).parameters()
        )

    def build(self) -> "TwoCores":
        """The module, with newly initialised weights."""
        return TwoCores(self)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32) -> Cache:
        """An empty KV cache for decoding `rows` samples, with up to `capacity` tokens of the context and as many written ones."""
        return self.writer.cache(rows=rows, capacity=capacity, device=device, dtype=dtype, crossed=capacity)

    def replace(self, **changes) -> Self:
        """A copy with some settings changed."""
        return override(self, **changes)


class TwoCores(nn.Module):
    """The module of an `EncoderDecoder`."""

    def __init__(self, core: EncoderDecoder) -> None:
        super().__init__()
        self.core = core
        self.reader = Transformer(core.reader)
        self.writer = Transformer(core.writer, crosses=True)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32) -> Cache:
        """An empty KV cache, as `EncoderDecoder.cache` describes."""
        return self.writer.cache(rows=rows, capacity=capacity, device=device, dtype=dtype, crossed=capacity)

    @property
    def norm(self) -> nn.Module:
        """The norm of the writer's states."""
        return self.writer.norm

    def forward(
        self,
        stream_TD: Tensor,
        position_TA: Tensor,
        layout: Layout,
        *,
        cache: Cache | None = None,
        backend: Backend = "auto",
        trace: Trace | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """The states (T, D) of a packed stream, those of the reader and of the writer in the order of its rows.

        With a cache that has a prompt, the stream is one newly written token for each sample. The arguments are those of
        `Transformer.forward`.

        Raises:
            StreamError: more context comes after the prompt, but the reader encodes all of it at once.
        """
        if cache is not None and any(cache.length[row] for row in cache.rows[: len(layout.spans)]):
            state_TD = self._step(stream_TD, position_TA, layout, cache, trace)
            return state_TD if wanted_N is None else state_TD[wanted_N]
        # the stream is divided into two layouts, in each of which the tokens of a sample are numbered from 0
        context_B = torch.tensor([span.read for span in layout.spans], device=stream_TD.device)
        in_context_T = layout.info.order < context_B[layout.info.sample.long()]
        context_rows, written_rows = in_context_T.nonzero()[:, 0], (~in_context_T).nonzero()[:, 0]
        context = Layout(tuple(Span(s.bidirectional, s.read, s.read) for s in layout.spans), layout.info[context_rows])
        state_TD = torch.empty_like(stream_TD)
        encoded_MD = stream_TD[:0]
        if len(context_rows):
            encoded_MD = self.reader(
                stream_TD[context_rows],
                position_TA[context_rows],
                _without_empty(context),
                backend=backend,
                trace=trace,
            )
        if not len(written_rows):
            return encoded_MD if wanted_N is None else encoded_MD[wanted_N]
        info = layout.info[written_rows]
        order_T = info.order - context_B[info.sample.long()].to(info.order.dtype)
        written = Layout(
            tuple(Span(0, s.total - s.read) for s in layout.spans),
            MaskInfo(info.sample, order_T, torch.zeros_like(info.bidirectional), info.segment),
        )
        # the cache stores the origins, because later steps come without the context
        origin_BA = _origins(position_TA[written_rows], written)
        if cache is not None:
            cache.origin_BA[torch.tensor(list(cache.rows[: len(layout.spans)]))] = origin_BA
        written_position_TA = position_TA[written_rows] - origin_BA[info.sample.long()]
        key_MD, key_rows = encoded_MD, context_rows
        if self.core.last is not None:  # the writer attends to the last states alone, renumbered from 0
            is_late = context.info.order >= (context_B - self.core.last)[context.info.sample.long()]
            (late,) = is_late.nonzero(as_tuple=True)
            key_MD, key_rows = encoded_MD[late], context_rows[late]
            spans = tuple(Span(0, min(s.total, self.core.last)) for s in context.spans)
            info = context.info[late]
            first = (context_B - self.core.last).clamp(min=0)[info.sample.long()].to(info.order.dtype)
            context = Layout(spans, MaskInfo(info.sample, info.order - first, info.bidirectional, info.segment))
        crossing = Crossing(
            key_MD,
            self.writer.rotations(position_TA[key_rows]),
            plan_cross_attention(written, context, backend=backend, cache=cache, trace=trace),
        )
        decoded_TD = self.writer(
            stream_TD[written_rows],
            written_position_TA,
            _without_empty(written),
            cache=cache,
            backend=backend,
            crossing=crossing,
            trace=trace,
        )
        state_TD = state_TD.index_copy(0, context_rows, encoded_MD).index_copy(0, written_rows, decoded_TD)
        return state_TD if wanted_N is None else state_TD[wanted_N]

    def _step(
        self, stream_TD: Tensor, position_TA: Tensor, layout: Layout, cache: Cache, trace: Trace | None
    ) -> Tensor:
        """The states of one newly written token for each sample, which attends to the cached keys of both cores."""
        if any(span.total != 1 or span.bidirectional for span in layout.spans):
            raise StreamError(
                "EncoderDecoder: more to read came after the prompt; the reader encodes all of it at once, so give it together"
            )
        written_position_TA = position_TA - cache.origin_BA[cache.row_index(layout.info.sample)]
        plan = plan_cross_attention(layout, None, backend="auto", cache=cache, trace=trace)
        crossing = Crossing(stream_TD[:0], self.writer.rotations(position_TA[:0]), plan)
        return self.writer(stream_TD, written_position_TA, layout, cache=cache, crossing=crossing, trace=trace)


def _without_empty(layout: Layout) -> Layout:
    """The layout without samples that have no tokens in it, numbered without gaps, because kernels want no empty sequences."""
    spans, sample_T = tuple(span for span in layout.spans if span.total), layout.info.sample
    if len(spans) == len(layout.spans):
        return layout
    number_T = (sample_T.diff(prepend=sample_T[:1]) != 0).cumsum(0).to(sample_T.dtype)
    return Layout(spans, replace(layout.info, sample=number_T))


def _origins(position_TA: Tensor, written: Layout) -> Tensor:
    """(B, A): the time of each sample's first written token, and 0 on other axes, since only time starts anew in the writer."""
    starts = torch.tensor([0, *(s.total for s in written.spans)]).cumsum(0)[:-1].clamp(max=len(position_TA) - 1)
    return only_time(position_TA[starts.to(position_TA.device)])
