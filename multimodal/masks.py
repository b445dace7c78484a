"""Who may look at whom: rules that combine with & | ~, written once and read by every attention backend.

A rule sees the places of queries and of keys and answers yes or no, elementwise. The dense oracle asks it for a whole
matrix, the block-sparse backend for single index pairs, the cached decoder for new queries against old keys.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

from torch import Tensor

from multimodal.declare import Declared
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class Places:
    """What a rule may ask about tokens; integer tensors that broadcast together.

    sample: which sample of the pack; order: index within its sample; free: read without direction (1) or causally (0);
    segment: which field of the sample.
    """

    sample: Tensor
    order: Tensor
    free: Tensor
    segment: Tensor

    def __getitem__(self, index) -> "Places":
        return Places(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device) -> "Places":
        return Places(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class Rule(Declared, ABC):
    """A mask rule. Subclass as a frozen dataclass and write `allows`."""

    @abstractmethod
    def allows(self, q: Places, k: Places) -> Tensor:
        """True where query q may look at key k; elementwise, with no branch on values."""

    def __and__(self, other: "Rule") -> "Rule":
        return And(self, other)

    def __or__(self, other: "Rule") -> "Rule":
        return Or(self, other)

    def __invert__(self) -> "Rule":
        return Not(self)


@dataclass(frozen=True)
class And(Rule):
    left: Rule
    right: Rule

    def allows(self, q: Places, k: Places) -> Tensor:
        return self.left.allows(q, k) & self.right.allows(q, k)


@dataclass(frozen=True)
class Or(Rule):
    left: Rule
    right: Rule

    def allows(self, q: Places, k: Places) -> Tensor:
        return self.left.allows(q, k) | self.right.allows(q, k)


@dataclass(frozen=True)
class Not(Rule):
    rule: Rule

    def allows(self, q: Places, k: Places) -> Tensor:
        return ~self.rule.allows(q, k)


@dataclass(frozen=True)
class SameSample(Rule):
    """Stay inside one's own sample: what makes packing invisible."""

    def allows(self, q: Places, k: Places) -> Tensor:
        return q.sample == k.sample


@dataclass(frozen=True)
class SameSegment(Rule):
    """Stay inside one's own field of the sample."""

    def allows(self, q: Places, k: Places) -> Tensor:
        return (q.sample == k.sample) & (q.segment == k.segment)


@dataclass(frozen=True)
class Causal(Rule):
    """Look at oneself and at what came before."""

    def allows(self, q: Places, k: Places) -> Tensor:
        return k.order <= q.order


@dataclass(frozen=True)
class Prefix(Rule):
    """Tokens that are read freely look at each other in both directions."""

    def allows(self, q: Places, k: Places) -> Tensor:
        return (q.free & k.free) != 0


@dataclass(frozen=True)
class InTurn(Rule):
    """Look at nothing before its turn, but for what is read freely."""

    def allows(self, q: Places, k: Places) -> Tensor:
        return (k.order <= q.order) | (k.free != 0)


@dataclass(frozen=True)
class Window(Rule):
    """Look at most `size` - 1 tokens away, in either direction."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Window: size={self.size} sees nothing, not even itself; use 1 or more")

    def allows(self, q: Places, k: Places) -> Tensor:
        distance = q.order - k.order
        return (distance < self.size) & (distance > -self.size)


@dataclass(frozen=True)
class Chunked(Rule):
    """Look at one's own chunk of `size` tokens and at all before it: sound can be read while it comes in."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Chunked: size={self.size} makes no chunks; use 1 or more")

    def allows(self, q: Places, k: Places) -> Tensor:
        return k.order // self.size <= q.order // self.size


PREFIX_LM: Rule = SameSample() & (Causal() | Prefix())
"""The default: what is read freely sees all that is read freely, everything else sees its past, nobody sees another sample."""

LAW: Rule = SameSample() & InTurn()
"""Holds under every rule: nobody sees another sample, and nobody sees a token that is not read freely before its turn."""
