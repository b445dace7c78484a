"""Kinds made of other kinds: a value is a sequence of parts, each with its own tokens, embedding and segment of the stream.

    {"picture": .., "caption": ..} --pieces--> ("picture", ..), ("caption", ..)
        --encode--> mark 0, tokens of the picture, mark 1, tokens of the caption          (`Composed`: one run for each)

Before every piece stands a mark, a learned token that says which part follows, so that the tokens also tell which entry is missing,
and where one text ends and the next begins.
"""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self
from zlib import crc32

import torch
from torch import Tensor, nn

from multimodal.declare import find, rebuild
from multimodal.shapes import AXES, ConfigError, MediaError, did_you_mean
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, at_times, describe, no_tokens, written_tokens


class Run(NamedTuple):
    """Consecutive tokens of one part.

    path: the part, "picture" or, of parts of parts, "figure.picture"; "" for the marks of the composite itself, and "figure" for
        those of a composite within it.
    tokens: its tokens.
    """

    path: str
    tokens: Tokens


@dataclass(frozen=True, init=False, eq=False)
class Composed(Tokens):
    """The tokens of a composite value: runs of tokens of its parts.

    As plain tokens they have positions (N, A) in steps, where the time of a run follows that of the run before, and contents
    (N, F), which are for comparisons and pictures only: a number for the part, and its ids or features.

    runs: the runs, in order; none is empty.
    steps: by run, the `step` of its tokenizer.
    """

    runs: tuple[Run, ...]
    steps: tuple[tuple[float, ...], ...]

    def __init__(self, runs: Iterable[Run], steps: Iterable[tuple[float, ...]]) -> None:
        object.__setattr__(self, "runs", tuple(runs))
        object.__setattr__(self, "steps", tuple(steps))

    def __len__(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    @cached_property
    def content(self) -> Tensor:  # type: ignore[override]
        width = max((run.tokens.content[:1].numel() for run in self.runs), default=0)
        content_NF = torch.zeros(len(self), 1 + width)
        start = 0
        for path, tokens in self.runs:
            part_NF = tokens.content.reshape(len(tokens), -1)
            content_NF[start : start + len(tokens), 0] = crc32(path.encode()) % 2**20
            content_NF[start : start + len(tokens), 1 : 1 + part_NF.shape[1]] = part_NF
            start += len(tokens)
        return content_NF

    @cached_property
    def position_NA(self) -> Tensor:  # type: ignore[override]
        axes = max((run.tokens.position_NA.shape[1] for run in self.runs), default=3)
        found, time = [torch.zeros(0, axes)], 0.0
        for (_, tokens), step in zip(self.runs, self.steps, strict=True):
            steps_NA, step_A = torch.zeros(len(tokens), axes), torch.ones(axes)
            step_A[: len(step)] = torch.tensor(step)
            own = tokens.position_NA.shape[1]
            steps_NA[:, :own] = tokens.position_NA / step_A[:own]
            steps_NA[:, 0] += time
            time = round(float(steps_NA[:, 0].max()), 3) + 1.0
            found.append(steps_NA)
        return torch.cat(found)

    def __repr__(self) -> str:
        return f"Composed({', '.join(f'{len(run.tokens)} of {run.path or chr(60) + chr(62)}' for run in self.runs)})"


@dataclass(frozen=True, init=False, eq=False)
class Several(Composed):
    """The tokens of a field that takes a list of values ("image*"); there may be none.

    values: the tokens of each value.
    """

    values: tuple[Tokens, ...]

    def __init__(self, values: Iterable[Tokens], step: tuple[float, ...]) -> None:
        """step: that of their tokenizer."""
        object.__setattr__(self, "values", tuple(values))
        runs: list[Run] = []
        for tokens in self.values:
            runs += tokens.runs if isinstance(tokens, Composed) else [Run("", tokens)]
        super().__init__(runs, [step] * len(runs))


@dataclass(frozen=True)
class Composite(Tokenizer):
    """A kind whose values are made of parts. Subclass as a frozen dataclass, and write `parts` and `pieces`.

    Every run of tokens becomes a segment of its own in the stream, of the kind "page.picture", and is embedded by
    `model.embeds["page"]["picture"]`; marks by `model.embeds["page"]`. The time of a run follows that of the run before. Mask rules
    see all runs of a value as one field, whose tokens are causal if the composite is.

    A part may be the name of another kind of the model, "image", whose tokenizer and weights it then shares. Composites whose parts
    are all discrete can be written token by token; all others are only read.

    causal: whether a token that is read attends only to tokens before it; the flags of the parts do not count.
    marked: whether a mark stands before each piece; a kind whose pieces say themselves what they are needs none.
    said: the part that holds earlier turns of the answering side, such as an assistant's; `NextTurn` learns them too.

    Methods to override: `parts` and `pieces`; to write or decode the kind `assemble`; with `said` also `before_answer`.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Titled(mm.Composite):
        ...     parts = {"title": TextBytes(), "image": "image"}
        ...     def pieces(self, value):
        ...         title, image = value
        ...         return [("title", title), ("image", image)]
        >>> kinds = {"page": Titled(), "image": ImagePatches(patch=4, channels=1), "label": Labels(("a", "b"))}
        >>> model = mm.Model(kinds, mm.Core.tiny(), ["page -> label"])
        >>> [run.path for run in model.packer.tokenizers["page"](("a square", square)).runs]
        ['', 'title', '', 'image']
    """

    causal: bool = dataclasses.field(default=False, kw_only=True)
    marked: ClassVar[bool] = True
    said: ClassVar[str | None] = None
    _resolved: ClassVar[Mapping[str, Tokenizer] | None] = None  # of a copy made by `bind`: the tokenizer of each part

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Tokenizer | str]:
        """By name of a part, its tokenizer, or the name of a kind of the model; always in the same order."""

    @abstractmethod
    def pieces(self, value: Any) -> Iterable[tuple[str, Any]]:
        """The pieces of a value in order: for each the name of its part and its own value, which may be Tokens already.

        Raises:
            ValueError: a value that has no such pieces.
        """

    def assemble(self, pieces: list[tuple[str, Any]]) -> Any:
        """Make a value of its pieces, which a model may have written in any order and number; the inverse of `pieces`.

        Raises:
            ConfigError: this kind can be read but not written.
        """
        raise ConfigError(f"{type(self).__name__} has no assemble: this kind can be read but not written")

    def before_answer(self, value: Any) -> tuple[Any, Any]:
        """Split a value into (all but its last turn, that turn) if that is one of the answering side; else (value, None)."""
        return value, None

    @property
    def lossy(self) -> bool:  # type: ignore[override]
        return any(part.lossy for part in self.resolved().values())

    @property
    def axes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys((*AXES, *(axis for part in self.resolved().values() for axis in part.axes))))

    @property
    def relations(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for part in self.resolved().values() for name in part.relations))

    @property
    def decodes(self) -> bool:
        can = type(self).assemble is not Composite.assemble
        return can and all(part.decodes for part in self.resolved().values())

    def bind(self, kinds: Mapping[str, Tokenizer], within: tuple[str, ...] = ()) -> Self:
        """A copy that knows the tokenizers of the kinds that its parts name.

        kinds: the tokenizers of a model by name. within: the kinds around it, for errors.

        Raises:
            ConfigError: a part is no tokenizer, names no kind, or contains itself; a name that cannot be one of a part.
        """
        name = type(self).__name__
        found: dict[str, Tokenizer] = {}
        if not self.parts:
            raise ConfigError(f"{name} has no parts; name one or more, such as {name}(caption=TextBytes())")
        for part, given in self.parts.items():
            check_module_name(f"{name}: a part", part)
            if isinstance(given, Tokenizer):
                found[part] = given.bind(kinds, within) if isinstance(given, Composite) else given
                continue
            if not isinstance(given, str):
                raise ConfigError(
                    f"{name}: part {part!r} is {describe(given)}; give a tokenizer made by its constructor, or the name of a kind"
                )
            if given not in kinds:
                raise ConfigError(
                    f"{name}: part {part!r} names the kind {given!r}, which is not there; there are "
                    f"{', '.join(map(repr, kinds)) or 'none'}{did_you_mean(given, kinds)}"
                )
            if given in within:
                raise ConfigError(f"{name}: part {part!r} names the kind {given!r}, which it is itself a part of")
            target = kinds[given]
            found[part] = target.bind(kinds, (*within, given)) if isinstance(target, Composite) else target
        bound = copy.copy(self)
        object.__setattr__(bound, "_resolved", found)
        return bound

    def resolved(self) -> Mapping[str, Tokenizer]:
        """By name of a part, its tokenizer.

        Raises:
            ConfigError: a part names a kind of a model, and `bind` has not been called, as a model does.
        """
        if self._resolved is None:
            try:
                object.__setattr__(self, "_resolved", self.bind({})._resolved)
            except ConfigError as error:
                hint = "; take the tokenizer from the model (model.packer.tokenizers), or call bind({name: tokenizer})"
                raise ConfigError(f"{error}{hint if 'names the kind' in str(error) else ''}") from None
        assert self._resolved is not None
        return self._resolved

    def at(self, path: str) -> Tokenizer:
        """The tokenizer of a path, such as "figure.picture"; this one for ""."""
        first, _, rest = path.partition(".")
        if not first:
            return self
        part = self.resolved()[first]
        return part.at(rest) if isinstance(part, Composite) else part

    def encode(self, value: Any) -> Composed:
        return self.composed(value)

    def composed(self, value: Any, encode: Any = None, *, written: bool = False) -> Composed:
        """The runs of a value.

        encode: makes the tokens of a piece, from (path, tokenizer, value); None: the tokenizer itself. written: by the tokenizers
        of the parts where they are written, which may leave marks around a value out.
        """
        runs = list(self._runs(value, encode, written, ""))
        return Composed(runs, [self.at(run.path).step for run in runs])

    def _runs(self, value: Any, encode: Any, written: bool, before: str) -> Iterator[Run]:
        parts, name = self.resolved(), type(self).__name__
        numbers = {part: i for i, part in enumerate(parts)}
        for i, (part, piece) in enumerate(self.pieces(value)):
            if part not in numbers:
                raise MediaError(f"{name}.encode: pieces gave {part!r}, which is none of its parts: {', '.join(parts)}")
            where = f"{name}.encode: piece {i} ({part})"
            path, tokenizer = f"{before}.{part}".lstrip("."), parts[part]
            if isinstance(tokenizer, Composite) and not isinstance(piece, Tokens):
                if self.marked:
                    yield Run(before, mark(numbers[part]))
                try:
                    yield from tokenizer._runs(piece, encode, written, path)
                except MediaError as error:
                    raise MediaError(f"{where}: {error}") from error
                continue
            tokenizer = tokenizer.written if written else tokenizer
            try:
                tokens = _piece_tokens(tokenizer, path, piece, encode)
            except MediaError as error:
                raise MediaError(f"{where}: {shortened(error, 500)}") from error
            number = numbers[part] if self.marked else None
            yield from (Run(f"{before}.{inner}".strip("."), x) for inner, x in runs_of(number, part, tokens))

    def check_tokens(self, tokens: Tokens, value: Any) -> Tokens:
        if not isinstance(tokens, Composed):
            raise MediaError(f"{type(self).__name__}.encode: gave {describe(tokens)}, wanted the runs of its parts")
        return tokens  # the tokenizer of each part has checked its own

    def decode(self, tokens: Tokens) -> Any:
        if not isinstance(tokens, Composed):
            raise ConfigError(f"{type(self).__name__}.decode: wanted the runs of a composite, not {describe(tokens)}")
        parts = self.resolved()
        pieces: list[tuple[str, list[Run]]] = []
        for path, run in tokens.runs:
            if not path:
                pieces += [(list(parts)[i], []) for i in run.content.tolist() if i < len(parts)]
            elif pieces:
                first, _, rest = path.partition(".")
                if first == pieces[-1][0]:
                    pieces[-1][1].append(Run(rest, run))
        found = []
        for name, runs in pieces:
            part = parts[name]
            if isinstance(part, Composite):
                found.append((name, part.decode(Composed(runs, [part.at(run.path).step for run in runs]))))
            elif (whole := _joined(part, [run.tokens for run in runs])) is not None:
                found.append((name, part.decode(whole)))
        return self.assemble(found)

    @property
    def written(self) -> "Written":
        """The kind as a head writes it token by token: ids of one vocabulary, which are those of the marks and of all parts.

        Raises:
            ConfigError: a part is not discrete or has no decode, so that this kind is only read.
        """
        return Written(self)

    def answered(self, tokens: Tokens) -> Tensor:
        """Those of its parts; a mark has no answer of its own."""
        if not isinstance(tokens, Composed):  # a run of marks
            return torch.zeros(len(tokens), dtype=torch.bool)
        return torch.cat([self.at(path).answered(run) for path, run in tokens.runs])

    def token_names(self, tokens: Tokens) -> list[str]:
        """Names of marks in angle brackets, of other tokens by their part: "picture: row 0, column 2"."""
        if not isinstance(tokens, Composed):
            return super().token_names(tokens)
        names: list[str] = []
        for path, run in tokens.runs:
            part = self.at(path)
            if isinstance(part, Composite):
                names += [f"<{f'{path}.{list(part.parts)[i]}'.lstrip('.')}>" for i in run.content.tolist()]
            else:
                names += [f"{path}: {name}" for name in part.token_names(run)]
        return names

    def embed(self, width: int) -> "PartEmbeds":
        return PartEmbeds(self, width)

    def files(self) -> dict[str, bytes]:
        return {f"{i}/{name}": data for i, part in enumerate(_own(self)) for name, data in part.files().items()}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        return super().from_config(with_files(config, files), files)


