"""Several processes that train one model: who this one is, what they tell each other, and how the weights are shared out.

Nothing that is exchanged depends on which kinds of data a process happens to hold: every parameter has a gradient in every
process (zero where nothing used it), every process sends the same figures of the same tasks.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multimodal.core import Block, Transformer
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.stream import Stream


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1
    local: int = 0  # on its machine, from 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in each process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def device(self, device: torch.device) -> torch.device:
        """This process's own, where a machine has several."""
        return torch.device("cuda", self.local) if device.type == "cuda" and self.count > 1 else device


@contextmanager
def found_processes(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun or `multimodal train --processes` started, connected; by itself a process is alone.

    Raises:
        ConfigError: half of the variables that say who is who.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    if count == "1":
        yield Processes()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"fit: WORLD_SIZE={count} says that this is one of several processes, but {', '.join(missing)} are not set; start "
            "it by torchrun or by multimodal train --processes, or unset WORLD_SIZE"
        )
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(local)
    hook = sys.excepthook
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch installs a hook that puts the rank in front of every line, and does not remove it


class _Reached(torch.autograd.Function):
    """The value as it is; in the backward pass every one of the parameters gets zeros added to its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _reach(value: Tensor, owners: list[tuple[nn.Module, str]]) -> Tensor:
    return _Reached.apply(value, *(p for m, name in owners if (p := getattr(m, name)).requires_grad))  # type: ignore[return-value]


def _reaching(owners: list[tuple[nn.Module, str]]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, given, out: _reach(out, owners)


def _owners(root: nn.Module, without: set[nn.Module] = frozenset()) -> list[tuple[nn.Module, str]]:  # type: ignore[assignment]
    """Where the parameters of a module are, once each, leaving out those of some modules inside it."""
    hidden = {id(p) for module in without for p in module.parameters()}
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in hidden:
                found.setdefault(id(parameter), (module, name))
    return list(found.values())


class Loss(nn.Module):
    """The loss of a stream as the forward pass of a module, which is what PyTorch's engines wrap."""

    def __init__(self, model: Model, units: set[nn.Module] | None = None) -> None:
        super().__init__()
        self.model, self.owners = model, _owners(model, units or set())

    def forward(self, stream: Stream, counts: Mapping[str, int]) -> Tensor:
        return _reach(self.model.loss(stream, counts=counts), self.owners)


class Trainee:
    """A model in training: `loss` of one micro-batch, ready for backward, whose gradients are summed over all processes.

    parallel: "ddp" keeps everything in every process; "fsdp" shares out weights, gradients and the optimiser's state, a block of
    the core at a time. `model` has the weights that are trained: under "fsdp" it is a copy of the one given.
    """

    def __init__(
        self, model: Model, processes: Processes, parallel: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self.processes, self.sharded = processes, parallel == "fsdp" and processes.count > 1
        self.model = self.given = model
        if self.sharded:
            self.model = copy.deepcopy(model).to(device)
            loss = Loss(self.model, set(_units(self.model)))
            for unit in _units(self.model):
                # before the engine's own hook, which frees the weights again
                unit.register_forward_hook(_reaching(_owners(unit)))
            self.wrapped: Any = shard(self.model, loss)
        else:
            self.wrapped = None
            model.to(device)
            if processes.count > 1:
                ids = [device.index] if device.type == "cuda" else None
                self.wrapped = nn.parallel.DistributedDataParallel(
                    Loss(model), device_ids=ids, gradient_as_bucket_view=True
                )

    def backward(self, stream: Stream, counts: Mapping[str, int], *, last: bool) -> Tensor:
        """The loss of a micro-batch; its gradients are added to those there are, and exchanged behind the last one."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = last
        elif self.wrapped is not None:
            self.wrapped.set_requires_gradient_sync(last)
        lower = self.dtype == torch.bfloat16
        # a cache of cast weights would keep every block whole in every process
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower, cache_enabled=not self.sharded):
            loss = self.model.loss(stream, counts=counts) if self.wrapped is None else self.wrapped(stream, counts)
        # both engines average over processes
        (loss if self.wrapped is None else loss * self.processes.count).backward()
        return loss.detach()

    def leave_unused(self) -> None:
        """No gradient for what no process used, as a process alone has none there: momentum and decay leave it alone too."""
        used = [p for p in self.model.parameters() if p.grad is not None]
        grads: list[Any] = [p.grad for p in used]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        sizes = [g.abs().amax() if g.numel() else g.new_zeros(()) for g in local]
        for parameter, size in zip(used, self.processes.sum(torch.stack(sizes).float()).tolist(), strict=True):
            if size == 0:
                parameter.grad = None

    def averages(self, decay: float) -> Any:
        """timm's running mean of the weights, shared out as they are."""
        from timm.utils import ModelEmaV3

        if not self.sharded:
            return ModelEmaV3(self.model, decay=decay, use_warmup=True)
        ema = ModelEmaV3(self.given, decay=decay, use_warmup=True)
        ema.module.to(self.model.device)
        shard(ema.module, ema.module)
        return ema


def full(tensor: Tensor) -> Tensor:
    """A tensor in one piece, where it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, on the CPU, apart from what goes on being trained."""
    return full(tensor).detach().cpu().clone().contiguous()


def shard(model: Model, root: nn.Module) -> nn.Module:
    """Share out the weights below `root`, which is or holds the model: a block of the core at a time, the rest in one piece.

    A process may have nothing to read for an encoder, whose blocks then do not run there, so those are no units of their own.
    """
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"fit: parallel='fsdp' cannot share out {scalars[0]}, which is a scalar; make it a parameter of shape (1,), or use "
            "parallel='ddp'"
        )
    for unit in _units(model):
        fully_shard(unit)
    fully_shard(root)
    return root


def _units(model: Model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Block)] if isinstance(model.core, Transformer) else []
