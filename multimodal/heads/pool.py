"""Pools: how the states of what was read become one vector, without a learned token in the stream."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multimodal.declare import Declared, check_part
from multimodal.layers.mlp import ACTIVATIONS
from multimodal.norm import Norm
from multimodal.shapes import ConfigError, check_whole


class Pool(Declared, ABC):
    """How the states (N, D) of what was read become one vector for each sample. Subclass as a frozen dataclass and write `pool`."""

    def rows(self, read: int) -> tuple[int, int]:
        """The rows [first, last) that it needs, of a sample of which `read` tokens were read."""
        return 0, read

    def width(self, width: int) -> int:
        """The width of the vector, for states of this width."""
        return width

    def weights(self, width: int) -> nn.Module | None:
        """Make its learned parameters, for states of this width; None: there are none."""
        return None

    @abstractmethod
    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        """The vectors (B, `width`).

        state_ND: the rows that it needs, sample after sample. lengths: their number in each sample.
        weights: what `weights` made.
        """

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        """The same of padded states of all that was read, for a program that is exported.

        order_BT: the index of each row in its sample; of padding `read_B` or more. read_B: number of tokens that were read.

        Raises:
            ConfigError: this pool does not say how.
        """
        name = type(self).__name__
        raise ConfigError(f"{name}: this pool has no `padded`, which a program needs to be exported; write it")


@dataclass(frozen=True)
class First(Pool):
    """The state of the first token, such as a class token, or the mean of the first ones.

    count: number of tokens.
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_whole("First", least=1, count=self.count)

    def rows(self, read: int) -> tuple[int, int]:
        return 0, min(self.count, read)

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        return state_ND if self.count == 1 else means(state_ND, lengths)

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        return _mean_of(state_BTD, order_BT < read_B.clamp(max=self.count)[:, None])


@dataclass(frozen=True)
class Last(Pool):
    """The state of the last token that was read."""

    def rows(self, read: int) -> tuple[int, int]:
        return read - 1, read

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        return state_ND

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        return _mean_of(state_BTD, order_BT == read_B[:, None] - 1)


@dataclass(frozen=True)
class Mean(Pool):
    """The mean of the states.

    skip: number of tokens at the beginning that are left out, such as a class token.
    """

    skip: int = 0

    def __post_init__(self) -> None:
        check_whole("Mean", skip=self.skip)

    def rows(self, read: int) -> tuple[int, int]:
        if read <= self.skip:
            raise ConfigError(f"Mean: there are {read} tokens, and skip={self.skip} leaves none; skip fewer")
        return self.skip, read

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        return means(state_ND, lengths)

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        return _mean_of(state_BTD, (order_BT >= self.skip) & (order_BT < read_B[:, None]))


@dataclass(frozen=True)
class Parts(Pool):
    """The means of parts of the states, one after the other, concatenated: the head knows where something is.

    Part i of n states begins at floor(i n / count) and ends before ceil((i + 1) n / count), as PyTorch's `AdaptiveAvgPool1d` has
    them: neighbours may share a state, and of fewer states than parts some are in several.

    count: number of parts.
    """

    count: int = 8

    def __post_init__(self) -> None:
        check_whole("Parts", least=1, count=self.count)

    def width(self, width: int) -> int:
        return self.count * width

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        return self.padded(*_padded(state_ND, lengths), weights)

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        part = torch.arange(self.count, device=state_BTD.device)
        first = part * read_B[:, None] // self.count
        end = ((part + 1) * read_B[:, None] + self.count - 1) // self.count
        order_B1T = order_BT[:, None]
        chosen = (order_B1T >= first[..., None]) & (order_B1T < end[..., None])
        share = chosen.to(state_BTD.dtype) / (end - first)[..., None]
        return (share @ state_BTD).flatten(1)


@dataclass(frozen=True)
class FirstAndMean(Pool):
    """The state of the first token and the mean of others, concatenated (Oquab et al. 2023, section 7.1).

    skip: number of tokens at the beginning that are left out of the mean.
    """

    skip: int = 1

    def __post_init__(self) -> None:
        check_whole("FirstAndMean", least=1, skip=self.skip)

    def width(self, width: int) -> int:
        return 2 * width

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        parts = state_ND.split(list(lengths))
        if any(len(part) <= self.skip for part in parts):
            raise ConfigError(f"FirstAndMean: a sample has no more than skip={self.skip} tokens; skip fewer")
        return torch.stack([torch.cat([part[0], part[self.skip :].mean(0)]) for part in parts])

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        parts = First(), Mean(self.skip)
        return torch.cat([part.padded(state_BTD, order_BT, read_B, None) for part in parts], -1)


@dataclass(frozen=True)
class Attended(Pool):
    """A learned query attends to all states, and an MLP with a residual connection follows: the head of SigLIP (Zhai et al. 2023).

    heads: number of heads.
    hidden: hidden width of the MLP; None: four times that of the states.
    activation: that of the MLP, one of those of `MLP`.
    norm: the norm before the MLP.
    """

    heads: int
    hidden: int | None = None
    activation: str = "gelu_tanh"
    norm: Norm = field(default_factory=lambda: Norm(centred=True, bias=True))

    def __post_init__(self) -> None:
        check_whole("Attended", least=1, heads=self.heads)
        _check_activation(self, self.activation)

    def weights(self, width: int) -> nn.Module:
        return _Attended(width, self)

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        # padded here, because each sample has a single query
        return self.padded(*_padded(state_ND, lengths), weights)

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        return weights(state_BTD, order_BT >= read_B[:, None])


