"""The command: which rows to run, how long, and what becomes of the figures."""

import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from benchmarks.speed import results
from benchmarks.speed.compare import BenchError, measure, profiles
from benchmarks.speed.row import Place, Row

GROUP = "uv sync --group peers"
RESULTS = results.RESULTS


def all_rows() -> Iterator[tuple[str, Row]]:
    """(module, row) of every file here that has rows."""
    for found in iter_modules([str(Path(__file__).parent)], "benchmarks.speed."):
        for row in getattr(import_module(found.name), "ROWS", ()):
            yield found.name, row


def missing(row: Row) -> str:
    """Why a row cannot run here; empty if it can."""
    absent = [name for name in row.needs if not _installed(name)]
    return f"{', '.join(absent)} not installed: {GROUP}" if absent else ""


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _no_device(row: Row, quick: bool) -> str:
    if not row.cuda or quick:
        return ""
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"


def bench(
    names: Sequence[str], *, quick: bool, rounds: int, seconds: float, threads: int, profile: bool, keep: Path | None
) -> int:
    """Run rows, show each as it is done, and add the figures to the folder `keep`, if there is one.

    Returns 1 if a row failed or missed its goal, else 0.

    Raises:
        ValueError: a row that is not there.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    rows = {row.name: (module, row) for module, row in all_rows()}
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"bench: there is no row {', '.join(unknown)}; there are {', '.join(rows)}")
    chosen = [rows[name] for name in names] if names else list(rows.values())
    if profile:
        chosen = [(module, row) for module, row in chosen if row.report is None and not row.fresh]
    say = Console(highlight=False, soft_wrap=True)
    failed = 0
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(chosen))
        for module, row in chosen:
            bar.update(task, description=row.name)
            why = missing(row) or _no_device(row, quick)
            if why:
                say.print(f"{row.name}: left out, {why}")
                failed += bool(names)
                bar.advance(task)
                continue
            with tempfile.TemporaryDirectory() as folder:
                place = Place(
                    folder=Path(folder),
                    quick=quick,
                    threads=threads,
                    device="cuda" if row.cuda and not quick else "cpu",
                )
                try:
                    found = profiles(module, row, place) if profile else measure(module, row, place, rounds, seconds)
                except BenchError as error:
                    failed += 1
                    say.print(f"[red]{escape(str(error))}[/red]")
                else:
                    line = results.record(row, found, threads, rounds)
                    failed += not _met(row, line)
                    if keep is not None and not quick:
                        results.add(line, keep)
                    say.print("\n".join([escape(f"{row.name}: {row.what}"), *map(escape, _shown(line, quick))]))
            bar.advance(task)
    if keep is None and not quick:
        say.print("shown only: --keep adds the figures to benchmarks/results, --out FOLDER to another folder")
    return int(failed > 0)


def _met(row: Row, line: dict[str, Any]) -> bool:
    if "ratio" not in line:
        return line.get("met") is not False
    return row.goal is None or line["ratio"] >= row.goal


def _shown(line: dict[str, Any], quick: bool) -> list[str]:
    """A row's figures for people."""
    if "profile" in line:
        return [f"  {side}: {text}" for side, lines in line["profile"].items() for text in lines] + [""]
    if "ratio" not in line:
        return [*line["lines"], ""]
    ours, theirs = (results.speed(line[side]["wall"], line["unit"]) for side in ("ours", "theirs"))
    spread = f"{line['ratios'][0]:.2f} to {line['ratios'][-1]:.2f} in {len(line['ratios'])} rounds"
    missed = line["goal"] is not None and line["ratio"] < line["goal"]
    goal = "" if line["goal"] is None else f", goal {line['goal']:g}{', missed' * missed}"
    same = "outputs not compared" if line["difference"] is None else f"outputs differ by {line['difference']:.1g}"
    out = [f"  {results.in_words(line)} ({spread}; {line['ratio_cpu']:.2f} by CPU time){goal}; {same}"]
    for side, speed in (("ours", ours), ("theirs", theirs)):
        facts = "; ".join(f"{k} {v}" for k, v in line[side]["facts"].items())
        out.append(f"  {side:6} {speed}, peak {line[side]['peak_mb']} MB; {facts}")
    return [*out, "  quick settings: the figures mean nothing" if quick else "", ""]
