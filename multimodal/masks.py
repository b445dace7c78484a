"""Mask rules and priors: which keys a query may attend to, and how probable each is beforehand. Priors add; rules combine by & | ~.

A rule gets what is known of queries and of keys (`MaskInfo`) and answers yes or no, elementwise. The dense oracle asks it for
a whole matrix, the block-sparse backend for single index pairs, the cached decoder for new queries against cached keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multimodal.declare import Declared, check_part
from multimodal.old_names import moved, warn
from multimodal.relations import Links, ReadsRelations
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class MaskInfo:
    """What a rule may know of tokens: integer tensors that broadcast together.

    sample: number of the token's sample in the pack.
    order: index of the token within its sample.
    bidirectional: 1 for a token that attends in both directions, 0 for a causal one.
    segment: number of the token's field within its sample.
    links: its relations to other tokens; None: no token of the stream has any.
    """

    sample: Tensor
    order: Tensor
    bidirectional: Tensor
    segment: Tensor
    links: Links | None = None

    def __getitem__(self, index) -> "MaskInfo":
        return self.map(lambda x: x[index])

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, order, bidirectional and segment."""
        return self.sample, self.order, self.bidirectional, self.segment

    def map(self, change: Callable[[Tensor], Tensor]) -> "MaskInfo":
        """What is known of some of the tokens, or of all of them in another shape."""
        return MaskInfo(*map(change, self.numbers), links=None if self.links is None else self.links.map(change))

    @property
    def free(self) -> Tensor:
        """The name of `bidirectional` in version 0.1, for rules of one's own; goes with 0.3."""
        warn("MaskInfo.free", "MaskInfo.bidirectional", 1)
        return self.bidirectional

    @property
    def alone(self) -> "MaskInfo":
        """A copy with the sample index 0, because what a rule answers must not depend on the position of a sample in its pack."""
        return replace(self, sample=torch.zeros_like(self.sample))


@dataclass(frozen=True)
class Pairs:
    """Queries and keys, and which query may attend to which key.

    q: what rules may know of the queries, (B, T, 1).
    k: what rules may know of the keys, (B, 1, M).
    allowed: (B, T, M) or what broadcasts to it, True where a query may attend; None: everywhere, unless `causal`.
    causal: every query attends to itself and to the keys before it; then `allowed` is None.
    """

    q: MaskInfo
    k: MaskInfo
    allowed: Tensor | None = None
    causal: bool = False

    @property
    def distance(self) -> Tensor:
        """Order of the key minus order of the query, in tokens, (B, 1, T, M): negative where the key comes before the query."""
        return (self.k.order - self.q.order)[:, None]

    @property
    def count(self) -> Tensor:
        """Number of keys that each query may attend to; broadcasts to (B, T, 1)."""
        if self.causal:
            return self.q.order + 1
        if self.allowed is None:
            return self.k.order.new_full((1, 1, 1), self.k.order.shape[-1])
        return self.allowed.sum(-1, keepdim=True)

    @cached_property
    def relation(self) -> Tensor | None:
        """The set of relations of each pair, (B, T, M), as a row of `PairTable.sets`; None: no token is related to another."""
        return None if self.q.links is None or self.k.links is None else self.q.links.relation(self.k.links)

    @cached_property
    def alone(self) -> "Pairs":
        """A copy with the sample index 0 for all queries and keys, also for keys of no sample, such as learned slots."""
        return replace(self, q=self.q.alone, k=self.k.alone)

    @property
    def closed(self) -> Tensor | None:
        """The pairs that are masked out, (B, T, M); None: no pair is."""
        if self.causal:
            return self.k.order > self.q.order
        return None if self.allowed is None else ~self.allowed


def all_pairs(queries: int, keys: int, device: torch.device) -> Pairs:
    """`queries` queries of one sample, each of which may attend to all of `keys` keys."""

    def info(order: Tensor) -> MaskInfo:
        zero = torch.zeros_like(order)
        return MaskInfo(zero, order, zero, zero)

    q = info(torch.arange(queries, device=device)[None, :, None])
    k = info(torch.arange(keys, device=device)[None, None])
    return Pairs(q, k)