def mark(number: int) -> Tokens:
    """The token before a piece of the part with this number."""
    return Tokens(torch.tensor([number]), torch.zeros(1, 3))


def runs_of(number: int | None, part: str, tokens: Tokens) -> Iterator[Run]:
    """The runs of a piece that has been encoded: the mark of this number, if any, and the tokens of the part."""
    if number is not None:
        yield Run("", mark(number))
    if isinstance(tokens, Composed):
        yield from (Run(f"{part}.{inner}".rstrip("."), run) for inner, run in tokens.runs)
    elif len(tokens):
        yield Run(part, tokens)


def _piece_tokens(tokenizer: Tokenizer, path: str, piece: Any, encode: Any) -> Tokens:
    if isinstance(piece, Tokens):
        return tokenizer.check_tokens(piece, piece) if len(piece) else piece
    if encode is not None:
        return encode(path, tokenizer, piece)
    # a mark stands before it, so that an empty text is not the same as none
    return tokenizer(piece, empty=tokenizer.text)


def _joined(part: Tokenizer, found: list[Tokens]) -> Tokens | None:
    """The tokens of a part as one; None: there are none, but every value of the part has some."""
    if len(found) == 1:
        return found[0]
    if found:
        return Tokens(torch.cat([x.content for x in found]), torch.cat([x.position_NA for x in found]))
    if part.classes or part.length is not None:
        return None
    return no_tokens(part)


