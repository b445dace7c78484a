"""The progress bar of all commands: what is done, a note, elapsed and remaining time; in terminals, and in notebooks that have
ipywidgets; elsewhere nothing."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """One line for each name that is updated.

    visible: whether anything is shown.
    """

    def __init__(self, what: str, total: float | None, start: float, progress: Any) -> None:
        self.visible = progress is not None
        self._what, self._total, self._start, self._progress = what, total, start, progress
        self._lines: dict[Any, Any] = {}

    def update(
        self, done: float, note: str = "", *, key: Any = None, name: str | None = None, total: float | None = None
    ) -> None:
        """Show that `done` of `total` is done. key: of the line, for several lines; name and total: as of the bar unless given."""
        if self.visible:
            self._progress.update(self._line(key, name), completed=done, total=total or self._total, note=note)

    def advance(self, count: float = 1) -> None:
        """Show that `count` more is done."""
        if self.visible:
            self._progress.advance(self._line(None, None), count)

    def _line(self, key: Any, name: str | None) -> Any:
        if key not in self._lines:
            self._lines[key] = self._progress.add_task(
                name or self._what, total=self._total, completed=self._start, note=""
            )
        return self._lines[key]


def has_widgets() -> bool:
    """Whether ipywidgets is installed, which rich draws with in a notebook."""
    return importlib.util.find_spec("ipywidgets") is not None


@contextmanager
def progress_bar(
    what: str, total: float | None, *, start: float = 0, quiet: bool = False, on_stdout: bool = False
) -> Iterator[Bar]:
    """Yields a bar on stderr, or below the cell of a notebook; it disappears at the end of the block.

    total: None if it is not known. start: what is done before the block. quiet: show nothing. on_stdout: on stdout, and it stays.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=not on_stdout)
    in_notebook = console.is_jupyter and has_widgets()
    if quiet or not (console.is_terminal or in_notebook):
        yield Bar(what, total, start, None)
        return
    text = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}", markup=False)
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    # where stdout is a pipe, rich would send what is printed to stderr
    redirect = on_stdout or in_notebook or sys.stdout.isatty()
    with Progress(*text, *times, console=console, transient=not on_stdout, redirect_stdout=redirect) as progress:
        yield Bar(what, total, start, progress)
