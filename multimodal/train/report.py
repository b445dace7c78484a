"""What people see of a run: a bar while it goes, a picture of the curves when it ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def bar(steps: int, start: int, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar with loss, tokens a second and time left; lines of text where there is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console()
    if quiet or not console.is_terminal:
        every = max(1, steps // 10)

        def say(row: dict[str, Any]) -> None:
            if not quiet and (row["step"] % every == 0 or _exact(row)):
                print(
                    f"  step {row['step']}/{steps}  loss {row['loss']:.4f}  {row['tokens_per_s']:,} tokens/s{_exact(row)}",
                    flush=True,
                )

        yield say
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, completed=start, loss=float("nan"), speed=0)

        def show(row: dict[str, Any]) -> None:
            progress.update(task, completed=row["step"], loss=row["loss"], speed=row["tokens_per_s"])
            if _exact(row):
                progress.console.print(f"step {row['step']}{_exact(row)}")

        yield show


def _exact(row: dict[str, Any]) -> str:
    return "".join(f"  {key} {value:.4f}" for key, value in row.items() if key.endswith(" exact"))


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Loss (raw and smoothed) and learning rate over steps, evaluation beside them, as a PNG."""
    from matplotlib.figure import Figure

    measured = sorted({key for row in history for key in row if key.endswith((" loss", " exact"))})
    rows = [row for row in history if "loss" in row]
    steps, loss = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(10 if measured else 5.5, 4), layout="constrained")
    panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    left, right = panels[0], panels[-1]
    left.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    left.plot(steps, _smooth(loss), color="tab:blue", label="training (weighted sum of tasks), smoothed")
    for key in measured:
        points = [(row["step"], row[key]) for row in history if key in row]
        axes = left if key.endswith(" loss") else right
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"held out: {key}")
    left.set(xlabel="step", ylabel="nats a target", title="loss")
    if measured:
        right.set(
            xlabel="step", ylabel="share exactly right", title="held-out answers", ylim=(0, 1.02), xlim=left.get_xlim()
        )
    for axes in panels:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential mean, corrected at its start."""
    smooth, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(mean / norm)
    return smooth
