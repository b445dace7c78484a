"""What `evaluate` returns: figures by name, with intervals, the worst samples, and a report in text, JSON, a picture and a page."""

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.files import write_atomic
from multimodal.measures.answered import Answered
from multimodal.measures.named import MEASURES, MODULES, Measure, edits, errors, named, own
from multimodal.measures.page import draw, figures_table, page
from multimodal.progress import progress_bar
from multimodal.shapes import ConfigError, check_whole, did_you_mean
from multimodal.texts import as_json
from multimodal.tokenizer import Tokenizer

SURE = 0.95  # of an interval
SECONDS, FEWEST = 10.0, 40  # a measure that is drawn again fewer times in so many seconds has no interval
Measures = Sequence[str | Callable[[Sequence[Any], Sequence[Any]], float]]


@dataclass(frozen=True)
class Figure:
    """A number of a report.

    value: the number; NaN where it is not defined.
    says: what it is, in one line.
    unit: as of `Measure`.
    interval: its 95 % interval over draws of the samples; None: not drawn, too slow, or not defined.
    """

    value: float
    says: str
    unit: str
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        shown = {"share": "{:.1%}", "points": "{:.1f}", "value": "{:.4g}"}[self.unit].format
        text = shown(self.value) if math.isfinite(self.value) else "not defined"
        return text + (f" ({shown(self.interval[0])} to {shown(self.interval[1])})" if self.interval else "")


class Evaluation(dict[str, float]):
    """The figures of one task by name, as a dict, and what they were computed from.

    task: the task.
    figures: by name, the number with its interval and meaning.
    answered: wanted and given answers; empty for tasks that are measured by their loss alone.
    sort: what the answers are: "class", "classes", "rows", "texts", "numbers" or "others".
    left_out: by name of a measure, what to install for it.
    samples: the samples, by number.
    fields: by name of a field that is read, its tokenizer, and whether it takes a list of values.
    """

    def __init__(
        self,
        task: str,
        figures: Mapping[str, Figure],
        answered: Answered,
        sort: str,
        left_out: Mapping[str, str],
        samples: Any,
        fields: Mapping[str, tuple[Tokenizer, bool]],
    ) -> None:
        super().__init__({name: figure.value for name, figure in figures.items()})
        self.task, self.answered, self.sort, self.samples = task, answered, sort, samples
        self.figures, self.left_out, self.fields = dict(figures), dict(left_out), dict(fields)

    def __str__(self) -> str:
        width = max(map(len, self.figures))
        lines = [f"{self.task}, {len(self.answered):,} samples" if len(self.answered) else self.task]
        lines += [f"  {name:<{width}}  {figure}" for name, figure in self.figures.items()]
        return "\n".join([*lines, *(f"  {name} is left out: {why}" for name, why in self.left_out.items())])

    def worst(self, count: int = 24) -> list[int]:
        """The numbers of the samples whose answers are farthest from the wanted ones, the worst first; right ones are left out."""
        found = badness(self.answered, self.sort)
        order = np.argsort(-found, kind="stable")[:count]
        return [int(i) for i in order if found[i] > 0]

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html with the worst answers first, and report.png if there is a picture; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "report.json", as_json(self.to_json(), 2) + "\n")
        picture = draw(self)
        if picture is not None:
            write_atomic(folder / "report.png", picture)
        write_atomic(folder / "report.html", page(self, picture))
        return folder

    def _repr_html_(self) -> str:
        """For notebooks: the figures."""
        return figures_table(self)

    def to_json(self) -> dict[str, Any]:
        """What `save` writes to report.json."""
        return {
            "task": self.task,
            "samples": len(self.answered),
            "figures": {
                name: {
                    "value": figure.value if math.isfinite(figure.value) else None,
                    "interval": figure.interval,
                    "says": figure.says,
                }
                for name, figure in self.figures.items()
            },
            "left_out": self.left_out,
            "worst": self.worst(),
        }


