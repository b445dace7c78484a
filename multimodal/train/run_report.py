"""`multimodal report RUN...`: run folders as one table and one picture."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from multimodal.files import read_json
from multimodal.shapes import ConfigError
from multimodal.train.display import (
    draw_panel,
    draw_points,
    draw_smoothed,
    finish_grid,
    finish_panel,
    is_held_out,
    make_panels,
)
from multimodal.train.run_folder import CONFIG, CURVES, LOG, read_rows
from multimodal.train.state import CHECKPOINTS, OLD, STATE

LESS_IS_BETTER = ("loss", "error", "errors", "wer", "cer")  # last words of measures
MOST_COLORS = 10


@dataclass(frozen=True)
class Record:
    """The content of a run folder.

    folder: the folder.
    history: the rows of its log.
    config: its configuration; {} if there is none.
    step: the step of its newest checkpoint; None: it has none.
    ended: whether it ended early there.
    """

    folder: Path
    history: list[dict[str, Any]]
    config: dict[str, Any]
    step: int | None
    ended: bool = False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run folder, or as much as there is of one; an incomplete last row of the log is left out."""
        names = [path.name for path in (folder / CHECKPOINTS).glob("step-*")]
        # only complete states have a name of digits alone
        steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
        old = _json(folder / OLD / STATE).get("step")
        steps += [old] if isinstance(old, int) else []
        step = max(steps, default=None)
        ended = step is not None and bool(_json(folder / CHECKPOINTS / f"step-{step:08d}" / STATE).get("ended"))
        return cls(folder, read_rows(folder / LOG, numbers=True), _json(folder / CONFIG), step, ended)

    @property
    def wanted(self) -> int | None:
        """The number of steps of the finished run; None: not known."""
        recipe = self.config.get("recipe")
        steps = recipe.get("steps") if isinstance(recipe, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        """Whether the last step was saved and the curves drawn, which is done last; an early end is one."""
        saved = self.wanted is not None and self.step is not None and self.step >= self.wanted
        return (saved or self.ended) and (self.folder / CURVES).is_file()

    @property
    def steps(self) -> int:
        """The last step in the log."""
        return max((row["step"] for row in self.history), default=0)

    @property
    def measures(self) -> list[str]:
        return sorted({key for row in self.history for key in row if is_held_out(key)})

    def last(self, key: str) -> Any:
        """The newest value of a column, None where it has none."""
        return next((row[key] for row in reversed(self.history) if key in row), None)

    def best(self, measure: str) -> tuple[float, int] | None:
        """(best value of a held-out measure, its step); None: it was never measured."""
        sign = -1 if measure.rsplit(" ", 1)[-1] in LESS_IS_BETTER else 1
        found = [(row[measure], row["step"]) for row in self.history if measure in row]
        return max(found, key=lambda pair: sign * pair[0]) if found else None

    def to_json(self) -> dict[str, Any]:
        """The row of the table, as JSON values."""
        seconds = self.last("seconds")
        return {
            "folder": str(self.folder),
            "steps": self.steps,
            "of": self.wanted,
            "finished": self.finished,
            "loss": self.last("loss"),
            "best": {key: {"value": b[0], "step": b[1]} for key in self.measures if (b := self.best(key))},
            "tokens_per_s": self.last("tokens_per_s"),
            "minutes": None if seconds is None else seconds / 60,
        }


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, ValueError)
    except ValueError:
        return {}


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """The runs in these folders, or directly in folders of runs.

    Raises:
        ConfigError: a folder that holds no log of any step.
    """
    records = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{LOG}")) if not (folder / LOG).is_file() else [folder]
        found = [record for path in inside if (record := Record.read(path)).history]
        if not found:
            what = f"holds no {LOG} with a step in it, nor do folders in it" if folder.is_dir() else "is no folder"
            raise ConfigError(
                f"report: {folder} {what}; give the folder that `multimodal train` wrote, such as runs/digits"
            )
        records += found
    return records


def names(records: Sequence[Record]) -> list[str]:
    """The names of the run folders, or as much of their paths as makes them differ."""
    longest = max(len(record.folder.parts) for record in records)
    candidates = [["/".join(record.folder.parts[-n:]) for record in records] for n in range(1, longest + 1)]
    return next((found for found in candidates if len(set(found)) == len(found)), candidates[-1])


