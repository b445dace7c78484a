"""A decoding step (one new token for each row) of a core of plain blocks, in as few calls of PyTorch as possible.

With few rows a step is bound by calls and by reading weights, not by arithmetic: modules cost about 20 us a layer, and each RMSNorm
20 us. The tests compare with `Transformer.forward`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Cache, Layout, ScaledDotProduct, plan_attention
from multimodal.attention.cached import StepPlan
from multimodal.attention.mechanism import Plan
from multimodal.core import Transformer
from multimodal.layers import MLP, Add, Attention, Layer, SelfAttention
from multimodal.layers.base import Rotations
from multimodal.norm import Norm, RMSNorm, is_untouched, product
from multimodal.quantization import QuantizedLinear

COPIED = 2**24  # parameters; a core with no more of them is copied, with norms folded into the matrices after them


def is_plain(core: nn.Module) -> TypeGuard[Transformer]:
    """Whether `Step` can run a core: bare self-attention and gated MLPs with `Add`, in one precision or quantized.

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
        and _one_precision(core)
    )


def _one_precision(core: Transformer) -> bool:
    """Whether all weights, except of quantized matrices, are float32, float64 or bfloat16; quantized ones multiply in float32."""
    quantized = [module for module in core.modules() if isinstance(module, QuantizedLinear)]
    inside = {id(p) for module in quantized for p in module.parameters()}
    found = {p.dtype for p in core.parameters() if id(p) not in inside}
    return found in ({torch.float32}, {torch.bfloat16}) or (found == {torch.float64} and not quantized)


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
    """The weights of a plain core, prepared for decoding.

    Those of a small core are copied, so that later training does not change them; those of a larger one are read where they are.
    """

    def __init__(self, core: Transformer) -> None:
        self.core = core
        weights = list(core.parameters())
        full = {p.dtype for p in weights} in ({torch.float32}, {torch.float64})
        copied = full and sum(p.numel() for p in weights) <= COPIED
        assert isinstance(core.norm, RMSNorm)
        self.dtype = core.norm.weight.dtype
        self.norm = _Norm(core.norm)
        self.layers: list[_Attention | _MLP] = []
        for sublayer in core.sublayers():
            body: Any = sublayer.body
            assert isinstance(sublayer.norm, RMSNorm)
            if type(sublayer.layer) is MLP:
                self.layers.append(_MLP(sublayer.norm, body.gate_up, body.down, copied))
            else:
                self.layers.append(_Attention(sublayer.norm, body.attention, body.index, copied))

    def __call__(self, stream_BD: Tensor, position_BA: Tensor, layout: Layout, cache: Cache) -> Tensor:
        """The states (B, D) of the new tokens of neighbouring rows of the cache."""
        plan = plan_attention(self.core.core.mask, layout, cache=cache)
        rows = _Rows(plan) if isinstance(plan, StepPlan) and cache.kv is not None else None
        rotations = self.core.rotations(position_BA)
        if self.dtype == torch.bfloat16:
            stream_BD = stream_BD.float()  # the sum of all layers; bfloat16 would round it after each
        for layer in self.layers:
            stream_BD = layer(stream_BD, plan, rows, rotations)
        return self.norm(stream_BD).to(self.dtype)


class _Rows:
    """One new token in each of B neighbouring rows of a cache in one buffer: where its keys and values go, and what it reads."""

    def __init__(self, plan: StepPlan) -> None:
        kv, (rows, window) = plan.cache.kv, plan.window
        assert kv is not None
        self.mask, (row_B, order_B) = plan.mask, plan.where
        # views of all layers at once, since a view of each takes longer than writing to it
        self.new = kv[:, :, rows, :, order_B].unbind() if isinstance(order_B, int) else None
        self.kv, self.where = kv, (slice(None), row_B, slice(None), order_B)
        self.k, self.v = (kv[:, i, rows, :, window].unbind() for i in range(2))

    def read(self, layer: int, q_BGHK: Tensor, kv_B2GK: Tensor, scale: float) -> Tensor:
        """Store the keys and values of a layer, and return the values (B, G, H, K) that its queries read; H heads of each of G."""
        if self.new is not None:
            self.new[layer].copy_(kv_B2GK.transpose(0, 1))
        else:
            self.kv[layer][self.where] = kv_B2GK.to(self.kv.dtype)
        # the queries of a group see the same keys, so they are rows of one product
        q_BGHK = q_BGHK.to(self.kv.dtype)
        return F.scaled_dot_product_attention(q_BGHK, self.k[layer], self.v[layer], attn_mask=self.mask, scale=scale)


