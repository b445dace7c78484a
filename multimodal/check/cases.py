"""What the checks work on: a tokenizer or a head, values, and small models around them."""

import contextlib
import copy
import json
import math
import pickle
import unittest
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.check.measure import TOLERANCE, allowed, difference
from multimodal.check.report import IMPORTS_MAY_CHANGE, changed, check_given, preserved_settings, settings, want
from multimodal.composite import Composed, Composite, named_kinds
from multimodal.core import Core
from multimodal.heads import Head, Masked, Pointer
from multimodal.model import Model
from multimodal.task import Task
from multimodal.tokenizer import Tokenizer, Tokens, at_times, describe

Module = TypeVar("Module", bound=nn.Module)
# 48 is a multiple of 2, 3, 4, 6, 8, 12, 16 and 24, whichever an embedding wants
CORE = Core(width=48, depth=2, heads=2)


@dataclass(frozen=True)
class Number(Tokenizer):
    """A number below `size`: what the models of these checks write.

    size: the number of numbers.
    """

    size: int
    classes = True

    @property
    def vocab_size(self) -> int:
        return self.size

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.tensor([int(value)]), torch.zeros(1, 3))

    def decode(self, tokens: Tokens) -> int:
        return int(tokens.content[0])


@dataclass(frozen=True)
class Signal(Tokenizer):
    """A pair (seed, count): `count` tokens of noise, for heads to read."""

    feature_size = 4

    def encode(self, value: Any) -> Tokens:
        seed, count = value
        noise_NF = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        return Tokens(noise_NF, at_times(torch.arange(count)))


@dataclass(frozen=True)
class Sizeless(Tokenizer):
    """A kind that declares no size: no head can write it."""

    def encode(self, value: Any) -> Tokens:
        raise NotImplementedError


@dataclass
class TokenizerCase:
    """A tokenizer under test: every value is read, and its number is the answer."""

    tokenizer: Tokenizer
    values: list[Any]
    task = "value -> answer"

    def __post_init__(self) -> None:
        """Copy the values before anything is encoded, so that no check gets values that an earlier one has changed."""
        self.settings = settings_of(self.tokenizer)
        self.uncopied = ""  # why the values cannot be copied; "": they can
        try:
            self.originals, self.values = copy.deepcopy(self.values), copy.deepcopy(self.values)
            for value in self.originals:
                contents(value)
        except Exception as error:  # an open file, for instance
            self.originals, self.uncopied = self.values, f"the values cannot be copied and compared: {error}"

    def copies(self) -> list[Any]:
        """Fresh copies of the original values.

        Raises:
            SkipTest: they cannot be copied.
        """
        if self.uncopied:
            raise unittest.SkipTest(self.uncopied)
        return copy.deepcopy(self.originals)

    def check_given(self) -> None:
        check_given(self.tokenizer, self.values)

    @property
    def part(self) -> Tokenizer:
        return self.tokenizer

    @property
    def chance(self) -> float:
        """The loss of not looking, in nats."""
        return math.log(len(self.samples))

    @cached_property
    def tokens(self) -> list[Tokens]:
        """Every value as `encode` gives it, unchecked."""
        # the first call may import a library, which sets up what belongs to it: that is no fault of the tokenizer
        before = settings()
        with preserved_settings():
            tokens = [copied(self.tokenizer.encode(value)) for value in self.values]
            self.changed = [name for name in changed(before) if name not in IMPORTS_MAY_CHANGE]
        return tokens

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [{"value": value, "answer": i} for i, value in enumerate(self.values[:4])]

    @property
    def batch(self) -> list[tuple[str, dict[str, Any]]]:
        """The samples among others: of other tasks, and beside another field."""
        batch: list[tuple[str, dict[str, Any]]] = []
        for i, sample in enumerate(self.samples):
            batch += [(self.task, sample), ("signal -> answer", {"signal": (i, 3 + i), "answer": 0})]
            batch.append(("signal value -> answer", {**sample, "signal": (i, 2)}))
        return batch

    @property
    def addition(self) -> dict[str, Any]:
        """What `Model.extended` adds to a model that knows only signals and answers."""
        kinds = {"value": self.tokenizer, **named_kinds(self.tokenizer)}
        return {"tokenizers": kinds, "tasks": [self.task, "signal value -> answer"]}

    def embed(self, width: int = CORE.width) -> nn.Module:
        """A module that embeds this kind; of a composite also the parts that a model embeds by the kinds they name."""
        module = self.tokenizer.embed(width)
        _complete(module, self.tokenizer, width)
        return module

    def model(self) -> Model:
        return perturbed(self.plain_model().extended(**self.addition))

    def plain_model(self) -> Model:
        """A model without this kind, whose core knows its axes."""
        return plain_model(self.tokenizer.axes)

    def check_same(self, again: Tokenizer, how: str) -> None:
        if isinstance(again, Composite):  # which kinds its parts name is the model's to say
            again = again.bind(named_kinds(self.tokenizer))
        for value, tokens in zip(self.values, self.tokens, strict=True):
            want(equal_tokens(again.encode(value), tokens), f"{describe(value)} gives other tokens {how}")


