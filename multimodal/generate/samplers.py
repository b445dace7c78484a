"""Samplers: rules that each change the logits of the next token, and combine with |.

    Temperature(0.8) | TopP(0.9)          first the temperature, then the smallest set of tokens with probability 90 %
    NoRepeat(3)                           greedy, without repeating any three tokens
    NoRepeat(3) | Temperature(0.8)        sampled, without repeating any three tokens

Decoding is greedy over what the rules leave, unless one of them samples (`Temperature`, `TopK`, `TopP`, `MinP`).
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
    """One answer so far, as samplers see it.

    ids: its ids, including those with which it began.
    tokenizer: the tokenizer of its kind.
    stop: the id that ends it.
    """

    ids: Sequence[int]
    tokenizer: Tokenizer
    stop: int


class Sampler(Declared, ABC):
    """A rule that changes the logits of the next token. Subclass as a frozen dataclass and write `__call__`.

    draws: whether the next token is sampled; if no rule does that, decoding is greedy.
    reweighs: whether it changes probabilities without ruling tokens out; beam search refuses such rules.
    spells: whether it has values, which it encodes as ids of the written kind; heads that choose no ids cannot use it.
    """

    draws: bool = False
    reweighs: bool = False
    spells: ClassVar[bool] = False

    def parts(self) -> "tuple[Sampler, ...]":
        """The rules of which this one is composed, in order."""
        return (self,)

    @abstractmethod
    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        """New logits (B, V), with a row for each answer; -inf rules a token out."""

    def __or__(self, then: "Sampler") -> "Sampler":
        return Then(self, then)


@dataclass(frozen=True)
class Then(Sampler):
    """One rule after the other: `first | second`.

    first, second: the rules.
    """

    first: Sampler
    second: Sampler

    def __post_init__(self) -> None:
        # after a greedy rule one token is left, so that later rules, and sampling before it, have no effect
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
    """Only the most probable token; the first of equal ones."""

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, NEVER).scatter(1, best_B1, logits_BV.gather(1, best_B1))


def _is_greedy(rule: Sampler) -> bool:
    return type(rule) is Greedy or getattr(rule, "temperature", None) == 0


@dataclass(frozen=True)
class Temperature(Sampler):
    """Samples with p ~ exp(logit / temperature).

    temperature: divisor of the logits; below 1 favours probable tokens, above 1 improbable ones; 0 is greedy.
    """

    temperature: float = 1.0
    draws = True

    def __post_init__(self) -> None:
        check_number("Temperature", temperature=self.temperature)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"Temperature: temperature={self.temperature} must be 0 or more")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        # a temperature that is 0 in the precision of the logits cannot divide them
        if self.temperature < torch.finfo(torch.promote_types(logits_BV.dtype, torch.float32)).tiny:
            return Greedy()(logits_BV, written)
        if self.temperature == 1:
            return logits_BV
        below_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # the largest is 0 and stays finite at any temperature
        return below_BV / self.temperature


@dataclass(frozen=True)
class TopK(Sampler):
    """Samples from the k most probable tokens (Fan et al. 2018); among equal ones the first.

    k: number of tokens that are left.
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
    """Samples from the smallest set of the most probable tokens with total probability p (nucleus: Holtzman et al. 2020).

    p: the least total probability of the tokens that are left, above 0 and at most 1.
    temperature: divisor of the logits, applied before.

    Examples:
        >>> sampler = mm.NoRepeat(4) | mm.TopP(0.9, temperature=0.8)
        >>> model.generate("image -> text", image=square, sampler=sampler, seed=7, max_tokens=8).value
        'square'
    """

    p: float
    temperature: float = 1.0
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
        beyond_BV = p_BV.cumsum(-1) - p_BV >= self.p  # the more probable tokens have p already
        beyond_BV[:, 0] = False
        return logits_BV.scatter(1, order_BV, sorted_BV.masked_fill(beyond_BV, NEVER))


