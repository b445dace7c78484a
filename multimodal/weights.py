"""Initial weights of the shipped layers (Radford et al. 2019): normal, and smaller for outputs that many layers add up."""

from torch import nn

SPREAD = 0.02  # standard deviation


def init_in(linear: nn.Linear) -> None:
    """Initialise an input projection of a layer."""
    nn.init.normal_(linear.weight, std=SPREAD)


def init_out(linear: nn.Linear, depth: int) -> None:
    """Initialise the output projection of a layer in a core of `depth` blocks, each of which adds two updates to the stream."""
    nn.init.normal_(linear.weight, std=SPREAD / (2 * depth) ** 0.5)