def measured(
    task: str,
    found: Mapping[str, float],
    answered: Answered,
    sort: str,
    measures: Measures | None,
    resamples: int,
    samples: Any,
    fields: Mapping[str, tuple[Tokenizer, bool]],
    quiet: bool = True,
) -> Evaluation:
    """The figures `found` of a task, those of `measures` (None: all that fit these answers), and their intervals.

    Raises:
        ConfigError: an unknown measure, one of other answers, or one whose package is not installed; resamples below 0.
    """
    check_whole("evaluate", least=0, resamples=resamples)
    figures = {name: Figure(value, *_OF_HEADS[name]) for name, value in found.items()}
    offered = {measure.name: measure for measure in named(answered, sort)} if len(answered) else {}
    left_out: dict[str, str] = {}
    if measures is None:
        left_out = {name: f"it needs {_install(m)}" for name, m in offered.items() if not _is_there(m)}
        wanted = [measure for name, measure in offered.items() if name not in left_out]
    else:
        wanted = [_chosen(one, offered, answered, task) for one in measures if one not in found]
    if "exact" in figures and len(answered):
        right = np.array(answered.right, dtype=float)[:, None]
        figures["exact"] = replace(
            figures["exact"], interval=interval(lambda rows: float(rows.mean()), right, resamples)
        )
    with progress_bar(f"measures of {task}", len(wanted), quiet=quiet or not resamples) as bar:
        for measure in wanted:
            rows = measure.rows()
            figures[measure.name] = Figure(
                measure.value(rows), measure.says, measure.unit, interval(measure.value, rows, resamples)
            )
            bar.advance()
    return Evaluation(task, figures, answered, sort, left_out, samples, fields)


_OF_HEADS = {
    "loss": ("mean loss of a real target, in nats", "value"),
    "exact": ("share of answers that are exactly right", "share"),
    "rows": ("share of rows that are right", "share"),
    **{
        f"R@{k} {side}": (f"share of the samples whose {side} side is among the {k} nearest to the other one", "share")
        for k in (1, 10)
        for side in ("right", "left")
    },
}


def _is_there(measure: Measure) -> bool:
    return not measure.needs or importlib.util.find_spec(MODULES[measure.needs]) is not None


def _install(measure: Measure) -> str:
    return f"the package {measure.needs}: pip install 'multimodal-stream[measures]'"


def _chosen(one: str | Callable[..., float], offered: Mapping[str, Measure], answered: Answered, task: str) -> Measure:
    if callable(one):
        if not len(answered):
            raise ConfigError(
                f"evaluate: task {task!r} has a loss and no answers, so a function of answers measures nothing"
            )
        return own(one, answered)
    if one not in offered:
        fits = f"; those of task {task!r} are {', '.join(offered) or 'none'}"
        known = "is of other answers" if one in MEASURES else "is no measure"
        raise ConfigError(f"evaluate: {one!r} {known}{fits}{did_you_mean(str(one), offered)}")
    if not _is_there(offered[one]):
        raise ConfigError(f"evaluate: {one!r} needs {_install(offered[one])}")
    return offered[one]


def interval(value: Callable[[np.ndarray], float], rows: np.ndarray, resamples: int) -> tuple[float, float] | None:
    """The middle 95 % of a measure over draws of as many samples with replacement (Efron 1979); None: see `Figure`."""
    random, found, until = np.random.default_rng(0), [], time.monotonic() + SECONDS
    while len(found) < resamples and (len(found) < 2 or time.monotonic() < until):
        found.append(value(rows[random.integers(len(rows), size=len(rows))]))
    if len(found) < min(FEWEST, resamples) or not np.isfinite(found).all() or not found:
        return None
    low, high = np.quantile(found, [(1 - SURE) / 2, (1 + SURE) / 2])
    return float(low), float(high)


def sort_of(answer: Any, classes: bool, text: bool, by_row: bool) -> str:
    """What wanted values like this one are: see `Evaluation.sort`."""
    if by_row and classes:
        return "rows" if all(not isinstance(x, (list, tuple)) for x in answer) else "others"
    if classes:
        return "classes" if isinstance(answer, (list, tuple)) else "class"
    if text:
        return "texts"
    number = isinstance(answer, Real) and not isinstance(answer, bool)
    floats = (
        getattr(getattr(answer, "dtype", None), "kind", None) == "f" or getattr(answer, "is_floating_point", bool)()
    )
    return "numbers" if number or floats else "others"


def badness(answered: Answered, sort: str) -> np.ndarray:
    """How far each answer is from the wanted one; 0: it is right."""
    wrong = ~np.array(answered.right, dtype=bool)
    if sort == "class":
        return wrong * (1 - answered.probability[np.arange(len(answered)), answered.classes])
    if sort == "classes":
        return np.abs(answered.classes - answered.probability).mean(1) * wrong
    if sort == "texts":
        rows = edits(answered, letters=True)
        return wrong * (rows[:, 0] + 1) / (rows[:, 1] + 1)
    if sort == "numbers":
        return np.nan_to_num(errors(answered)[:, 0], nan=math.inf)
    if sort == "rows":
        pairs = zip(answered.wanted, answered.value, strict=True)
        return np.array([np.mean([str(x) != str(y) for x, y in zip(a, b, strict=False)]) for a, b in pairs])
    return wrong * np.array(answered.confidence)
