"""Where a model stores facts, and how to change one: mean-ablation of parts, and ROME's rank-one edit of a matrix."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.core import Block
from multimodal.layers import MLP, Sublayer
from multimodal.look.layers import block_name, transformers
from multimodal.model import Model
from multimodal.shapes import ConfigError, StreamError
from multimodal.stream import Stream

Sample = Mapping[str, Any]

KINDS = {"SelfAttention": "attention", "CrossAttention": "cross-attention", "MLP": "mlp"}


def parts(model: Model) -> dict[str, Sublayer]:
    """The layers of every block by name: "block 1 attention", "block 1 mlp", ..; with two cores "reader block 1 ..", .."""
    found: dict[str, Sublayer] = {}
    for name, core in transformers(model).items():
        for i, block in enumerate(core.blocks):
            assert isinstance(block, Block)
            for layer in block.layers:
                assert isinstance(layer, Sublayer)
                kind = type(layer.layer).__name__
                title = f"{block_name(name, i)} {KINDS.get(kind, kind)}"
                # a block may hold several layers of one kind
                again = sum(known.startswith(title) for known in found)
                found[f"{title} {again + 1}" if again else title] = layer
    return found


@contextmanager
def mean_ablated(model: Model, names: Sequence[str], task: str, samples: Sequence[Sample]) -> Iterator[Model]:
    """While the context lasts, the output of these parts is their mean over all rows of the samples, whatever their input.

    Setting a part's output to 0 instead would take the stream far from anything the later parts have seen.

    Raises:
        ConfigError: there is no such part.
    """
    chosen = [_part(model, name).body for name in names]
    means = _means(model, chosen, task, samples)

    def constant(mean_D: Tensor):
        def replace(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return mean_D.to(output.dtype).expand_as(output)

        return replace

    hooks = []
    try:
        hooks += [part.register_forward_hook(constant(mean)) for part, mean in zip(chosen, means, strict=True)]
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def localise(model: Model, task: str, samples: Sequence[Sample], *, batch: int = 256) -> dict[str, float]:
    """The share of correct answers while each part alone is mean-ablated; "whole": while none is."""
    rights = {"whole": right_answers(model, task, samples, batch=batch).float().mean()}
    for name in parts(model):
        with mean_ablated(model, [name], task, samples):
            rights[name] = right_answers(model, task, samples, batch=batch).float().mean()
    return {name: float(share) for name, share in rights.items()}


def right_answers(model: Model, task: str, samples: Sequence[Sample] | Stream, *, batch: int = 256) -> Tensor:
    """Whether each sample's answer (N,) has the largest logit at every row that its head reads (teacher forcing).

    samples: samples, or a stream packed with answers, on which many edits can be scored.
    """
    streams = (
        [samples]
        if isinstance(samples, Stream)
        else (model.pack(task, samples[start : start + batch], first=start) for start in range(0, len(samples), batch))
    )
    found = []
    with model.inference_mode():
        for stream in streams:
            reading = stream.readings[task]
            hit_N = (model.logits(stream)[task].argmax(-1) == _targets(task, stream)).cpu()
            hits = torch.stack([hit.all() for hit in hit_N.split(list(reading.lengths))])
            right = torch.empty_like(hits)
            right[torch.tensor(reading.samples)] = hits
            found.append(right)
    return torch.cat(found)


@dataclass(frozen=True)
class Edit:
    """A rank-one change of one matrix: W + left_D right_F^T.

    matrix: the layer that was changed.
    left_D: what is added to its output per unit of right_F . key.
    right_F: the direction of keys that the change answers to.
    before_DF: the weight before the change.
    """

    matrix: nn.Linear
    left_D: Tensor
    right_F: Tensor
    before_DF: Tensor

    def undo(self) -> None:
        """Put the old matrix back, bit for bit."""
        with torch.no_grad():
            self.matrix.weight.copy_(self.before_DF)


def second_moment(
    model: Model, task: str, samples: Sequence[Sample], *, part: str | None = None, batch: int = 256
) -> Tensor:
    """C = E[k k^T] (F, F) of the inputs of a part's matrix, over the rows that the head reads.

    ROME weighs its change by C^-1, so that it moves the other keys least.
    """
    matrix = _matrix(model, part)
    total_FF, count = torch.zeros(matrix.in_features, matrix.in_features, dtype=torch.float64), 0
    for start in range(0, len(samples), batch):
        stream = model.pack(task, samples[start : start + batch], first=start)
        key_NF = _keys(model, matrix, stream)[stream.readings[task].row_N].double().cpu()
        total_FF += key_NF.T @ key_NF
        count += len(key_NF)
    return total_FF / count


def edit_fact(
    model: Model,
    task: str,
    sample: Sample,
    *,
    moment_FF: Tensor,
    part: str | None = None,
    ridge: float = 1e-4,
    steps: int = 50,
    lr: float = 0.5,
    decay: float = 1e-3,
    confident: float = 0.98,
) -> Edit:
    """Make the model answer what `sample` says, by a rank-one change of the matrix that writes an MLP's update, in place.

    ROME (Meng et al. 2022, equations 2 and 4): with k the key of this sample's first row that the head reads and v the value
    under which the answer is likely, W' = W + (v - W k) (C^-1 k)^T / (k^T C^-1 k), the least change, as the other keys see it,
    that maps k to v. v is found by Adam on -log p(answer) + decay |v - W k|^2 and stops where p(answer) > `confident`.

    moment_FF: C, from `second_moment` on facts that should not change. part: a name of `parts`, the last MLP unless given. ridge:
    share of C's mean eigenvalue that is added to all. `right_answers` says whether the edit worked.

    Raises:
        ConfigError: there is no such part, or it is no matrix. StreamError: C is of another width, or the head has no classes.
    """
    matrix = _matrix(model, part)
    if moment_FF.shape != (matrix.in_features, matrix.in_features):
        raise StreamError(
            f"edit_fact: moment_FF is {tuple(moment_FF.shape)}, but the matrix reads {matrix.in_features} features; "
            "take second_moment(..) of the same part"
        )
    stream = model.pack(task, [sample])
    reading = stream.readings[task]
    target_N = _targets(task, stream)
    row = int(reading.row_N[0])
    key_F = _keys(model, matrix, stream)[row]
    delta_D = _value_change(model, matrix, stream, task, row, target_N, steps, lr, decay, confident)
    # C may be singular: few facts, many features
    c_FF = moment_FF.double()
    c_FF = c_FF + ridge * c_FF.diagonal().mean() * torch.eye(len(c_FF), dtype=torch.float64)
    solved_F = torch.linalg.solve(c_FF, key_F.double().cpu())
    right_F = (solved_F / (solved_F @ key_F.double().cpu())).to(matrix.weight)
    edit = Edit(matrix, delta_D, right_F, matrix.weight.detach().clone())
    with torch.no_grad():
        matrix.weight += torch.outer(delta_D, right_F)
    return edit


def _value_change(
    model: Model,
    matrix: nn.Linear,
    stream: Stream,
    task: str,
    row: int,
    target_N: Tensor,
    steps: int,
    lr: float,
    decay: float,
    confident: float,
) -> Tensor:
    """v - W k: what must be added to the matrix's output at one row for the answer to be likely."""
    delta_D = torch.zeros(matrix.out_features, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta_D], lr=lr * float(matrix.weight.detach().norm(dim=1).mean()))
    reading, head = stream.readings[task], model.packer.head(task)

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        at_T1 = torch.zeros(len(output), 1, device=output.device, dtype=output.dtype).index_fill_(
            0, torch.tensor([row], device=output.device), 1.0
        )
        return output + at_T1 * delta_D.to(output.dtype)

    hook = matrix.register_forward_hook(add)
    training = model.training
    # only the change of the output is learned, so no other gradient is needed
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for _ in range(steps):
                state_TD = model(stream)
                state_ND, inputs = state_TD[reading.row_N], head.inputs(reading, state_TD)
                logits = head.logits(model.readout(task), state_ND, reading.lengths, **inputs).float()
                nats = nn.functional.cross_entropy(logits, target_N)
                if float(nats.detach()) < -math.log(confident):
                    break
                optimizer.zero_grad()
                (nats + decay * delta_D.square().sum()).backward()
                optimizer.step()
    finally:
        hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(training)
    return delta_D.detach()


