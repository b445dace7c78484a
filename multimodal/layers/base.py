"""The contract of layers: each computes an update of the stream, which its merge brings back into the stream.

stream --norm--> layer --> update
   |                          |
   +---------- merge ---------+--> stream
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Cache, Layout, Plan, Read, Score, Trace
from multimodal.declare import Declared
from multimodal.masks import Prior, Rule
from multimodal.norm import Norm
from multimodal.old_names import warn
from multimodal.positions import Rotary
from multimodal.shapes import ConfigError


class Merge(Declared, ABC):
    """How an update (T, D') joins the stream (T, D).

    keeps: whether the stream goes on unchanged where the update is 0; `drop_path` needs that.
    normed: whether the layer reads the stream through a norm; else it reads the stream as it is.
    """

    keeps: ClassVar[bool] = True
    normed: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("weights")
        if own is not None and len(inspect.signature(own).parameters) == 1:  # of version 0.1; goes with 0.3
            warn(f"{cls.__name__}.weights(self)", f"{cls.__name__}.weights(self, width, norm)", 2)
            cls.weights = lambda self, width, norm: own(self)  # type: ignore[method-assign]

    def weights(self, width: int, norm: Norm) -> nn.Module | None:
        """Makes its learned parameters, for an update of this width in a core with this norm; `merge` gets them last."""
        return None

    def width(self, stream: int, update: int) -> int:
        """The width of the result.

        Raises:
            ConfigError: a stream and an update of these widths cannot be merged.
        """
        if stream != update:
            raise ConfigError(
                f"{type(self).__name__}: a stream of width {stream} and an update of {update} do not add up"
            )
        return stream

    @abstractmethod
    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        """The stream after the layer, (T, `width`)."""


@dataclass(frozen=True)
class Add(Merge):
    """x + f(x): He et al. 2016.

    normed: whether the layer reads the stream through a norm; else it reads the stream as it is.
    """

    normed: bool = True

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return stream_TD + update_TD


@dataclass(frozen=True)
class Replace(Merge):
    """f(x) without a residual connection."""

    keeps: ClassVar[bool] = False

    def width(self, stream: int, update: int) -> int:
        return update

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return update_TD


@dataclass(frozen=True)
class Concat(Merge):
    """x and f(x) concatenated, so that the stream becomes wider: Mishra et al. 2018, figure 1."""

    def width(self, stream: int, update: int) -> int:
        return stream + update

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return torch.cat([stream_TD, update_TD], -1)


@dataclass(frozen=True)
class Gated(Merge):
    """x + gamma f(x) with one learned gamma that starts at 0: Zhang et al. 2019, equation 3."""

    def weights(self, width: int, norm: Norm) -> nn.Module:
        return _Gamma()

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return stream_TD + weights.gamma * update_TD


class _Gamma(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))  # with an axis, because FSDP2 cannot shard a scalar

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any) -> None:
        """Load `gamma` also from checkpoints of version 0.1, in which it was a scalar."""
        if (old := state_dict.get(f"{prefix}gamma")) is not None:
            state_dict[f"{prefix}gamma"] = old.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)


@dataclass(frozen=True)
class LayerScale(Merge):
    """x + gamma f(x) with a learned gamma for each feature: Touvron et al. 2021, equation 3.

    start: initial value of every gamma.
    """

    start: float = 1e-5

    def weights(self, width: int, norm: Norm) -> nn.Module:
        return _Scale(width, self.start)

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return stream_TD + update_TD * weights.gamma


class _Scale(nn.Module):
    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))


@dataclass(frozen=True)
class PostNorm(Merge):
    """norm(x + f(x)), and no norm before the layer: Vaswani et al. 2017, section 3.1."""

    keeps: ClassVar[bool] = False
    normed: ClassVar[bool] = False

    def weights(self, width: int, norm: Norm) -> nn.Module:
        return norm.build(width)

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return weights(stream_TD + update_TD)


@dataclass(frozen=True)
class SandwichNorm(Merge):
    """x + norm(f(x)), besides the norm before the layer: Ding et al. 2021, section 2.4."""

    def weights(self, width: int, norm: Norm) -> nn.Module:
        return norm.build(width)

    def merge(self, stream_TD: Tensor, update_TD: Tensor, weights: Any) -> Tensor:
        return stream_TD + weights(update_TD)


SPREAD = 0.02  # standard deviation of initial weights (Radford et al. 2019)


def init_in(linear: nn.Linear) -> None:
    """Initialise an input projection of a layer."""
    nn.init.normal_(linear.weight, std=SPREAD)
    _no_bias(linear)


def init_out(linear: nn.Linear, depth: int) -> None:
    """Initialise the output projection of a layer in a core of `depth` blocks.

    It is smaller, because each block adds two updates to the stream, whose variances add up (Radford et al. 2019).
    """
    nn.init.normal_(linear.weight, std=SPREAD / (2 * depth) ** 0.5)
    _no_bias(linear)


def _no_bias(linear: nn.Linear) -> None:
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class CoreSettings(Protocol):
    """The settings of the core that its layers use, see `Core`."""

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
    def norm(self) -> Norm: ...
    @property
    def rotary_split(self) -> tuple[int, ...]: ...
    @property
    def score(self) -> Score: ...
    @property
    def prior(self) -> Prior | None: ...
    @property
    def read(self) -> Read: ...


class Keys(NamedTuple):
    """The sizes of the keys and values that a layer caches.

    heads: number of key-value heads.
    key_width: width of the key of one head.
    value_width: width of the value of one head.
    """

    heads: int
    key_width: int
    value_width: int


class Layer(Declared, ABC):
    """One layer of a block. Subclass as a frozen dataclass with a field `merge` and write `build`.

    crosses: whether it attends to the states of another core, whose keys are then cached in `Cache.memory`.
    merge: how the update joins the stream.
    """

    crosses: ClassVar[bool] = False
    merge: Merge

    @abstractmethod
    def build(self, core: CoreSettings, width: int) -> "Body":
        """Make the layer's module, for a stream of this width."""

    def keys(self, core: CoreSettings) -> Keys | None:
        """The sizes of the keys and values that it caches; None: it caches none."""
        return None

    def state(self, core: CoreSettings, width: int) -> int | None:
        """The size of the state that it carries from token to token of a sample; None: it has no state."""
        return None


def check_sizes(layer: Layer, *names: str) -> None:
    """Raise a ConfigError unless each of these settings is None or a whole number of at least 1."""
    for name in names:
        given = getattr(layer, name)
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise ConfigError(f"{type(layer).__name__}: {name}={given!r} must be a whole number of at least 1")


class Body(nn.Module):
    """A layer's module: (normed stream (T, D), context) -> update (T, `out_width`).

    out_width: width of the update.
    index: its number among the layers that cache keys, or among those that carry states.
    narrows: whether `forward` accepts `wanted_N`, the rows whose updates are wanted, and returns these (N, `out_width`) alone.
    """

    out_width: int
    index: int = 0
    narrows: ClassVar[bool] = False

    def __init__(self, out_width: int) -> None:
        super().__init__()
        self.out_width = out_width

    def init_weights(self, depth: int) -> None:
        """Initialise the weights after the core of `depth` blocks is built; by default those of the constructor stay."""


Rotations = Mapping[int | tuple[int, Rotary], Tensor | None]
"""By width of a head, or by (width, a layer's own `Rotary`), the rotations at each token; None: no rotary positions."""


class Crossing(NamedTuple):
    """What cross-attention needs of the other core.

    memory_MD: the states (M, D) of the reader, which give keys and values; 0 rows if these are cached already.
    rotations: by width of a head, the rotary rotations at the positions of these states.
    plan: which written token attends to which state.
    """

    memory_MD: Tensor
    rotations: Rotations
    plan: Plan


@dataclass
class Context:
    """What the layers of one pass over a stream share.

    layout: which rows belong to which sample.
    plan: how self-attention is computed.
    rotations: by width of a head, the rotary rotations at the positions of the stream; None: no rotary positions. A layer with
        rotary positions of its own finds its rotations by (width, its `Rotary`).
    cache: the KV cache; None: nothing is cached.
    trace: collects a record of every attention layer.
    crossing: the states of another core, for cross-attention.
    fresh: whether these samples start with this stream; else the cache has their earlier tokens.
    plans: by the rule of a layer that has its own, how its self-attention is computed.
    """

    layout: Layout
    plan: Plan
    rotations: Rotations
    cache: Cache | None = None
    trace: Trace | None = None
    crossing: Crossing | None = None
    fresh: bool = True
    plans: Mapping[Rule, Plan] = field(default_factory=dict)

    @property
    def sample_T(self) -> Tensor:
        """The number of each row's sample, (T,)."""
        return self.layout.info.sample

    def at(self, row_N: Tensor) -> Self:
        """A context for some rows of the stream, for layers in which tokens are independent."""
        return replace(self, layout=Layout(self.layout.spans, self.layout.info[row_N]))

    @cached_property
    def sequences(self) -> "Sequences":
        """The samples of the stream in the order of recurrent layers; made once for all of them."""
        return Sequences([span.total for span in self.layout.spans], self.sample_T.device)

    def state(self, index: int, size: int, like: Tensor) -> Tensor:
        """The state (B, size) with which each sample of the stream starts: zeros, or what is cached of its earlier tokens."""
        if self.cache is None or self.fresh:
            return like.new_zeros(len(self.layout.spans), size)
        rows = torch.tensor(list(self.cache.rows[: len(self.layout.spans)]), device=like.device)
        return self.cache.state[index][rows].to(like.dtype)

    def save_state(self, index: int, state_BF: Tensor) -> None:
        """Cache the state after each sample's last token, if there is a cache."""
        if self.cache is not None:
            rows = torch.tensor(list(self.cache.rows[: len(self.layout.spans)]), device=state_BF.device)
            self.cache.state[index][rows] = state_BF.to(self.cache.state[index].dtype)

    def turns(self, head_width: int) -> Tensor | None:
        """`rotations` as version 0.1 had them; goes with 0.3."""
        warn("Context.turns(width)", "Context.rotations[width]", 1)
        return self.rotations[head_width]

    def keep(self, index: int, state_BF: Tensor) -> None:
        """The name of `save_state` in version 0.1; goes with 0.3."""
        warn("Context.keep", "Context.save_state", 1)
        self.save_state(index, state_BF)


class Sequences:
    """Samples of unequal length step by step, without padding: step t has token t of all samples that are longer than t.

    sample_B: the samples, the longest first.
    sizes: by step, the number of samples that are longer.
    order_T: the rows of the stream, step after step.
    back_T: the inverse of `order_T`.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        length_B = torch.tensor(lengths)
        self.sample_B = torch.argsort(length_B, descending=True, stable=True)
        start_B = length_B.cumsum(0) - length_B
        sorted_B = length_B[self.sample_B]
        steps = torch.arange(int(length_B.max()) if lengths else 0)
        longer = sorted_B[None] > steps[:, None]
        self.sizes = longer.sum(1)
        self.order_T = (start_B[self.sample_B][None] + steps[:, None])[longer].to(device)
        self.back_T = torch.empty_like(self.order_T)
        self.back_T[self.order_T] = torch.arange(len(self.order_T), device=device)
        self.sample_B = self.sample_B.to(device)

    def packed(self, stream_TD: Tensor) -> nn.utils.rnn.PackedSequence:
        """The stream as torch.nn's recurrent layers take it; initial states must be in the order of `sample_B`."""
        return nn.utils.rnn.PackedSequence(stream_TD[self.order_T], self.sizes)


class Sublayer(nn.Module):
    """A layer with its norm before it, if its merge wants one, and its merge after it."""

    def __init__(self, layer: Layer, core: CoreSettings, width: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.layer, self.in_width = layer, width
        self.norm = core.norm.build(width) if layer.merge.normed else nn.Identity()
        self.body = layer.build(core, width)
        self.merge_weights = layer.merge.weights(self.body.out_width, core.norm)
        self.width = layer.merge.width(width, self.body.out_width)
        self.dropout, self.drop_path = dropout, drop_path
        if drop_path and not layer.merge.keeps:
            raise ConfigError(
                f"Core: drop_path skips layers, but with {type(layer.merge).__name__} in {type(layer).__name__} nothing of the "
                "stream would be left; use Add, Gated or Concat, or drop_path=0"
            )

    def forward(self, stream_TD: Tensor, context: Context, wanted_N: Tensor | None = None) -> Tensor:
        """The stream after the layer, or only its wanted rows (N, D)."""
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
        """The update with dropout, and with stochastic depth, which drops the whole update of some samples."""
        if self.dropout:
            update_TD = F.dropout(update_TD, self.dropout)
        if self.drop_path:
            place = {"device": update_TD.device, "dtype": update_TD.dtype}
            survives_B1 = torch.rand(len(context.layout.spans), 1, **place) >= self.drop_path
            sample_T = context.sample_T
            # the other updates are scaled up, so that their expectation is the update of evaluation
            update_TD = update_TD * (survives_B1 / (1 - self.drop_path))[sample_T]
        return update_TD
