"""What a row of the benchmark declares: the same work, done by us and by a peer, each in a process of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a side runs.

    folder: shared by both sides of a row, for weights that are copied. quick: tiny sizes. threads: of PyTorch.
    device: "cpu" or "cuda". seed: of weights and data. sizes: those of the row, set by `Row.job`.
    """

    folder: Path
    quick: bool = False
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    sizes: Any = None


@dataclass(frozen=True)
class Job:
    """Work that is ready to be timed.

    run: one unit of work; that of a whole program may return facts. outputs: tensors by name that the other side must have too.
    units: number of `unit` in one run. unit: what is counted, such as "tokens". facts: figures shown beside the times.
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

    name: on the command line. what: the work, in a line, with what differs between the sides. peer: the other side's name.
    needs: distributions that the peer needs. goal: the ratio theirs / ours that is wanted. sizes: a dataclass, which both sides
    find in their `Place`. quick: the sizes that differ in the quick form. ours, theirs: make the work. tolerance: the largest
    difference of the outputs, as a share of their largest number; None: the layouts do not allow a comparison. fresh: a whole
    program, each round of it in a new process. report: gives "lines" to show and whether the goal is "met". cuda: needs a CUDA
    device, unless quick.
    """

    name: str
    what: str
    peer: str = ""
    needs: tuple[str, ...] = ()
    goal: float | None = None
    sizes: Any = None
    quick: Mapping[str, Any] = field(default_factory=dict)
    ours: Side | None = None
    theirs: Side | None = None
    tolerance: float | None = None
    fresh: bool = False
    report: Callable[[Place], dict[str, Any]] | None = None
    cuda: bool = False

    def job(self, side: str, place: Place) -> Job:
        """The work of one side, "ours" or "theirs", in the row's sizes."""
        make = self.ours if side == "ours" else self.theirs
        assert make is not None
        sizes = replace(self.sizes, **self.quick) if place.quick and self.quick else self.sizes
        return make(replace(place, sizes=sizes))
