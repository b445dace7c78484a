"""What a row of benchmarks/seeds.py is: where it is measured, what it must reach and beat, and what its paper reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Bar:
    """What one measured number must reach: `wanted`, or `wanted` over another measured one, or `wanted` times another."""

    value: str
    sense: Literal[">=", "<=", "=="]
    wanted: float
    over: str = ""
    times: str = ""
    size: bool = False  # whether its sign is taken off

    def limit(self, values: Mapping[str, float]) -> float:
        if self.times:
            return self.wanted * values[self.times]
        return self.wanted + (values[self.over] if self.over else 0.0)

    def __str__(self) -> str:
        number = f"{self.wanted:g}"
        if self.times:
            number = f"{number} x ({self.times})"
        elif self.over:
            number = f"({self.over})" + (f" {self.wanted:+g}" if self.wanted else "")
        return f"{f'|{self.value}|' if self.size else self.value} {self.sense} {number}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mechanism. `program` is a file, and its function behind a colon where that is not `measure`."""

    name: str  # on the command line
    title: str
    section: str  # of the list of mechanisms that the project answers
    seam: str
    program: str
    bars: tuple[Bar, ...]
    beats: tuple[str, ...] = ()  # measured baselines that are shown beside
    headline: str = "-"  # the paper's own number
    options: Mapping[str, Any] = field(default_factory=dict)  # handed to the function
    needs: tuple[str, ...] = ()  # data files
    of: str = ""  # another row, whose numbers these are
    notes: str = ""
    tried: str = ""  # where a bar is missed: what was tried

    @property
    def file(self) -> str:
        return self.program.partition(":")[0]

    @property
    def function(self) -> str:
        return self.program.partition(":")[2] or "measure"


MNIST = ("mnist_t10k/t10k-images-idx3-ubyte.gz", "mnist_t10k/t10k-labels-idx1-ubyte.gz")
TRANSLATIONS, FSDD, SHAKESPEARE = ("multi30k_train_val.zip",), ("fsdd.zip",), ("tinyshakespeare.txt.gz",)
EXAMPLES, SEEDS = "examples/attention/", "benchmarks/seed_rows/"
SYNTHETIC = "the captions are synthetic: digit words in reading order"
