"""The contract of every kind of data: a value goes in, tokens with positions come out.

    value --encode--> Tokens(content, position) --embed--> rows of the stream

`encode` is pure and runs in data workers. `embed` makes a module that runs on the device, once for all tokens of a kind.
"""

import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.notebook import tables_html
from multimodal.positions import in_steps
from multimodal.shapes import AXES, ConfigError, MediaError, StreamError
from multimodal.texts import shortened
from multimodal.value_files import write_value


@dataclass(frozen=True)
class Tokens:
    """The tokens of one value.

    content: ids (N,) int64 of a discrete kind, or features (N, F) float32 of a continuous one.
    position_NA: (N, A) float32, the position of each token on the axes of its kind (time, row, column), in the kind's own units.
    pairs: (E, 3) int64, the related pairs: number of the query token, number of the key token, number of the relation in
        `Tokenizer.relations`; None: there are none. They are used where the value is read, and not where it is written.

    Examples:
        >>> tokens = mm.Tokens(torch.tensor([4, 0, 7]), mm.at_times(torch.arange(3)))
        >>> len(tokens), tokens.position_NA[-1].tolist()
        (3, [2.0, 0.0, 0.0])
    """

    content: Tensor
    position_NA: Tensor
    pairs: Tensor | None = None

    def __len__(self) -> int:
        return self.content.shape[0]

    def _repr_html_(self) -> str:
        """For notebooks: the first tokens with their positions."""
        first = [
            (number, shortened(str(content), 100), str([round(x, 4) for x in place]))
            for number, (content, place) in enumerate(
                zip(self.content[:8].tolist(), self.position_NA[:8].tolist(), strict=False)
            )
        ]
        what = "ids" if self.content.ndim == 1 else f"features of {self.content.shape[-1]:,} numbers"
        pairs = f", {len(self.pairs):,} pairs" if self.pairs is not None else ""
        return tables_html(f"Tokens, {len(self):,} {what}{pairs}", {"number, content, position": first})

    def kept(self, keep_N: Tensor) -> "Tokens":
        """Some of the tokens, by a bool for each; a pair is kept if both of its tokens are."""
        pairs = self.pairs
        if pairs is not None:
            both = pairs[keep_N[pairs[:, 0]] & keep_N[pairs[:, 1]]]
            number_N = keep_N.cumsum(0) - 1
            pairs = torch.stack([number_N[both[:, 0]], number_N[both[:, 1]], both[:, 2]], 1)
        return Tokens(self.content[keep_N], self.position_NA[keep_N], pairs)


@dataclass(frozen=True)
class AfterEncoding:
    """A value of a sample, and changes of its tokens that whoever encodes the sample makes, such as augmentations in training.

    value: the value, as its kind takes it.
    changes: each gives the tokens for (tokens, their kind, a generator of numpy), in order.
    seed: of that generator, so that encoding twice gives the same tokens.
    """

    value: Any
    changes: tuple[Callable[[Tokens, "Tokenizer", np.random.Generator], Tokens], ...]
    seed: int

    def encoded(self, tokenizer: "Tokenizer", tokens: Tokens) -> Tokens:
        """The changed tokens; `tokens` are those of `value`."""
        draw = np.random.default_rng(self.seed)
        for change in self.changes:
            tokens = change(tokens, tokenizer, draw)
        return tokens


def at_times(time_N: Tensor, axes: Sequence[str] = AXES) -> Tensor:
    """Positions (N, A) of tokens at these times (N,), with 0 on all other axes: row 0, column 0."""
    position_NA = torch.zeros(len(time_N), len(axes))
    position_NA[:, 0] = time_N
    return position_NA


@dataclass(frozen=True)
class Places:
    """Where the tokens of one kind stand, for an embedding that depends on it (`reads_places = True`).

    The values lie end to end, as in the content.

    position_NA: (N, A) the position of each token within its value, in steps, on the axes of its kind.
    lengths: by value, its number of tokens.
    extents: by value, its size in times, rows, columns and so on: its largest position on each axis in steps, plus 1, rounded.
    """

    position_NA: Tensor
    lengths: tuple[int, ...]
    extents: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, values: Sequence[Tokens], step: tuple[float, ...]) -> "Places":
        """The places of the tokens of these values."""
        positions = [in_steps(tokens.position_NA, step) for tokens in values]
        extents = [tuple((position_NA.amax(0) + 1).round().int().tolist()) for position_NA in positions]
        return cls(torch.cat(positions), tuple(map(len, values)), tuple(extents))


