"""What a row of the benchmark is made of: the same work, done by us and by a peer, each in a process of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a side runs. quick: tiny settings; folder: shared by both sides of a row, for weights that are copied."""

    folder: Path
    quick: bool = False
    threads: int = 1
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """Work that is ready to be timed.

    run: one unit of work; of a whole program it may return facts. outputs: tensors by name that the other side must have too.
    units: how many of `unit` one run makes. facts: figures that are told beside the times.
    """

    run: Callable[[], Any]
    outputs: Callable[[], Any] | None = None
    units: float = 1.0
    unit: str = "step"
    facts: Mapping[str, Any] = field(default_factory=dict)


Side = Callable[[Place], Job]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, or with `report` one measurement that has no peer.

    what: the work, in a line, with what differs between the sides. goal: the ratio theirs / ours that is wanted. tolerance: the
    largest difference of the outputs, as a share of their largest number; None: the layouts do not allow a comparison. fresh: a
    whole program, each round of it in a new process. needs: distributions of the peer's. report: gives "lines" to show and
    whether the goal is "met".
    """

    name: str
    what: str
    peer: str = ""
    needs: tuple[str, ...] = ()
    goal: float | None = None
    ours: Side | None = None
    theirs: Side | None = None
    tolerance: float | None = None
    fresh: bool = False
    report: Callable[[Place], dict[str, Any]] | None = None
    cuda: bool = False  # needs a CUDA device, unless quick
