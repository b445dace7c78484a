"""Keys and values of tokens already read, kept for decoding: explicit, allocated once, never a hook."""

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
    a core that writes by cross-attention; origin_BA: where such a core counts its places from.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_width: int,
        device=None,
        dtype=torch.float32,
        memory: "Cache | None" = None,
    ) -> None:
        shape = (layers, batch, capacity, kv_heads, head_width)
        self.k_LBMGK = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBMGK = torch.zeros(shape, device=device, dtype=dtype)
        self.free_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.segment_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.origin_BA = torch.zeros(batch, 3, device=device)
        self.length = [0] * batch
        self.rows: Sequence[int] = range(batch)
        self.memory = memory

    @property
    def capacity(self) -> int:
        return self.k_LBMGK.shape[2]

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

    def write(self, layer: int, row_T: Tensor, order_T: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Keep keys and values at (row, order)."""
        self.k_LBMGK[layer, row_T, order_T] = k_TGK.to(self.k_LBMGK.dtype)
        self.v_LBMGK[layer, row_T, order_T] = v_TGK.to(self.v_LBMGK.dtype)

    def clear(self, row: int) -> None:
        """Make a row empty."""
        self.length[row] = 0
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
        for ours, theirs in ((self.k_LBMGK, of.k_LBMGK), (self.v_LBMGK, of.v_LBMGK)):
            ours[:, target, start:stop] = theirs[:, source, start:stop].to(ours.dtype)
        for ours, theirs in ((self.free_BM, of.free_BM), (self.segment_BM, of.segment_BM)):
            ours[target, start:stop] = theirs[source, start:stop]
        self.origin_BA[target] = of.origin_BA[source]
        self.length[target] = stop
        if self.memory is not None and of.memory is not None and start == 0:
            self.memory.copy(source, target, of=of.memory)