@dataclass
class HeadCase:
    """A head under test: every value is written from a signal that is long enough to learn it from; by a head that points or
    hides from the value itself."""

    head: Head
    tokenizer: Tokenizer
    values: list[Any]
    chance = math.inf

    def check_given(self) -> None:
        check_given(self.tokenizer, self.values)

    @property
    def part(self) -> Head:
        return self.head

    @property
    def task(self) -> str:
        if isinstance(self.head, Masked):
            return "value -> value"
        return "seen:value -> value" if isinstance(self.head, Pointer) else "signal -> value"

    @property
    def samples(self) -> list[dict[str, Any]]:
        if isinstance(self.head, (Masked, Pointer)):
            return [{"seen": value, "value": value} for value in self.values[:4]]
        lengths = [2 * len(self.tokenizer(value)) + 2 + i for i, value in enumerate(self.values[:4])]
        return [{"signal": (i, n), "value": v} for i, (n, v) in enumerate(zip(lengths, self.values, strict=False))]

    @property
    def batch(self) -> list[tuple[str, dict[str, Any]]]:
        others = [("signal -> answer", {"signal": (i, 3 + i), "answer": i}) for i in range(len(self.samples))]
        return [item for i, sample in enumerate(self.samples) for item in ((self.task, sample), others[i])]

    @property
    def addition(self) -> dict[str, Any]:
        return {"tokenizers": {"value": self.tokenizer}, "tasks": [Task(self.task, self.head)]}

    def model(self) -> Model:
        return perturbed(self.plain_model().extended(**self.addition))

    def plain_model(self) -> Model:
        """A model without this head, whose core knows the axes of what it writes."""
        return plain_model(self.tokenizer.axes)

    def check_same(self, again: Head, how: str) -> None:
        want(again.vocab(self.tokenizer) == self.head.vocab(self.tokenizer), f"the head has another vocabulary {how}")


def _complete(module: Any, tokenizer: Tokenizer, width: int) -> None:
    """Add the modules of parts that name kinds, which `Composite.embed` leaves to the model."""
    if not isinstance(tokenizer, Composite):
        return
    for name, part in tokenizer.resolved().items():
        if isinstance(tokenizer.parts[name], str):
            module[name] = part.embed(width)
        _complete(module[name], part, width)


def copied(tokens: Any) -> Any:
    """A copy of tokens, which no later call can change."""
    if isinstance(tokens, Composed):
        return copy.deepcopy(tokens)
    parts = (tokens.content, tokens.position_NA) if isinstance(tokens, Tokens) else ()
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        return tokens
    pairs = tokens.pairs.clone() if isinstance(tokens.pairs, Tensor) else tokens.pairs
    return Tokens(tokens.content.clone(), tokens.position_NA.clone(), pairs)


def settings_of(tokenizer: Any) -> str | None:
    """The tokenizer's settings as JSON; None if they cannot be written as such, which `config_round_trip` reports."""
    with contextlib.suppress(Exception):
        return json.dumps(tokenizer.config())
    return None


def contents(value: Any) -> Any:
    """A key that is equal for equal contents and shares no memory with the value."""
    if isinstance(value, (Tensor, np.ndarray)):
        array = np.asarray(value)
        return (str(array.dtype), array.shape, array.tobytes())
    if isinstance(value, dict):
        return [(key, contents(x)) for key, x in value.items()]
    return [contents(x) for x in value] if isinstance(value, (list, tuple)) else pickle.dumps(value)


def plain_model(axes: tuple[str, ...]) -> Model:
    return Model({"signal": Signal(), "answer": Number(4)}, CORE.replace(axes=axes), ["signal -> answer"])


def perturbed(model: Module) -> Module:
    """The model, or a part of it, with noise added to its weights: logits, and their errors, are as large as in a trained one."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def equal_tokens(a: Tokens, b: Tokens) -> bool:
    return torch.equal(a.content, b.content) and torch.equal(a.position_NA, b.position_NA) and equal_pairs(a, b)


def equal_pairs(a: Tokens, b: Tokens) -> bool:
    """Whether the tokens are related in the same pairs, in whichever order these are given."""
    sets = [
        {tuple(pair) for pair in x.pairs.tolist()} if isinstance(x.pairs, Tensor) and x.pairs.numel() else set()
        for x in (a, b)
    ]
    return sets[0] == sets[1]


def close_tokens(a: Tokens, b: Tokens) -> bool:
    """Whether two values' tokens differ by rounding only."""
    pairs = (a.content, b.content), (a.position_NA, b.position_NA)
    close = all(x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5) for x, y in pairs)
    return close and equal_pairs(a, b)


def check_close(got: Tensor, wanted: Tensor, what: str) -> None:
    want(got.shape == wanted.shape, f"{what}: {tuple(got.shape)} is not {tuple(wanted.shape)}")
    error, bound = difference(got, wanted), allowed(wanted)
    scale = bound / TOLERANCE
    want(error <= bound, f"{what}: they differ by {error:.2g}, more than {TOLERANCE:g} of {scale:.2g}")


def check_gradients(module: nn.Module) -> None:
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    still = [name for name, grad in trained.items() if grad is None or not grad.any()]
    want(not still, f"no gradient reaches {', '.join(still)}")
