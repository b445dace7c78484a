"""RMSNorm (Zhang & Sennrich 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_untouched(linear: nn.Module) -> bool:
    """Whether a product is that of its weights and bias alone, and may be computed from them: not replaced, watched or pruned."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)  # under autocast the two differ, which no fused kernel takes
        fast = x.device.type == "cpu" and x.requires_grad
        if fast and not torch.compiler.is_compiling():
            return _RMSNormCPU.apply(x, self.weight, self.eps)  # type: ignore[return-value]
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNormCPU(torch.autograd.Function):
    """The same, with a backward three to four times as fast: PyTorch has no fused one on CPUs, but it has layer norm's.

    Layer norm's backward with mean 0 gives inv * (gw - mean(gw) - y * mean(gw * y)), with y = x * inv; adding inv * mean(gw)
    leaves the gradient of RMSNorm. Checked against F.rms_norm in the tests.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inv = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inv)
        return (x * inv).mul_(weight)

    @staticmethod
    @once_differentiable  # without it a second derivative would be wrong in silence: inv counts as a constant
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inv = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [x.shape[-1]], torch.zeros_like(inv), inv, weight, None, [True, True, False]
        )
        shift = (grad @ weight).unsqueeze(-1).mul_(inv).div_(x.shape[-1])
        return grad_x.add_(shift), grad_weight, None
