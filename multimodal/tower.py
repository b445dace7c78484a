"""Towers: an encoder (tokenizer, core and connector) that embeds one kind, such as a vision tower for images.

encode: value --inner tokenizer--> inner tokens --connector.group--> stream tokens, each with the content of several inner tokens
embed:  content of stream tokens --> inner tokens --inner core--> states --connector.gather, build--> embeddings in the stream

Inner tokens are those of the tower; stream tokens are those that the model's core reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.attention import Layout, Span
from multimodal.core import Core
from multimodal.declare import Declared, check_part, declaration, override, rebuild
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.heads.pool import Mean, Pool
from multimodal.layers.mlp import ACTIVATIONS
from multimodal.masks import MaskInfo
from multimodal.positions import check_known, on_axes, steps_of
from multimodal.relations import named_relations
from multimodal.shapes import ConfigError, MediaError, check_whole
from multimodal.tokenizer import Places, Tokenizer, Tokens


class Connector(Declared, ABC):
    """How the states of inner tokens become embeddings of stream tokens. Subclass as a frozen dataclass and write `build`.

    A stream token has one slot for each of its inner tokens. `group` assigns inner tokens to slots, `gather` combines the states in
    the slots of a token into one vector, and the module that `build` makes maps the vectors to the width of the stream.

    Shapes: N stream tokens, T slots of each, D the width of the inner core, A position axes. `group` and `place` get one value.
    """

    full: ClassVar[bool] = True
    """Whether every slot always holds an inner token. If False, override `filled`."""

    @property
    def slots(self) -> int:
        """T, the number of slots of a stream token."""
        return 1

    def group(self, position_NA: Tensor) -> Tensor:
        """The index (N, T) of the inner token in each slot; -1: the slot is empty.

        position_NA: the positions (inner tokens, A) of one value.

        Raises:
            MediaError: the inner tokens cannot be grouped.
        """
        return torch.arange(len(position_NA))[:, None]

    def place(self, position_NA: Tensor) -> Tensor:
        """The positions (N, A) of stream tokens. position_NA: of the inner token in the first slot of each."""
        return position_NA

    def learned(self, inner: int) -> int:
        """The number of learned stream tokens of a value of which `inner` inner tokens are learned, such as a class token."""
        return inner

    def filled(self, lengths: Sequence[int], index_NT: Tensor) -> Tensor:
        """Which slots hold an inner token: (N, T) bool, for several values end to end.

        lengths: the number of stream tokens of each value. index_NT: the results of `group`.
        """
        return torch.ones_like(index_NT, dtype=torch.bool)

    def gathered(self, width: int) -> int:
        """F, the size of the vectors that `gather` returns. width: D, of the states."""
        return width

    def weights(self, width: int) -> nn.Module | None:
        """Make the parameters of `gather`, for states of width D; None: it has none. They are part of `TowerEmbed.frozen_part`."""
        return None

    def gather(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        """The vectors (N, F) of stream tokens.

        state_NTD: the states in all slots, zeros in empty ones. weights: what `weights` made.
        """
        return state_NTD[:, 0]

    def padded(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        """`gather` for exported programs: written so that it can be traced for any `filled_NT`."""
        return self.gather(state_NTD, filled_NT, weights)

    @abstractmethod
    def build(self, width: int, rows: int) -> nn.Module:
        """Make the module that maps the vectors (N, F) of `gather` to embeddings in the stream.

        width: D, of the states. rows: the width of the stream, which is the output size.
        """


@dataclass(frozen=True)
class Linear(Connector):
    """A linear layer on each state.

    bias: whether it has a bias.
    """

    bias: bool = True

    def build(self, width: int, rows: int) -> nn.Module:
        return nn.Linear(width, rows, self.bias)


@dataclass(frozen=True)
class Unchanged(Connector):
    """No map: the vectors must be as wide as the stream."""

    def build(self, width: int, rows: int) -> nn.Module:
        if width != rows:
            raise ConfigError(
                f"Unchanged: vectors are {width} wide and the stream {rows}; make them equal, or use Linear()"
            )
        return nn.Identity()


@dataclass(frozen=True)
class MLPConnector(Connector):
    """Two linear layers with an activation between them, on each state.

    hidden: hidden width; None: the width of the stream.
    activation: as in `MLP`.
    bias: whether the layers have biases.
    """

    hidden: int | None = None
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.hidden is not None:
            check_whole("MLPConnector", least=1, hidden=self.hidden)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"MLPConnector: activation={self.activation!r} must be one of {', '.join(map(repr, ACTIVATIONS))}"
            )

    def build(self, width: int, rows: int) -> nn.Module:
        return _TwoLayers(width, self.hidden or rows, rows, self.activation, self.bias)


class _TwoLayers(nn.Module):
    def __init__(self, width: int, hidden: int, rows: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias), nn.Linear(hidden, rows, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, vector_NF: Tensor) -> Tensor:
        return self.down(self.activation(self.up(vector_NF)))


@dataclass(frozen=True)
class PixelShuffle(Connector):
    """Merges squares of patches into one token: concatenates their states row by row (the inverse of Shi et al. 2016).

    side: patches on one side of a square.
    then: the connector that maps the vectors (N, side * side * D) to the width of the stream.
    """

    side: int
    then: Connector = field(default_factory=lambda: Linear(bias=False))

    def __post_init__(self) -> None:
        check_whole("PixelShuffle", least=1, side=self.side)
        _check_last("PixelShuffle", self.then)

    @property
    def slots(self) -> int:
        return self.side**2

    def group(self, position_NA: Tensor) -> Tensor:
        rows, columns = (len(position_NA[:, axis].unique()) for axis in (1, 2))
        others = [axis for axis in range(position_NA.shape[1]) if axis not in (1, 2)]
        times = len(
            position_NA[:, others].unique(dim=0)
        )  # with further axes, such as pages, as many grids as there are of these
        if times * rows * columns != len(position_NA):
            raise MediaError(
                f"PixelShuffle: {len(position_NA)} tokens are no whole grid of {rows} rows x {columns} columns"
            )
        if rows % self.side or columns % self.side:
            raise MediaError(
                f"PixelShuffle: side={self.side} does not divide {rows} rows x {columns} columns of patches; resize pictures so "
                "that it does"
            )
        grid = torch.arange(len(position_NA)).reshape(
            times, rows // self.side, self.side, columns // self.side, self.side
        )
        return grid.transpose(2, 3).reshape(-1, self.slots)

    def place(self, position_NA: Tensor) -> Tensor:
        return position_NA / steps_of((1, self.side, self.side), position_NA.shape[1])

    def gathered(self, width: int) -> int:
        return width * self.slots

    def gather(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        return state_NTD.flatten(1)

    def build(self, width: int, rows: int) -> nn.Module:
        return self.then.build(self.gathered(width), rows)


@dataclass(frozen=True)
class Dropped(Connector):
    """Drops the first inner tokens, such as a class token and registers, after the inner core has read them.

    The first `count` stream tokens of a value transport the dropped ones in one more slot, so it needs at least `count` of them.

    count: number of dropped inner tokens.
    then: the connector of the other inner tokens.
    """

    count: int
    then: Connector = field(default_factory=Linear)
    full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("Dropped", least=1, count=self.count)
        check_part("Dropped: then", self.then, Connector, "Linear()")
        if isinstance(self.then, (Dropped, Pooled)):
            raise ConfigError(f"Dropped: then={self.then} chooses tokens by itself; use its count or pool instead")

    @property
    def slots(self) -> int:
        return self.then.slots + 1

    def group(self, position_NA: Tensor) -> Tensor:
        index_NT = self.then.group(position_NA[self.count :]) + self.count
        if len(index_NT) < self.count:
            raise MediaError(
                f"Dropped: {len(index_NT)} tokens cannot carry count={self.count} others; give a larger value, or drop fewer"
            )
        index_N = torch.full((len(index_NT), 1), -1)
        index_N[: self.count, 0] = torch.arange(self.count)
        return torch.cat([index_NT, index_N], 1)

    def place(self, position_NA: Tensor) -> Tensor:
        return self.then.place(position_NA)

    def learned(self, inner: int) -> int:
        return max(inner - self.count, 0)

    def filled(self, lengths: Sequence[int], index_NT: Tensor) -> Tensor:
        carries = [torch.arange(length) < self.count for length in lengths]
        carries_N = torch.cat(carries).to(index_NT.device)[:, None]
        return torch.cat([self.then.filled(lengths, index_NT[:, :-1]), carries_N], 1)

    def gathered(self, width: int) -> int:
        return self.then.gathered(width)

    def weights(self, width: int) -> nn.Module | None:
        return self.then.weights(width)

    def gather(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        return self.then.gather(state_NTD[:, :-1], filled_NT[:, :-1], weights)

    def padded(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        return self.then.padded(state_NTD[:, :-1], filled_NT[:, :-1], weights)

    def build(self, width: int, rows: int) -> nn.Module:
        return self.then.build(width, rows)


@dataclass(frozen=True)
class Pooled(Connector):
    """Pools the states of a whole value into one token.

    most: the largest number of inner tokens of a value. Every value is padded to it, so choose no more than you need.
    pool: how the states become one vector.
    then: the connector that maps the vector to the width of the stream.
    """

    most: int
    pool: Pool = field(default_factory=Mean)
    then: Connector = field(default_factory=Linear)
    full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("Pooled", least=1, most=self.most)
        check_part("Pooled: pool", self.pool, Pool, "First()")
        _check_last("Pooled", self.then)

    @property
    def slots(self) -> int:
        return self.most

    def group(self, position_NA: Tensor) -> Tensor:
        if len(position_NA) > self.most:
            raise MediaError(
                f"Pooled: a value has {len(position_NA)} inner tokens, more than most={self.most}; shorten it, or raise most "
                "if the core of the tower has positions for more"
            )
        index_N = torch.full((self.most,), -1)
        index_N[: len(position_NA)] = torch.arange(len(position_NA))
        return index_N[None]

    def place(self, position_NA: Tensor) -> Tensor:
        return torch.zeros_like(position_NA)

    def learned(self, inner: int) -> int:
        return 0

    def filled(self, lengths: Sequence[int], index_NT: Tensor) -> Tensor:
        return F.pad(index_NT[:, 1:] > -0.5, (1, 0), value=True)

    def gathered(self, width: int) -> int:
        return self.pool.width(width)

    def weights(self, width: int) -> nn.Module | None:
        return self.pool.weights(width)

    def gather(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        parts, lengths = [], []
        for state_TD, count in zip(state_NTD, filled_NT.sum(1).tolist(), strict=True):
            first, last = self.pool.rows(count)
            parts.append(state_TD[first:last])
            lengths.append(last - first)
        return self.pool.pool(torch.cat(parts), lengths, weights)

    def padded(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        total_N = filled_NT.sum(1)
        order_NT = torch.where(filled_NT, filled_NT.cumsum(1) - 1, total_N[:, None])
        return self.pool.padded(state_NTD, order_NT, total_N, weights)

    def build(self, width: int, rows: int) -> nn.Module:
        return self.then.build(self.gathered(width), rows)


def _check_last(where: str, then: Any) -> None:
    check_part(f"{where}: then", then, Connector, "Linear()")
    if isinstance(then, (PixelShuffle, Dropped, Pooled)):
        raise ConfigError(f"{where}: then={then} would group tokens a second time; use Linear() or MLPConnector()")


@dataclass(frozen=True)
class Tower(Tokenizer):
    """A kind that is embedded by an encoder of its own: a tokenizer, an inner core and a connector, such as a vision tower.

    The inner core reads each value by itself. The connector groups inner tokens into stream tokens. A stream token has the content
    of its inner tokens, and its time is the time of the first of them, or its index if these times do not increase. The relations
    of inner tokens are not kept.

    tokenizer: turns a value into inner tokens. Attention among them is bidirectional unless it is causal.
    core: the inner core.
    connector: how the states of the inner core become embeddings in the stream.
    causal: whether attention among the stream tokens is causal, as in most vision-language models.
    weights: initial weights of the inner embedding and core; `of` sets them. They are stored in the model's checkpoint, not in its
        declaration.

    Examples:
        >>> eye = mm.Tower.of(model, mm.tower.PixelShuffle(5), kind="image")
        >>> seeing = mm.Model({"image": eye, "text": TextBytes()}, mm.Core.tiny(), ["image text -> text"])
        >>> len(model.packer.tokenizers["image"](square)), len(eye(square))
        (25, 1)
    """

    tokenizer: Tokenizer
    core: Core
    connector: Connector = field(default_factory=Linear)
    causal: bool = False
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_part("Tower: tokenizer", self.tokenizer, Tokenizer, "ImagePatches()")
        check_part("Tower: core", self.core, Core, "Core.small()")
        check_part("Tower: connector", self.connector, Connector, "Linear()")
        kind = {type(self.tokenizer).__name__: self.tokenizer.axes}
        check_known("Tower: ", kind, self.core.axes, "core.replace(axes={axes}), where core is that of the tower")
        if names := named_relations(self.core):
            raise ConfigError(
                f"Tower: its core names the relations {', '.join(names)}, but a tower's content has no place for pairs of tokens; "
                "let the model's own core read this kind"
            )

    @classmethod
    def of(
        cls, source: Any, connector: Connector | None = None, *, kind: str | None = None, causal: bool = False
    ) -> Self:
        """Make a tower from the tokenizer, core and weights of a `Pretrained` or a `Model`; of an EncoderDecoder, from its reader.

        kind: the kind that the tower embeds; None: the only kind, or the only one named "image" or "audio".

        Raises:
            ConfigError: there is no such kind.
        """
        tokenizers, core, weights = _parts(source)
        kinds = list(tokenizers)
        if kind is None:
            likely = [name for name in kinds if name in ("image", "audio")]
            kind = kinds[0] if len(kinds) == 1 else likely[0] if len(likely) == 1 else None
        if kind not in kinds:
            raise ConfigError(f"Tower.of: kind={kind!r} is none of its kinds, which are {', '.join(kinds)}; name one")
        before = "core."
        if isinstance(core, EncoderDecoder):
            core, before = core.reader, "core.reader."
        found = {}
        for inner, outer in (("embed.", f"embeds.{kind}."), ("core.", before)):
            found |= {inner + name.removeprefix(outer): x for name, x in weights.items() if name.startswith(outer)}
        return cls(tokenizers[kind], core, connector or Linear(), causal, weights=found)

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in super().config().items() if name != "weights"}

    def __getstate__(self) -> dict[str, Any]:
        # data workers only encode; they need no weights
        return {name: x for name, x in vars(self).items() if name != "weights"}

    @property
    def content_size(self) -> int:
        """Numbers in the content of one inner token."""
        return self.tokenizer.feature_size or 1

    @property
    def feature_size(self) -> int:
        return self.connector.slots * (self.content_size + self.placed)

    @property
    def placed(self) -> int:
        """Numbers of a slot besides its content: the position of the inner token on each axis in steps, and its index."""
        return len(self.axes) + 1

    @property
    def axes(self) -> tuple[str, ...]:
        return self.tokenizer.axes

    @property
    def step(self) -> tuple[float, ...]:
        return self.tokenizer.step

    @property
    def learned(self) -> int:
        return self.connector.learned(self.tokenizer.learned)

    @property
    def lossy(self) -> bool:
        return self.tokenizer.lossy

    def encode(self, value: Any) -> Tokens:
        try:
            tokens = self.tokenizer(value)
            most, times = self.core.learned_times, tokens.position_NA[:, 0] / self.step[0]
            # the inner core would refuse it too, but without the names of the sample and the field
            if most is not None and len(tokens) and (count := int(times.max().round()) + 1) > most:
                raise MediaError(
                    f"it has {count} tokens, and the core of the tower has learned positions for {most}; shorten it, because "
                    "positions that were never trained mean nothing"
                )
            return self.grouped(tokens)
        except (MediaError, ConfigError) as error:
            raise type(error)(f"Tower.encode: {error}") from error

    def grouped(self, tokens: Tokens) -> Tokens:
        """Group the inner tokens of a value into stream tokens. Their content is (N, T * (F + A + 1)).

        Raises:
            MediaError: the connector cannot group them.
        """
        index_NT = self.connector.group(tokens.position_NA)
        content_NF = tokens.content.float().reshape(len(tokens), -1)
        step = steps_of(self.step, len(self.axes))
        slot_NF = torch.cat([content_NF, tokens.position_NA / step, torch.arange(len(tokens))[:, None]], 1)
        # index -1, an empty slot, looks up the last row
        slot_NF = torch.cat([slot_NF, torch.zeros(1, slot_NF.shape[1])])
        slot_NF[-1, -1] = -1
        position_NA = self.connector.place(tokens.position_NA[index_NT[:, 0]])
        if not bool((position_NA[:, 0].diff() > 0).all()):
            position_NA[:, 0] = torch.arange(len(position_NA)) * step[0]
        return Tokens(slot_NF[index_NT].flatten(1), position_NA)

    def inner_tokens(self, tokens: Tokens) -> Tokens:
        """The inner tokens of a value, from its stream tokens: the inverse of `grouped`."""
        slot_NTF = tokens.content.reshape(len(tokens), self.connector.slots, -1)
        slot_NF = slot_NTF[slot_NTF[..., -1] >= 0]
        slot_NF = slot_NF[slot_NF[:, -1].argsort()]
        content, position_NA = slot_NF[:, : -self.placed], slot_NF[:, -self.placed : -1]
        position_NA = position_NA * steps_of(self.step, len(self.axes))
        return Tokens(content if self.tokenizer.vocab_size is None else content[:, 0].round().long(), position_NA)

    def picture(self, tokens: Tokens) -> Tensor | None:
        return self.tokenizer.picture(self.inner_tokens(tokens))

    def embed(self, width: int) -> nn.Module:
        made = TowerEmbed(self, width)
        if self.weights is not None and not next(made.parameters()).is_meta:
            missing, foreign = made.frozen_part.load_state_dict(dict(self.weights), strict=False)
            missing = [name for name in missing if not name.startswith("pool.")]
            if missing or foreign:
                raise ConfigError(f"Tower: its weights do not fit its core: {', '.join([*missing, *foreign][:3])}")
        return made

    def files(self) -> dict[str, bytes]:
        return self.tokenizer.files()

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        inner = config.get("tokenizer")
        made = rebuild(inner, files) if isinstance(inner, dict) else inner
        return super().from_config({**config, "tokenizer": made}, files)


def _parts(source: Any) -> tuple[Mapping[str, Tokenizer], Any, Mapping[str, Tensor]]:
    """Return (tokenizers, declaration of the core, weights) of a `Model` or a `Pretrained`."""
    if isinstance(source, nn.Module):
        model: Any = source
        return model.packer.tokenizers, model.core.core, model.state_dict()
    return source.tokenizers, source.core, source.weights


class TowerEmbed(nn.Module):
    """The embedding module of a `Tower`.

    frozen_part: maps (content, places) to one vector (F,) for each stream token. If it is frozen, its vectors can be cached.
    connector: maps these vectors to embeddings in the stream.
    cache: called as cache(frozen_part, content, places) instead of `frozen_part`; None: no cache.
    """

    cache: Callable[[nn.Module, Tensor, Places], Tensor] | None = None
    reads_places = True
    full_precision = True  # the positions of inner tokens are in the content

    def __init__(self, tower: Tower, width: int) -> None:
        super().__init__()
        self.frozen_part = _Inner(tower)
        self.connector = tower.connector.build(tower.core.width, width)

    def forward(self, content_NF: Tensor, places: Places) -> Tensor:
        if self.cache is None:
            vector_NF = self.frozen_part(content_NF, places)
        else:
            vector_NF = self.cache(self.frozen_part, content_NF, places)
        weight = next(self.connector.parameters(), None)
        return self.connector(vector_NF if weight is None else vector_NF.to(weight.dtype))


def _grouping(connector: Any) -> Any:
    """The connector with its last map replaced by `Linear()`: the vectors of `gather` do not depend on that map."""
    if type(connector) in (Linear, MLPConnector):
        return Linear()
    then = getattr(connector, "then", None)
    return connector if then is None else override(connector, then=_grouping(then))


class _Inner(nn.Module):
    """The inner embedding and core, and the learned parameters of the connector's `gather`."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.embed = tower.tokenizer.embed(tower.core.width)
        self.core = tower.core.build()
        self.pool = tower.connector.weights(tower.core.width)

    def declared(self) -> dict[str, Any]:
        """All that the vectors depend on, except weights, as JSON values."""
        parts = {
            "tokenizer": self.tower.tokenizer,
            "core": self.tower.core,
            "connector": _grouping(self.tower.connector),
        }
        return {name: declaration(part) for name, part in parts.items()}

    def forward(self, content_NF: Tensor, places: Places) -> Tensor:
        connector = self.tower.connector
        slot_NTF = content_NF.reshape(len(content_NF), connector.slots, -1)
        filled_NT = connector.filled(places.lengths, slot_NTF[..., -1])
        lengths = self._lengths(places.lengths, filled_NT)
        # values are sorted by length, because neighbours of equal length run as one batch
        ranks = torch.tensor(sorted(range(len(lengths)), key=lengths.__getitem__)).argsort()
        rank_N = ranks.repeat_interleave(torch.tensor(places.lengths)).to(content_NF.device)
        there = filled_NT.flatten().nonzero()[:, 0]
        slot_NF = slot_NTF.flatten(0, 1)[there]
        rank_N = rank_N.repeat_interleave(connector.slots)[there]
        order = slot_NF[:, -1].argsort(stable=True)
        order = order[rank_N[order].argsort(stable=True)]
        slot_NF, rank_N = slot_NF[order], rank_N[order]

        lengths = sorted(lengths)
        placed = self.tower.placed
        position_NA = slot_NF[:, -placed:-1].float()
        rows_ND = self._embedded(slot_NF[:, :-placed], position_NA, lengths)
        bidirectional = not self.tower.tokenizer.causal
        spans = tuple(Span(n if bidirectional else 0, n, n) for n in lengths)
        first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        number = torch.arange(len(rank_N), device=rank_N.device) - first.to(rank_N.device)[rank_N]
        ones = torch.ones_like(rank_N, dtype=torch.int32)
        info = MaskInfo(rank_N.int(), number.int(), ones * bidirectional, ones * 0)
        position_NA = on_axes(position_NA, self.tower.axes, self.tower.core.axes)
        state_ND = self.core(rows_ND, position_NA, Layout(spans, info))

        gathered_ND = state_ND.new_zeros(filled_NT.numel(), state_ND.shape[1]).index_copy(0, there[order], state_ND)
        return connector.gather(gathered_ND.unflatten(0, (-1, connector.slots)), filled_NT, self.pool)

    def _lengths(self, lengths: Sequence[int], filled_NT: Tensor) -> list[int]:
        """The number of inner tokens of each value."""
        if self.tower.connector.full:  # avoids a synchronisation with the GPU
            return [n * self.tower.connector.slots for n in lengths]
        return [int(part.sum()) for part in filled_NT.cpu().split(list(lengths))]

    def _embedded(self, content: Tensor, position_NA: Tensor, lengths: Sequence[int]) -> Tensor:
        """The embeddings (N, D) of inner tokens."""
        tokenizer, dtype = self.tower.tokenizer, next(self.core.parameters()).dtype
        if tokenizer.vocab_size is not None:
            content = content[:, 0].round().long().clamp(0, tokenizer.vocab_size - 1)
        elif not getattr(self.embed, "full_precision", False):
            content = content.to(dtype)
        if not getattr(self.embed, "reads_places", False):
            rows_ND = self.embed(content)
        else:
            values = [Tokens(content[:0], part_NA.cpu()) for part_NA in position_NA.split(list(lengths))]
            places = Places.of(values, (1.0, 1.0, 1.0))
            rows_ND = self.embed(content, Places(position_NA, tuple(lengths), places.extents))
        return rows_ND if torch.is_autocast_enabled(rows_ND.device.type) else rows_ND.to(dtype)
