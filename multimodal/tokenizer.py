"""The contract of every kind of data: a value goes in, tokens with positions come out.

    value --encode--> Tokens(content, position) --embed--> rows of the stream

`encode` is pure and runs in data workers. `embed` makes a module that runs on the device, once for all tokens of a kind.
"""

import math
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.declare import Declared
from multimodal.shapes import ConfigError, MediaError
from multimodal.texts import shortened


@dataclass(frozen=True)
class Tokens:
    """The tokens of one value.

    content: ids (N,) int64 of a discrete kind, or features (N, F) float32 of a continuous one.
    position_NA: (N, 3) float32, the position of each token: time, row, column, in the tokenizer's own units.

    Examples:
        >>> tokens = mm.Tokens(torch.tensor([4, 0, 7]), mm.at_times(torch.arange(3)))
        >>> len(tokens), tokens.position_NA[-1].tolist()
        (3, [2.0, 0.0, 0.0])
    """

    content: Tensor
    position_NA: Tensor

    def __len__(self) -> int:
        return self.content.shape[0]


def at_times(time_N: Tensor) -> Tensor:
    """Positions (N, 3) of tokens at these times (N,), with row 0 and column 0."""
    position_NA = torch.zeros(len(time_N), 3)
    position_NA[:, 0] = time_N
    return position_NA


@dataclass(frozen=True)
class Places:
    """Where the tokens of one kind stand, for an embedding that depends on it (`reads_places = True`).

    The values lie end to end, as in the content.

    position_NA: (N, 3) the position of each token within its value, in steps.
    lengths: by value, its number of tokens.
    extents: by value, its size in times, rows and columns: its largest position on each axis in steps, plus 1, rounded.
    """

    position_NA: Tensor
    lengths: tuple[int, ...]
    extents: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, values: Sequence[Tokens], step: tuple[float, float, float]) -> "Places":
        """The places of the tokens of these values."""
        positions = [tokens.position_NA / torch.tensor(step) for tokens in values]
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
    causal: whether a token that is read attends only to tokens before it (written tokens always do). `encode` must be causal
    too: the beginning of a value gives the beginning of its tokens.
    classes: whether a value is one of a fixed set of classes, or a set of several; it is then a single token.
    text: whether values are text (str), and `decode` accepts any ids, so that text can be shown while it is written.
    lossy: whether decode(encode(value)) may differ from the value, such as a sound with other phases; it must still be nearer
    to its own value than to others. If False, decode(encode(value)) is the value.
    length: number of tokens of every value that is written; None: the head decides when to stop.
    learned: number of tokens before those of the value itself, such as a class token; they are no part of its picture.
    step: the distance in (time, row, column) that is one step for rotary positions, in the units of `position_NA`.
    max_tokens: the most tokens of a value; a longer one raises a MediaError and is never cut.

    Methods to override: `encode`; to write the kind `decode` and `places` (and for features `written_features` and `fed_back`);
    `embed`; `picture` and `token_names` for display; `wanted` for measures; `files` and `from_config` for large data.

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
    causal: bool = False
    classes: bool = False
    text: bool = False
    lossy: bool = False
    length: int | None = None
    learned: int = 0
    step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    max_tokens: ClassVar[int] = 65536

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

    def wanted(self, value: Any) -> Any:
        """The answer that measures compare with: a text itself; for other kinds decode(encode(value)), such as the name of a class
        that was given by its number."""
        return value if self.text else self.decode(self(value, empty=True))

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
        """A name for each token in figures and tables of attention: "mean smoothness", "row 2, column 0".

        By default a token is named by its piece of text, its row and column, its class, its id, its single feature or its time.
        """
        position = tokens.position_NA
        if self.text:
            pieces = [self.decode(Tokens(tokens.content[i : i + 1], position[i : i + 1])) for i in range(len(tokens))]
            # a token that is a part of a character decodes to the replacement character
            return [piece.replace("\ufffd", "·") or "·" for piece in pieces]
        if bool(position[:, 1:].any()):
            return [f"row {r:g}, column {c:g}" for _, r, c in position.tolist()]
        if self.classes and self.vocab_size is not None:
            return [
                str(self.decode(Tokens(tokens.content[i : i + 1], position[i : i + 1]))) for i in range(len(tokens))
            ]
        if self.vocab_size is not None:
            return [str(i) for i in tokens.content.tolist()]
        if self.feature_size == 1:
            return [f"{number:.4g}" for number in tokens.content.flatten().tolist()]
        unit = "" if self.step[0] == 1 else " s"  # positions with other steps are seconds
        return [f"at {time:.4g}{unit}" for time, _, _ in position.tolist()]

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
        # tensors of the right shape and type, because encoders often return torch.tensor([]) for an empty value
        if not count:
            shape = (0,) if self.vocab_size is not None else (0, self.feature_size or 0)
            dtype = torch.int64 if self.vocab_size is not None else torch.float32
            return Tokens(torch.zeros(shape, dtype=dtype), torch.zeros(0, 3))
        if position_NA.shape != (count, 3) or position_NA.dtype != torch.float32:
            raise MediaError(
                f"{name}.encode: position is {position_NA.dtype} {tuple(position_NA.shape)}, "
                f"wanted float32 ({count}, 3): time, row, column"
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
        return tokens

    def files(self) -> dict[str, bytes]:
        """Files, by name, that are saved beside the weights and passed to `from_config`; for data too large for `config`."""
        return {}

    def places(self, count: int) -> Tensor:
        """Positions (count, 3) of the first tokens of a value that is being written; they must agree with `encode`."""
        return at_times(torch.arange(count, dtype=torch.float32))


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
