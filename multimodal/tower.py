"""Towers: a whole core, with its tokenizer and a connector, as the embedding of one kind, such as a vision tower.

value --inner tokenizer--> inner tokens --grouped--> tokens of the stream, one for several inner ones
rows of the stream <--connector-- states, grouped <--inner core-- inner tokens, taken apart again
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
from multimodal.shapes import ConfigError, MediaError, check_whole
from multimodal.tokenizer import Places, Tokenizer, Tokens

PLACED = 4  # numbers of a slot besides its content: time, row and column in steps, and the index of the inner token


class Connector(Declared, ABC):
    """How the states of inner tokens become rows of the stream. Subclass as a frozen dataclass and write `build`.

    A token of the stream has a slot for each inner token that it stands for. `group` fills the slots, `gather` makes one vector of
    the states in them, and the module of `build` maps these vectors to rows.
    """

    full: ClassVar[bool] = True
    """Whether every slot of every token holds an inner token; else `filled` says which."""

    @property
    def slots(self) -> int:
        """The most inner tokens that a token stands for."""
        return 1

    def group(self, position_NA: Tensor) -> Tensor:
        """(tokens, slots): the indices of the inner tokens of each token of the stream, -1 for an empty slot.

        position_NA: the positions of a value's inner tokens.

        Raises:
            MediaError: inner tokens that cannot be grouped.
        """
        return torch.arange(len(position_NA))[:, None]

    def place(self, position_NA: Tensor) -> Tensor:
        """The positions of tokens of the stream, from those of the inner tokens in their first slots."""
        return position_NA

    def learned(self, inner: int) -> int:
        """How many of a value's tokens in the stream are learned, if `inner` of its inner tokens are."""
        return inner

    def filled(self, lengths: Sequence[int], index_NT: Tensor) -> Tensor:
        """(tokens, slots): which slots hold an inner token.

        lengths: by value, its number of tokens in the stream. index_NT: what `group` gave for them.
        """
        return torch.ones_like(index_NT, dtype=torch.bool)

    def gathered(self, width: int) -> int:
        """The size of the vectors of `gather`, for states of this width."""
        return width

    def weights(self, width: int) -> nn.Module | None:
        """Make the learned parameters of `gather`, which belong to the tower; None: there are none."""
        return None

    def gather(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        """The vectors (tokens, `gathered`), from the states in all slots, with zeros in empty ones."""
        return state_NTD[:, 0]

    def padded(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        """`gather` where the number of filled slots may differ from call to call, as in an exported program."""
        return self.gather(state_NTD, filled_NT, weights)

    @abstractmethod
    def build(self, width: int, rows: int) -> nn.Module:
        """The module from the vectors of `gather` to rows of the stream.

        width: of the states. rows: the width of the stream.
        """


@dataclass(frozen=True)
class Linear(Connector):
    """A linear layer.

    bias: whether it has one.
    """

    bias: bool = True

    def build(self, width: int, rows: int) -> nn.Module:
        return nn.Linear(width, rows, self.bias)


@dataclass(frozen=True)
class Unchanged(Connector):
    """The vectors themselves, which must be as wide as the stream."""

    def build(self, width: int, rows: int) -> nn.Module:
        if width != rows:
            raise ConfigError(
                f"Unchanged: vectors are {width} wide and the stream {rows}; make them equal, or use Linear()"
            )
        return nn.Identity()


@dataclass(frozen=True)
class MLPConnector(Connector):
    """Two linear layers and an activation between them.

    hidden: hidden width; None: that of the stream.
    activation: one of those of `MLP`.
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
    """Concatenates the states of a square of patches, row by row, into one vector (the inverse of Shi et al. 2016).

    side: rows, and columns, of patches in a square.
    then: what maps the vectors to rows.
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
        times, rows, columns = (len(position_NA[:, axis].unique()) for axis in range(3))
        if times * rows * columns != len(position_NA):
            raise MediaError(f"PixelShuffle: {len(position_NA)} tokens are no whole grid of {rows} rows x {columns}")
        if rows % self.side or columns % self.side:
            raise MediaError(
                f"PixelShuffle: side={self.side} does not divide {rows} rows x {columns} columns of patches; bring pictures to a "
                "size that it divides"
            )
        grid = torch.arange(len(position_NA)).reshape(
            times, rows // self.side, self.side, columns // self.side, self.side
        )
        return grid.transpose(2, 3).reshape(-1, self.slots)

    def place(self, position_NA: Tensor) -> Tensor:
        return position_NA / torch.tensor([1, self.side, self.side])

    def gathered(self, width: int) -> int:
        return width * self.slots

    def gather(self, state_NTD: Tensor, filled_NT: Tensor, weights: Any) -> Tensor:
        return state_NTD.flatten(1)

    def build(self, width: int, rows: int) -> nn.Module:
        return self.then.build(self.gathered(width), rows)


@dataclass(frozen=True)
class Dropped(Connector):
    """Leaves the first inner tokens, such as a class token and registers, out of the stream; the inner core still reads them.

    The first `count` tokens of the stream carry them in a further slot, so a value needs at least `count` other tokens.

    count: number of inner tokens that are left out.
    then: the connector of the others.
    """

    count: int
    then: Connector = field(default_factory=Linear)
    full: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole("Dropped", least=1, count=self.count)
        check_part("Dropped: then", self.then, Connector, "Linear()")
        if isinstance(self.then, (Dropped, Pooled)):
            raise ConfigError(f"Dropped: then={self.then} chooses tokens by itself; give its own count or pool instead")

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
    """Pools a whole value into one token.

    most: the most inner tokens of a value. Contents are padded to this number, so choose it close.
    pool: how their states become one vector.
    then: what maps the vector to a row.
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
                f"Pooled: a value has {len(position_NA)} inner tokens, more than most={self.most}; shorten it, or raise most"
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
        raise ConfigError(f"{where}: then={then} would group what is grouped already; give Linear() or MLPConnector()")


@dataclass(frozen=True)
class Tower(Tokenizer):
    """A kind whose embedding is a whole core, between its own tokenizer and a connector.

    The inner core reads each value as if it were alone. The connector says for how many inner tokens a token of the stream stands:
    its content holds theirs, and its time is that of the first of them, or its index if times do not rise.

    tokenizer: turns a value into inner tokens, which are bidirectional unless it is causal.
    core: the inner core.
    connector: how its states become rows of the stream.
    causal: whether the tokens of the stream are causal, as in most vision-language models.
    weights: initial weights of the inner embedding and core; `of` sets them. They are not part of the declaration: the model's
        checkpoint has them.

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

    @classmethod
    def of(
        cls, source: Any, connector: Connector | None = None, *, kind: str | None = None, causal: bool = False
    ) -> Self:
        """A tower with the tokenizer, core and weights of a `Pretrained` or a `Model`; of an EncoderDecoder, those of its reader.

        kind: the kind that the tower reads; None: the only one, or the only one named "image" or "audio".

        Raises:
            ConfigError: no such kind.
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
        # data workers only encode, which needs no weights
        return {name: x for name, x in vars(self).items() if name != "weights"}

    @property
    def content_size(self) -> int:
        """Numbers of the content of one inner token."""
        return self.tokenizer.feature_size or 1

    @property
    def feature_size(self) -> int:
        return self.connector.slots * (self.content_size + PLACED)

    @property
    def step(self) -> tuple[float, float, float]:
        return self.tokenizer.step

    @property
    def learned(self) -> int:
        return self.connector.learned(self.tokenizer.learned)

    @property
    def lossy(self) -> bool:
        return self.tokenizer.lossy

    def encode(self, value: Any) -> Tokens:
        try:
            return self.grouped(self.tokenizer(value))
        except (MediaError, ConfigError) as error:
            raise type(error)(f"Tower.encode: {error}") from error

    def grouped(self, tokens: Tokens) -> Tokens:
        """The tokens of the stream for the inner tokens of a value.

        Raises:
            MediaError: the connector cannot group them.
        """
        index_NT = self.connector.group(tokens.position_NA)
        content_NF = tokens.content.float().reshape(len(tokens), -1)
        step = torch.tensor(self.step)
        slot_NF = torch.cat([content_NF, tokens.position_NA / step, torch.arange(len(tokens))[:, None]], 1)
        # the last row stands for empty slots
        slot_NF = torch.cat([slot_NF, torch.zeros(1, slot_NF.shape[1])])
        slot_NF[-1, -1] = -1
        position_NA = self.connector.place(tokens.position_NA[index_NT[:, 0]])
        if not bool((position_NA[:, 0].diff() > 0).all()):
            position_NA[:, 0] = torch.arange(len(position_NA)) * step[0]
        return Tokens(slot_NF[index_NT].flatten(1), position_NA)

    def inner_tokens(self, tokens: Tokens) -> Tokens:
        """The inner tokens of a value's tokens."""
        slot_NTF = tokens.content.reshape(len(tokens), self.connector.slots, -1)
        slot_NF = slot_NTF[slot_NTF[..., -1] >= 0]
        slot_NF = slot_NF[slot_NF[:, -1].argsort()]
        content, position_NA = slot_NF[:, :-PLACED], slot_NF[:, -PLACED:-1] * torch.tensor(self.step)
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
    """The tokenizers, the declaration of the core, and the weights of a model or of what declares one."""
    if isinstance(source, nn.Module):
        model: Any = source
        return model.packer.tokenizers, model.core.core, model.state_dict()
    return source.tokenizers, source.core, source.weights


class TowerEmbed(nn.Module):
    """The inner model and the connector.

    frozen_part: from (content, places) to one vector for each token of the stream; may be frozen, and then cached.
    connector: from these vectors to rows.
    cache: called instead of `frozen_part`, which is its first argument; None: no cache.
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
    """A connector without its map to rows, on which the vectors do not depend."""
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
        """What the vectors depend on besides the weights, as JSON values."""
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
        # neighbours of one length run as one batch
        ranks = torch.tensor(sorted(range(len(lengths)), key=lengths.__getitem__)).argsort()
        rank_N = ranks.repeat_interleave(torch.tensor(places.lengths)).to(content_NF.device)
        there = filled_NT.flatten().nonzero()[:, 0]
        slot_NF = slot_NTF.flatten(0, 1)[there]
        rank_N = rank_N.repeat_interleave(connector.slots)[there]
        order = slot_NF[:, -1].argsort(stable=True)
        order = order[rank_N[order].argsort(stable=True)]
        slot_NF, rank_N = slot_NF[order], rank_N[order]

        lengths = sorted(lengths)
        position_NA = slot_NF[:, -PLACED:-1].float()
        rows_ND = self._embedded(slot_NF[:, :-PLACED], position_NA, lengths)
        bidirectional = not self.tower.tokenizer.causal
        spans = tuple(Span(n if bidirectional else 0, n, n) for n in lengths)
        first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        number = torch.arange(len(rank_N), device=rank_N.device) - first.to(rank_N.device)[rank_N]
        ones = torch.ones_like(rank_N, dtype=torch.int32)
        info = MaskInfo(rank_N.int(), number.int(), ones * bidirectional, ones * 0)
        state_ND = self.core(rows_ND, position_NA, Layout(spans, info))

        gathered_ND = state_ND.new_zeros(filled_NT.numel(), state_ND.shape[1]).index_copy(0, there[order], state_ND)
        return connector.gather(gathered_ND.unflatten(0, (-1, connector.slots)), filled_NT, self.pool)

    def _lengths(self, lengths: Sequence[int], filled_NT: Tensor) -> list[int]:
        """By value, its number of inner tokens."""
        if self.tower.connector.full:  # avoids a synchronisation with the GPU
            return [n * self.tower.connector.slots for n in lengths]
        return [int(part.sum()) for part in filled_NT.cpu().split(list(lengths))]

    def _embedded(self, content: Tensor, position_NA: Tensor, lengths: Sequence[int]) -> Tensor:
        """The embedded inner tokens (N, D)."""
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
