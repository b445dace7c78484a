"""Kinds made of other kinds: lists, records with named entries, and tokens that have several contents at once."""

from collections.abc import Iterator, Mapping, MappingView, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.composite import Composite, check_module_name, with_files
from multimodal.declare import check_part
from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.texts import shortened
from multimodal.tokenizer import Places, Tokenizer, Tokens, describe


@dataclass(frozen=True)
class Sequence(Composite):
    """A list of any number of values of one kind, such as the pictures of an album or the paragraphs of a text.

    of: the tokenizer of its elements, or the name of a kind of the model, whose weights it then shares.
    causal: whether a token that is read attends only to tokens before it.

    Examples:
        >>> words = Sequence(of=TextBytes())
        >>> words.decode(words(["two", "words"]))
        ['two', 'words']
    """

    of: Tokenizer | str

    def __post_init__(self) -> None:
        _check_given("Sequence: of", self.of)

    @property
    def parts(self) -> dict[str, Tokenizer | str]:
        return {"of": self.of}

    def pieces(self, value: Any) -> Iterator[tuple[str, Any]]:
        listed = hasattr(value, "__len__") and hasattr(value, "__iter__")
        # a set has another order in each process, and a DataFrame gives the names of its columns
        unordered = isinstance(value, Set) and not isinstance(value, MappingView)
        if not listed or unordered or isinstance(value, (str, bytes, Mapping)) or hasattr(value, "columns"):
            raise MediaError(f"Sequence.encode: wanted a list of values, not {describe(value)}")
        for element in value:
            yield "of", element

    def assemble(self, pieces: list[tuple[str, Any]]) -> list[Any]:
        return [value for _, value in pieces]


@dataclass(frozen=True, init=False)
class Record(Composite):
    """A mapping with named entries of different kinds, such as a page: Record(picture=ImagePatches(), caption=TextBytes()).

    An entry that is None, or not there, is missing; one at least must be there.

    entries: (name, tokenizer, or the name of a kind of the model) of each entry, in the order of the stream.
    causal: whether a token that is read attends only to tokens before it.

    Examples:
        >>> page = Record(number=Labels(("1", "2")), caption=TextBytes())
        >>> page.decode(page({"number": "2", "caption": None}))
        {'number': '2', 'caption': None}
    """

    entries: tuple[tuple[str, Tokenizer | str], ...]

    def __init__(self, entries: Any = (), *, causal: bool = False, **named: Tokenizer | str) -> None:
        """entries: a mapping or pairs, for names that are no keywords of their own, such as "causal"."""
        if isinstance(entries, (str, Tokenizer)):  # an entry that is called so
            entries, named = (), {"entries": entries, **named}
        given = [*(entries.items() if isinstance(entries, Mapping) else entries), *named.items()]
        object.__setattr__(self, "entries", tuple((name, part) for name, part in given))
        object.__setattr__(self, "causal", causal)
        _check_names("Record", self.entries)

    @property
    def parts(self) -> dict[str, Tokenizer | str]:
        return dict(self.entries)

    def pieces(self, value: Any) -> Iterator[tuple[str, Any]]:
        names = [name for name, _ in self.entries]
        if not isinstance(value, Mapping):
            raise MediaError(f"Record.encode: wanted a mapping of {', '.join(names)}, not {describe(value)}")
        for name in value:
            if name not in names:
                raise MediaError(
                    f"Record.encode: there is no entry {shortened(repr(name), 60)}; there are {', '.join(names)}"
                    f"{did_you_mean(str(name), names)}"
                )
        for name in names:
            if value.get(name) is not None:
                yield name, value[name]

    def assemble(self, pieces: list[tuple[str, Any]]) -> dict[str, Any]:
        """Of an entry that was written twice the first counts."""
        found = dict(reversed(pieces))
        return {name: found.get(name) for name, _ in self.entries}


