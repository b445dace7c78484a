"""The cross-entropy of a linear layer's logits, without all logits in memory at the same time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import TiedLinear
from multimodal.norm import is_untouched

CHUNK = 2**20  # logits (numbers) in memory at the same time: as many as fit into the caches of CPUs
CHUNK_CUDA = 2**27  # on GPUs, where only large matrix products reach full speed


def linear_cross_entropy(
    linear: nn.Linear | TiedLinear, state_ND: Tensor, target_N: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Sum over rows of F.cross_entropy(linear(state), target, label_smoothing=smoothing), in nats, in float32 at least.

    For a large vocabulary the logits are computed for some rows at a time, and freed. Their gradient, which is softmax minus target
    (Bridle 1990), is computed in the same pass, so that only gradients of states, weight and bias are stored.
    """
    chunk = CHUNK_CUDA if state_ND.is_cuda else CHUNK
    size = max(1, chunk // linear.out_features)
    few = state_ND.shape[0] * linear.out_features <= chunk
    plain = is_untouched(linear) or (type(linear) is TiedLinear and isinstance(linear.table, nn.Embedding))
    if few or not plain:
        # without gradients any layer can take some rows at a time
        sizes = len(state_ND) if few or torch.is_grad_enabled() else size
        losses = []
        for state, target in zip(state_ND.split(sizes or 1), target_N.split(sizes or 1), strict=True):
            logits = linear(state)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="sum"))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    given = (state_ND, linear.weight, linear.bias)
    if not torch.is_grad_enabled():  # within an autograd.Function, needs_input_grad is True even under no_grad
        given = tuple(None if x is None else x.detach() for x in given)
    return _Chunked.apply(*given, target_N, smoothing, size)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """`linear_cross_entropy` for `size` rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        state_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        smoothing: float,
        size: int,
    ) -> Tensor:
        device = state_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        exact = torch.promote_types(dtype, torch.float32)  # for the loss, and for sums over chunks
        for_state, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_ND = torch.empty_like(state_ND) if for_state else None
        grad_VD = torch.zeros_like(weight_VD, dtype=exact) if for_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=exact) if for_bias and bias_V is not None else None
        total = torch.zeros((), dtype=exact, device=state_ND.device)
        with torch.autocast(device, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(state_ND), size):
                state, target_N1 = state_ND[start : start + size].to(dtype), target_N[start : start + size, None]
                log_p = F.linear(state, weight, bias).to(exact).log_softmax(-1)
                total -= (1 - smoothing) * log_p.gather(1, target_N1).sum()
                if smoothing:
                    total -= smoothing * log_p.mean(-1).sum()
                if not any(ctx.needs_input_grad[:3]):
                    continue
                grad = log_p.exp_()  # of the logits: softmax - target
                if smoothing:
                    grad -= smoothing / grad.shape[1]
                grad.scatter_add_(1, target_N1, torch.full_like(target_N1, smoothing - 1, dtype=exact))
                if grad_V is not None:
                    grad_V += grad.sum(0)
                grad = grad.to(dtype)
                if grad_ND is not None:
                    grad_ND[start : start + size] = grad @ weight
                if grad_VD is not None:
                    if dtype == exact:
                        grad_VD.addmm_(grad.T, state)
                    else:
                        grad_VD += grad.T @ state
        ctx.grads = grad_ND, grad_VD, grad_V
        ctx.dtypes = state_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True, where the stored gradients would silently count as constants
            raise RuntimeError(
                "linear_cross_entropy: gradients of a large vocabulary are made in the forward pass and cannot be differentiated "
                "again; for second derivatives use the head's loss of its logits"
            )
        scaled = (None if g is None else (g * grads[0]).to(d) for g, d in zip(ctx.grads, ctx.dtypes, strict=True))
        return *scaled, None, None, None
