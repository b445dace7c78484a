"""Training in several processes: their ranks, collective operations, and the model under DDP, FSDP, tensor and context parallel.

No collective operation depends on which modalities a process has in its batch: every parameter has a gradient in every process
(zero where nothing used it), and every process sends the same numbers of the same tasks.
"""

import copy
import logging
import math
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

from multimodal.attention.exchange import StreamShare, gather_rows, local
from multimodal.core import Block, Transformer
from multimodal.heads.base import GatherRows
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.stream import Stream
from multimodal.train.split import SHARDS, TENSOR, Divided, RowOrder, divide, is_divided


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and what the others do.

    Processes of neighbouring ranks divide the core (tensor parallel), then come those that divide a stream (context parallel); all
    of these hold the same samples, as `copies` of each other.

    rank: its number among all, from 0.
    count: the number of processes.
    local: its number on its machine, from 0.
    tensor: the number of processes that divide the core.
    context: the number of processes that divide a stream.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    tensor: int = 1
    context: int = 1

    @property
    def copies(self) -> int:
        """Number of processes that hold the same samples."""
        return self.tensor * self.context

    @property
    def data_rank(self) -> int:
        """The number of this process's samples among those of all, from 0."""
        return self.rank // self.copies

    @property
    def data_count(self) -> int:
        """Number of processes with samples of their own."""
        return self.count // self.copies

    @property
    def leads(self) -> bool:
        """Whether this is the first of the processes that hold these samples."""
        return self.rank % self.copies == 0

    def groups(self, what: str) -> list[list[int]]:
        """The ranks of the processes that divide a "stream", or that have other "samples" and are otherwise alike."""
        ranks = torch.arange(self.count).view(self.data_count, self.context, self.tensor)
        return ranks.movedim({"samples": 0, "stream": 1}[what], -1).flatten(0, 1).tolist()

    def sum_over_samples(self, values: Tensor) -> Tensor:
        """The sum over all processes that have samples of their own, in each process."""
        return self.all_reduce(values if self.leads else torch.zeros_like(values))

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


def process_count() -> int:
    """How many processes train together, as far as the variables say that torchrun sets."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


@contextmanager
def connected_processes(device: torch.device, tensor: int = 1, context: int = 1) -> Iterator[Processes]:
    """Connects the processes that torchrun or `multimodal train --processes` started; a process without WORLD_SIZE is alone.

    tensor, context: as of `Processes`.

    Raises:
        ConfigError: WORLD_SIZE is set, but not all other variables.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), tensor, context)
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
    own = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(own)
    hook = sys.excepthook
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), own, tensor, context)
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
    found = [getattr(module, name) for module, name in owners]
    # what is divided belongs to layers that every stream passes
    return _AddZeroGradients.apply(value, *(p for p in found if p.requires_grad and not hasattr(p, "full_tensor")))  # type: ignore[return-value]


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


