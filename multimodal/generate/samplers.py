"""How the next token is chosen: small rules that each reshape the logits, and combine with |.

    Temperature(0.8) | TopP(0.9)          first the temperature, then the smallest set that holds 90 %
    NoRepeat(3)                           the likeliest token that repeats no three tokens
    NoRepeat(3) | Temperature(0.8)        any token that repeats no three, the likelier the more often

The likeliest of what is left is taken, unless one of the rules draws (`Temperature`, `TopK`, `TopP`, `MinP`).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from multimodal.declare import Declared
from multimodal.generate.lexicon import Node, State, WordTree, id_tree
from multimodal.shapes import ConfigError, check_number, check_whole
from multimodal.tokenizer import Tokenizer

NEVER = float("-inf")


@dataclass(frozen=True)
class Written:
    """One answer so far: its ids (with those it began with), the tokenizer of its kind, and the id that ends it."""

    ids: Sequence[int]
    tokenizer: Tokenizer
    stop: int


class Sampler(Declared, ABC):
    """A rule of choice. Subclass as a frozen dataclass and write `__call__`.

    draws: whether a token is drawn from what the rule leaves; otherwise the likeliest is taken.
    reweighs: whether it changes probabilities without ruling tokens out; beams ignore such changes.
    spells: whether it knows values, which it spells in the ids of their kind.
    """

    draws: bool = False
    reweighs: bool = False
    spells: ClassVar[bool] = False

    def parts(self) -> "tuple[Sampler, ...]":
        """The rules that this one is made of, in their order."""
        return (self,)

    @abstractmethod
    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        """New logits (B, V), of a row for each answer; -inf rules a token out."""

    def __or__(self, then: "Sampler") -> "Sampler":
        return Then(self, then)


@dataclass(frozen=True)
class Then(Sampler):
    """One rule after the other."""

    first: Sampler
    second: Sampler

    def __post_init__(self) -> None:
        rules = self.parts()
        for i, rule in enumerate(rules):
            if not _is_greedy(rule):
                continue
            idle = [*rules[i + 1 :], *(other for other in rules[:i] if other.draws)]
            if idle:
                raise ConfigError(
                    f"{self}: {rule} leaves the likeliest token only, so {idle[0]} would do nothing; leave one of them out"
                )

    def parts(self) -> tuple[Sampler, ...]:
        return (*self.first.parts(), *self.second.parts())

    @property
    def draws(self) -> bool:
        return self.first.draws or self.second.draws

    def __str__(self) -> str:
        return f"{self.first} | {self.second}"

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        return self.second(self.first(logits_BV, written), written)


@dataclass(frozen=True)
class Greedy(Sampler):
    """Only the likeliest token; the first of equals."""

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, NEVER).scatter(1, best_B1, logits_BV.gather(1, best_B1))


def _is_greedy(rule: Sampler) -> bool:
    return type(rule) is Greedy or getattr(rule, "temperature", None) == 0


@dataclass(frozen=True)
class Temperature(Sampler):
    """p ~ exp(logit / temperature): below 1 surer, above 1 bolder, 0 greedy.

    temperature: what logits are divided by; 0: only the likeliest is left.
    """

    temperature: float = 1.0
    draws = True

    def __post_init__(self) -> None:
        check_number("Temperature", temperature=self.temperature)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"Temperature: temperature={self.temperature} must be 0 or more")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        # logits cannot be divided by a number that is 0 in their precision
        if self.temperature < torch.finfo(torch.promote_types(logits_BV.dtype, torch.float32)).tiny:
            return Greedy()(logits_BV, written)
        if self.temperature == 1:
            return logits_BV
        below_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # so that the likeliest stays finite, however cold
        return below_BV / self.temperature


@dataclass(frozen=True)
class TopK(Sampler):
    """The k likeliest tokens (Fan et al. 2018); of equals the first.

    k: how many tokens are left.
    """

    k: int
    draws = True

    def __post_init__(self) -> None:
        check_whole("TopK", k=self.k)
        if self.k < 1:
            raise ConfigError(f"TopK: k={self.k} leaves no candidate; use 1 or more")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
        return logits_BV.scatter(1, order_BV[:, self.k :], NEVER)


@dataclass(frozen=True)
class TopP(Sampler):
    """The smallest set of likeliest tokens that together hold probability p (nucleus: Holtzman et al. 2020).

    p: the probability that those left hold together, above 0 and at most 1.
    temperature: what logits are divided by first.

    Examples:
        >>> sampler = mm.NoRepeat(4) | mm.TopP(0.9, temperature=0.8)
        >>> model.generate("image -> text", image=square, sampler=sampler, seed=7, max_tokens=8).value
        'square'
    """

    p: float
    temperature: float = 1.0  # applied first
    draws = True

    def __post_init__(self) -> None:
        Temperature(self.temperature)
        check_number("TopP", p=self.p)
        if not 0 < self.p <= 1:
            raise ConfigError(f"TopP: p={self.p} must be above 0 and at most 1")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        logits_BV = Temperature(self.temperature)(logits_BV, written)
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        p_BV = sorted_BV.double().softmax(-1)
        beyond_BV = p_BV.cumsum(-1) - p_BV >= self.p  # what comes before already holds p; the first is always in
        beyond_BV[:, 0] = False
        return logits_BV.scatter(1, order_BV, sorted_BV.masked_fill(beyond_BV, NEVER))


@dataclass(frozen=True)
class MinP(Sampler):
    """Tokens at least `p` times as probable as the likeliest (Nguyen et al. 2024).

    p: the least share of the likeliest token's probability, from 0 to 1.
    temperature: what logits are divided by afterwards, as in the paper's code.
    """

    p: float
    temperature: float = 1.0  # applied afterwards, as in the paper's code
    draws = True

    def __post_init__(self) -> None:
        Temperature(self.temperature)
        check_number("MinP", p=self.p)
        if not 0 <= self.p <= 1:
            raise ConfigError(f"MinP: p={self.p} must be from 0 to 1")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        log_p_BV = logits_BV.log_softmax(-1)
        least_B1 = log_p_BV.amax(-1, keepdim=True) + torch.tensor(self.p).log()
        return Temperature(self.temperature)(logits_BV.masked_fill(log_p_BV < least_B1, NEVER), written)


@dataclass(frozen=True)
class Repetition(Sampler):
    """Tokens written before lose `penalty` nats, and `each` nats more for every time they were written.

    Additive, so that it means the same wherever the logits' zero lies (the "presence" and "frequency" penalties of other
    tools). `last` tokens are looked back at; 0: all.

    penalty: nats off for a token that was written, however often.
    each: nats off for every time it was written.
    last: how many tokens are looked back at; 0: all.
    """

    penalty: float = 1.0
    each: float = 0.0
    last: int = 64
    reweighs = True

    def __post_init__(self) -> None:
        check_number("Repetition", penalty=self.penalty, each=self.each)
        check_whole("Repetition", last=self.last)
        if not (isfinite(self.penalty) and isfinite(self.each)):
            raise ConfigError(f"Repetition: penalty={self.penalty} and each={self.each} must be finite numbers")
        if self.last < 0:
            raise ConfigError(f"Repetition: last={self.last} must be 0 (all) or more")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        logits_BV = logits_BV.clone()
        for row_V, so_far in zip(logits_BV, written, strict=True):
            count = Counter(so_far.ids[-self.last :] if self.last else so_far.ids)
            if count:
                times = torch.tensor(list(count.values()), dtype=row_V.dtype, device=row_V.device)
                row_V[list(count)] -= self.penalty + self.each * times
        return logits_BV


@dataclass(frozen=True)
class NoRepeat(Sampler):
    """No run of `size` tokens is written twice (Paulus et al. 2018).

    size: tokens of a run.
    """

    size: int

    def __post_init__(self) -> None:
        check_whole("NoRepeat", size=self.size)
        if self.size < 1:
            raise ConfigError(f"NoRepeat: size={self.size} must be at least 1")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        logits_BV = logits_BV.clone()
        for row_V, so_far in zip(logits_BV, written, strict=True):
            ids = list(so_far.ids)
            end = ids[len(ids) - self.size + 1 :]
            runs = range(len(ids) - self.size + 1) if len(ids) >= self.size else ()
            seen = {ids[i + self.size - 1] for i in runs if ids[i : i + self.size - 1] == end}
            row_V[list(seen)] = NEVER
        return logits_BV


@dataclass(frozen=True)
class AtLeast(Sampler):
    """No stop before `tokens` tokens.

    tokens: how many tokens are written before the answer may stop.
    """

    tokens: int

    def __post_init__(self) -> None:
        check_whole("AtLeast", least=0, tokens=self.tokens)

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        logits_BV = logits_BV.clone()
        for row_V, so_far in zip(logits_BV, written, strict=True):
            if len(so_far.ids) < self.tokens:
                row_V[so_far.stop] = NEVER
        return logits_BV


@dataclass(frozen=True)
class OneOf(Sampler):
    """The answer is one of these values ("yes", "no"), encoded by the kind's own tokenizer; anything else is ruled out.

    values: all answers that may be given.
    """

    values: tuple[str, ...]
    spells: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.values, (list, tuple)) or not self.values:
            raise ConfigError(f"OneOf: values={self.values!r} must be one value or more, in a tuple")
        object.__setattr__(self, "values", tuple(self.values))

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        out_BV = torch.full_like(logits_BV, NEVER)
        for row_V, new_V, so_far in zip(logits_BV, out_BV, written, strict=True):
            node: Node | None = _value_tree(self.values, so_far.tokenizer)
            for token in so_far.ids:
                node = node and node.children.get(token)
            if node is None:  # it began with what is none of the values
                continue
            ids = [*node.children, *([so_far.stop] if node.whole else ())]
            new_V[ids] = row_V[ids]
        return out_BV


_value_tree = lru_cache(maxsize=64)(id_tree)


@dataclass(frozen=True)
class Only(Sampler):
    """Only words of a list may be written, any number of them, with single blanks between.

    words: the words, none of which holds a blank.
    """

    words: tuple[str, ...]
    spells: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.words if isinstance(self.words, (list, tuple)) else ()
        if not given or any(not isinstance(w, str) or not w or " " in w for w in given):
            raise ConfigError(f"Only: words={self.words!r} must be one word or more, without blanks, in a tuple")
        object.__setattr__(self, "words", tuple(self.words))

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        out_BV = torch.full_like(logits_BV, NEVER)
        for row_V, new_V, so_far in zip(logits_BV, out_BV, written, strict=True):
            tree = _word_tree(self.words, so_far.tokenizer)
            state: State | None = tree.start
            for token in so_far.ids:
                state = state and tree.step(state, token)
            if state is None:
                continue
            ids = [*tree.following(state), *([so_far.stop] if tree.word_ends(state) else ())]
            new_V[ids] = row_V[ids]
        return out_BV


_word_tree = lru_cache(maxsize=64)(WordTree)
