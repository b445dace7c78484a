"""The KV cache: keys and values of tokens already read, and states of recurrent layers; allocated once, and passed explicitly."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from multimodal.shapes import StreamError


class Cache:
    """Rows, each with room for `capacity` tokens of one sample in every layer; lengths may differ.

    length: tokens held per row (on the host); free_BM and segment_BM say of them what rules ask. rows: which row the first,
    second, .. sample of a stream stands for (`at` chooses). memory: the keys and values of what a separate core has read, for
    a core that writes by cross-attention; origin_BA: where such a core counts its places from. state: what layers that carry a
    state (recurrent ones, convolutions, tapes) remember of each row.

    keys: for each layer that caches keys and values, (key-value heads, width of a key, width of a value); states: for each that
    carries a state, how many numbers.
    """

    def __init__(
        self,
        *,
        keys: Sequence[tuple[int, int, int]],
        batch: int,
        capacity: int,
        states: Sequence[int] = (),
        device=None,
        dtype=torch.float32,
        memory: "Cache | None" = None,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        # of each layer (B, M, G, K)
        self.k = [torch.zeros(batch, capacity, heads, width, **place) for heads, width, _ in keys]
        self.v = [torch.zeros(batch, capacity, heads, width, **place) for heads, _, width in keys]
        self.state = [torch.zeros(batch, size, **place) for size in states]
        self.capacity = capacity  # tokens that a row has room for
        self.bidirectional_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.segment_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.origin_BA = torch.zeros(batch, 3, device=device)
        self.length = [0] * batch
        self.rows: Sequence[int] = range(batch)
        self.memory = memory

    def at(self, rows: Sequence[int]) -> Self:
        """The same storage for a stream whose samples are these rows."""
        view = copy.copy(self)
        view.rows = rows
        if self.memory is not None:
            view.memory = self.memory.at(rows)
        return view

    def row_index(self, sample_T: Tensor) -> Tensor:
        """The row of each token of a stream."""
        return torch.tensor(self.rows, device=sample_T.device)[sample_T.long()]

    def reserve(self, added: Sequence[int]) -> None:
        """Count `added` more tokens for each sample of the stream.

        Raises:
            StreamError: a sample would outgrow the capacity.
        """
        for row, count in zip(self.rows, added, strict=False):
            if self.length[row] + count > self.capacity:
                raise StreamError(
                    f"Cache: sample {row} needs {self.length[row] + count} places, but capacity={self.capacity}; "
                    "make the cache larger or the answer shorter"
                )
        for row, count in zip(self.rows, added, strict=False):
            self.length[row] += count

    def write(self, layer: int, row: Tensor | slice, order: Tensor | int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Store keys and values at (row, order) of each token; a slice and a number where that says it, which costs less."""
        self.k[layer][row, order] = k_TGK.to(self.k[layer].dtype)
        self.v[layer][row, order] = v_TGK.to(self.v[layer].dtype)

    def clear(self, row: int) -> None:
        """Make a row empty."""
        self.length[row] = 0
        for state in self.state:
            state[row] = 0
        if self.memory is not None:
            self.memory.clear(row)

    def copy(self, source: int, target: int, *, start: int = 0, of: "Cache | None" = None) -> None:
        """Make row `target` equal to row `source` (of another cache, if given), which it already is before `start`.

        Raises:
            StreamError: the other cache's row does not fit.
        """
        of = of or self
        stop = of.length[source]
        if stop > self.capacity:
            raise StreamError(f"Cache: a row of {stop} tokens does not fit capacity={self.capacity}; make it larger")
        for ours, theirs in zip((*self.k, *self.v), (*of.k, *of.v), strict=True):
            ours[target, start:stop] = theirs[source, start:stop].to(ours.dtype)
        for ours, theirs in zip(self.state, of.state, strict=True):
            ours[target] = theirs[source].to(ours.dtype)
        for ours, theirs in ((self.bidirectional_BM, of.bidirectional_BM), (self.segment_BM, of.segment_BM)):
            ours[target, start:stop] = theirs[source, start:stop]
        self.origin_BA[target] = of.origin_BA[source]
        self.length[target] = stop
        if self.memory is not None and of.memory is not None and start == 0:
            self.memory.copy(source, target, of=of.memory)