def _part(model: Model, name: str) -> Sublayer:
    there = parts(model)
    if name not in there:
        raise ConfigError(f"there is no part {name!r}; there are {', '.join(there)}")
    return there[name]


def _matrix(model: Model, name: str | None) -> nn.Linear:
    """The matrix that writes an MLP's update, the last MLP's unless named."""
    mlps = [part for part, layer in parts(model).items() if isinstance(layer.layer, MLP)]
    if not mlps:
        raise ConfigError("this model has no MLP, so there is no matrix to edit")
    if name is not None and name not in mlps:
        raise ConfigError(f"part {name!r} is no MLP of this model; there are {', '.join(mlps)}")
    matrix = _part(model, name or mlps[-1]).body.down
    assert isinstance(matrix, nn.Linear)
    return matrix


def _targets(task: str, stream: Stream) -> Tensor:
    target = stream.readings[task].target
    if target is None or target.is_floating_point() or len(target) != len(stream.readings[task].row_N):
        raise StreamError(
            f"task {task!r}: its head does not choose one class a row, so it states no fact that could be edited"
        )
    return target


def _keys(model: Model, matrix: nn.Linear, stream: Stream) -> Tensor:
    """What goes into a matrix: a row (T, F) for every row of the stream."""
    seen: list[Tensor] = []
    hook = matrix.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        with model.inference_mode():
            model(stream)
    finally:
        hook.remove()
    if len(seen) != 1 or len(seen[0]) != len(stream):
        raise StreamError("edit_fact: the matrix does not see every row of the stream once; of two cores neither does")
    return seen[0].clone()


def _means(
    model: Model, chosen: Sequence[nn.Module], task: str, samples: Sequence[Sample], batch: int = 256
) -> list[Tensor]:
    """The mean output (D,) of each module over all rows of the samples."""
    sums: dict[int, Tensor] = {}
    counts = dict.fromkeys(range(len(chosen)), 0)

    def adder(i: int):
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            total_D = output.detach().double().sum(0)
            sums[i] = sums[i] + total_D if i in sums else total_D
            counts[i] += len(output)

        return add

    hooks = []
    try:
        hooks += [module.register_forward_hook(adder(i)) for i, module in enumerate(chosen)]
        with model.inference_mode():
            for start in range(0, len(samples), batch):
                model(model.pack(task, samples[start : start + batch], first=start))
    finally:
        for hook in hooks:
            hook.remove()
    return [sums[i].clone() / counts[i] for i in range(len(chosen))]