class _Attended(nn.Module):
    def __init__(self, width: int, pool: Attended) -> None:
        super().__init__()
        hidden = pool.hidden or 4 * width
        self.query = nn.Parameter(torch.randn(1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, pool.heads, batch_first=True)
        self.norm = pool.norm.build(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[pool.activation]

    def forward(self, state_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        query_B1D = self.query.expand(state_BTD.shape[0], 1, -1)
        read_BD = self.attention(query_B1D, state_BTD, state_BTD, key_padding_mask=padding_BT, need_weights=False)[0][
            :, 0
        ]
        return read_BD + self.down(self.activation(self.up(self.norm(read_BD))))


@dataclass(frozen=True)
class Transformed(Pool):
    """Another pool, then a norm, a linear layer with an activation, and a norm; each is optional.

    of: the other pool.
    first_norm: the norm of the pooled vector.
    dense: the activation after the linear layer: "tanh", one of those of `MLP`, or "linear" for none; None: no linear layer.
    bias: whether the linear layer has a bias.
    last_norm: the norm after it.
    out: output width of the linear layer; None: that of its input.
    """

    of: Pool
    first_norm: Norm | None = None
    dense: Literal["tanh", "linear", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] | None = None
    bias: bool = True
    last_norm: Norm | None = None
    out: int | None = None

    def __post_init__(self) -> None:
        check_part("Transformed: of", self.of, Pool, "First()")
        if self.dense is not None:
            _check_activation(self, self.dense)
        if self.out is not None:
            check_whole("Transformed", least=1, out=self.out)
            if self.dense is None:
                raise ConfigError(
                    f"Transformed: out={self.out} is the width of a linear layer, and dense=None has none; give dense='linear'"
                )

    def rows(self, read: int) -> tuple[int, int]:
        return self.of.rows(read)

    def width(self, width: int) -> int:
        return self.out or self.of.width(width)

    def weights(self, width: int) -> nn.Module:
        return _Transformed(self, width)

    def pool(self, state_ND: Tensor, lengths: Sequence[int], weights: Any) -> Tensor:
        return weights(self.of.pool(state_ND, lengths, weights.of))

    def padded(self, state_BTD: Tensor, order_BT: Tensor, read_B: Tensor, weights: Any) -> Tensor:
        return weights(self.of.padded(state_BTD, order_BT, read_B, weights.of))


class _Transformed(nn.Module):
    def __init__(self, pool: Transformed, width: int) -> None:
        super().__init__()
        self.of = pool.of.weights(width)
        width = pool.of.width(width)
        self.first_norm = nn.Identity() if pool.first_norm is None else pool.first_norm.build(width)
        out = pool.out or width
        self.dense = nn.Identity() if pool.dense is None else _Dense(width, out, pool.dense, pool.bias)
        width = out
        self.last_norm = nn.Identity() if pool.last_norm is None else pool.last_norm.build(width)

    def forward(self, vector_BD: Tensor) -> Tensor:
        return self.last_norm(self.dense(self.first_norm(vector_BD)))


class _Dense(nn.Module):
    def __init__(self, width: int, out: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias)
        self.activation = {**ACTIVATIONS, "tanh": torch.tanh, "linear": nn.Identity()}[activation]

    def forward(self, vector_BD: Tensor) -> Tensor:
        return self.activation(self.linear(vector_BD))


def means(state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean state (B, D) of each sample, from the rows of all, end to end."""
    length_B = torch.tensor(lengths, device=state_ND.device)
    number_N = torch.arange(len(lengths), device=state_ND.device).repeat_interleave(length_B)
    sum_BD = state_ND.new_zeros(len(lengths), state_ND.shape[1]).index_add(0, number_N, state_ND)
    return sum_BD / length_B[:, None]


def _padded(state_ND: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of samples, end to end, as padded states (B, T, D), the index of each row in its sample, and their number."""
    state_BTD = nn.utils.rnn.pad_sequence(list(state_ND.split(list(lengths))), batch_first=True)
    order_BT = torch.arange(state_BTD.shape[1], device=state_ND.device).expand(state_BTD.shape[:2])
    return state_BTD, order_BT, torch.tensor(lengths, device=state_ND.device)


def _mean_of(state_BTD: Tensor, chosen_BT: Tensor) -> Tensor:
    """The mean (B, D) of the rows that are chosen of each sample."""
    count_B1 = chosen_BT.sum(1, keepdim=True).to(state_BTD.dtype)
    return (state_BTD * chosen_BT[..., None]).sum(1) / count_B1


def _check_activation(pool: Pool, name: str) -> None:
    if name not in ACTIVATIONS and not (name in ("tanh", "linear") and isinstance(pool, Transformed)):
        raise ConfigError(f"{type(pool).__name__}: {name!r} is no activation; there are {', '.join(ACTIVATIONS)}")