class Prior(Declared, ABC):
    """The log-probability that a query attends to a key before their contents are compared, up to a constant per query.

    Priors add: `ALiBi() + MixingWeights(8)`. Subclass as a frozen dataclass and write `log_prior`. A prior whose values are 0
    and minus infinity is a mask: write a `Rule` instead.

    shared: whether the layers of a core have its learned parameters in common, which are stored with the first of them.
    """

    shared: bool = False

    @property
    def most(self) -> int | None:
        """The largest number of keys for which it is defined; None: any number."""
        return None

    @property
    def normalised(self) -> bool:
        """Whether it is applied before the softmax; if not, exp(log_prior) multiplies the attention weights, which then sum to less
        than 1."""
        return True

    def weights(self, heads: int, width: int) -> nn.Module | None:
        """Makes its learned parameters, for `heads` query heads of this width; `log_prior` gets them as its last argument."""
        return None

    @abstractmethod
    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        """The log-prior, (B, H, T, M) or what broadcasts to it, in nats."""

    def __add__(self, other: "Prior") -> "Prior":
        check_part(f"{type(self).__name__} + other: other", other, Prior, "Window(64)")
        return Sum(self, other)

    def parts(self) -> "tuple[Prior, ...]":
        """The priors of which this one is the sum, from left to right."""
        return (self,)


@dataclass(frozen=True)
class Sum(Prior):
    """The sum of two priors, which `Mechanism` takes apart with `parts`: each part has its own parameters.

    left, right: the priors.
    """

    left: Prior
    right: Prior

    def parts(self) -> tuple[Prior, ...]:
        return (*self.left.parts(), *self.right.parts())

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        raise NotImplementedError("Sum.log_prior: call log_prior of each of its parts()")


class Rule(Prior):
    """A mask rule. Subclass as a frozen dataclass and write `allows`."""

    @abstractmethod
    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        """True where query q may attend to key k; elementwise, without branches on values, so that FlexAttention compiles it."""

    @property
    def reach(self) -> int | None:
        """The largest distance, in tokens, between a query and a key that it attends to; None: no bound is known."""
        return None

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        allowed = self.allows(pairs.q, pairs.k)[:, None]
        return torch.zeros(allowed.shape, device=q_BTHK.device).masked_fill(~allowed, float("-inf"))

    def __and__(self, other: "Rule") -> "Rule":
        check_part(f"{type(self).__name__} & other: other", other, Rule, "Window(64)")
        return And(self, other)

    def __or__(self, other: "Rule") -> "Rule":
        check_part(f"{type(self).__name__} | other: other", other, Rule, "Window(64)")
        return Or(self, other)

    def __invert__(self) -> "Rule":
        return Not(self)


@dataclass(frozen=True)
class And(Rule):
    """Both rules allow it: `left & right`.

    left, right: the rules.
    """

    left: Rule
    right: Rule

    @property
    def reach(self) -> int | None:
        # one bound is enough, since both rules must allow a pair
        bounds = [r for r in (self.left.reach, self.right.reach) if r is not None]
        return min(bounds, default=None)

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return self.left.allows(q, k) & self.right.allows(q, k)


@dataclass(frozen=True)
class Or(Rule):
    """One of the rules allows it, or both: `left | right`.

    left, right: the rules.
    """

    left: Rule
    right: Rule

    @property
    def reach(self) -> int | None:
        left, right = self.left.reach, self.right.reach
        return None if left is None or right is None else max(left, right)

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return self.left.allows(q, k) | self.right.allows(q, k)


@dataclass(frozen=True)
class Not(Rule):
    """The rule does not allow it: `~rule`.

    rule: the rule.
    """

    rule: Rule

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return ~self.rule.allows(q, k)


@dataclass(frozen=True)
class SameSample(Rule):
    """A token attends only within its own sample; this makes packing invisible."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return q.sample == k.sample


@dataclass(frozen=True)
class SameSegment(Rule):
    """A token attends only within its own field of its own sample."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (q.sample == k.sample) & (q.segment == k.segment)


