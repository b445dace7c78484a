"""Two cores in the place of one: the first reads, the second writes and looks at what the first read.

    stream = [ read | written ]  --reader-->  states of what is read
                     \\------------writer (cross-attention)-->  states of what is written

The blocks, the stream, the tasks and the heads are those of the single core; only the core's declaration differs.
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
from multimodal.norm import RMSNorm
from multimodal.shapes import ConfigError, StreamError


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Declared):
    """Reads with one core and writes with another (Vaswani et al. 2017), in the place of a `Core`.

    What a task reads goes through `reader`, what it writes (from the head's learned start on) through `writer`, which looks at
    all that its sample read. The writer counts places from its own start.
    last: the writer looks at the last n states of what was read; 1 is a fixed vector, as before attention (Sutskever et al. 2014).
    reader: the core that reads.
    writer: the core that writes; as wide as the reader.
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
        if self.last is not None and self.last < 1:
            raise ConfigError(
                f"EncoderDecoder: last={self.last} leaves nothing to look at; use 1 or more, or None for all"
            )
        self.reader.layers()
        self.writer.layers(crosses=True)

    @property
    def width(self) -> int:
        """D."""
        return self.writer.width

    @property
    def depth(self) -> int:
        """L of the core that writes, whose caches decoding keeps."""
        return self.writer.depth

    @property
    def mask(self):
        """The rule under which reading happens."""
        return self.reader.mask

    @property
    def parameters(self) -> int:
        """Exact number of parameters of both cores."""
        return sum(
            p.numel() for core in (self.reader, self.writer) for p in core.outline(core is self.writer).parameters()
        )

    def build(self) -> "TwoCores":
        """Make the module, with fresh weights."""
        return TwoCores(self)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32) -> Cache:
        """Room for decoding: what is written and, as its memory, what was read; up to `capacity` tokens each."""
        return self.writer.cache(rows=rows, capacity=capacity, device=device, dtype=dtype, crossed=capacity)

    def replace(self, **changes) -> Self:
        """A copy with some settings changed."""
        return override(self, **changes)


class TwoCores(nn.Module):
    """The weights of an `EncoderDecoder`."""

    def __init__(self, core: EncoderDecoder) -> None:
        super().__init__()
        self.core = core
        self.reader = Transformer(core.reader)
        self.writer = Transformer(core.writer, crosses=True)

    def cache(self, *, rows: int, capacity: int, device=None, dtype=torch.float32) -> Cache:
        """As `EncoderDecoder.cache`."""
        return self.writer.cache(rows=rows, capacity=capacity, device=device, dtype=dtype, crossed=capacity)

    @property
    def norm(self) -> RMSNorm:
        """The last norm."""
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
        """States (T, D) of a packed stream, read and written rows in their places; with a cache that holds a prompt, of one
        newly written token a sample. wanted_N: the rows whose states (N, D) are given instead.

        Raises:
            StreamError: more to read after the prompt; a reader reads all at once.
        """
        if cache is not None and any(cache.length[row] for row in cache.rows[: len(layout.spans)]):
            state_TD = self._step(stream_TD, position_TA, layout, cache, trace)
            return state_TD if wanted_N is None else state_TD[wanted_N]
        reads = torch.tensor([span.read for span in layout.spans], device=stream_TD.device)
        is_read_T = layout.info.order < reads[layout.info.sample.long()]
        read_rows, written_rows = is_read_T.nonzero()[:, 0], (~is_read_T).nonzero()[:, 0]
        read = Layout(tuple(Span(s.bidirectional, s.read, s.read) for s in layout.spans), layout.info[read_rows])
        state_TD = torch.empty_like(stream_TD)
        memory_MD = stream_TD[:0]
        if len(read_rows):
            there = _without_empty(read)
            memory_MD = self.reader(stream_TD[read_rows], position_TA[read_rows], there, backend=backend, trace=trace)
        if not len(written_rows):
            return memory_MD if wanted_N is None else memory_MD[wanted_N]
        places = layout.info[written_rows]
        order_T = places.order - reads[places.sample.long()].to(places.order.dtype)
        written = Layout(
            tuple(Span(0, s.total - s.read) for s in layout.spans),
            MaskInfo(places.sample, order_T, torch.zeros_like(places.bidirectional), places.segment),
        )
        origin_BA = _origins(position_TA[written_rows], written)
        if cache is not None:
            cache.origin_BA[torch.tensor(list(cache.rows[: len(layout.spans)]))] = origin_BA
        place_TA = position_TA[written_rows] - origin_BA[places.sample.long()]
        seen_MD, seen_rows = memory_MD, read_rows
        if self.core.last is not None:
            (late,) = (read.info.order >= (reads - self.core.last)[read.info.sample.long()]).nonzero(as_tuple=True)
            seen_MD, seen_rows = memory_MD[late], read_rows[late]
            spans = tuple(Span(0, min(s.total, self.core.last)) for s in read.spans)
            places = read.info[late]
            first = (reads - self.core.last).clamp(min=0)[places.sample.long()].to(places.order.dtype)
            read = Layout(spans, MaskInfo(places.sample, places.order - first, places.bidirectional, places.segment))
        crossing = Crossing(
            seen_MD,
            self.writer.rotations(position_TA[seen_rows]),
            plan_cross_attention(written, read, backend=backend, cache=cache, trace=trace),
        )
        states = self.writer(
            stream_TD[written_rows],
            place_TA,
            _without_empty(written),
            cache=cache,
            backend=backend,
            crossing=crossing,
            trace=trace,
        )
        state_TD = state_TD.index_copy(0, read_rows, memory_MD).index_copy(0, written_rows, states)
        return state_TD if wanted_N is None else state_TD[wanted_N]

    def _step(
        self, stream_TD: Tensor, position_TA: Tensor, layout: Layout, cache: Cache, trace: Trace | None
    ) -> Tensor:
        if any(span.total != 1 or span.bidirectional for span in layout.spans):
            raise StreamError(
                "EncoderDecoder: more to read came after the prompt; the reader sees all of it at once, so read it together"
            )
        place_TA = position_TA - cache.origin_BA[cache.row_index(layout.info.sample)]
        plan = plan_cross_attention(layout, None, backend="auto", cache=cache, trace=trace)
        crossing = Crossing(stream_TD[:0], self.writer.rotations(position_TA[:0]), plan)
        return self.writer(stream_TD, place_TA, layout, cache=cache, crossing=crossing, trace=trace)


def _without_empty(layout: Layout) -> Layout:
    """Samples that lack this half are no samples of it: kernels see only shapes with tokens, and numbers have no gaps."""
    spans, sample_T = tuple(span for span in layout.spans if span.total), layout.info.sample
    if len(spans) == len(layout.spans):
        return layout
    number_T = (sample_T.diff(prepend=sample_T[:1]) != 0).cumsum(0).to(sample_T.dtype)
    return Layout(spans, replace(layout.info, sample=number_T))


def _origins(position_TA: Tensor, written: Layout) -> Tensor:
    """The place of each sample's first written token: only its time counts from there."""
    starts = torch.tensor([0, *(s.total for s in written.spans)]).cumsum(0)[:-1].clamp(max=len(position_TA) - 1)
    return position_TA[starts.to(position_TA.device)] * position_TA.new_tensor([1.0, 0.0, 0.0])
