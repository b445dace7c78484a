"""Mask rules and priors: which keys a query may look at, and how much it expects of each. Priors add; rules combine by & | ~.

A rule sees the places of queries and of keys and answers yes or no, elementwise. The dense oracle asks it for a whole
matrix, the block-sparse backend for single index pairs, the cached decoder for new queries against old keys.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multimodal.declare import Declared, check_part
from multimodal.old_names import moved
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class MaskInfo:
    """What a rule may know of tokens; integer tensors that broadcast together.

    sample: which sample of the pack.
    order: index within its sample.
    bidirectional: 1 for tokens that see each other in both directions, 0 for causal ones.
    segment: which field of the sample.
    """

    sample: Tensor
    order: Tensor
    bidirectional: Tensor
    segment: Tensor

    def __getitem__(self, index) -> "MaskInfo":
        return MaskInfo(*(getattr(self, f.name)[index] for f in fields(self)))

    @property
    def alone(self) -> "MaskInfo":
        """The same with the sample index 0: the answer of a rule must not depend on the position of a sample in its pack."""
        return replace(self, sample=torch.zeros_like(self.sample))


@dataclass(frozen=True)
class Pairs:
    """Queries (B, T, 1) and keys (B, 1, M), and which query may look at which key.

    allowed: (B, T, M), or what broadcasts to it; None: every query at every key.
    causal: every query at the keys that are not after it; then `allowed` is None.
    """

    q: MaskInfo
    k: MaskInfo
    allowed: Tensor | None = None
    causal: bool = False

    @property
    def distance(self) -> Tensor:
        """How far each key is after each query, in tokens: (B, 1, T, M); negative before it."""
        return (self.k.order - self.q.order)[:, None]

    @property
    def count(self) -> Tensor:
        """Number of keys that each query may look at: broadcasts to (B, T, 1)."""
        if self.causal:
            return self.q.order + 1
        if self.allowed is None:
            return self.k.order.new_full((1, 1, 1), self.k.order.shape[-1])
        return self.allowed.sum(-1, keepdim=True)

    @property
    def alone(self) -> "Pairs":
        """These pairs with the sample index 0 throughout, even for keys that belong to no sample, such as a learned memory."""
        return replace(self, q=self.q.alone, k=self.k.alone)

    @property
    def closed(self) -> Tensor | None:
        """The pairs that are masked out, (B, T, M); None: no pair is."""
        if self.causal:
            return self.k.order > self.q.order
        return None if self.allowed is None else ~self.allowed


def everyone(count: int, keys: int, device: torch.device) -> Pairs:
    """`count` queries of one sample, each of which may look at all of `keys` keys."""

    def places(order: Tensor) -> MaskInfo:
        nothing = torch.zeros_like(order)
        return MaskInfo(nothing, order, nothing, nothing)

    q = places(torch.arange(count, device=device)[None, :, None])
    k = places(torch.arange(keys, device=device)[None, None])
    return Pairs(q, k)


class Prior(Declared, ABC):
    """What a query expects of a key before it compares them: a log-probability, up to a constant of the query. Priors add.

    Subclass as a frozen dataclass and write `log_prior`. A prior that is 0 or minus infinity is a mask: a `Rule`.
    """

    @property
    def most(self) -> int | None:
        """The largest number of keys; None: any number."""
        return None

    @property
    def normalised(self) -> bool:
        """Whether the responsibilities sum to 1 again after it; if not, its factor is multiplied onto them."""
        return True

    def weights(self, heads: int, width: int) -> nn.Module | None:
        """What is learned, for `heads` query heads of this width; it comes back as the last argument of `log_prior`."""
        return None

    @abstractmethod
    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        """(B, H, T, M), or what broadcasts to it."""

    def __add__(self, other: "Prior") -> "Prior":
        check_part(f"{type(self).__name__} + other: other", other, Prior, "Window(64)")
        return Sum(self, other)

    def parts(self) -> "tuple[Prior, ...]":
        """The priors that this one is the sum of."""
        return (self,)


@dataclass(frozen=True)
class Sum(Prior):
    """Both: log-priors add."""

    left: Prior
    right: Prior

    def parts(self) -> tuple[Prior, ...]:
        return (*self.left.parts(), *self.right.parts())

    def log_prior(self, pairs: Pairs, q_BTHK: Tensor, weights: Any) -> Tensor:
        raise NotImplementedError("a sum is asked by its parts")


class Rule(Prior):
    """A mask rule. Subclass as a frozen dataclass and write `allows`."""

    @abstractmethod
    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        """True where query q may look at key k; elementwise, with no branch on values."""

    @property
    def reach(self) -> int | None:
        """The largest distance, in tokens, at which a query looks; None: no bound is known."""
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
    left: Rule
    right: Rule

    @property
    def reach(self) -> int | None:
        bounds = [r for r in (self.left.reach, self.right.reach) if r is not None]
        return min(bounds, default=None)

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return self.left.allows(q, k) & self.right.allows(q, k)


@dataclass(frozen=True)
class Or(Rule):
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
    rule: Rule

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return ~self.rule.allows(q, k)


@dataclass(frozen=True)
class SameSample(Rule):
    """Stay inside one's own sample: what makes packing invisible."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return q.sample == k.sample


