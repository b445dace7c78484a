"""The KV cache: keys and values of earlier tokens, and states of recurrent layers; allocated once, and passed explicitly."""

import copy
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from multimodal.shapes import StreamError


class Cache:
    """The cache of every layer: rows with a capacity of `capacity` tokens each, one sample a row; lengths may differ.

    Arguments:
    keys: for each layer that caches keys and values, (number of key-value heads, width of a key, width of a value).
    batch: number of rows.
    capacity: the most tokens of a row.
    states: for each layer that carries a state, its size.
    memory: the cache of the keys and values that cross-attention attends to; None: there is no cross-attention.
    axes: number of position axes of the core.

    Attributes:
    kv: keys and values of all layers in one buffer (layers, 2, B, G, M, K), if all have the same sizes and it was made without
        gradients; else None.
    k, v: by layer, keys and values (B, M, G, K); in memory the tokens of a head are neighbours, as attention reads them.
    state: by layer, the states (B, F) of recurrent layers, convolutions and tapes.
    length: number of tokens of each row; a list on the host.
    dropped: number of the oldest tokens of each row that are no longer stored; a list on the host.
    bidirectional_BM, segment_BM: what rules may know of the cached tokens, see `MaskInfo`.
    origin_BA: the position at which the writer of an `EncoderDecoder` starts in each row.
    rows: the row of the first, second, .. sample of a stream; `at` sets it.
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
        axes: int = 3,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        self.kv: Tensor | None = None
        # where gradients are wanted each layer has tensors of its own, or writing those of one would change what others keep
        if len(set(keys)) == 1 and keys[0][1] == keys[0][2] and not torch.is_grad_enabled():
            heads, width, _ = keys[0]
            self.kv = torch.zeros(len(keys), 2, batch, heads, capacity, width, **place)
            by_layer = [(k, v) for k, v in self.kv]
        else:
            by_layer = [
                tuple(torch.zeros(batch, heads, capacity, width, **place) for width in widths)
                for heads, *widths in keys
            ]
        self.k, self.v = ([pair[i].transpose(1, 2) for pair in by_layer] for i in range(2))
        self.state = [torch.zeros(batch, size, **place) for size in states]
        self.capacity = capacity
        self.bidirectional_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.segment_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.origin_BA = torch.zeros(batch, axes, device=device)
        self.length = [0] * batch
        self.dropped = [0] * batch
        self.rows: Sequence[int] = range(batch)
        self.memory = memory

    def at(self, rows: Sequence[int]) -> Self:
        """A view of the same storage, for a stream whose samples are in these rows."""
        view = copy.copy(self)
        view.rows = rows
        if self.memory is not None:
            view.memory = self.memory.at(rows)
        return view

    def row_index(self, sample_T: Tensor) -> Tensor:
        """The row (T,) of each token of a stream, from the number of its sample."""
        return torch.tensor(self.rows, device=sample_T.device)[sample_T.long()]

    def stored(self, row: int) -> int:
        """Number of tokens of a row whose keys and values are stored."""
        return self.length[row] - self.dropped[row]

    def drop(self, row: int, count: int) -> None:
        """Forget the keys and values of the `count` oldest tokens that are stored: those that no later token attends to."""
        stored = self.stored(row)
        for each in (*self.k, *self.v, self.bidirectional_BM, self.segment_BM):
            each[row, : stored - count] = each[row, count:stored].clone()  # both ranges may overlap
        self.dropped[row] += count

    def shorten(self, row: int, length: int) -> None:
        """Forget the newest tokens of a row, so that it has `length` tokens; states of recurrent layers stay as they are."""
        self.length[row] = length

    def reserve(self, added: Sequence[int]) -> None:
        """Lengthen the row of each sample of a stream by `added` tokens, all rows or none.

        Raises:
            StreamError: a row would exceed the capacity.
        """
        for row, count in zip(self.rows, added, strict=False):
            if self.stored(row) + count > self.capacity:
                raise StreamError(
                    f"Cache: sample {row} needs {self.stored(row) + count} tokens, but capacity={self.capacity}; "
                    "make the cache larger or the answer shorter"
                )
        for row, count in zip(self.rows, added, strict=False):
            self.length[row] += count

    def write(self, layer: int, row: Tensor | slice, order: Tensor | int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Store the keys and values of a stream at (row, order) of its tokens; a slice and an int are faster than tensors.

        order: among the tokens that are stored, so without the dropped ones.
        """
        self.k[layer][row, order] = k_TGK.to(self.k[layer].dtype)
        self.v[layer][row, order] = v_TGK.to(self.v[layer].dtype)

    def clear(self, row: int) -> None:
        """Make a row empty; its keys and values are overwritten later, its states become 0."""
        self.length[row] = self.dropped[row] = 0
        for state in self.state:
            state[row] = 0
        if self.memory is not None:
            self.memory.clear(row)

    def copy(
        self, source: int, target: int, *, start: int = 0, count: int | None = None, of: "Cache | None" = None
    ) -> None:
        """Copy row `source` (of another cache, if given) to row `target`.

        start: number of tokens in which the rows are equal already, so that they need not be copied.
        count: number of tokens of the copy, the first ones, of a row that has dropped none; None: all.

        Raises:
            StreamError: the row exceeds the capacity of this cache.
        """
        of = of or self
        stop = of.stored(source) if count is None else count
        start = max(start - of.dropped[source], 0) if self.dropped[target] == of.dropped[source] else 0
        if stop > self.capacity:
            raise StreamError(f"Cache: a row of {stop} tokens does not fit capacity={self.capacity}; make it larger")
        for ours, theirs in zip((*self.k, *self.v), (*of.k, *of.v), strict=True):
            ours[target, start:stop] = theirs[source, start:stop].to(ours.dtype)
        for ours, theirs in zip(self.state, of.state, strict=True):
            ours[target] = theirs[source].to(ours.dtype)
        for ours, theirs in ((self.bidirectional_BM, of.bidirectional_BM), (self.segment_BM, of.segment_BM)):
            ours[target, start:stop] = theirs[source, start:stop]
        self.origin_BA[target] = of.origin_BA[source]
        self.length[target] = of.length[source] if count is None else count
        self.dropped[target] = of.dropped[source]
        if self.memory is not None and of.memory is not None and start == 0:
            self.memory.copy(source, target, of=of.memory)
