"""The MLP, which runs on each token alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.layers.base import Add, Body, Context, CoreSettings, Layer, Merge, check_sizes, init_in, init_out
from multimodal.shapes import ConfigError, did_you_mean

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class MLP(Layer):
    """down(activation(gate) * up), or with gated=False down(activation(up)).

    By default it is SwiGLU (Shazeer 2020).

    hidden: hidden width; None: the core's `mlp_width`.
    out: width of the update; None: that of the stream.
    activation: "silu"; "gelu", exact, or by tanh ("gelu_tanh") or sigmoid ("quick_gelu", Hendrycks & Gimpel 2016); or "relu".
    gated: whether a second projection multiplies the activations.
    bias: whether both projections have a bias.
    merge: how the update joins the stream.
    """

    hidden: int | None = None
    out: int | None = None
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    merge: Merge = field(default_factory=Add)

    def __post_init__(self) -> None:
        check_sizes(self, "hidden", "out")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"MLP: activation={self.activation!r} is unknown; there are {', '.join(ACTIVATIONS)}"
                f"{did_you_mean(str(self.activation), ACTIVATIONS)}"
            )

    def build(self, core: CoreSettings, width: int) -> Body:
        kind = _MLP if self.gated else _UngatedMLP
        return kind(width, self.hidden or core.hidden, self.out or width, self.activation, self.bias)


class _MLP(Body):
    def __init__(self, width: int, hidden: int, out: int, activation: str, bias: bool) -> None:
        super().__init__(out)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def fused(self) -> dict[str, list[int]]:
        """For Muon, the numbers of rows of the matrices that `gate_up` consists of."""
        return {"gate_up.weight": [self.down.in_features] * 2}

    def init_weights(self, depth: int) -> None:
        init_in(self.gate_up)
        init_out(self.down, depth)

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        gate, up = self.gate_up(stream_TD).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class _UngatedMLP(Body):
    def __init__(self, width: int, hidden: int, out: int, activation: str, bias: bool) -> None:
        super().__init__(out)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def init_weights(self, depth: int) -> None:
        init_in(self.up)
        init_out(self.down, depth)

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        return self.down(self.activation(self.up(stream_TD)))
