"""What every way of attending a stream shares: who lies where in it, and the verb."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from multimodal.attention.mechanism import Mechanism, Trace
from multimodal.masks import PREFIX_LM, Places, Rule


class Span(NamedTuple):
    """One sample of a pack: its tokens, how many at its start are read freely (-1: not only at its start), and how many are read
    at all, freely or in order, before what is written (only a core that reads and writes apart asks)."""

    free: int
    total: int
    read: int = 0


@dataclass(frozen=True)
class Layout:
    """Who lies where in a stream: spans on the host, places (T,) on the device."""

    spans: tuple[Span, ...]
    places: Places


def is_prefix_lm(rule: Rule, layout: Layout) -> bool:
    """Whether this is the default rule, with what is read freely at the start of every sample."""
    return rule == PREFIX_LM and all(span.free >= 0 for span in layout.spans)


class Plan(ABC):
    """One way to attend a stream. A `trace`, if there is one, collects what every layer does."""

    trace: Trace | None = None

    @abstractmethod
    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        """What every query reads: (T, H, K). `layer` counts the layers that keep keys and values."""

    def narrowed(self, row_N: Tensor) -> "Plan | None":
        """The same where these rows of the stream alone ask, of all keys; None: not by this plan, so let all rows ask."""
        return None
