"""The requests that are decoded together: what stays the same from step to step, made anew when one of them joins or leaves."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from multimodal.attention import Layout, Span
from multimodal.generate.request import Request
from multimodal.masks import MaskInfo
from multimodal.network import Network

AHEAD = 32  # steps whose positions are computed at once


class DecodeBatch:
    """Running requests as one batch, one new token a row.

    The rows of the cache are in use from 0 on, but in another order than the requests and the kinds of their tokens; three orders
    meet here: rows of the cache, requests, kinds.

    sizes: number of rows of each request, in this order.
    """

    def __init__(self, requests: Sequence[Request], model: Network) -> None:
        self.requests = sorted(requests, key=lambda request: request.rows[0])
        self.sizes = [request.width for request in self.requests]
        self.model, device = model, model.device
        self.kinds: dict[str, list[Request]] = {}
        for request in self.requests:
            self.kinds.setdefault(request.kind, []).append(request)
        self.place_of = _order(
            [row for group in self.kinds.values() for a in group for row in a.rows], device, back=True
        )
        rows = [row for request in self.requests for row in request.rows]
        self.order_of_requests = _order(rows, device)
        self.rows, count = range(len(rows)), len(rows)
        segment = {row: a.segments[i % len(a.segments)] for a in self.requests for i, row in enumerate(a.rows)}
        self.segment_B = torch.tensor([segment[row] for row in self.rows], dtype=torch.int32, device=device)
        self.sample_B = torch.arange(count, dtype=torch.int32, device=device)
        self.bidirectional_B = torch.zeros(count, dtype=torch.int32, device=device)
        self.spans = (Span(0, 1),) * count
        self._positions = self._ahead()

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The newest token of each row, embedded, and its position."""
        parts = []
        for kind, group in self.kinds.items():
            if any(request.head.draws_features or request.source is not None for request in group):
                content = torch.cat([request.newest() for request in group])
            else:  # ids of many requests as one tensor
                content = torch.tensor([token for request in group for token in request.newest_ids()])
            parts.append(self.model.embed(kind, content.to(self.model.device)))
        stream_BD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return stream_BD if self.place_of is None else stream_BD[self.place_of], next(self._positions)

    def guessed(self, guesses: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor, Layout]:
        """The newest token of each request and the guesses after it, embedded, their positions, and their layout.

        Every request has one row. guesses: ids by request; lengths: number of tokens that each row holds.
        """
        parts, places, numbers = [], [], []
        starts = [0, *accumulate(1 + len(guess) for guess in guesses)]
        guess_of = dict(zip(self.requests, guesses, strict=True))
        start_of = dict(zip(self.requests, starts, strict=False))
        for kind, group in self.kinds.items():
            more = [torch.tensor(guess_of[a], dtype=torch.long) for a in group]
            content = torch.cat([x for a, ids in zip(group, more, strict=True) for x in (a.newest(), ids) if len(x)])
            parts.append(self.model.embed(kind, content.to(self.model.device)))
            for request in group:
                count = 1 + len(guess_of[request])
                places.append(request.ahead(count)[:count, 0])
                numbers += range(start_of[request], start_of[request] + count)
        back = torch.argsort(torch.tensor(numbers)).to(self.sample_B.device)
        counts = torch.tensor([1 + len(guess) for guess in guesses], device=self.sample_B.device)
        sample_T = self.sample_B.repeat_interleave(counts)
        orders = [length + i for length, guess in zip(lengths, guesses, strict=True) for i in range(1 + len(guess))]
        order_T = torch.tensor(orders, dtype=torch.int32, device=self.sample_B.device)
        info = MaskInfo(sample_T, order_T, torch.zeros_like(order_T), self.segment_B.repeat_interleave(counts))
        self._positions = self._ahead()  # how many tokens are written is not known yet
        spans = tuple(Span(0, 1 + len(guess)) for guess in guesses)
        return torch.cat(parts)[back], torch.cat(places)[back], Layout(spans, info)

    def layout(self, lengths: Sequence[int]) -> Layout:
        """The layout of one more token in every row; lengths: number of tokens that each row holds."""
        order_B = torch.tensor(lengths, dtype=torch.int32, device=self.sample_B.device)
        return Layout(self.spans, MaskInfo(self.sample_B, order_B, self.bidirectional_B, self.segment_B))

    def _ahead(self) -> Iterator[Tensor]:
        while True:
            # where contents say where the next token stands, as for a pointer, a request gives one position at a time
            parts = [request.ahead(AHEAD) for group in self.kinds.values() for request in group]
            place_NBA = torch.cat([part[: min(map(len, parts))] for part in parts], 1)
            yield from place_NBA if self.place_of is None else place_NBA[:, self.place_of]


def _order(rows: Sequence[int], device: torch.device, *, back: bool = False) -> Tensor | None:
    """Rows in another order as an index, or the way back; None: it is the same."""
    if list(rows) == list(range(len(rows))):
        return None
    index = torch.tensor(rows)
    return (torch.argsort(index) if back else index).to(device)