class _Gather(torch.autograd.Function):
    """The rows of all processes; the gradient of a row is the sum of what all processes send back."""

    @staticmethod
    def forward(ctx: Any, rows_NF: Tensor, always: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_rows(rows_NF, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_MF = grads[0].contiguous()
        dist.all_reduce(grad_MF, group=ctx.group)
        return grad_MF.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None, None


def _gather_samples(group: Any, vector_NF: Tensor, target: Tensor) -> tuple[Tensor, Tensor, int]:
    """Vectors and targets of the streams of all processes of a group, and the index of the first own one; see `GatherRows`."""
    count = torch.tensor([len(vector_NF)], device=vector_NF.device)
    sizes = gather_rows(count, [1] * dist.get_world_size(group), group).tolist()
    # the backward pass waits for all processes, also for those whose own vectors need no gradient
    always = vector_NF.new_zeros((), requires_grad=True)
    all_MF = _Gather.apply(vector_NF, always, sizes, group)
    return all_MF, gather_rows(target, sizes, group), sum(sizes[: dist.get_rank(group)])  # type: ignore[return-value]


class Loss(nn.Module):
    """The loss of a stream as the forward pass of a module, because DDP and FSDP wrap the forward pass.

    gather: what heads that compare samples get, see `Network.losses`.
    """

    def __init__(self, model: Model, units: set[nn.Module] | None = None, gather: GatherRows | None = None) -> None:
        super().__init__()
        self.model, self.owners, self.gather = model, _owners(model, units or set()), gather

    def forward(self, stream: Stream, counts: Mapping[str, float]) -> Tensor:
        return _add_zero_gradients(self.model.loss(stream, counts=counts, gather=self.gather), self.owners)


class ParallelModel:
    """A model whose gradients are summed over all processes.

    parallel: "ddp" has everything in every process; "fsdp" shards weights, gradients and the optimiser's state, a block of the
    core at a time. compares: whether heads that compare samples compare those of all processes. `model` has the weights that are
    trained: under "fsdp" it is a copy of the given one. `order`: how the rows of its matrices lie in memory.
    """

    def __init__(
        self,
        model: Model,
        processes: Processes,
        parallel: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compares: bool = True,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.processes, self.sharded = processes, parallel == "fsdp" and processes.count > 1
        self.model = self.given = model
        self.divided = Divided(RowOrder(), set(), set())
        self.mesh: Any = None
        gather = None
        if compares and processes.data_count > 1 and any(head.gathers for head in model.packer.heads.values()):
            gather = partial(_gather_samples, _group(processes, "samples"))
        if self.sharded:
            self.model = copy.deepcopy(model).to(device)
            if processes.tensor > 1:
                from torch.distributed.device_mesh import init_device_mesh

                sizes = processes.count // processes.tensor, processes.tensor
                self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=(SHARDS, TENSOR))
                self.divided = divide(self.model, self.mesh[TENSOR])
            if processes.context > 1:
                self.model.core.share = StreamShare(_group(processes, "stream"))  # type: ignore[assignment]
            loss = Loss(self.model, set(_units(self.model)), gather)
            for unit in _units(self.model):
                owners = _owners(unit)
                # registered before FSDP's own hook, which frees the weights again
                unit.register_forward_hook(partial(_after_unit, owners))
            self.wrapped: Any = shard(self.model, loss, self.mesh)
        else:
            self.wrapped = None
            model.to(device)
            if processes.count > 1:
                ids = [device.index] if device.type == "cuda" else None
                self.wrapped = nn.parallel.DistributedDataParallel(
                    Loss(model, gather=gather), device_ids=ids, gradient_as_bucket_view=True
                )

    @property
    def order(self) -> RowOrder:
        """How the rows of divided matrices lie in memory."""
        return self.divided.order

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
        # DDP and FSDP average over processes, and the loss is already divided by the counts of all. Processes that divide a stream
        # add up the gradients of its rows in that average, and those of what each computes whole are equal
        (loss if self.wrapped is None else loss * self.processes.data_count).backward()
        if last and self.mesh is not None:
            self._sum_gradients_of_copies()
        return loss.detach()

    def _sum_gradients_of_copies(self) -> None:
        """Make equal what the processes that divide the core have whole: where each has the gradient of its heads alone, the sum;
        else the mean of gradients that are equal but for rounding, which would let the copies drift apart."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        whole = [(name, local(p.grad)) for name, p in named if name not in self.divided.names]  # type: ignore[arg-type]
        if whole:
            share = 1 / self.processes.tensor
            flat = torch.cat([(g if name in self.divided.partial else g * share).flatten() for name, g in whole])
            dist.all_reduce(flat, group=self.mesh.get_group(TENSOR))
            for (_, grad), found in zip(whole, flat.split([g.numel() for _, g in whole]), strict=True):
                grad.copy_(found.view_as(grad))

    def clip_gradients(self, most: float) -> Tensor:
        """Scale all gradients down to a norm of `most` together, and return the norm they had; 0: only return it."""
        most = most or math.inf
        if self.mesh is None:
            return full(nn.utils.clip_grad_norm_(self.model.parameters(), most))
        # torch's function takes tensors of one mesh; and one sum over all processes gives all of them the same bits
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        first = self.mesh.get_local_rank(TENSOR) == 0
        own = [local(p.grad) for _, p in named if first or is_divided(p)]  # type: ignore[arg-type]
        square = nn.utils.get_total_norm(own).to(self.device).square()
        norm = self.processes.all_reduce(square).sqrt()
        for divided in (True, False):
            some = [p for name, p in named if (name in self.divided.names) == divided]
            nn.utils.clip_grads_with_norm_(some, most, norm)
        return norm

    def weights(self, model: Model | None = None) -> dict[str, Tensor]:
        """Whole copies on the CPU of the weights that are trained, or of a model that is divided as they are."""
        state = (self.model if model is None else model).state_dict()
        return {name: self.order.restored(name, cpu_copy(tensor)) for name, tensor in state.items()}

    def release(self) -> None:
        """Let go of the connections: the last one that holds them waits for their threads, which DDP would do with Python's lock
        held."""
        self.wrapped = self.mesh = None
        if self.model is not self.given:
            self.model.core.share = None  # type: ignore[assignment]

    def drop_unused_gradients(self) -> None:
        """Set the gradients that are zero in all processes to None, as they are with one process.

        Otherwise momentum and weight decay would change parameters that no sample used.
        """
        used = [p for p in self.model.parameters() if p.grad is not None]
        grads: list[Any] = [p.grad for p in used]
        sizes = [own.abs().amax() if (own := local(g)).numel() else own.new_zeros(()) for g in grads]
        for parameter, size in zip(used, self.processes.all_reduce(torch.stack(sizes).float()).tolist(), strict=True):
            if size == 0:
                parameter.grad = None

    def make_ema(self, decay: float) -> Any:
        """timm's exponential moving average of the weights, sharded like them."""
        from timm.utils import ModelEmaV3

        if not self.sharded:
            return ModelEmaV3(self.model, decay=decay, use_warmup=True)
        # several tensors at once must be of one mesh
        ema = ModelEmaV3(self.given, decay=decay, use_warmup=True, foreach=self.mesh is None)
        ema.module.to(self.model.device)
        if self.mesh is not None:
            divide(ema.module, self.mesh[TENSOR])
        shard(ema.module, ema.module, self.mesh)
        return ema


def full(tensor: Tensor) -> Tensor:
    """The unsharded tensor, on its device."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    log = logging.getLogger("torch.distributed.tensor._redistribute")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that a tensor of two mesh axes is gathered in two steps
    try:
        return tensor.full_tensor()  # type: ignore[operator]
    finally:
        log.setLevel(level)


def cpu_copy(tensor: Tensor) -> Tensor:
    """An unsharded copy on the CPU, which further training does not change."""
    return full(tensor).detach().cpu().clone().contiguous()


def _group(processes: Processes, what: str) -> Any:
    """The group of processes to which this one belongs, see `Processes.groups`."""
    return dist.new_subgroups_by_enumeration(processes.groups(what))[0]


def shard(model: Model, root: nn.Module, mesh: Any = None) -> nn.Module:
    """Shard the weights below `root`, which is or contains the model: each block of the core is a unit, the rest is another.

    The blocks of an encoder are not separate units: they do not run in a process whose batch has nothing for the encoder,
    and FSDP gathers a unit in all processes at once.

    mesh: where the core is divided, all processes by its axes; the weights are sharded over the first one. None: over all.
    """
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ConfigError(
            f"fit: parallel='fsdp' cannot shard {scalars[0]}, which is a scalar; make it a parameter of shape (1,), or use "
            "parallel='ddp'"
        )
    over = {} if mesh is None else {"mesh": mesh[SHARDS]}
    for unit in _units(model):
        fully_shard(unit, **over)
    fully_shard(root, **over)
    return root


def _units(model: Model) -> list[nn.Module]:
    """The blocks of the core, which FSDP gathers one at a time."""
    return [m for m in model.core.modules() if isinstance(m, Block)] if isinstance(model.core, Transformer) else []
