"""Keys and values of tokens already read, kept for decoding: explicit, allocated once, never a hook."""

import torch
from torch import Tensor

from multimodal.shapes import StreamError


class Cache:
    """Room for `capacity` tokens of each of `batch` samples in every layer; lengths may differ.

    length: tokens held per sample (on the host); free_BM says which of them were read freely, for rules that ask.
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
    ) -> None:
        shape = (layers, batch, capacity, kv_heads, head_width)
        self.k_LBMGK = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBMGK = torch.zeros(shape, device=device, dtype=dtype)
        self.free_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.segment_BM = torch.zeros(batch, capacity, dtype=torch.int32, device=device)
        self.length = [0] * batch

    @property
    def capacity(self) -> int:
        return self.k_LBMGK.shape[2]

    def reserve(self, added: list[int]) -> None:
        """Count `added` more tokens per sample.

        Raises:
            StreamError: a sample would outgrow the capacity.
        """
        for sample, count in enumerate(added):
            if self.length[sample] + count > self.capacity:
                raise StreamError(
                    f"Cache: sample {sample} needs {self.length[sample] + count} places, but capacity={self.capacity}; "
                    "make the cache larger or the answer shorter"
                )
        self.length = [old + new for old, new in zip(self.length, added, strict=True)]

    def write(self, layer: int, sample_T: Tensor, order_T: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Keep keys and values at (sample, order)."""
        self.k_LBMGK[layer, sample_T, order_T] = k_TGK.to(self.k_LBMGK.dtype)
        self.v_LBMGK[layer, sample_T, order_T] = v_TGK.to(self.v_LBMGK.dtype)
