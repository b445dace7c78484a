"""Discrete codes over any continuous tokenizer: a learnt codebook, so that images and sounds can be generated id by id."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from multimodal.declare import declaration, rebuild
from multimodal.progress import progress_bar
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens

BOOK, INSIDE = "codebook.safetensors", "of/"  # our file, and the folder of the inner tokenizer's files
SEED_ROWS = 64  # largest number of rows for each code among which the first codes are drawn
TRIES = 4  # rows drawn for each first code, of which the best is taken
CHUNK = 2**22  # distances computed at a time, 16 MB


@dataclass(frozen=True)
class Codes(Tokenizer):
    """Vector quantisation (k-means, Lloyd 1982): every token of `of` becomes the index of the nearest code vector.

    Make one with `Codes.train(ImagePatches(patch=4), pictures, size=512)`. A token is one code; features
    that `of` appends for its own embedding (the place after a patch's pixels) are not coded. If the places of `of` are not known
    before a value is written, as for images, the book stores the places of the training values if all are equal: such values can
    be written, and have `length` tokens. Values of other sizes can still be read and decoded.

    of: the tokenizer whose features are coded.
    book: a safetensors file with "codes" (V, F), and "places" (N, A) if they are stored.
    causal: whether a token that is read attends only to earlier ones.
    """

    of: Tokenizer
    book: bytes = field(repr=False)
    causal: bool = False
    lossy = True  # a code decodes to a value near the encoded one

    def __post_init__(self) -> None:
        wanted, came = _written(self.of), self.codes_VF.shape[1]
        if came != wanted:
            raise ConfigError(
                f"Codes: the codes have {came} features, but {type(self.of).__name__} writes {wanted}; train a book for it"
            )

    @classmethod
    def train(
        cls,
        of: Tokenizer,
        values: Iterable[Any],
        size: int = 512,
        *,
        seed: int = 0,
        rounds: int = 100,
        max_rows: int = 200_000,
        causal: bool = False,
        quiet: bool = False,
    ) -> Self:
        """Learn `size` codes from all tokens of the values, or from `max_rows` random ones.

        K-means++ (Arthur & Vassilvitskii 2007), then at most `rounds` rounds of Lloyd's; 100 000 rows of 48 features and 512
        codes take less than a minute on one CPU core. The same values and seed give the same book.

        Raises:
            ConfigError: a tokenizer that cannot be coded, or fewer different rows than codes.
        """
        written = _written(of)
        if size < 1 or rounds < 1:
            raise ConfigError(f"Codes.train: size={size} and rounds={rounds} must be at least 1")
        tokens = [of(value) for value in _shown(values, "reading values", quiet)]
        if not tokens:
            raise ConfigError("Codes.train: there are no values to learn from")
        draw = torch.Generator().manual_seed(seed)
        rows_NF = torch.cat([t.content[:, :written] for t in tokens])
        if len(rows_NF) > max_rows:
            rows_NF = rows_NF[torch.randperm(len(rows_NF), generator=draw)[:max_rows]]
        parts = {"codes": _kmeans(rows_NF, size, rounds, draw, quiet)}
        first = tokens[0].position_NA
        if not _knows_places(of, first) and all(torch.equal(t.position_NA, first) for t in tokens):
            parts["places"] = first.clone()
        return cls(of, save(parts), causal)

    @property
    def codes_VF(self) -> Tensor:
        """The code vectors, which are cached: do not change them."""
        return _opened(self.book)["codes"]

    @property
    def vocab_size(self) -> int:
        return self.codes_VF.shape[0]

    @property
    def length(self) -> int | None:
        places = _opened(self.book).get("places")
        return self.of.length if places is None else len(places)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.of.axes

    @property
    def relations(self) -> tuple[str, ...]:
        return self.of.relations

    @property
    def step(self) -> tuple[float, ...]:
        return self.of.step

    def encode(self, value: Any) -> Tokens:
        try:
            tokens = self.of(value)
        except ValueError as error:
            raise MediaError(f"Codes.encode: {shortened(str(error), 1000)}") from error
        codes_VF = self.codes_VF
        return Tokens(nearest(tokens.content[:, : codes_VF.shape[1]], codes_VF)[0], tokens.position_NA, tokens.pairs)

    def decode(self, tokens: Tokens) -> Any:
        return self.of.decode(self.features(tokens))

    def answered(self, tokens: Tokens) -> Tensor:
        return self.of.answered(self.features(tokens))

    def picture(self, tokens: Tokens) -> Tensor | None:
        return self.of.picture(self.features(tokens))

    def features(self, tokens: Tokens) -> Tokens:
        """The code vectors of ids, which `of` decodes."""
        return Tokens(self.codes_VF[tokens.content], tokens.position_NA)

    def places(self, count: int) -> Tensor:
        places_NA = _opened(self.book).get("places")
        if places_NA is None and self.of.placed_by_content:
            raise ConfigError(
                f"Codes: where a token of {type(self.of).__name__} stands depends on its features, which codes only approximate; "
                "such codes can be read but not written"
            )
        if places_NA is None:
            return self.of.places(count)
        if count > len(places_NA):
            raise ConfigError(f"Codes: places({count}), but a written value has length={len(places_NA)}")
        return places_NA[:count].clone()

    def config(self) -> dict[str, Any]:
        return {"of": declaration(self.of), "causal": self.causal}

    def files(self) -> dict[str, bytes]:
        return {BOOK: self.book, **{INSIDE + name: data for name, data in self.of.files().items()}}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> Self:
        files = files or {}
        if BOOK not in files:
            raise CheckpointError(f"Codes: its file {BOOK} is missing")
        inside = {name.removeprefix(INSIDE): data for name, data in files.items() if name.startswith(INSIDE)}
        settings = {name: value for name, value in config.items() if name != "of"}
        return cls(rebuild(config["of"], inside), files[BOOK], **settings)


def nearest(rows_NF: Tensor, codes_VF: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code (N,) of each row, and its squared distance (N,)."""
    # far from 0 the squares of large numbers would round away the differences between codes
    middle_F = codes_VF.mean(0)
    rows_NF, codes_VF = rows_NF - middle_F, codes_VF - middle_F
    half_V = codes_VF.square().sum(1) / 2
    ids, errors = [], []
    for part_NF in rows_NF.split(max(CHUNK // len(codes_VF), 1)):
        score_N, id_N = torch.addmm(half_V, part_NF, codes_VF.T, beta=-1).max(1)
        ids.append(id_N)
        errors.append((part_NF.square().sum(1) - 2 * score_N).clamp(min=0))
    return torch.cat(ids), torch.cat(errors)


def _kmeans(rows_NF: Tensor, size: int, rounds: int, draw: torch.Generator, quiet: bool) -> Tensor:
    middle_F = rows_NF.mean(0)
    rows_NF = rows_NF - middle_F  # distances lose fewer digits around 0
    codes_VF = _seeded(rows_NF, size, draw, quiet)
    before = float("inf")
    for _ in _shown(range(rounds), "moving codes", quiet):
        id_N, error_N = nearest(rows_NF, codes_VF)
        count_V = torch.bincount(id_N, minlength=size)
        sum_VF = torch.zeros(codes_VF.shape, dtype=torch.float64)  # many equal rows must give that row as their mean
        for ids, part_NF in zip(id_N.split(2**14), rows_NF.split(2**14), strict=True):
            sum_VF.index_add_(0, ids, part_NF.double())
        codes_VF = (sum_VF / count_V.clamp(min=1)[:, None]).float()
        dead, total = count_V == 0, float(error_N.sum())
        if dead.any() and total > 0:
            moved = torch.multinomial(error_N + 1e-12 * error_N.max(), int(dead.sum()), generator=draw)
            codes_VF[dead] = rows_NF[moved]
        elif total >= before * (1 - 1e-5):
            break
        before = total
    return codes_VF + middle_F


def _seeded(rows_NF: Tensor, size: int, draw: torch.Generator, quiet: bool) -> Tensor:
    """The first codes: each the best of a few rows, drawn by their squared distance from those before."""
    some_NF = rows_NF
    if len(rows_NF) > SEED_ROWS * size:
        some_NF = rows_NF[torch.randperm(len(rows_NF), generator=draw)[: SEED_ROWS * size]]
    codes = [some_NF[int(torch.randint(len(some_NF), (), generator=draw))]]
    error_N = (some_NF - codes[0]).square().sum(1)
    for _ in _shown(range(size - 1), "choosing first codes", quiet):
        if not error_N.any():
            if len(some_NF) < len(rows_NF):  # many equal rows, and the rare ones were not drawn
                return _seeded(rows_NF.unique(dim=0), size, draw, quiet)
            raise ConfigError(
                f"Codes.train: the values have only {len(codes)} different rows; use size={len(codes)} or less, "
                "or give more values"
            )
        tried = torch.multinomial(error_N, TRIES, replacement=True, generator=draw).unique()
        errors = torch.stack([torch.minimum(error_N, (some_NF - some_NF[i]).square().sum(1)) for i in tried])
        best = int(errors.sum(1).argmin())
        codes.append(some_NF[tried[best]])
        error_N = errors[best]
    return torch.stack(codes)


def _written(of: Any) -> int:
    """The number of features of a token that are coded."""
    if not isinstance(of, Tokenizer):
        raise ConfigError(f"Codes: of is {of!r}, not a Tokenizer made by its constructor")
    name = type(of).__name__
    if of.written_features is None or of.classes:
        raise ConfigError(f"Codes: {name} has no features to code; its values are {'classes' if of.classes else 'ids'}")
    if type(of).decode is Tokenizer.decode:
        raise ConfigError(f"Codes: {name} has no decode, so its codes could not be decoded")
    return of.written_features


def _knows_places(of: Tokenizer, position_NA: Tensor) -> bool:
    """Whether `of` has these places for any value of this length."""
    try:
        return torch.equal(of.places(len(position_NA)), position_NA)
    except ConfigError:
        return False


@lru_cache(maxsize=16)
def _opened(book: bytes) -> dict[str, Tensor]:
    try:
        parts = load(book)
    except SafetensorError as error:
        raise CheckpointError(f"Codes: {BOOK} is damaged or cut short: {error}") from error
    if "codes" not in parts or parts["codes"].dim() != 2 or 0 in parts["codes"].shape:
        raise CheckpointError(f"Codes: {BOOK} holds no codes (V, F)")
    return parts


def _shown(items: Iterable[Any], what: str, quiet: bool) -> Iterator[Any]:
    """The items, with a progress bar where there is a terminal."""
    with progress_bar(what, len(items) if isinstance(items, Sized) else None, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()