def settings(config: Any, path: str = "") -> dict[str, Any]:
    """A configuration as {"core.depth": 6, "core.score": "Cosine", ...}; tasks by their patterns."""
    if isinstance(config, Mapping):
        if set(config) >= {"type", "config"}:
            return {path: str(config["type"]).rpartition(":")[2], **settings(config["config"], path)}
        found = {}
        for name, value in config.items():
            found |= settings(value, f"{path}.{name}" if path else name)
        return found
    if isinstance(config, list) and any(isinstance(value, Mapping) for value in config):
        named = [value.get("pattern") if isinstance(value, Mapping) else None for value in config]
        return settings(
            {str(name or i): value for i, (name, value) in enumerate(zip(named, config, strict=True))}, path
        )
    return {path: config}


def differences(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Settings in which the runs differ -> the value of each run, None where a run has no such setting."""
    flat = [settings(record.config) for record in records]
    rows = {name: [one.get(name) for one in flat] for one in flat for name in one}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def table(records: Sequence[Record]) -> str:
    """A row for each run, then a row for each setting in which the runs differ, as text."""
    measures = list(dict.fromkeys(key for record in records for key in record.measures))
    shown = names(records)
    lines = [["run", "steps", "last loss", *(f"best {key}" for key in measures), "tokens/s", "minutes"]]
    for name, record in zip(shown, records, strict=True):
        row = record.to_json()
        best = [row["best"].get(key) for key in measures]
        lines.append(
            [
                name,
                f"{row['steps']} of {row['of'] or '?'}{'' if record.finished else ', unfinished'}"
                f"{', ended early' if record.finished and record.ended else ''}",
                _number(row["loss"]),
                *("-" if b is None else f"{_number(b['value'])} at {b['step']}" for b in best),
                "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,}",
                "-" if row["minutes"] is None else f"{row['minutes']:.1f}",
            ]
        )
    text = aligned(lines)
    if different := differences(records):
        rows = [["", *shown], *([name, *map(_setting, values)] for name, values in different.items())]
        text += f"\n\nsettings that differ\n{aligned(rows)}"
    elif len(records) > 1:
        text += "\n\nno setting differs"
    if any(not record.config for record in records):
        text += f"\n(no {CONFIG}: {', '.join(n for n, r in zip(shown, records, strict=True) if not r.config)})"
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _setting(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def draw(records: Sequence[Record], picture: BinaryIO) -> None:
    """Draw loss, held-out measures, gradient norm and speed over steps, one colour for each run, as a PNG."""
    import numpy as np
    from matplotlib import colormaps

    measures = list(dict.fromkeys(key for record in records for key in record.measures))
    below = [key for key in ("grad_norm", "tokens_per_s") if any(record.last(key) is not None for record in records)]
    figure, panels = make_panels(1 + len(measures) + len(below), legend_height=0.4 + 0.2 * len(records))
    colors = colormaps["tab10" if len(records) <= MOST_COLORS else "turbo"]
    spread = range(len(records)) if len(records) <= MOST_COLORS else np.linspace(0, 1, len(records))
    for name, record, place in zip(names(records), records, spread, strict=True):
        color = colors(place)
        rows = [row for row in record.history if "loss" in row]
        # in a folder's name, $ begins no formula, and unprintable characters become ?
        name = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
        label = name if record.finished else f"{name} (unfinished, {record.steps} of {record.wanted or '?'})"
        draw_smoothed(panels[0], rows, "loss", color, label)
        for axes, measure in zip(panels[1:], measures, strict=False):
            if record.best(measure):
                draw_points(axes, record.history, measure, None, color)
        for axes, key in zip(panels[1 + len(measures) :], below, strict=False):
            if record.last(key) is not None:
                draw_panel(axes, rows, key, color)
    panels[0].set(title="training loss, smoothed", ylabel="nats a target")
    for axes, measure in zip(panels[1:], measures, strict=False):
        axes.set(title=f"held out: {measure}")
    for axes, key in zip(panels[1 + len(measures) :], below, strict=False):
        finish_panel(axes, key)
    for axes in panels[1:]:
        axes.set_xlim(panels[0].get_xlim())
    finish_grid(panels)
    figure.legend(loc="outside lower left", ncols=1 if len(records) < 5 else 3, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=110)