class _Attention:
    """Norm, self-attention and residual connection of one layer."""

    def __init__(self, norm: RMSNorm, attention: Attention, index: int, copied: bool) -> None:
        self.norm, self.index = _Norm(norm, folded=copied), index
        self.qkv, self.add_out = _product(attention.qkv, norm if copied else None), _sum(attention.out, copied)
        self.heads, self.groups, self.width = attention.heads, attention.kv_heads, attention.key_width
        self.rows, self.turned, self.mechanism = attention.rows, attention.turned, attention.mechanism
        score = self.mechanism.score
        self.scale = self.width**-0.5 if type(score) is ScaledDotProduct else None
        # queries and keys are normed and rotated as one tensor, so their weights are one too
        self.norm_HK: Tensor | None = None
        if isinstance(attention.norm_q, RMSNorm) and isinstance(attention.norm_k, RMSNorm):
            parts = attention.norm_q.weight.expand(self.heads, -1), attention.norm_k.weight.expand(self.groups, -1)
            self.norm_HK = _full(torch.cat(parts).detach())
            self.norm_eps = self.norm_HK.new_tensor(attention.norm_q.eps)

    def __call__(self, stream_BD: Tensor, plan: Plan, rows: _Rows | None, rotations: Rotations) -> Tensor:
        qkv, count, queries = self.qkv(self.norm(stream_BD)), len(stream_BD), self.rows[0]
        qk_BHK = qkv[:, : queries + self.rows[1]].view(count, -1, self.width)
        if self.norm_HK is not None:
            qk_BHK.mul_(_inverse_rms(qk_BHK, self.norm_eps)).mul_(self.norm_HK)
        if self.turned and (rotation := rotations[self.width]) is not None:
            # a complex view needs rows of an even size, which those with odd values are not
            turned = qk_BHK.clone() if qkv.shape[-1] % 2 else qk_BHK
            torch.view_as_complex(turned.view(count, self.heads + self.groups, -1, 2)).mul_(rotation)
            if turned is not qk_BHK:
                qk_BHK.copy_(turned)
        if rows is not None and self.scale is not None:
            q_BGHK = qkv[:, :queries].view(count, self.groups, -1, self.width)
            kv_B2GK = qkv[:, queries:].view(count, 2, self.groups, self.width)
            read = rows.read(self.index, q_BGHK, kv_B2GK, self.scale).reshape(count, queries)
        else:
            v_BGK = qkv[:, sum(self.rows[:2]) :].view(count, self.groups, -1)
            q_BHK, k_BGK = qk_BHK.split([self.heads, self.groups], 1)
            read = plan.attend(q_BHK, k_BGK, v_BGK, self.mechanism, self.index).reshape(count, -1)
        return self.add_out(stream_BD, read.to(qkv.dtype))


class _MLP:
    """Norm, gated MLP and residual connection of one layer."""

    def __init__(self, norm: RMSNorm, gate_up: nn.Module, down: nn.Module, copied: bool) -> None:
        self.norm = _Norm(norm, folded=copied)
        self.gate_up, self.add_down = _product(gate_up, norm if copied else None), _sum(down, copied)

    def __call__(self, stream_BD: Tensor, plan: Plan, rows: _Rows | None, rotations: Rotations) -> Tensor:
        gate, up = self.gate_up(self.norm(stream_BD)).chunk(2, -1)
        return self.add_down(stream_BD, F.silu(gate).mul_(up))


class _Norm:
    """RMSNorm, in float32 at least. folded: its weight is in the matrix after it."""

    def __init__(self, norm: RMSNorm, folded: bool = False) -> None:
        weight_D = _full(norm.weight.detach())
        self.eps, self.weight_D = weight_D.new_tensor(norm.eps), None if folded else weight_D

    def __call__(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD * _inverse_rms(x_BD, self.eps)
        return x_BD if self.weight_D is None else x_BD.mul_(self.weight_D)


def _inverse_rms(x: Tensor, eps: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(eps, size, size, value=1 / x.shape[-1]).rsqrt_()


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _product(linear: nn.Module, norm: RMSNorm | None = None) -> Callable[[Tensor], Tensor]:
    """The product with the matrix of a linear layer, in float32 at least.

    norm: the norm before it, whose weight becomes a part of a copy; None: nothing is copied.
    """
    if isinstance(linear, QuantizedLinear):
        return linear.rows_product
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach()
    if norm is not None:
        weight_DN = (weight * norm.weight.detach()).t().contiguous()  # by columns, which is faster for few rows
        return partial(torch.mm, mat2=weight_DN)
    if weight.dtype == torch.bfloat16:
        return lambda x: F.linear(x.bfloat16(), weight).float()
    return partial(product, weight_ND=weight)


def _sum(linear: nn.Module, copied: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of a stream and the product with the matrix of a linear layer."""
    if copied:
        assert isinstance(linear, nn.Linear)
        weight_ND = linear.weight.detach().t().contiguous()
        return lambda stream_BD, x: torch.addmm(stream_BD, x, weight_ND)
    matrix = _product(linear)
    return lambda stream_BD, x: matrix(x).add_(stream_BD)
