"""Steering: adds a feature direction to the states of one layer while a model predicts or generates (Turner et al. 2023)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.look.layers import layer_number, layer_widths, transformers
from multimodal.model import Model
from multimodal.shapes import check_shapes


@contextmanager
def steer(model: Model, layer: int | str, direction_D: Tensor, alpha: float = 1.0) -> Iterator[Model]:
    """While the context lasts, alpha * direction is added to every state of a layer, in every forward pass.

    Layers are counted as in `states`: 0 is the first block's input. The hook is removed at the end, after an error too.

    Raises:
        ConfigError: there is no such layer. ShapeError: a direction of another width.
    """
    number = layer_number(model, layer)
    cores = list(transformers(model).values())
    # the layers of two cores are numbered one core after the other
    while number > len(cores[0].blocks):
        number -= len(cores.pop(0).blocks) + 1
    core = cores[0]
    check_shapes("steer", {"D": layer_widths(core)[number]}, direction_D=direction_D)
    push_D = alpha * direction_D.detach().to(model.device)

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + push_D.to(output.dtype)

    def add_before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] + push_D.to(inputs[0].dtype), *inputs[1:])

    hook = (
        core.blocks[0].register_forward_pre_hook(add_before)
        if number == 0
        else core.blocks[number - 1].register_forward_hook(add)
    )
    try:
        yield model
    finally:
        hook.remove()


def random_like(direction_D: Tensor, *, seed: int = 0) -> Tensor:
    """A random direction of the same length, the baseline of steering."""
    drawn_D = torch.randn(direction_D.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn_D * (direction_D.norm().cpu() / drawn_D.norm())).to(direction_D)
