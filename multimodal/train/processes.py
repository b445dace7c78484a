"""Training in several processes: their ranks, collective operations, and the model under DDP or FSDP.

No collective operation depends on which modalities a process has in its batch: every parameter has a gradient in every process
(zero where nothing used it), and every process sends the same numbers of the same tasks.
"""

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    """The rank of this process.

    rank: its number among all, from 0.
    count: the number of processes.
    local: its number on its machine, from 0.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them; `values` is overwritten."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, in each process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this process, where a machine has several; any other device unchanged."""
        return torch.device("cuda", self.local) if device.type == "cuda" and self.count > 1 else device


@contextmanager
def connected_processes(device: torch.device) -> Iterator[Processes]:
    """Connects the processes that torchrun or `multimodal train --processes` started; a process without WORLD_SIZE is alone.

    Raises:
        ConfigError: WORLD_SIZE is set, but not all other variables.
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


class _AddZeroGradients(torch.autograd.Function):
    """Identity in the forward pass; in the backward pass each parameter gets zeros added to its gradient.

    DDP and FSDP wait for a gradient of every parameter, and those of a modality that is not in the batch have none.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _add_zero_gradients(value: Tensor, owners: list[tuple[nn.Module, str]]) -> Tensor:
    return _AddZeroGradients.apply(value, *(p for m, name in owners if (p := getattr(m, name)).requires_grad))  # type: ignore[return-value]


def _after_unit(owners: list[tuple[nn.Module, str]], module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """A forward hook."""
    return _add_zero_gradients(out, owners)


def _owners(root: nn.Module, without: set[nn.Module] = frozenset()) -> list[tuple[nn.Module, str]]:  # type: ignore[assignment]
    """(module, name) of each parameter below `root` once, without those of the modules `without`.

    Modules and names, not the parameters themselves, because FSDP replaces the parameters.
    """
    hidden = {id(p) for module in without for p in module.parameters()}
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in hidden:
                found.setdefault(id(parameter), (module, name))
    return list(found.values())


class Loss(nn.Module):
    """The loss of a stream as the forward pass of a module, because DDP and FSDP wrap the forward pass."""

    def __init__(self, model: Model, units: set[nn.Module] | None = None) -> None:
        super().__init__()
        self.model, self.owners = model, _owners(model, units or set())

    def forward(self, stream: Stream, counts: Mapping[str, float]) -> Tensor:
        return _add_zero_gradients(self.model.loss(stream, counts=counts), self.owners)


class ParallelModel:
    """A model whose gradients are summed over all processes.

    parallel: "ddp" has everything in every process; "fsdp" shards weights, gradients and the optimiser's state, a block of the
    core at a time. `model` has the weights that are trained: under "fsdp" it is a copy of the given one.
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
                owners = _owners(unit)
                # registered before FSDP's own hook, which frees the weights again
                unit.register_forward_hook(partial(_after_unit, owners))
            self.wrapped: Any = shard(self.model, loss)
        else:
            self.wrapped = None
            model.to(device)
            if processes.count > 1:
                ids = [device.index] if device.type == "cuda" else None
                self.wrapped = nn.parallel.DistributedDataParallel(
                    Loss(model), device_ids=ids, gradient_as_bucket_view=True
                )

    def backward(self, stream: Stream, counts: Mapping[str, float], *, last: bool) -> Tensor:
        """The loss of a micro-batch; its gradients are accumulated, and summed over processes after the last one of a step."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = last
        elif self.wrapped is not None:
            self.wrapped.set_requires_gradient_sync(last)
        lower = self.dtype == torch.bfloat16
        # a cache of cast weights would hold every block unsharded in every process
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower, cache_enabled=not self.sharded):
            loss = self.model.loss(stream, counts=counts) if self.wrapped is None else self.wrapped(stream, counts)
        # DDP and FSDP average over processes, and the loss is already divided by the counts of all
        (loss if self.wrapped is None else loss * self.processes.count).backward()
        return loss.detach()

    def drop_unused_gradients(self) -> None:
        """Set the gradients that are zero in all processes to None, as they are with one process.

        Otherwise momentum and weight decay would change parameters that no sample used.
        """
        used = [p for p in self.model.parameters() if p.grad is not None]
        grads: list[Any] = [p.grad for p in used]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        sizes = [g.abs().amax() if g.numel() else g.new_zeros(()) for g in local]
        for parameter, size in zip(used, self.processes.all_reduce(torch.stack(sizes).float()).tolist(), strict=True):
            if size == 0:
                parameter.grad = None

    def make_ema(self, decay: float) -> Any:
        """timm's exponential moving average of the weights, sharded like them."""
        from timm.utils import ModelEmaV3

        if not self.sharded:
            return ModelEmaV3(self.model, decay=decay, use_warmup=True)
        ema = ModelEmaV3(self.given, decay=decay, use_warmup=True)
        ema.module.to(self.model.device)
        shard(ema.module, ema.module)
        return ema


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor, on its device."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def cpu_copy(tensor: Tensor) -> Tensor:
    """An unsharded copy on the CPU, which further training does not change."""
    return full(tensor).detach().cpu().clone().contiguous()


def shard(model: Model, root: nn.Module) -> nn.Module:
    """Shard the weights below `root`, which is or contains the model: each block of the core is a unit, the rest is another.

    The blocks of an encoder are not separate units: they do not run in a process whose batch has nothing for the encoder,
    and FSDP gathers a unit in all processes at once.
    """
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"fit: parallel='fsdp' cannot shard {scalars[0]}, which is a scalar; make it a parameter of shape (1,), or use "
            "parallel='ddp'"
        )
    for unit in _units(model):
        fully_shard(unit)
    fully_shard(root)
    return root


def _units(model: Model) -> list[nn.Module]:
    """The blocks of the core, which FSDP gathers one at a time."""
    return [m for m in model.modules() if isinstance(m, Block)] if isinstance(model.core, Transformer) else []
