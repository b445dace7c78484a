"""What a block is made of: layers, each declared with the merge that brings what it computes back into the stream.

stream --norm--> layer --> update
   |                          |
   +---------- merge ---------+--> stream
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Cache, Layout, Plan, Read, Score, Trace
from multimodal.declare import Declared
from multimodal.masks import Prior
from multimodal.norm import RMSNorm
from multimodal.old_names import warn
from multimodal.shapes import ConfigError


class Merge(Declared, ABC):
    """How an update (T, D') joins the stream (T, D). keeps: whether the stream goes on where there is no update."""

    keeps: ClassVar[bool] = True

    def weights(self) -> nn.Module | None:
        """What is learned; it comes back as the last argument of `merge`."""
        return None

    def width(self, stream: int, update: int) -> int:
        """D of the result.

        Raises:
            ConfigError: these widths cannot be merged.
        """
        if stream != update:
            raise ConfigError(
                f"{type(self).__name__}: a stream of width {stream} and an update of {update} do not add up"
            )
        return stream

    @abstractmethod
    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        """The stream after the layer."""


@dataclass(frozen=True)
class Add(Merge):
    """x + f(x): He et al. 2016."""

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return stream_TD + update_TD


@dataclass(frozen=True)
class Replace(Merge):
    """f(x) alone."""

    keeps: ClassVar[bool] = False

    def width(self, stream: int, update: int) -> int:
        return update

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return update_TD


@dataclass(frozen=True)
class Concat(Merge):
    """x and f(x) side by side, so that the stream grows: Mishra et al. 2018, figure 1."""

    def width(self, stream: int, update: int) -> int:
        return stream + update

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return torch.cat([stream_TD, update_TD], -1)


@dataclass(frozen=True)
class Gated(Merge):
    """x + gamma f(x) with one learned gamma that starts at 0: Zhang et al. 2019, equation 3."""

    def weights(self) -> nn.Module:
        return _Gamma()

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return stream_TD + weights.gamma * update_TD


class _Gamma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))  # has an axis, because FSDP2 cannot shard a scalar

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
        """Load `gamma` also from checkpoints in which it had no axis."""
        if (old := state_dict.get(f"{prefix}gamma")) is not None:
            state_dict[f"{prefix}gamma"] = old.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)


SPREAD = 0.02  # standard deviation of initial weights (Radford et al. 2019)


def init_in(linear: nn.Linear) -> None:
    """Initialise an input projection of a layer."""
    nn.init.normal_(linear.weight, std=SPREAD)


def init_out(linear: nn.Linear, depth: int) -> None:
    """Initialise the output projection of a layer in a core of `depth` blocks.

    It is smaller, because each block adds two updates to the stream, whose variances add up (Radford et al. 2019).
    """
    nn.init.normal_(linear.weight, std=SPREAD / (2 * depth) ** 0.5)


