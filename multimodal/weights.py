"""How the shipped layers draw their first weights (Radford et al. 2019): normal, and smaller where sums of many layers grow."""

from torch import nn

SPREAD = 0.02  # standard deviation


def draw_in(linear: nn.Linear) -> None:
    """Draw a projection that a layer begins with."""
    nn.init.normal_(linear.weight, std=SPREAD)


def draw_out(linear: nn.Linear, depth: int) -> None:
    """Draw a projection that ends a layer, in a core of so many blocks; each adds two updates to the stream."""
    nn.init.normal_(linear.weight, std=SPREAD / (2 * depth) ** 0.5)