@dataclass(frozen=True)
class MinP(Sampler):
    """Samples from the tokens that are at least `p` times as probable as the most probable one (Nguyen et al. 2024).

    p: the least probability, relative to that of the most probable token, from 0 to 1.
    temperature: divisor of the logits, applied afterwards, as in the paper's code.
    """

    p: float
    temperature: float = 1.0
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
    """Subtracts from the logits of tokens that were written before ("presence" and "frequency" penalties of other tools).

    It subtracts and does not divide, because only differences of logits have a meaning.

    penalty: nats that are subtracted for a token that was written, however often.
    each: nats that are subtracted for every time it was written.
    last: number of tokens, the newest ones, that are considered; 0: all.
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
    """No n-gram of `size` tokens is written twice (Paulus et al. 2018).

    size: n, number of tokens.
    """

    size: int

    def __post_init__(self) -> None:
        check_whole("NoRepeat", size=self.size)
        if self.size < 1:
            raise ConfigError(f"NoRepeat: size={self.size} must be at least 1")

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        logits_BV = logits_BV.clone()
        for row_V, so_far in zip(logits_BV, written, strict=True):
            # ruled out: the last token of each n-gram that begins with the newest n - 1 tokens
            ids = list(so_far.ids)
            end = ids[len(ids) - self.size + 1 :]
            starts = range(len(ids) - self.size + 1) if len(ids) >= self.size else ()
            repeated = {ids[i + self.size - 1] for i in starts if ids[i : i + self.size - 1] == end}
            row_V[list(repeated)] = NEVER
        return logits_BV


@dataclass(frozen=True)
class AtLeast(Sampler):
    """The answer does not stop before it has `tokens` tokens.

    tokens: the least number of tokens.
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
class Forbid(Sampler):
    """Some ids are never written, or never begin an answer.

    ids: the ids that are never written.
    first: ids that never begin an answer; that of its end forbids an empty one.
    """

    ids: tuple[int, ...]
    first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ids", "first"):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or any(type(i) is not int or i < 0 for i in given):
                raise ConfigError(f"Forbid: {name}={given!r} must be ids, whole numbers from 0, in a tuple")
            object.__setattr__(self, name, tuple(given))

    def __call__(self, logits_BV: Tensor, written: Sequence[Written]) -> Tensor:
        ids, first = (torch.tensor(x, dtype=torch.long, device=logits_BV.device) for x in (self.ids, self.first))
        logits_BV = logits_BV.index_fill(1, ids, NEVER)
        begins_B = torch.tensor([not so_far.ids for so_far in written], device=logits_BV.device)
        return torch.where(begins_B[:, None], logits_BV.index_fill(1, first, NEVER), logits_BV)


@dataclass(frozen=True)
class OneOf(Sampler):
    """The answer is one of these values ("yes", "no"), as encoded by the tokenizer of the written kind.

    values: the allowed answers.
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
            if node is None:  # the answer began with something else, so every token is ruled out
                continue
            ids = [*node.children, *([so_far.stop] if node.whole else ())]
            new_V[ids] = row_V[ids]
        return out_BV


_value_tree = lru_cache(maxsize=64)(id_tree)


@dataclass(frozen=True)
class Only(Sampler):
    """The answer consists of these words, any number of them, separated by single blanks.

    words: the allowed words, which have no blanks.
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
            if state is None:  # the answer began with something else
                continue
            ids = [*tree.following(state), *([so_far.stop] if tree.word_ends(state) else ())]
            new_V[ids] = row_V[ids]
        return out_BV


_word_tree = lru_cache(maxsize=64)(WordTree)


def combined_sampler(
    *,
    repetition: Repetition | None = None,
    no_repeat: int | None = None,
    only: Sequence[str] = (),
    one_of: Sequence[str] = (),
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    beams: int = 1,
) -> Sampler | None:
    """The sampler of options that were given one by one; None where nothing but perhaps a temperature was.

    Rules come first: probabilities are cut (top-k, top-p, min-p) among what may be written at all.
    """
    ruled: list[Sampler] = [] if repetition is None else [repetition]
    if no_repeat is not None:
        ruled.append(NoRepeat(no_repeat))
    if only:
        ruled.append(Only(tuple(only)))
    if one_of:
        ruled.append(OneOf(tuple(one_of)))
    drawn: list[Sampler] = []
    if top_k is not None:
        drawn.append(TopK(top_k))
    if top_p is not None:
        drawn.append(TopP(top_p))
    if min_p is not None:
        drawn.append(MinP(min_p))
    if not ruled and not drawn:
        return None
    if temperature is not None:
        drawn.insert(0, Temperature(temperature))
    elif not drawn and beams == 1:
        drawn.append(Greedy())
    first, *others = ruled + drawn
    for then in others:
        first = first | then
    return first
