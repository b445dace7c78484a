"""Values that a tokenizer accepts, found by trial: to check it with where no values are given."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.check.cases import equal_tokens
from multimodal.composite import Composed, Composite, runs_of
from multimodal.heads import one_class
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, Tokens, at_times, written_tokens


def plausible_values(tokenizer: Tokenizer, count: int = 4, *, seed: int = 0) -> list[Any]:
    """Up to `count` different values that this tokenizer accepts, found by trial, of equal and of other lengths; [] if none is.

    Tried in turn: what its `examples()` gives if it has one, the names of classes, texts, pictures, sounds, arrays of
    numbers, clips of pictures, ids and plain numbers, and what its `decode` makes of random tokens.
    """
    for family in _candidates(tokenizer, seed):
        accepted: list[Any] = []
        seen: list[Tokens] = []
        for value in family:
            try:
                tokens = tokenizer(value)
            except ValueError:
                continue
            if not any(equal_tokens(tokens, other) for other in seen):
                accepted.append(value)
                seen.append(tokens)
            if len(accepted) == count:
                break
        if accepted:
            return accepted
    return []


def _candidates(tokenizer: Tokenizer, seed: int) -> Iterator[Iterable[Any]]:
    random = np.random.default_rng(seed)
    yield getattr(tokenizer, "examples", list)()
    if isinstance(tokenizer, Composite):
        yield _assembled(tokenizer, seed)
        return
    if tokenizer.classes:
        classes = tokenizer.vocab_size or tokenizer.feature_size or 0
        yield _decoded(tokenizer, [one_class(c, tokenizer) for c in range(min(classes, 8))])
    yield (
        "seven",
        "a bird on a wire",
        "eight",
        "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich.",
        "7",
        "1 2 3",
        "ACGT",
    )
    for channels in (3, 1, 4):
        sides = [(s * a, s * b) for s in (8, 16, 32, 64, 224) for a, b in ((1, 1), (2, 1), (1, 2))]
        yield (random.integers(0, 256, (y, x, channels), dtype=np.uint8) for y, x in sides)
    rate_hz = getattr(tokenizer, "rate_hz", 16000)
    seconds = (0.1, 0.25, 0.25, 0.5, 1.0, 2.0, 4.0)
    yield ((random.uniform(-0.5, 0.5, int(s * rate_hz)).astype(np.float32), rate_hz) for s in seconds)
    features = tokenizer.feature_size or 1
    for shape in ((features,), (3,), (1,), (2,), ()):
        for lengths in ((16, 24, 24, 40), (64, 128, 128, 256), (512, 1024)):
            yield [random.standard_normal((n, *shape)).astype(np.float32) for n in lengths]
    yield [random.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8) for frames in (2, 4, 4, 8)]
    ids = tokenizer.vocab_size or 2
    yield [random.integers(0, ids, n) for n in (3, 5, 5, 8)]
    yield [random.integers(0, ids, n).tolist() for n in (3, 5, 5, 8)]
    yield [random.standard_normal(n).tolist() for n in (16, 24, 24, 40)]
    yield 0.5, 1.5, -0.25, 3.0
    yield 1, 2, 0, 3
    yield True, False
    yield _decoded(tokenizer, random_tokens(tokenizer, seed))


def _assembled(composite: Composite, seed: int) -> Iterator[Any]:
    """Values of a composite with plausible values of its parts, one or two of each."""
    found = {name: plausible_values(part, 8, seed=seed) for name, part in composite.resolved().items()}
    for i in range(8):
        pieces = [(name, values[i % len(values)]) for name, values in found.items() if values]
        pieces += [(name, values[(i + 1) % len(values)]) for name, values in found.items() if values and i % 2]
        try:
            yield composite.assemble(pieces)
        except ConfigError:  # this kind is only read, so that it need not be able to put pieces together
            return


def _decoded(tokenizer: Tokenizer, tokens: Sequence[Tokens]) -> list[Any]:
    values = []
    for one in tokens:
        try:
            values.append(tokenizer.decode(one))
        except Exception:  # random tokens may mean nothing to it; then this is simply no candidate
            continue
    return values


def random_tokens(tokenizer: Tokenizer, seed: int) -> list[Tokens]:
    """Random tokens of the declared size; they need not be those of any value."""
    random = torch.Generator().manual_seed(seed)
    tokens = []
    if isinstance(tokenizer, Composite):
        parts = {name: random_tokens(part, seed) for name, part in tokenizer.resolved().items()}
        for i in range(4):
            # a mark before each, and the tokens of a composite in it as they are
            runs = [run for n, name in enumerate(parts) for run in runs_of(n, name, parts[name][i])]
            tokens.append(Composed(runs, [tokenizer.at(run.path).step for run in runs]))
        return tokens
    for count in (3, 5, 5, 8) if tokenizer.length is None else [tokenizer.length] * 4:
        if tokenizer.vocab_size is not None:
            ids = torch.randint(tokenizer.vocab_size, (count,), generator=random)
            tokens.append(written_tokens(tokenizer, ids))
        else:
            assert tokenizer.feature_size is not None
            features = torch.randn(count, tokenizer.feature_size, generator=random)
            if tokenizer.placed_by_content:
                tokens.append(written_tokens(tokenizer, features))
            else:
                tokens.append(Tokens(features, at_times(torch.arange(count) * tokenizer.step[0], tokenizer.axes)))
    return tokens


@dataclass(frozen=True)
class Encoded(Tokenizer):
    """A tokenizer for values that are tokens already; it answers with ids, so that answers can be compared exactly.

    inner: the tokenizer that made the tokens.
    """

    inner: Tokenizer

    @property
    def vocab_size(self) -> int | None:
        return self.inner.vocab_size

    @property
    def feature_size(self) -> int | None:
        return self.inner.feature_size

    @property
    def one_hot(self) -> int | None:
        return self.inner.one_hot

    @property
    def causal(self) -> bool:
        return self.inner.causal

    @property
    def classes(self) -> bool:
        return self.inner.classes

    @property
    def axes(self) -> tuple[str, ...]:
        return self.inner.axes

    @property
    def step(self) -> tuple[float, ...]:
        return self.inner.step

    @property
    def relations(self) -> tuple[str, ...]:
        return self.inner.relations

    def encode(self, value: Any) -> Tokens:
        return value

    def __call__(self, value: Any, *, empty: bool = False) -> Tokens:
        return value

    def decode(self, tokens: Tokens) -> Any:
        return self.inner.decode(tokens) if self.vocab_size is None else tuple(tokens.content.tolist())

    @property
    def length(self) -> int | None:
        return self.inner.length

    @property
    def written_features(self) -> int | None:
        return self.inner.written_features

    def answered(self, tokens: Tokens) -> Tensor:
        return self.inner.answered(tokens)

    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        return self.inner.fed_back(features_NF, position_NA)

    def places(self, count: int) -> Tensor:
        return self.inner.places(count)

    def next_place(self, written: Tokens, content: Tensor) -> Tensor:
        return self.inner.next_place(written, content)

    @property
    def placed_by_content(self) -> bool:
        return self.inner.placed_by_content