@dataclass(frozen=True, init=False)
class Joint(Tokenizer):
    """Tokens with several contents at once, such as an id with features: the embedding of a token is the sum of theirs.

    A value is a mapping with all entries; their tokenizers give equally many tokens, which have the positions of the first entry.
    It is one kind with features, in which ids are numbers, so that it is only read.

    entries: (name, tokenizer) of each content.
    causal: whether a token that is read attends only to tokens before it.

    Examples:
        >>> notes = Joint(pitch=Ids(128), strength=Features(1))
        >>> tokens = notes({"pitch": [60, 64], "strength": np.array([[0.5], [0.7]])})
        >>> len(tokens), notes.embed(32)(tokens.content).shape
        (2, torch.Size([2, 32]))
    """

    entries: tuple[tuple[str, Tokenizer], ...]
    causal: bool = False

    def __init__(self, entries: Any = (), *, causal: bool = False, **named: Tokenizer) -> None:
        if isinstance(entries, Tokenizer):
            entries, named = (), {"entries": entries, **named}
        given = [*(entries.items() if isinstance(entries, Mapping) else entries), *named.items()]
        object.__setattr__(self, "entries", tuple((name, part) for name, part in given))
        object.__setattr__(self, "causal", causal)
        _check_names("Joint", self.entries)
        for name, part in self.entries:
            check_part(f"Joint: {name}", part, Tokenizer, "TextBytes()")
            if isinstance(part, Composite) or (part.vocab_size is None and part.feature_size is None):
                raise ConfigError(
                    f"Joint: {name}={type(part).__name__} has tokens of several parts, which cannot be added to others; use Record"
                )
            if part.vocab_size is not None and part.vocab_size > 2**24:
                raise ConfigError(
                    f"Joint: {name} has {part.vocab_size} ids, and tokens hold them as float32, which tells 2**24 apart; use Record"
                )

    @property
    def feature_size(self) -> int:
        return sum(part.feature_size or 1 for _, part in self.entries)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.entries[0][1].axes

    @property
    def step(self) -> tuple[float, ...]:
        return self.entries[0][1].step

    @property
    def learned(self) -> int:
        return self.entries[0][1].learned

    def encode(self, value: Any) -> Tokens:
        names = [name for name, _ in self.entries]
        if not isinstance(value, Mapping) or {*value} != {*names}:
            raise MediaError(f"Joint.encode: wanted a mapping of {', '.join(names)}, not {describe(value)}")
        found = {}
        for name, part in self.entries:
            try:
                found[name] = part(value[name])
            except MediaError as error:
                raise MediaError(f"Joint.encode: {name}: {error}") from error
        counts = {name: len(tokens) for name, tokens in found.items()}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise MediaError(
                f"Joint.encode: a token has one content of each entry, but the numbers of tokens differ: {said}"
            )
        columns = [tokens.content.float().reshape(len(tokens), -1) for tokens in found.values()]
        return Tokens(torch.cat(columns, 1), found[names[0]].position_NA.clone())

    def split(self, content_NF: Tensor) -> dict[str, Tensor]:
        """By entry, its content: ids (N,) or features (N, F)."""
        sizes = [part.feature_size or 1 for _, part in self.entries]
        found = zip(self.entries, content_NF.split(sizes, -1), strict=True)
        # a model may give any numbers, so that ids are rounded to one of the vocabulary
        return {
            name: x if part.vocab_size is None else x[..., 0].round().long().clamp(0, part.vocab_size - 1)
            for (name, part), x in found
        }

    def decode(self, tokens: Tokens) -> dict[str, Any]:
        content = self.split(tokens.content)
        return {name: part.decode(Tokens(content[name], tokens.position_NA)) for name, part in self.entries}

    @property
    def decodes(self) -> bool:
        return all(part.decodes for _, part in self.entries)

    @property
    def lossy(self) -> bool:
        return any(part.lossy for _, part in self.entries)

    def token_names(self, tokens: Tokens) -> list[str]:
        content = self.split(tokens.content)
        names = [part.token_names(Tokens(content[name], tokens.position_NA)) for name, part in self.entries]
        return [", ".join(parts) for parts in zip(*names, strict=True)]

    def embed(self, width: int) -> "JointEmbed":
        return JointEmbed(self, width)

    def files(self) -> dict[str, bytes]:
        return {f"{i}/{name}": x for i, (_, part) in enumerate(self.entries) for name, x in part.files().items()}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> "Joint":
        return super().from_config(with_files(config, files), None)


class JointEmbed(nn.ModuleDict):
    """The sum of the embeddings of a token's contents."""

    full_precision = True  # ids are among the features

    def __init__(self, joint: Joint, width: int) -> None:
        super().__init__({name: part.embed(width) for name, part in joint.entries})
        self.joint = joint
        self.reads_places = any(getattr(module, "reads_places", False) for module in self.values())

    def forward(self, content_NF: Tensor, places: Places | None = None) -> Tensor:
        rows_ND: Tensor | None = None
        for name, content in self.joint.split(content_NF).items():
            module = self[name]
            weight = next(module.parameters(), None)
            if content.is_floating_point() and weight is not None and not getattr(module, "full_precision", False):
                content = content.to(weight.dtype)
            found_ND = module(content, places) if getattr(module, "reads_places", False) else module(content)
            rows_ND = found_ND if rows_ND is None else rows_ND + found_ND
        assert rows_ND is not None
        return rows_ND


def _check_given(where: str, part: Any) -> None:
    """Raise a ConfigError unless a part is a tokenizer or the name of a kind."""
    if not isinstance(part, str):
        check_part(where, part, Tokenizer, "TextBytes(), or the name of a kind of the model")


def _check_names(where: str, entries: tuple[tuple[str, Any], ...]) -> None:
    if not entries:
        raise ConfigError(f"{where}: there are no entries; give one or more, as {where}(caption=TextBytes())")
    names = [name for name, _ in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{where}: the entry {twice[0]!r} is given twice")
    for name, part in entries:
        check_module_name(f"{where}: an entry", name)
        _check_given(f"{where}: {name}", part)
