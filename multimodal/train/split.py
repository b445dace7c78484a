"""Tensor parallel: the layers of the core divided over processes by heads and hidden units, on PyTorch's DTensor.

stream --> queries, keys, values of some heads --> attention --> out --sum over processes--> stream
stream --> some hidden units -------------------> activation --> down --sum over processes--> stream

Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3). What is not divided, every process computes whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.attention import Bernoulli, Cosine, DotProduct, Gaussian, ScaledDotProduct, Soft
from multimodal.attention.exchange import local
from multimodal.core import Transformer
from multimodal.layers import MLP, PersistentMemory, SelfAttention
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.train.recipe import Recipe

ALIKE = (ScaledDotProduct, DotProduct, Cosine, Gaussian, Bernoulli)  # scores that are the same for every head
SHARDS, TENSOR = "shards", "tensor"  # names of the axes of the mesh of processes: of FSDP, and of tensor parallel


def check_split(model: Model, recipe: Recipe, processes: int, by: str = "fit") -> None:
    """Refuse what tensor_parallel and context_parallel cannot divide, before anything is connected or trained.

    by: who asks, for errors.

    Raises:
        ConfigError: names the layer, the number that is not divisible, or the feature.
    """
    settings = {name: getattr(recipe, name) for name in ("tensor_parallel", "context_parallel")}
    settings = {name: count for name, count in settings.items() if count > 1}
    if not settings:
        return
    together = recipe.tensor_parallel * recipe.context_parallel
    said = " and ".join(f"{name}={count}" for name, count in settings.items())
    if processes % together:
        raise ConfigError(f"{by}: {said} need a multiple of {together} processes, and there are {processes}")
    if not isinstance(model.core, Transformer):
        raise ConfigError(f"{by}: {said}: an EncoderDecoder cannot be divided; use a Core, or leave the setting out")
    if model.adapters is not None:
        raise ConfigError(f"{by}: {said}: adapters cannot be divided; merge them, or leave the setting out")
    for depth, block in enumerate(model.core.core.blocks, 1):
        for layer in block:
            where = f"{by}: {said}: {type(layer).__name__} of block {depth}"
            if type(layer) not in (SelfAttention, MLP, PersistentMemory) and recipe.context_parallel > 1:
                raise ConfigError(f"{where} reads the stream in its order, and cannot be divided among processes")
    if recipe.context_parallel > 1 and model.core.core.dropout:
        raise ConfigError(
            f"{by}: {said}: dropout={model.core.core.dropout:g} of the core would draw other numbers than one process does; "
            "use dropout=0 (drop_path may stay)"
        )
    for sublayer in model.core.sublayers():
        _check_layer(sublayer.layer, sublayer.body, recipe, f"{by}: {said}: {type(sublayer.layer).__name__}")


def _check_layer(layer: Any, body: Any, recipe: Recipe, where: str) -> None:
    if type(layer) is MLP and body.down.in_features % recipe.tensor_parallel:
        raise ConfigError(
            f"{where}: tensor_parallel={recipe.tensor_parallel} does not divide its hidden width {body.down.in_features}; set "
            f"mlp_width={-(-body.down.in_features // recipe.tensor_parallel) * recipe.tensor_parallel}"
        )
    if type(layer) is not SelfAttention:
        return
    attention, together = body.attention, recipe.tensor_parallel * recipe.context_parallel
    for name, heads in (("heads", attention.heads), ("kv_heads", attention.kv_heads)):
        if heads % together:
            raise ConfigError(f"{where}: {together} processes do not divide its {name}={heads}; use fewer of them")
    mechanism = attention.mechanism
    if not mechanism.bare or mechanism.score_weights is not None or type(mechanism.score) not in ALIKE:
        others = [part for part in (mechanism.prior, mechanism.read) if part is not None and not isinstance(part, Soft)]
        part = [*others, mechanism.score][0]
        raise ConfigError(
            f"{where}: its heads can be divided if each is computed alike, and {part!r} may differ from head to head; use a "
            "score without weights, Soft(), no prior (a rule may stand in mask), or leave the setting out"
        )


@dataclass(frozen=True)
class RowOrder:
    """How the rows of divided matrices lie in memory: process after process, in each some rows of every part.

    count: number of processes that divide them.
    parts: by name of a parameter, the numbers of rows of the matrices that it consists of, such as queries, keys and values.
    """

    count: int = 1
    parts: Mapping[str, list[int]] = field(default_factory=dict)

    def of(self, name: str) -> list[int] | None:
        """The parts of a tensor of a state: "core..", "model/core..", or "optimizer/exp_avg/core..."""
        return self.parts.get(name.rpartition("/")[2])

    def runs(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows start .. stop - 1 in memory as (first row in memory, first row of the tensor itself, number of rows)."""
        parts = self.of(name)
        if parts is None:
            yield start, start, stop - start
            return
        at = 0
        for process in range(self.count):
            own = 0
            for rows in parts:
                size = rows // self.count
                first, last = max(start, at), min(stop, at + size)
                if first < last:
                    yield first, own + process * size + first - at, last - first
                at, own = at + size, own + rows

    def boxes(self, name: str, box: list[tuple[int, int]]) -> Iterator[tuple[tuple[slice, ...], list[tuple[int, int]]]]:
        """A box in memory as (slices of it, box of the tensor itself); a box has the first and the last row + 1 along each axis."""
        if not box:
            yield (), []
            return
        (start, stop), *rest = box
        for first, row, count in self.runs(name, start, stop):
            yield (slice(first - start, first - start + count),), [(row, row + count), *rest]

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor with its rows in their own order."""
        if self.of(name) is None:
            return tensor
        found = torch.empty_like(tensor)
        for first, row, count in self.runs(name, 0, len(tensor)):
            found[row : row + count] = tensor[first : first + count]
        return found

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor with its rows as they lie in memory."""
        if self.of(name) is None:
            return tensor
        return torch.cat([tensor[row : row + count] for _, row, count in self.runs(name, 0, len(tensor))])


def box_of(tensor: Tensor) -> list[tuple[int, int]]:
    """The part of a sharded tensor that this process holds: along each axis its first row and its last one + 1."""
    box = [(0, size) for size in tensor.shape]
    if not hasattr(tensor, "full_tensor"):
        return box
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    # FSDP shards what tensor parallel has left, so the last axis of the mesh divides first; both cut as torch.chunk does
    for axis in reversed(range(mesh.ndim)):
        dim = getattr(placements[axis], "dim", None)
        if dim is not None:
            start, stop = box[dim]
            size = -(-(stop - start) // mesh.size(axis))
            first = min(start + mesh.get_local_rank(axis) * size, stop)
            box[dim] = first, min(first + size, stop)
    return box


def is_divided(tensor: Tensor) -> bool:
    """Whether the processes that divide the core hold other parts of a tensor, and not copies."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.ndim == 2 and not tensor.placements[1].is_replicate()  # type: ignore[attr-defined]


@dataclass
class Divided:
    """What `divide` has divided.

    order: how the rows lie in memory now.
    names: the parameters that are divided.
    partial: the others whose gradient each process has of its own heads alone, so that it is the sum over processes.
    """

    order: RowOrder
    names: set[str]
    partial: set[str]


def divide(model: Model, mesh: Any) -> Divided:
    """Divide the attention and the MLPs of the core over the processes of a mesh with one axis, in place."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    assert isinstance(model.core, Transformer)
    count, before = mesh.size(), {id(p): name for name, p in model.named_parameters()}
    parts: dict[str, list[int]] = {}
    names: set[str] = set()
    partial: set[str] = set()
    for sublayer in model.core.sublayers():
        body: Any = sublayer.body
        if type(sublayer.layer) is SelfAttention:
            body = body.attention
            first, last = "qkv", "out"
            partial |= {before[id(p)] for norm in (body.norm_q, body.norm_k) for p in norm.parameters()}
        elif type(sublayer.layer) is MLP:
            first, last = "gate_up" if sublayer.layer.gated else "up", "down"
        else:
            continue
        divided = [*getattr(body, first).parameters(), *getattr(body, last).parameters()]
        names |= {before[id(p)] for p in divided}
        rows = next(iter(body.fused().values()), None) if hasattr(body, "fused") else None
        if rows is not None:
            for parameter in getattr(body, first).parameters():
                order = RowOrder(count, {before[id(parameter)]: rows})
                parts |= order.parts
                parameter.data = order.ordered(before[id(parameter)], parameter.data)
        parallelize_module(body, mesh, {first: ColwiseParallel(), last: RowwiseParallel()})
        if type(sublayer.layer) is SelfAttention:
            for name, bias in body.biases.items():
                names.add(before[id(bias)])
                body.biases[name] = nn.Parameter(distribute_tensor(bias, mesh, [Shard(0)]), bias.requires_grad)
            body.heads, body.kv_heads = body.heads // count, body.kv_heads // count
            body.rows = [n // count for n in body.rows]
    return Divided(RowOrder(count, parts), names, partial)


def fill(tensor: Tensor, whole: Tensor, order: RowOrder, name: str) -> Tensor:
    """Copy this process's part of a whole tensor into a sharded one."""
    with torch.no_grad():
        for inside, box in order.boxes(name, box_of(tensor)):
            local(tensor)[inside].copy_(whole[tuple(slice(*rows) for rows in box)])
    return tensor
