"""Norms of tokens: RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), and the declaration that chooses one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multimodal.declare import Declared
from multimodal.shapes import ConfigError


def is_untouched(linear: nn.Module) -> bool:
    """Whether this is a plain nn.Linear without hooks (or pruning), so that callers may use its weight and bias directly."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


def product(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """F.linear. In inference one row on a CPU is multiplied as a vector, since its threads then read the weight together."""
    plain = torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()
    if plain and x_TD.shape[0] == 1 and x_TD.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        y_N = torch.mv(weight_ND, x_TD[0]) if bias_N is None else torch.addmv(bias_N, weight_ND, x_TD[0])
        return y_N[None]
    return F.linear(x_TD, weight_ND, bias_N)


def divided(linear: nn.Module, sizes: Sequence[int]) -> list[Callable[[Tensor], Tensor]] | None:
    """The products with parts of a linear module's rows, of these sizes; None: the module has to be called as a whole."""
    if is_untouched(linear):
        assert isinstance(linear, nn.Linear)
        return [partial(F.linear, weight=rows) for rows in linear.weight.split(list(sizes))]
    own: Any = getattr(linear, "divided", None)  # of a QuantizedLinear
    return None if own is None or linear._forward_hooks or linear._forward_pre_hooks else own(sizes)


def matrix_of(linear: nn.Module) -> Tensor:
    """The matrix (out, in) that a linear module multiplies by, also where an adapter or a hook changes what its weight does."""
    if is_untouched(linear):
        assert isinstance(linear, nn.Linear)
        return linear.weight
    weight = linear.weight
    assert isinstance(weight, Tensor)
    identity = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
    return (linear(identity) - linear(torch.zeros_like(identity))).T


@dataclass(frozen=True, kw_only=True)
class Norm(Declared):
    """How tokens are normed: x / spread(x) * weight, over the features of each token.

    eps: added to the variance.
    centred: whether the mean is subtracted first: LayerNorm; else RMSNorm.
    bias: whether LayerNorm adds a learned bias.
    around_one: whether RMSNorm stores its weight as the difference from 1 (Gemma Team 2024), so that decay pulls it to 1.
    """

    eps: float = 1e-6
    centred: bool = False
    bias: bool = False
    around_one: bool = False

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ConfigError(f"Norm: eps={self.eps} must be above 0, lest a token of zeros be divided by 0")
        if self.bias and not self.centred:
            raise ConfigError("Norm: bias=True is for centred=True; RMSNorm has no bias")
        if self.around_one and self.centred:
            raise ConfigError("Norm: around_one=True is for RMSNorm, so leave centred out")

    def build(self, width: int) -> "RMSNorm | LayerNorm":
        """Make the module for tokens of this width."""
        return LayerNorm(width, self.eps, bias=self.bias) if self.centred else RMSNorm(width, self.eps, self.around_one)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, where rms(x) = sqrt(mean(x ** 2) + eps).

    around_one: whether the weight is stored as its difference from 1.
    """

    def __init__(self, width: int, eps: float = 1e-6, around_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if around_one else torch.ones(width))
        self.eps, self.around_one = eps, around_one

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)  # fused kernels want one dtype, and under autocast the two differ
        weight = self.weight + 1 if self.around_one else self.weight
        fast = x.device.type == "cpu" and x.requires_grad
        if fast and not torch.compiler.is_compiling():
            return _RMSNormCPU.apply(x, weight, self.eps)  # type: ignore[return-value]
        return F.rms_norm(x, weight.shape, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, which also takes what is not of its own precision."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class _RMSNormCPU(torch.autograd.Function):
    """RMSNorm on CPUs, with a backward pass three to four times as fast as F.rms_norm's, which is not fused there.

    It calls the fused backward of layer norm, which with mean 0 gives inv * (gw - mean(gw) - y * mean(gw * y)), where
    gw = grad * weight and y = x * inv; adding inv * mean(gw) leaves the gradient of RMSNorm. The tests compare with F.rms_norm.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inv = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inv)
        return (x * inv).mul_(weight)

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong, since inv counts as a constant
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inv = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [x.shape[-1]], torch.zeros_like(inv), inv, weight, None, [True, True, False]
        )
        shift = (grad @ weight).unsqueeze(-1).mul_(inv).div_(x.shape[-1])
        return grad_x.add_(shift), grad_weight, None