@dataclass(frozen=True)
class Causal(Rule):
    """A token attends to itself and to the tokens before it."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return k.order <= q.order


@dataclass(frozen=True)
class Prefix(Rule):
    """Bidirectional tokens attend to each other in both directions."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (q.bidirectional & k.bidirectional) != 0


@dataclass(frozen=True)
class InTurn(Rule):
    """A token attends to itself, to the tokens before it, and to bidirectional tokens anywhere."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (k.order <= q.order) | (k.bidirectional != 0)


@dataclass(frozen=True)
class Window(Rule):
    """A token attends to tokens that are at most `size` - 1 away, in either direction.

    size: number of tokens to either side, the token itself counted.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Window: size={self.size} sees nothing, not even itself; use 1 or more")

    @property
    def reach(self) -> int:
        return self.size - 1

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        distance = q.order - k.order
        return (distance < self.size) & (distance > -self.size)


@dataclass(frozen=True)
class Chunked(Rule):
    """A token attends to its own chunk of `size` tokens and to all chunks before it, so that a sound can be read as it arrives.

    size: number of tokens of a chunk.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Chunked: size={self.size} makes no chunks; use 1 or more")

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return k.order // self.size <= q.order // self.size


@dataclass(frozen=True, init=False)
class Linked(ReadsRelations, Rule):
    """A token attends to itself and to the tokens to which it has one of these relations: `Linked("edge", "next")`.

    The pairs are those that `Tokenizer.encode` gives with the tokens of a value. Tokens without any, such as what a head adds,
    attend to themselves alone; `Linked("edge") | ~SameSegment()` lets all attend to other fields too.

    relations: the names of the relations, as a tokenizer of the model declares them.
    """

    relations: tuple[str, ...]

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        itself = k.order == q.order
        if q.links is None or k.links is None:
            return itself
        return itself | q.links.has_any(k.links, self.relations)


@dataclass(frozen=True)
class Alone(Rule):
    """Applies a rule with the sample index hidden, so that a sample attends alike in every pack.

    rule: the rule.
    """

    rule: Rule

    @property
    def reach(self) -> int | None:
        return self.rule.reach

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return self.rule.allows(q.alone, k.alone)


PREFIX_LM: Rule = SameSample() & (Causal() | Prefix())
"""The default, prefix-LM: bidirectional tokens attend to each other, every token to those before it, none to another sample."""

LAW: Rule = SameSample() & InTurn()
"""Every rule is combined with this one: no token attends to another sample, nor to a causal token that comes after it."""


class Span(NamedTuple):
    """The numbers of tokens of one sample of a pack.

    bidirectional: number of bidirectional tokens at its start; -1: there are bidirectional tokens elsewhere too.
    total: number of all its tokens.
    read: number of tokens of the context, which comes before what is written; only an `EncoderDecoder` needs it.
    """

    bidirectional: int
    total: int
    read: int = 0


@dataclass(frozen=True)
class Layout:
    """Which rows of a stream belong to which sample.

    spans: by sample, its numbers of tokens; on the host, so that plans need not wait for the device.
    info: what rules may know of each row, (T,); on the device.
    """

    spans: tuple[Span, ...]
    info: MaskInfo


def prefix_window(rule: Rule) -> int | None:
    """The size of the window if a rule is the default one within a window, `PREFIX_LM & Window(size)`; None: another rule."""
    if isinstance(rule, And):
        for one, other in ((rule.left, rule.right), (rule.right, rule.left)):
            if one == PREFIX_LM and type(other) is Window:
                return other.size
    return None


def is_prefix_lm(rule: Rule, layout: Layout) -> bool:
    """Whether this is the default rule and every sample has its bidirectional tokens at its start: fused kernels can run that."""
    return rule == PREFIX_LM and all(span.bidirectional >= 0 for span in layout.spans)


__getattr__ = moved(__name__)  # goes with version 0.3