def _own(composite: Composite) -> list[Tokenizer]:
    """The tokenizers in the fields of a composite, in the order of its configuration."""

    def inside(value: Any) -> Iterator[Tokenizer]:
        if isinstance(value, Tokenizer):
            yield value
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from inside(part)

    fields = sorted(f.name for f in dataclasses.fields(composite) if f.init)
    return [part for name in fields for part in inside(getattr(composite, name))]


def with_files(config: Mapping[str, Any], files: Mapping[str, bytes] | None) -> dict[str, Any]:
    """A configuration with the tokenizers in it rebuilt; the i-th of them gets the files "i/NAME"."""
    count = iter(range(2**31))
    return {name: _rebuilt(config[name], files or {}, count) for name in sorted(config)}


def _rebuilt(value: Any, files: Mapping[str, bytes], count: Iterator[int]) -> Any:
    """JSON values with the tokenizers in them rebuilt, each with its own files."""
    if isinstance(value, list):
        return [_rebuilt(part, files, count) for part in value]
    if not (
        isinstance(value, dict) and set(value) == {"type", "config"} and issubclass(find(value["type"]), Tokenizer)
    ):
        return value
    before = f"{next(count)}/"
    return rebuild(value, {name.removeprefix(before): x for name, x in files.items() if name.startswith(before)})