class Tokenizer(Declared, ABC):
    """A kind of data. Subclass as a frozen dataclass; its fields are its whole configuration and must be JSON values.

    Declare `vocab_size` (discrete: content is ids) or `feature_size` (continuous: content is features), and write `encode`.
    Everything else has a default: an embedding table or a linear layer embeds, and nothing can be decoded.
    `multimodal.check.check_tokenizer` checks every promise below by name.

    Declared by attributes or fields:
    vocab_size: V, number of ids; None: content is features.
    feature_size: F, numbers per token; None: content is ids.
    one_hot: features come in groups of this many, of which one is 1 and the others are 0, or all are 0 where that is not known: the
    classes of each pixel of a patch. `EachRow` then answers a class for each group; None: features are any numbers.
    causal: whether a token that is read attends only to tokens before it (written tokens always do). `encode` must be causal
    too: the beginning of a value gives the beginning of its tokens.
    classes: whether a value is one of a fixed set of classes, or a set of several; it is then a single token.
    text: whether values are text (str), and `decode` accepts any ids, so that text can be shown while it is written.
    lossy: whether decode(encode(value)) may differ from the value, such as a sound with other phases; it must still be nearer
    to its own value than to others. If False, decode(encode(value)) is the value.
    length: number of tokens of every value that is written; None: the head decides when to stop.
    learned: number of tokens before those of the value itself, such as a class token; they are no part of its picture.
    axes: names of the position axes, whose number is A: time, row and column, and behind them those that only some kinds have,
    such as "voice" or "page". The core must know them too: `core.replace(axes=...)`.
    step: the distance on each axis that is one step for rotary positions, in the units of `position_NA`; with three numbers, that
    of time, row and column, and it is 1 on further axes.
    max_tokens: the most tokens of a value; a longer one raises a MediaError and is never cut.
    relations: names of the relations of tokens, which `Tokens.pairs` numbers and `masks.Linked` and `attention.Related` name.

    Methods to override: `encode`; to write the kind `decode` and `places`, or `next_place` where a token stands where contents say
    (and for features `written_features` and `fed_back`); `embed`; `picture`, `token_names` and `write` for people (`writes_files`
    says whether a kind has its own `write`); `wanted` for measures; `answered` where an answer belongs to some of the tokens only;
    `files` and `from_config` for large data. A kind that wraps another forwards `decodes`, `placed_by_content` and
    `check_tokens`, which `__call__` calls.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Digits(mm.Tokenizer):
        ...     vocab_size = 10
        ...     def encode(self, value):
        ...         return mm.Tokens(torch.tensor([int(digit) for digit in str(value)]), self.places(len(str(value))))
        >>> Digits()(407).content.tolist()
        [4, 0, 7]
    """

    vocab_size: int | None = None
    feature_size: int | None = None
    one_hot: int | None = None
    causal: bool = False
    classes: bool = False
    text: bool = False
    lossy: bool = False
    length: int | None = None
    learned: int = 0
    axes: tuple[str, ...] = AXES
    step: tuple[float, ...] = (1.0, 1.0, 1.0)
    max_tokens: ClassVar[int] = 65536
    relations: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, value: Any) -> Tokens:
        """Turn one value into tokens, on the CPU; the same value gives the same tokens in any process and folder.

        It has no side effects, neither on the value nor on the process (folder, environment, torch's settings, global generators).
        The tokens share no memory with the value, and represent all of it.

        Raises:
            ValueError: a value that cannot be encoded.
        """

    def decode(self, tokens: Tokens) -> Any:
        """Turn tokens back into a value.

        Raises:
            ConfigError: this kind can be read but not written.
        """
        raise ConfigError(f"{type(self).__name__} has no decode: this kind can be read but not written")

    @property
    def decodes(self) -> bool:
        """Whether `decode` is written, so that tokens can be turned back into values."""
        return type(self).decode is not Tokenizer.decode

    def wanted(self, value: Any) -> Any:
        """The answer that measures compare with: a text itself; for other kinds decode(encode(value)), such as the name of a class
        that was given by its number."""
        return value if self.text else self.decode(self(value, empty=True))

    def answered(self, tokens: Tokens) -> Tensor:
        """Which tokens (N,) of a value, as bool, have an answer of their own where a head such as `EachRow` answers token by token:
        the first piece of each word of a text, or the nodes of a graph but not its edges. By default all have."""
        return torch.ones(len(tokens), dtype=torch.bool)

    @property
    def written(self) -> "Tokenizer":
        """The tokenizer of this kind where a head writes it token by token: by default the same.

        It has the same ids. A text, say, has no tokens around it there.
        """
        return self

    @property
    def written_features(self) -> int | None:
        """How many features, the first ones, a head writes; the others are a function of the position (see `fed_back`)."""
        return self.feature_size

    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        """The content (N, F) that `encode` would give tokens whose written features have just been sampled, at these positions."""
        return features_NF

    def picture(self, tokens: Tokens) -> Tensor | None:
        """An image (Y, X, C) in 0..1 for display, which the tokens after the `learned` ones tile by rows and columns or along
        time; None: there is none."""
        return None

    def token_names(self, tokens: Tokens) -> list[str]:
        """A name for each token in figures and tables of attention, such as "row 2, column 0".

        By default a token is named by its piece of text, its row and column, its class, its id, its single feature or its time.
        """
        position, decodes = tokens.position_NA, self.decodes
        if self.text and decodes:
            pieces = [self.decode(Tokens(tokens.content[i : i + 1], position[i : i + 1])) for i in range(len(tokens))]
            # a token that is a part of a character decodes to the replacement character
            return [piece.replace("\ufffd", "·") or "·" for piece in pieces]
        if bool(position[:, 1:].any()):
            return self._names_by_place(position)
        if self.classes and self.vocab_size is not None and decodes:
            return [
                str(self.decode(Tokens(tokens.content[i : i + 1], position[i : i + 1]))) for i in range(len(tokens))
            ]
        if self.vocab_size is not None:
            return [str(i) for i in tokens.content.tolist()]
        if self.feature_size == 1:
            return [f"{number:.4g}" for number in tokens.content.flatten().tolist()]
        unit = "" if self.step[0] == 1 else " s"  # positions with other steps are seconds
        return [f"at {time:.4g}{unit}" for time in position[:, 0].tolist()]

    def _names_by_place(self, position_NA: Tensor) -> list[str]:
        """Names such as "row 2, column 0"; with further axes "row 2, column 0, page 1", or "at 0.5, voice 1" without rows."""
        grid = bool(position_NA[:, 1:3].any())
        further = [axis for axis in range(3, position_NA.shape[1]) if bool(position_NA[:, axis].any())]
        names = []
        for place in position_NA.tolist():
            first = f"row {place[1]:g}, column {place[2]:g}" if grid else f"at {place[0]:.4g}"
            names.append(", ".join([first, *(f"{self.axes[axis]} {place[axis]:g}" for axis in further)]))
        return names

    def write(self, value: Any, path: str | Path) -> Path:
        """Save a value as a file that other programs open, and return where it is: `path` with the ending of its format.

        By default a text is saved as .txt, a picture (C, Y, X) in 0..1 as .png, a sound (wave, rate) as .wav, another array as .npy
        and anything else as .json. Override it for a kind that has a format of its own; `generate --out`, `look` and the page of
        `serve` then write that.

        Raises:
            MediaError: no such file can hold the value.
        """
        return write_value(value, path, f"{type(self).__name__}.write")

    @property
    def writes_files(self) -> bool:
        """Whether this kind has a `write` of its own."""
        return type(self).write is not Tokenizer.write

    def embed(self, width: int) -> nn.Module:
        """Make the module that embeds content as (N, width), each token independently of the others.

        For a continuous kind the module must accept any finite features, not only those that `encode` gives, because a model
        writes others. Do not look features up in a table.

        Features are cast to the precision of the weights. A module with an attribute `full_precision = True` gets them in float32
        at least, so that bfloat16 does not round neighbouring positions to the same number. A module with an attribute
        `reads_places = True` is called with the content and its `Places`, for instance to convolve the frames of each value. To
        be exported as a program it has a method `padded(content, position_BNA, length_B)` for values side by side too, (B, N) of
        which each has `length_B` tokens: positions are in steps, and the rows (B, N, width) behind a value may be anything.

        Raises:
            ConfigError: neither vocab_size nor feature_size is declared.
        """
        if self.vocab_size is not None:
            table = nn.Embedding(self.vocab_size, width)
            nn.init.normal_(table.weight, std=0.02)
            return table
        if self.feature_size is None:
            raise ConfigError(
                f"{type(self).__name__} declares neither vocab_size nor feature_size; it needs one of them"
            )
        return nn.Linear(self.feature_size, width)

    def __call__(self, value: Any, *, empty: bool = False) -> Tokens:
        """Encode a value and check the tokens, so that no later step meets malformed ones.

        empty: accept a value without tokens, such as an empty text as an answer.

        Raises:
            MediaError: no tokens, too many, not finite, or of another shape or type than declared; the message names this class.
        """
        name = type(self).__name__
        try:
            tokens = self.encode(value)
        except (MediaError, ConfigError):
            raise
        except Exception as error:  # a user's encode may fail in any way; say where and on what
            raise MediaError(
                f"{name}.encode: cannot read {describe(value)}: {type(error).__name__}: {shortened(str(error), 200)}"
            ) from error
        if not isinstance(tokens, Tokens):
            raise MediaError(f"{name}.encode: gave {describe(tokens)}, wanted Tokens(content, position)")
        content, position_NA = tokens.content, tokens.position_NA
        for part, tensor in (("content", content), ("position", position_NA)):
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                raise MediaError(
                    f"{name}.encode: {part} is {describe(tensor)}, wanted a tensor with a row for each token"
                )
        count = len(tokens)
        if count == 0 and not empty:
            raise MediaError(
                f"{name}.encode: {describe(value)} gave no tokens; to leave a field out of a sample, give None"
            )
        if count > self.max_tokens:
            raise MediaError(
                f"{name}.encode: {describe(value)} gave {count} tokens, more than max_tokens={self.max_tokens}; "
                "shorten or shrink it first"
            )
        return self.check_tokens(tokens, value)

    def check_tokens(self, tokens: Tokens, value: Any) -> Tokens:
        """The tokens of a value, checked against what this kind declares; tensors of the declared shape for an empty value.

        Raises:
            MediaError: not finite, or of another shape or type than declared; the message names this class.
        """
        name, count = type(self).__name__, len(tokens)
        content, position_NA = tokens.content, tokens.position_NA
        # tensors of the right shape and type, because encoders often return torch.tensor([]) for an empty value
        if not count:
            return no_tokens(self)
        if position_NA.shape != (count, len(self.axes)) or position_NA.dtype != torch.float32:
            raise MediaError(
                f"{name}.encode: position is {position_NA.dtype} {tuple(position_NA.shape)}, "
                f"wanted float32 ({count}, {len(self.axes)}): {', '.join(self.axes)}"
            )
        if self.vocab_size is not None:
            if content.dim() != 1 or content.dtype != torch.int64:
                raise MediaError(
                    f"{name}.encode: content is {content.dtype} {tuple(content.shape)}, wanted ids: int64 (N,)"
                )
            low, high = (int(x) for x in content.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise MediaError(f"{name}.encode: ids run from {low} to {high}, outside 0..{self.vocab_size - 1}")
        else:
            if content.dim() != 2 or content.shape[1] != self.feature_size or content.dtype != torch.float32:
                raise MediaError(
                    f"{name}.encode: content is {content.dtype} {tuple(content.shape)}, "
                    f"wanted features: float32 (N, {self.feature_size})"
                )
            if not _finite(content):
                raise MediaError(
                    f"{name}.encode: {describe(value)} gave features that are not finite (NaN or infinity)"
                )
        if not _finite(position_NA):
            raise MediaError(f"{name}.encode: {describe(value)} gave positions that are not finite")
        if tokens.pairs is None:
            return tokens
        # encoders often return torch.tensor([]) for a value without pairs
        if isinstance(tokens.pairs, Tensor) and not tokens.pairs.numel():
            return Tokens(content, position_NA)
        check_pairs(self, tokens)
        return tokens

    def files(self) -> dict[str, bytes]:
        """Files, by name, that are saved beside the weights and passed to `from_config`; for data too large for `config`."""
        return {}

    def places(self, count: int) -> Tensor:
        """Positions (count, A) of the first tokens of a value that is being written; they must agree with `encode`."""
        return at_times(torch.arange(count, dtype=torch.float32), self.axes)

    def next_place(self, written: Tokens, content: Tensor) -> Tensor:
        """The position (A,) of the token with this content that is written after the tokens of a value so far; it must agree with
        `encode`.

        Override it where a token stands where contents say, such as a note whose time is the sum of the steps before it. A model
        may write any contents. By default the contents do not matter, and `places` has the positions.

        written: the tokens before it; 0 tokens before the first.
        content: its id (1,), or the features (1, F) that a head has written, the first `written_features`.
        """
        return self.places(len(written) + 1)[-1]

    @property
    def placed_by_content(self) -> bool:
        """Whether `next_place` depends on contents, so that positions are known one by one: by default whether it is overridden."""
        return type(self).next_place is not Tokenizer.next_place


def no_tokens(tokenizer: Tokenizer) -> Tokens:
    """The tokens of an empty value."""
    if tokenizer.vocab_size is not None:
        content = torch.zeros(0, dtype=torch.int64)
    else:
        content = torch.zeros(0, tokenizer.feature_size or 0)
    return Tokens(content, torch.zeros(0, len(tokenizer.axes)))


def with_next(tokenizer: Tokenizer, written: Tokens, content: Tensor) -> Tokens:
    """Written tokens and one more, with this content, at the position where it stands.

    content: its id (1,), or the features (1, F) that a head has written.

    Raises:
        StreamError: the tokenizer's `next_place` fails, or gives no finite position.
    """
    name, axes = type(tokenizer).__name__, tokenizer.axes
    try:
        place_A = tokenizer.next_place(written, content)
    except Exception as error:  # a user's next_place may fail in any way; say where
        raise StreamError(
            f"{name}.next_place: fails after {len(written)} tokens: {type(error).__name__}: {shortened(str(error), 200)}"
        ) from error
    if not isinstance(place_A, Tensor) or place_A.shape != (len(axes),) or not bool(place_A.isfinite().all()):
        raise StreamError(
            f"{name}.next_place: gave {describe(place_A)}, wanted finite numbers ({len(axes)},): {', '.join(axes)}"
        )
    place_1A = place_A[None].float()
    if tokenizer.vocab_size is None:
        content = tokenizer.fed_back(content, place_1A)
    return Tokens(torch.cat([written.content, content]), torch.cat([written.position_NA, place_1A]))


def written_tokens(tokenizer: Tokenizer, content: Tensor, after: Tokens | None = None) -> Tokens:
    """Tokens with these contents as a head writes them, each at the position where it stands.

    after: the tokens written before them, which are not in the result.

    Raises:
        ConfigError: this kind cannot be written. StreamError: its `next_place` fails.
    """
    after = no_tokens(tokenizer) if after is None else after
    first = len(after)
    if not tokenizer.placed_by_content:
        return Tokens(content, tokenizer.places(first + len(content))[first:])
    for i in range(len(content)):
        part = content[i : i + 1]
        after = with_next(tokenizer, after, part if part.dim() == 1 else part[:, : tokenizer.written_features])
    return Tokens(content, after.position_NA[first:])


def check_pairs(tokenizer: Tokenizer, tokens: Tokens) -> None:
    """Raise a MediaError unless the pairs are of tokens and relations that exist."""
    name, pairs, wanted = type(tokenizer).__name__, tokens.pairs, "int64 (E, 3): query, key, relation"
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 3:
        kind = f"{pairs.dtype} {tuple(pairs.shape)}" if isinstance(pairs, Tensor) else describe(pairs)
        raise MediaError(f"{name}.encode: pairs is {kind}, wanted {wanted}")
    for what, part, count in (
        ("tokens", pairs[:, :2], len(tokens)),
        ("relations", pairs[:, 2], len(tokenizer.relations)),
    ):
        if not 0 <= int(part.min()) <= int(part.max()) < count:
            raise MediaError(
                f"{name}.encode: pairs name {what} from {int(part.min())} to {int(part.max())}, but there are {count}"
                + ("; declare `relations`, their names" if not tokenizer.relations else "")
            )


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. The sum is tried first, since it is faster; it may overflow, so isfinite decides then."""
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def describe(value: Any, depth: int = 0) -> str:
    """A short description of a value for an error, of at most 200 characters: 'array (30, 48) uint8', 'str 'cat.png''."""
    name = type(value).__name__
    if isinstance(value, (tuple, list)) and len(value) <= 3 and depth < 3:
        inside = ", ".join(describe(v, depth + 1) for v in value)
        return shortened(f"{name} ({inside})", 200)
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return shortened(f"{name} {tuple(shape)} {getattr(value, 'dtype', '')}".rstrip(), 120)
    if isinstance(value, (str, bytes, bytearray)) and len(value) > 60:
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{name} {shortened(repr(value[:30]), 40)}... of {len(value)} {unit}"
    text = " ".join(_BRIEF.repr(value).split())
    if not isinstance(value, (str, bytes, bytearray)):
        text = re.sub(" at 0x[0-9a-f]+", "", text)  # where an object lies in memory tells nobody anything
    return f"{name} {shortened(text, 60)}"


_BRIEF = reprlib.Repr()  # looks at the first elements only; a list of a million takes no time
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60
