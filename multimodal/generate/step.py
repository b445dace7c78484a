"""A decoding step (one new token for each row) of a small core of plain blocks, in as few calls of PyTorch as possible.

A step of a small model is bound by calls and not by arithmetic: modules cost about 20 us a layer, and each RMSNorm 20 us. So the
weights of norms are folded into the matrices after them, which are stored by columns, since that is faster for few rows. The tests
compare with `Transformer.forward`.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Cache, Layout, plan_attention
from multimodal.attention.cached import StepPlan
from multimodal.core import Transformer
from multimodal.layers import MLP, Add, Attention, Layer, SelfAttention
from multimodal.layers.base import Rotations
from multimodal.norm import Norm, RMSNorm, is_untouched
from multimodal.positions import rotate

MOST = 2**24  # parameters; in a larger core calls cost little beside arithmetic, and its copies would cost memory


def is_plain(core: nn.Module) -> TypeGuard[Transformer]:
    """Whether `Step` can run a core: bare self-attention and gated MLPs with `Add`, in float32 or float64, and small.

    Nobody may have changed it by hooks, by replaced modules or by replaced `forward` methods, which `Step` would not call.
    """
    return (
        type(core) is Transformer
        and core.narrow is None
        and core.bare
        and core.times is None
        and core.fields is None
        and core.core.norm == Norm(eps=core.core.norm.eps)
        and core.core.last_norm
        and not core.core.first_norm
        and all(is_default(s.layer) for s in core.sublayers())
        and all(_as_made(module) for module in core.modules())
        and type(core.norm) is RMSNorm
        and all(type(s.norm) is RMSNorm for s in core.sublayers())
        and {p.dtype for p in core.parameters()} in ({torch.float32}, {torch.float64})
        and sum(p.numel() for p in core.parameters()) <= MOST
    )


def is_default(layer: Layer) -> bool:
    """Whether a layer is self-attention or an MLP of the default form: its sizes, score and read may differ, and nothing else."""
    if layer.merge != Add():
        return False
    if type(layer) is MLP:
        return layer.gated and not layer.bias and layer.activation == "silu"
    return type(layer) is SelfAttention and not layer.bias and layer.rotary is None and layer.mask is None


def _as_made(module: nn.Module) -> bool:
    """Whether a module is of one of our classes, without hooks and with its own `forward`."""
    if isinstance(module, nn.Linear):
        return is_untouched(module) and module.bias is None and "forward" not in vars(module)
    plain = (nn.Identity, nn.ModuleList, nn.ParameterDict)
    ours = type(module).__module__.startswith("multimodal.") or type(module) in plain
    return ours and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Step:
    """The weights of a plain core, prepared for decoding. They are copies, so later training does not change them."""

    def __init__(self, core: Transformer) -> None:
        self.core = core
        assert isinstance(core.norm, RMSNorm)
        self.eps, self.last = core.norm.weight.new_tensor(core.norm.eps), core.norm.weight.detach().clone()
        self.layers: list[_Attention | _MLP] = []
        for sublayer in core.sublayers():
            assert isinstance(sublayer.norm, RMSNorm)
            body: Any = sublayer.body
            if type(sublayer.layer) is MLP:
                self.layers.append(_MLP(sublayer.norm, body.gate_up, body.down))
            else:
                self.layers.append(_Attention(sublayer.norm, body.attention, body.index))

    def __call__(self, stream_BD: Tensor, position_BA: Tensor, layout: Layout, cache: Cache) -> Tensor:
        """The states (B, D) of one new token in each of B neighbouring rows of the cache."""
        plan = plan_attention(self.core.core.mask, layout, cache=cache)
        assert isinstance(plan, StepPlan)
        rotations = self.core.rotations(position_BA)
        for layer in self.layers:
            stream_BD = layer(stream_BD, plan, rotations)
        return _normed(stream_BD, self.eps).mul_(self.last)


class _Attention:
    """Norm, self-attention and residual connection of one layer."""

    def __init__(self, norm: RMSNorm, attention: Attention, index: int) -> None:
        self.eps, self.index = norm.weight.new_tensor(norm.eps), index
        score: Any = attention.mechanism.score
        self.features, self.weights = score.features, attention.mechanism.score_weights
        self.qkv_DN, self.out_ND = _columns(attention.qkv.weight * norm.weight), _columns(attention.out.weight)
        self.heads, self.groups, self.width = attention.heads, attention.kv_heads, attention.key_width
        self.turned = attention.turned
        # queries and keys are normed and rotated as one tensor, so their weights are one too
        self.norm_HK: Tensor | None = None
        if isinstance(attention.norm_q, RMSNorm) and isinstance(attention.norm_k, RMSNorm):
            parts = attention.norm_q.weight.expand(self.heads, -1), attention.norm_k.weight.expand(self.groups, -1)
            self.norm_HK = torch.cat(parts).detach()
            self.norm_eps = self.norm_HK.new_tensor(attention.norm_q.eps)

    def __call__(self, stream_BD: Tensor, plan: StepPlan, rotations: Rotations) -> Tensor:
        rows = len(stream_BD)
        both = (self.heads + self.groups) * self.width
        qkv = torch.mm(_normed(stream_BD, self.eps), self.qkv_DN)
        qk_BHK, v_BGK = qkv[:, :both].view(rows, -1, self.width), qkv[:, both:].view(rows, self.groups, -1)
        if self.norm_HK is not None:
            qk_BHK = _normed(qk_BHK, self.norm_eps).mul_(self.norm_HK)
        rotation = rotations[self.width] if self.turned else None
        if rotation is not None:
            qk_BHK = rotate(qk_BHK, rotation)
        cache = plan.cache
        cache.write(self.index, *plan.where, qk_BHK[:, self.heads :], v_BGK)
        k_BMGK, v_BMGK = cache.k[self.index][plan.window], cache.v[self.index][plan.window]
        q_B1HK, k_BMGK, scale = self.features(qk_BHK[:, None, : self.heads], k_BMGK, self.weights)
        q, k, v = q_B1HK.transpose(1, 2), k_BMGK.transpose(1, 2), v_BMGK.transpose(1, 2)
        grouped = self.heads != self.groups
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, scale=scale, enable_gqa=grouped)
        return torch.addmm(stream_BD, read.transpose(1, 2).reshape(rows, -1), self.out_ND)


class _MLP:
    """Norm, gated MLP and residual connection of one layer."""

    def __init__(self, norm: RMSNorm, gate_up: nn.Linear, down: nn.Linear) -> None:
        self.eps = norm.weight.new_tensor(norm.eps)
        self.gate_up_DN, self.down_ND = _columns(gate_up.weight * norm.weight), _columns(down.weight)

    def __call__(self, stream_BD: Tensor, plan: StepPlan, rotations: Rotations) -> Tensor:
        gate, up = torch.mm(_normed(stream_BD, self.eps), self.gate_up_DN).chunk(2, -1)
        return torch.addmm(stream_BD, F.silu(gate).mul_(up), self.down_ND)


def _normed(x: Tensor, eps: Tensor) -> Tensor:
    """x / rms(x), without the weight of the norm, which is folded into the matrix after it."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, size, size, value=1 / x.shape[-1]).rsqrt_()


def _columns(weight: Tensor) -> Tensor:
    """A copy of a weight (out, in) as (in, out), for x @ weight."""
    return weight.detach().t().contiguous()
