"""Attention over the cells of a feature map, as a self-attention GAN has it in both players."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from multimodal.attention import DotProduct, Mechanism, Soft, Trace
from multimodal.layers import Gated
from multimodal.masks import all_pairs
from multimodal.norm import Norm


class MapAttention(nn.Module):
    """Every cell of a map looks at all, with keys of C / 8 and values of C / 2 channels: Zhang et al. 2019, equations 1 to 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes, self.merge = [channels // 8, channels // 8, channels // 2], Gated()
        self.qkv = nn.ModuleList(spectral_norm(nn.Linear(channels, size, bias=False)) for size in self.sizes)
        self.out = spectral_norm(nn.Linear(channels // 2, channels, bias=False))
        self.mechanism = Mechanism(DotProduct(), None, Soft(), 1, channels // 8)
        self.gate = self.merge.weights(channels, Norm())
        self.trace: Trace | None = None

    def forward(self, map_BCYX: Tensor) -> Tensor:
        stream_BTD = map_BCYX.flatten(2).transpose(1, 2)
        q, k, v = (linear(stream_BTD)[:, :, None] for linear in self.qkv)
        pairs = all_pairs(q.shape[1], q.shape[1], q.device)
        update_BTD = self.out(self.mechanism(q, k, v, pairs, self.trace)[:, :, 0])
        return self.merge.merge(stream_BTD, update_BTD, self.gate).transpose(1, 2).reshape(map_BCYX.shape)


def reach(weight_BHTM: Tensor) -> float:
    """How far away the cells that are read lie on average, in cells."""
    place = torch.cartesian_prod(torch.arange(7.0), torch.arange(7.0))
    return float((weight_BHTM * torch.cdist(place, place)).sum(-1).mean())