@dataclass(frozen=True)
class SameSegment(Rule):
    """Stay inside one's own field of the sample."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (q.sample == k.sample) & (q.segment == k.segment)


@dataclass(frozen=True)
class Causal(Rule):
    """Look at oneself and at what came before."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return k.order <= q.order


@dataclass(frozen=True)
class Prefix(Rule):
    """Bidirectional tokens look at each other in both directions."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (q.bidirectional & k.bidirectional) != 0


@dataclass(frozen=True)
class InTurn(Rule):
    """Look at oneself, at what came before, and at bidirectional tokens."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (k.order <= q.order) | (k.bidirectional != 0)


@dataclass(frozen=True)
class Window(Rule):
    """Look at most `size` - 1 tokens away, in either direction.

    size: how many tokens are seen to either side, oneself counted.
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
    """Look at one's own chunk of `size` tokens and at all before it: sound can be read while it comes in.

    size: tokens of a chunk.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Chunked: size={self.size} makes no chunks; use 1 or more")

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return k.order // self.size <= q.order // self.size


@dataclass(frozen=True)
class Alone(Rule):
    """Hides the sample index from a rule: each sample looks as if it were alone in its pack."""

    rule: Rule

    @property
    def reach(self) -> int | None:
        return self.rule.reach

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return self.rule.allows(q.alone, k.alone)


PREFIX_LM: Rule = SameSample() & (Causal() | Prefix())
"""The default, prefix-LM: bidirectional tokens see each other, every other token sees its past, no token sees another sample."""

LAW: Rule = SameSample() & InTurn()
"""Holds under every rule: no token sees another sample, and none sees a causal token that comes after it."""


class Span(NamedTuple):
    """One sample of a pack, by numbers of tokens.

    bidirectional: at its start; -1: there are some elsewhere too.
    total: all of them.
    read: of the context, which comes before what is written; only a core that reads and writes apart needs it.
    """

    bidirectional: int
    total: int
    read: int = 0


@dataclass(frozen=True)
class Layout:
    """Which rows of a stream belong to which sample: spans on the host, and what rules may know of each row (T,) on the device."""

    spans: tuple[Span, ...]
    info: MaskInfo


def is_prefix_lm(rule: Rule, layout: Layout) -> bool:
    """Whether this is the default rule, with bidirectional tokens only at the start of every sample."""
    return rule == PREFIX_LM and all(span.bidirectional >= 0 for span in layout.spans)


__getattr__ = moved(__name__)  # goes with version 0.3