def check_module_name(where: str, name: Any) -> None:
    """Raise a ConfigError for a name that a pattern cannot have, or that is an attribute of torch's ModuleDict."""
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
        raise ConfigError(
            f"{where} cannot be named {name!r}: tasks name it, as one word of the letters a to z, digits and "
            "underscores; use a plain word such as 'image'"
        )
    if hasattr(nn.ModuleDict(), name) or name == MARKS:
        raise ConfigError(
            f"{where} cannot be named {name!r}: its weights are stored under this name in a ModuleDict of "
            f"torch, which has a {name!r} of its own; call it {name.strip('_')}_kind, say"
        )


MARKS = "_marks"


def named_kinds(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    """The kinds that parts of a composite name, by name, as `bind` gave them."""
    found: dict[str, Tokenizer] = {}
    if isinstance(tokenizer, Composite):
        for name, part in tokenizer.resolved().items():
            given = tokenizer.parts[name]
            found |= {**named_kinds(part), **({given: part} if isinstance(given, str) else {})}
    return found


class PartEmbeds(nn.ModuleDict):
    """The embeddings of a composite's own parts by name; called itself, it embeds the marks.

    Parts that name a kind of the model are embedded by that kind's module, which is not in here.
    """

    def __init__(self, composite: Composite, width: int) -> None:
        super().__init__()
        if composite.marked:
            marks = nn.Embedding(len(composite.parts), width)
            nn.init.normal_(marks.weight, std=0.02)
            self[MARKS] = marks
        for name, part in composite.parts.items():
            if isinstance(part, Tokenizer):
                self[name] = part.embed(width)

    def forward(self, mark_N: Tensor) -> Tensor:
        return self[MARKS](mark_N)


class Leaf(NamedTuple):
    """Where the tokens of a path of a composite are embedded.

    weights: the kind whose module embeds them: "page.picture", or "image" where the part names that kind.
    tokenizer: their tokenizer; of a composite they are its marks.
    """

    weights: str
    tokenizer: Tokenizer


def leaves(name: str, tokenizer: Tokenizer, weights: str | None = None) -> Iterator[tuple[str, Leaf]]:
    """(kind of a segment, leaf) of a kind, and of all its parts if it is composite."""
    weights = name if weights is None else weights
    yield name, Leaf(weights, tokenizer)
    if isinstance(tokenizer, Composite):
        for part, given in tokenizer.parts.items():
            inner = given if isinstance(given, str) else f"{weights}.{part}"
            yield from leaves(f"{name}.{part}", tokenizer.resolved()[part], inner)


@dataclass(frozen=True)
class Written(Tokenizer):
    """A composite of discrete parts as it is written token by token: ids of one vocabulary, at times 0, 1, 2, ..

    The ids of the composite's marks come first, then those of each part; parts that share weights share ids. A model may write
    ids in any order; those that have no meaning where they stand are left out of the value.

    composite: what is written.
    """

    composite: Composite

    def __post_init__(self) -> None:
        name = type(self.composite).__name__
        for path, (_, part) in leaves("", self.composite):
            if isinstance(part, Composite):
                if type(part).assemble is Composite.assemble:
                    raise ConfigError(f"{type(part).__name__} has no assemble: this kind can be read but not written")
            elif part.vocab_size is None or not part.decodes:
                lacks = "is not discrete" if part.vocab_size is None else "has no decode"
                raise ConfigError(
                    f"{name} can be read but not written, because its part {path.lstrip('.')!r} ({type(part).__name__}) {lacks}"
                )

    @cached_property
    def ranges(self) -> dict[str, range]:
        """By kind with weights, relative to the composite (".picture", or "image"), its ids."""
        found: dict[str, range] = {}
        start = 0
        for _, (weights, part) in leaves("", self.composite):
            if weights not in found:
                size = len(part.parts) if isinstance(part, Composite) else part.written.vocab_size
                assert size is not None
                found[weights] = range(start, start + size)
                start += size
        return found

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return max(ids.stop for ids in self.ranges.values())

    @property
    def lossy(self) -> bool:  # type: ignore[override]
        return self.composite.lossy

    def encode(self, value: Any) -> Tokens:
        composed = self.composite.composed(value, written=True)
        of = dict(leaves("", self.composite))
        ids = [run.content + self.ranges[of[f".{path}".rstrip(".")].weights].start for path, run in composed.runs]
        content_N = torch.cat([torch.zeros(0, dtype=torch.long), *ids])
        return Tokens(content_N, at_times(torch.arange(len(content_N))))

    def decode(self, tokens: Tokens) -> Any:
        runs = list(self._runs(self.composite, "", "", tokens.content.tolist()))
        return self.composite.decode(Composed(runs, [(1.0, 1.0, 1.0)] * len(runs)))

    def _runs(self, composite: Composite, path: str, weights: str, ids: list[int]) -> Iterator[Run]:
        """The runs that the ids of a composite stand for. weights: the kind that embeds its marks."""
        marks, parts = self.ranges[weights], composite.resolved()
        pieces: list[tuple[int, list[int]]] = []
        for i in ids:
            if i in marks:
                pieces.append((i - marks.start, []))
            elif pieces:  # what stands before the first mark has no meaning
                pieces[-1][1].append(i)
        for number, inner in pieces:
            yield Run(path, mark(number))
            name, part = list(parts.items())[number]
            given = composite.parts[name]
            here, at = f"{path}.{name}".lstrip("."), given if isinstance(given, str) else f"{weights}.{name}"
            if isinstance(part, Composite):
                yield from self._runs(part, here, at, inner)
                continue
            own = [i - self.ranges[at].start for i in inner if i in self.ranges[at]]
            part = part.written
            own = own[: 1 if part.classes else part.length]
            if own:
                yield Run(here, written_tokens(part, torch.tensor(own)))

    def token_names(self, tokens: Tokens) -> list[str]:
        of = {weights: (path.lstrip("."), part) for path, (weights, part) in reversed([*leaves("", self.composite)])}
        names = []
        for i in tokens.content.tolist():
            weights, ids = next((w, ids) for w, ids in self.ranges.items() if i in ids)
            path, part = of[weights]
            if isinstance(part, Composite):
                names.append(f"<{f'{path}.{list(part.parts)[i - ids.start]}'.lstrip('.')}>")
            else:
                names += part.token_names(written_tokens(part, torch.tensor([i - ids.start])))
        return names
