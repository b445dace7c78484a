"""The display of a run: progress bar, table, curves, and the environment it ran in."""

import csv
import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.files import save_figure, write_atomic
from multimodal.progress import progress_bar
from multimodal.versions import installed_version

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PACKAGES = ("multimodal-stream", "torch", "torchvision", "torchaudio", "numpy")
PANELS = {  # column of the log -> (title, unit, logarithmic)
    "grad_norm": ("gradient norm", "before clipping", True),
    "lr": ("learning rate", "", False),
    "tokens_per_s": ("speed", "tokens/s", False),
    "filled": ("packs", "share of the token budget that is filled", False),
}
COLUMNS = 3  # of panels


@contextmanager
def bar(steps: int, start: int, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that shows a row of the log: a progress bar, or ten lines of text where there is no terminal."""
    every = max(1, steps // 10)
    with progress_bar("training", steps, start=start, quiet=quiet, on_stdout=True) as progress:

        def show(row: dict[str, Any]) -> None:
            step, loss, speed = row["step"], row["loss"], row["tokens_per_s"]
            measures = "".join(
                f"  {key} {value:.4f}" for key, value in row.items() if key.endswith(" exact") or " R@" in key
            )
            if progress.visible:
                progress.update(step, f"{step}/{steps}  loss {loss:.4f}  {speed:,} tokens/s")
                if measures:
                    print(f"step {step}{measures}")
            elif not quiet and (step % every == 0 or measures):
                print(f"  step {step}/{steps}  loss {loss:.4f}  {speed:,} tokens/s{measures}", flush=True)

        yield show


def write_csv(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The log as a table with a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(history)
    write_atomic(path, text.getvalue())


def environment() -> dict[str, Any]:
    """The environment of a run: versions, machine, commit of the folder, command, date; JSON values, no host or user name."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "python": platform.python_version(),
        "packages": {
            **{name: installed_version(name) for name in PACKAGES},
            "torch": torch.__version__,  # with its build: +cu130
        },
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "git": _git(),
    }


def _command() -> str:
    """The command line without the path of the program, and with ~ for the home folder, which contains the user's name."""
    program, *arguments = sys.argv
    name = Path(program).name
    name = f"python -m {Path(program).parent.name}" if name == "__main__.py" else name
    command = " ".join([name, *(shlex.quote(text) for text in arguments)])
    try:
        home = str(Path.home())
    except RuntimeError:  # a container without HOME and without an entry for its user
        return command
    return command.replace(home, "~") if len(home) > 1 else command


def cpu_name() -> str:
    """What this machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the working folder; None without git. Read from git's files, because the program git runs commands that the
    repository's own settings name, and the folder may not be the user's."""
    try:
        here = Path.cwd()
        place = next(folder / ".git" for folder in (here, *here.parents) if (folder / ".git").exists())
        if place.is_file():  # of a linked worktree or a submodule
            place = place.parent / _line(place).removeprefix("gitdir:").strip()
        head = _line(place / "HEAD")
        if not head.startswith("ref:"):
            return _commit(head)
        name = head.removeprefix("ref:").strip()
        if not re.fullmatch(r"refs(/[^/.][^/]*)+", name):
            return None
        shared = place / _line(place / "commondir") if (place / "commondir").is_file() else place
        for folder in (place, shared):
            if (folder / name).is_file():
                return _commit(_line(folder / name))
        with (shared / "packed-refs").open(encoding="utf-8") as file:
            return next((_commit(line.split(" ")[0]) for line in file if line.rstrip("\n").endswith(f" {name}")), None)
    except (OSError, StopIteration, ValueError):
        return None


def _line(path: Path) -> str:
    """The first line of a small file."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        return file.read(4096).decode("utf-8").partition("\n")[0].strip()


def _commit(text: str) -> dict[str, Any] | None:
    return {"commit": text} if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None


def is_held_out(key: str) -> bool:
    """Whether a column of the log is a measure on held-out data: "image -> label exact"."""
    return "->" in key


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss (raw and smoothed) and held-out measures over steps; below them gradient norm, learning rate, speed. As a PNG."""
    rows = [row for row in history if "loss" in row]
    measured = sorted({key for row in history for key in row if is_held_out(key)})
    losses = [key for key in measured if key.endswith(" loss")]
    answers = [key for key in measured if key not in losses]
    below = [key for key in PANELS if sum(key in row for row in rows) > 1]
    figure, panels = make_panels(1 + bool(answers) + len(below))
    loss, *others = panels
    draw_smoothed(loss, rows, "loss", "tab:blue", "training (weighted sum of tasks), smoothed")
    tasks = list(dict.fromkeys(key.rpartition(" ")[0] for key in measured))
    colors = {key: f"C{1 + tasks.index(key.rpartition(' ')[0])}" for key in measured}
    for key in losses:
        draw_points(loss, history, key, f"held out: {key}", colors[key])
    loss.set(title="loss", ylabel="nats a target")
    loss.legend(fontsize=7)
    if answers:
        right = others.pop(0)
        for key in answers:
            draw_points(right, history, key, key, colors[key])
        right.set(title="held-out answers", xlim=loss.get_xlim())
        if all(key.endswith(" exact") for key in answers):
            right.set(ylabel="share exactly right", ylim=(0, 1.02))
        right.legend(fontsize=7)
    for axes, key in zip(others, below, strict=True):
        draw_panel(axes, rows, key, "tab:blue")
        finish_panel(axes, key)
    finish_grid(panels)
    save_figure(path, figure, 110)


def make_panels(count: int, legend_height: float = 0.0) -> tuple[Any, "list[Axes]"]:
    """A figure with `count` panels in rows of COLUMNS. legend_height: inches below them."""
    from matplotlib.figure import Figure

    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines + legend_height), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def finish_grid(panels: "Sequence[Axes]") -> None:
    """Label the steps of all panels."""
    for axes in panels:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)


def draw_panel(axes: "Axes", rows: Sequence[dict[str, Any]], key: str, color: Any) -> None:
    """Draw the values of one of PANELS."""
    if key == "grad_norm":
        draw_smoothed(axes, rows, key, color, None)
    else:
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2)


def finish_panel(axes: "Axes", key: str) -> None:
    """Set title and scale of one of PANELS, after everything is drawn."""
    from matplotlib.ticker import LogFormatter

    title, unit, logarithmic = PANELS[key]
    axes.set(title=title, ylabel=unit)
    if logarithmic:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
    elif key == "filled":
        axes.set_ylim(top=1.005)
    else:
        axes.set_ylim(bottom=0)


def draw_smoothed(axes: "Axes", rows: Sequence[dict[str, Any]], key: str, color: Any, label: str | None) -> None:
    """Draw every value, pale, and their smoothed curve."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=color, label=label, linewidth=1.4)


def draw_points(
    axes: "Axes", history: Sequence[dict[str, Any]], key: str, label: str | None, color: Any = None
) -> None:
    """Draw values that not every step has."""
    points = [(row["step"], row[key]) for row in history if key in row]
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=color)


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average: half the window is a fiftieth of all values, at least one; at the ends it is smaller."""
    half, total = max(1, len(values) // 50), [0.0, *accumulate(values)]
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [(total[i + n + 1] - total[i - n]) / (2 * n + 1) for i, n in enumerate(reach)]
