"""Freezes parts of a model while it trains; afterwards they learn again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from multimodal.core import Block
from multimodal.model import Model
from multimodal.model_parts import topmost, weights_of
from multimodal.shapes import ConfigError


@contextmanager
def frozen(model: Model, parts: Sequence[str]) -> Iterator[None]:
    """Within this context the weights of these parts (see `weights_of`) need no gradients.

    Raises:
        ConfigError: no such part, or nothing is left that learns.
    """
    names = weights_of("freeze", model, parts)
    changed = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    if parts and not any(p.requires_grad and name not in names for name, p in model.named_parameters()):
        raise ConfigError(f"fit: freeze={tuple(parts)} leaves nothing to learn; freeze less")
    for parameter in changed:
        parameter.requires_grad_(False)
        # an old gradient would take memory, and count in the norm for clipping
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def set_modes(model: Model, parts: Sequence[str]) -> None:
    """Put a model into training mode, but these parts into evaluation mode: no dropout, no running statistics."""
    model.train()
    for part in topmost(model, weights_of("freeze", model, parts)):
        for module in part.modules():
            # a block decides by its own mode whether it is recomputed, which saves memory where what lies below it learns
            module.training = isinstance(module, Block)