class CoreSettings(Protocol):
    """What a layer may ask the core it is part of."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def rotary_split(self) -> tuple[int, ...]: ...
    @property
    def score(self) -> Score: ...
    @property
    def prior(self) -> Prior | None: ...
    @property
    def read(self) -> Read: ...


class Keys(NamedTuple):
    """What a layer caches of every token it has read: key-value heads, width of a key, width of a value."""

    heads: int
    key_width: int
    value_width: int


class Layer(Declared, ABC):
    """One layer of a block. Subclass as a frozen dataclass with a field `merge` and write `build`.

    crosses: whether it looks at what another core has read (and keeps its keys in the cache's memory).
    """

    crosses: ClassVar[bool] = False
    merge: Merge

    @abstractmethod
    def build(self, core: CoreSettings, width: int) -> "Body":
        """The module, for a stream of this width."""

    def keys(self, core: CoreSettings) -> Keys | None:
        """What is cached of each token while decoding; None: nothing."""
        return None

    def state(self, core: CoreSettings, width: int) -> int | None:
        """How many numbers it carries from token to token of a sample; None: it carries none."""
        return None


def check_sizes(layer: Layer, *names: str) -> None:
    """Raises a ConfigError unless each of these settings is a whole number of at least 1, or None for the usual one."""
    for name in names:
        given = getattr(layer, name)
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise ConfigError(f"{type(layer).__name__}: {name}={given!r} must be a whole number of at least 1")


class Body(nn.Module):
    """A layer's module: (normed stream (T, D), context) -> update (T, `out_width`).

    index: its number among the layers that cache the same thing. narrows: `forward` takes `wanted_N`, the rows whose
    update is wanted, and gives theirs alone, which costs less than all.
    """

    out_width: int
    index: int = 0
    narrows: ClassVar[bool] = False

    def __init__(self, out_width: int) -> None:
        super().__init__()
        self.out_width = out_width

    def init_weights(self, depth: int) -> None:
        """Initialise the weights once the whole core of `depth` blocks is built; by default those of the constructor stay."""


class Crossing(NamedTuple):
    """What a core that writes looks at: the states (M, D) of what another core has read, and how.

    rotations: by width of a head, the rotations at their positions. plan: who looks at whom.
    """

    memory_MD: Tensor
    rotations: Mapping[int, Tensor]
    plan: Plan


@dataclass
class Context:
    """What a stream's layers share.

    rotations: by width of a head, how far each of its pairs is rotated at each position; no entry: not at all.
    crossing: what another core has read, for cross-attention.
    fresh: whether nothing of these samples was read before; else the cache holds what was.
    """

    layout: Layout
    plan: Plan
    rotations: Mapping[int, Tensor]
    cache: Cache | None = None
    trace: Trace | None = None
    crossing: Crossing | None = None
    fresh: bool = True

    @property
    def sample_T(self) -> Tensor:
        return self.layout.info.sample

    def at(self, row_N: Tensor) -> Self:
        """The same for some rows of the stream, which look at nothing any more."""
        return replace(self, layout=Layout(self.layout.spans, self.layout.info[row_N]))

    @cached_property
    def sequences(self) -> "Sequences":
        """The stream's samples step by step."""
        return Sequences([span.total for span in self.layout.spans], self.sample_T.device)

    def state(self, index: int, size: int, like: Tensor) -> Tensor:
        """(B, size): the state that each sample of the stream starts from; zeros where nothing was read."""
        if self.cache is None or self.fresh:
            return like.new_zeros(len(self.layout.spans), size)
        rows = torch.tensor(list(self.cache.rows[: len(self.layout.spans)]), device=like.device)
        return self.cache.state[index][rows].to(like.dtype)

    def save_state(self, index: int, state_BF: Tensor) -> None:
        """Cache the state after each sample's last token, if there is a cache."""
        if self.cache is not None:
            rows = torch.tensor(list(self.cache.rows[: len(self.layout.spans)]), device=state_BF.device)
            self.cache.state[index][rows] = state_BF.to(self.cache.state[index].dtype)

    def keep(self, index: int, state_BF: Tensor) -> None:
        """The name of `save_state` in version 0.1; goes with 0.3."""
        warn("Context.keep", "Context.save_state", 1)
        self.save_state(index, state_BF)


class Sequences:
    """Samples of unequal length step by step and without padding: step t holds token t of all samples that are as long.

    sample_B: samples, the longest first; sizes: how many of them there are at each step; order_T: which row of the stream each
    row is, step after step; back_T: its inverse.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        length_B = torch.tensor(lengths)
        self.sample_B = torch.argsort(length_B, descending=True, stable=True)
        start_B = length_B.cumsum(0) - length_B
        sorted_B = length_B[self.sample_B]
        steps = torch.arange(int(length_B.max()) if lengths else 0)
        self.sizes = (sorted_B[None] > steps[:, None]).sum(1)
        there = sorted_B[None] > steps[:, None]
        self.order_T = (start_B[self.sample_B][None] + steps[:, None])[there].to(device)
        self.back_T = torch.empty_like(self.order_T)
        self.back_T[self.order_T] = torch.arange(len(self.order_T), device=device)
        self.sample_B = self.sample_B.to(device)

    def packed(self, stream_TD: Tensor) -> nn.utils.rnn.PackedSequence:
        """As torch.nn's recurrent layers take it; initial states go in the order of `sample_B`."""
        return nn.utils.rnn.PackedSequence(stream_TD[self.order_T], self.sizes)


class Sublayer(nn.Module):
    """A layer with its norm before it and its merge after it."""

    def __init__(self, layer: Layer, core: CoreSettings, width: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.layer = layer
        self.norm = RMSNorm(width)
        self.body = layer.build(core, width)
        self.merge_weights = layer.merge.weights()
        self.width = layer.merge.width(width, self.body.out_width)
        self.dropout, self.drop_path = dropout, drop_path
        if drop_path and not layer.merge.keeps:
            raise ConfigError(
                f"Core: drop_path skips layers, but with {type(layer.merge).__name__} in {type(layer).__name__} nothing of the "
                "stream would be left; use Add, Gated or Concat, or drop_path=0"
            )

    def forward(self, stream_TD: Tensor, context: Context, wanted_N: Tensor | None = None) -> Tensor:
        """The stream after the layer, or wanted rows of it."""
        normed_TD = self.norm(stream_TD)
        if wanted_N is None:
            update_TD = self.body(normed_TD, context)
        else:
            narrows = self.body.narrows
            update_TD = self.body(normed_TD, context, wanted_N) if narrows else self.body(normed_TD, context)[wanted_N]
            stream_TD, context = stream_TD[wanted_N], context.at(wanted_N)
        if self.training and (self.dropout or self.drop_path):
            update_TD = self._drop(update_TD, context)
        return self.layer.merge.merge(stream_TD, update_TD, self.merge_weights)

    def _drop(self, update_TD: Tensor, context: Context) -> Tensor:
        """The update with some of its numbers dropped, and that of whole samples."""
        if self.dropout:
            update_TD = F.dropout(update_TD, self.dropout)
        if self.drop_path:
            place = {"device": update_TD.device, "dtype": update_TD.dtype}
            keep = torch.rand(len(context.layout.spans), 1, **place) >= self.drop_path
            sample_T = context.sample_T
            update_TD = update_TD * (keep / (1 - self.drop_path))[sample_T]
        return update_TD
