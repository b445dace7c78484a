"""Every mechanism that this project promises, as one row each: what it must reach, what it must beat, what it reached.

    uv run benchmarks/seeds.py --list                         the rows, and whether they met their bars
    uv run benchmarks/seeds.py causal content --seeds 0 1 2   run rows; without names all of them, about 4 CPU-hours a seed
    uv run benchmarks/seeds.py causal --quick                 a reduced form, seconds; shown, never saved
    uv run benchmarks/seeds.py --write causal                 and write benchmarks/results/seeds.md from all that is saved, and
                                                              the documents and headers of figures.py

Rows are declared in seed_rows/table.py. Each run has a process and one thread of its own, so that a failure ends only itself and
the CPU time is its own. Numbers are saved in benchmarks/results/seeds.json by row and seed. The exit status is 1 where a row that
was run failed or missed a bar. Programs read data from the folder MULTIMODAL_DATA (default: shared/data beside the project).
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PATHS = [ROOT / "tokenizers", ROOT]
sys.path[:0] = [str(path) for path in PATHS if str(path) not in sys.path]

from benchmarks import report  # noqa: E402
from benchmarks.data import DATA  # noqa: E402
from benchmarks.script import parser as options  # noqa: E402
from benchmarks.script import table  # noqa: E402
from benchmarks.seed_rows.table import NOT_CLAIMED, ROWS, Bar, Row  # noqa: E402
from multimodal.files import write_atomic  # noqa: E402

PROGRAM = Path(__file__).resolve()
SAVED = HERE / "results" / "seeds.json"
BY_NAME = {row.name: row for row in ROWS}

Saved = dict[str, dict[str, dict[str, Any]]]
"""Row -> seed -> what its run gave: {"values", "cpu_s", "date", "command"}."""


def absent(row: Row) -> str:
    """Why a row cannot be run here; nothing if it can."""
    if not (ROOT / row.file).is_file():
        return f"{row.file} is not written yet"
    missing = [name for name in row.needs if not (DATA / name).exists()]
    return f"no {', '.join(missing)} in the folder of MULTIMODAL_DATA" if missing else ""


def measure_of(row: Row) -> Callable[..., dict[str, float]]:
    """The function of a row, imported now."""
    path = ROOT / row.file
    if path.is_relative_to(HERE):  # rows may use each other's parts, so they are imported by their own names
        module = importlib.import_module(".".join(path.relative_to(HERE.parent).with_suffix("").parts))
    else:  # benchmarks and examples share names such as captions.py
        name = "seed_program_" + path.stem
        module = sys.modules.get(name)
        if module is None:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return getattr(module, row.function)


def measured(row: Row, seed: int, quick: bool, out: Path | None = None) -> dict[str, float]:
    """What the row's program gives, in this process."""
    measure = measure_of(row)
    if unknown := set(row.options) - set(inspect.signature(measure).parameters):
        raise TypeError(
            f"{row.file}: {row.function} takes no {', '.join(sorted(unknown))}, which row {row.name!r} gives"
        )
    return {name: float(value) for name, value in measure(seed=seed, quick=quick, out=out, **row.options).items()}


def run(row: Row, seed: int, quick: bool, folder: Path) -> dict[str, Any]:
    """The row's run in a process of its own: {"values", "cpu_s"}, or {"error"}; what it printed is in `folder`."""
    log = folder / f"{row.name}-seed{seed}.log"
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MULTIMODAL_DATA": str(DATA),
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
    }
    with tempfile.TemporaryDirectory() as inside, log.open("w", encoding="utf-8") as file:
        answer = Path(inside) / "answer.json"
        command = [sys.executable, str(PROGRAM), row.name, "--seeds", str(seed), "--answer", str(answer)]
        done = subprocess.run(
            [*command, *["--quick"] * quick], env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
        if answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["it printed nothing"]
    return {"error": f"ended with status {done.returncode}: {last[0]} (all of it in {log})"}


def answer_alone(row: Row, seed: int, quick: bool, path: Path) -> None:
    """The other end of `run`; counts the CPU time of this process and of those that it starts."""
    start = sum(os.times()[:4])
    out = None if quick else ROOT / "runs" / "seeds" / row.name
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    values = measured(row, seed, quick, out)
    path.write_text(json.dumps({"values": values, "cpu_s": sum(os.times()[:4]) - start}), encoding="utf-8")


def read_saved(path: Path) -> Saved:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path: Path, row: Row, seed: int, found: Mapping[str, Any]) -> Saved:
    """Put one run among those that are saved, and nothing else; returns all of them."""
    saved = read_saved(path)  # anew, as another process may have saved another row meanwhile
    facts = {"date": str(date.today()), "command": f"uv run benchmarks/seeds.py {row.name} --seeds {seed}"}
    saved.setdefault(row.name, {})[str(seed)] = {**found, **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(saved, indent=1, sort_keys=True) + "\n")
    return saved


def judged(bar: Bar, values: Mapping[str, float]) -> tuple[bool, str]:
    """Whether a bar is met, and in words what was measured and by how much it is missed."""
    for name in filter(None, (bar.value, bar.over, bar.times)):
        if name not in values:
            return False, f"{bar}: nothing named {name!r} was measured"
        if not math.isfinite(values[name]):
            return False, f"{bar}: {name} is {values[name]}"
    value, limit = values[bar.value], bar.limit(values)
    value = abs(value) if bar.absolute else value
    inside = {">=": value - limit, "<=": limit - value, "==": -abs(value - limit)}[bar.sense]
    if inside >= 0:
        return True, f"{bar}: {short(value)}"
    return False, f"{bar}: {short(value)}, missed by {short(-inside)}"


def short(value: float) -> str:
    """Four digits at most, and no more than they need."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def spread(name: str, runs: Sequence[Mapping[str, float]]) -> str:
    """A value's mean over seeds, and its range where that shows in the digits."""
    values = [values[name] for values in runs if name in values]
    if not values:
        return "not measured"
    mean, least, most = (short(x) for x in (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def is_met(row: Row, values: Mapping[str, float]) -> bool:
    return all(judged(bar, values)[0] for bar in row.bars)


def cells(row: Row, saved: Saved) -> dict[str, str]:
    """One line of the table: bars, what was measured, baselines, verdict, CPU-minutes."""
    entries = saved.get(row.of or row.name, {})
    runs = [entry["values"] for _, entry in sorted(entries.items(), key=lambda item: int(item[0]))]
    right = sum(is_met(row, values) for values in runs)
    verdict = "yes" if right == len(runs) else "no" if not right else f"{right} of {len(runs)} seeds"
    minutes = [entry["cpu_s"] / 60 for entry in entries.values()]
    names = list(dict.fromkeys(bar.value for bar in row.bars))
    beaten = list(dict.fromkeys([*row.beats, *filter(None, (b.over or b.times for b in row.bars))]))
    return {
        "row": row.title,
        "seam": row.seam,
        "bar": "; ".join(map(str, row.bars)),
        "measured": "; ".join(f"{name} {spread(name, runs)}" for name in names) if runs else "",
        "beside": "; ".join(f"{name} {spread(name, runs)}" for name in beaten) if runs else "",
        "met": verdict if runs else "not run",
        "CPU-minutes": f"{sum(minutes) / len(minutes):.1f}" if minutes else "",
        "seeds": " ".join(sorted(entries, key=int)),
        "paper": row.headline,
    }


def markdown(rows: Sequence[Row], saved: Saved) -> str:
    """The table of all rows, notes, and for every miss what was tried."""
    lines = [cells(row, saved) for row in rows]
    ran = [line["met"] for line in lines if line["met"] != "not run"]
    text = f"{ran.count('yes')} of {len(rows)} rows meet their bars, {len(rows) - len(ran)} are not run.\n\n"
    text += table(list(lines[0]), ([cell.replace("|", "/") for cell in line.values()] for line in lines))
    if notes := [f"- {row.title}: {row.notes}" for row in rows if row.notes]:
        text += "\nNotes\n\n" + "\n".join(notes) + "\n"
    missed = [row for row, line in zip(rows, lines, strict=True) if line["met"] not in ("yes", "not run")]
    if missed:
        text += "\nMissed, and what was tried\n\n" + "\n".join(_miss(row, saved) for row in missed) + "\n"
    days = sorted({entry["date"] for entries in saved.values() for entry in entries.values()})
    text += "\nNot claimed\n\n" + "\n".join(f"- {name}: {why}" for name, why in NOT_CLAIMED.items()) + "\n"
    return text + (f"\nMeasured on {', '.join(days)}; all numbers are in seeds.json.\n" if days else "")


def _miss(row: Row, saved: Saved) -> str:
    said = [
        f"seed {seed}, {text}"
        for seed, entry in sorted(saved[row.of or row.name].items(), key=lambda item: int(item[0]))
        for met, text in (judged(bar, entry["values"]) for bar in row.bars)
        if not met
    ]
    return f"- {row.title}: {'; '.join(said)}. {row.tried or 'Nothing else was tried yet.'}"


def show(row: Row, seed: int, found: Mapping[str, Any], quick: bool = False) -> bool:
    """Print what one run gave; whether all bars are met. A quick form is too short for the bars, so they are left out."""
    if "error" in found:
        print(f"{row.name}, seed {seed}: FAILED, {found['error']}", flush=True)
        return False
    values = found["values"]
    met = quick or is_met(row, values)
    verdict = (
        f"ran, {found['cpu_s']:.1f} CPU-s"
        if quick
        else f"{'met' if met else 'MISSED'}, {found['cpu_s'] / 60:.1f} CPU-minutes"
    )
    print(f"{row.name}, seed {seed}: {verdict}")
    bars = () if quick else row.bars
    for bar in bars:
        ok, text = judged(bar, values)
        print(f"  {'met   ' if ok else 'missed'}  {text}")
    asked = {bar.value for bar in bars}
    for name, value in values.items():
        if name not in asked:
            print(f"          {name}: {short(value)}" + ("  (baseline)" if name in row.beats else ""))
    sys.stdout.flush()
    return met


def run_all(rows: Sequence[Row], seeds: Sequence[int], quick: bool, path: Path, logs: Path) -> bool:
    """Run rows one after the other; whether all that were run met their bars (quick forms need only run)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    todo = [(row, seed) for row in rows for seed in seeds]
    good = True
    if quick:
        print("quick forms: too short for the bars, never saved")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as progress:
        task = progress.add_task("", total=len(todo))
        for row, seed in todo:
            progress.update(task, description=f"{row.name}, seed {seed}")
            if row.of:
                print(f"{row.name}: has the numbers of {row.of}")
            elif why := absent(row):
                print(f"{row.name}: not run, {why}")
            else:
                found = run(row, seed, quick, logs)
                if "error" not in found and not quick:
                    save(path, row, seed, found)
                good &= show(row, seed, found, quick)
            progress.advance(task)
    return good


def chosen(names: Sequence[str]) -> list[Row]:
    """Rows by name, all where none is given."""
    if unknown := [name for name in names if name not in BY_NAME]:
        import difflib

        close = difflib.get_close_matches(unknown[0], BY_NAME, 3)
        sys.exit(
            f"seeds: there is no row {unknown[0]!r}{'; ' + ', '.join(close) + '?' if close else ''} (--list shows all)"
        )
    return [BY_NAME[name] for name in names] or list(ROWS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options(__doc__, "seeds")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--list", action="store_true", help="show rows and their state, run nothing")
    parser.add_argument("--quick", action="store_true", help="reduced forms, not saved")
    parser.add_argument("--write", action="store_true", help="write results/seeds.md; alone, from what is saved")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    rows = chosen(args.rows)
    if args.answer:
        answer_alone(rows[0], args.seeds[0], args.quick, args.answer)
        return 0
    if args.list:
        saved = read_saved(SAVED)
        for row in rows:
            line = cells(row, saved)
            state = absent(row) or line["met"]
            print(f"{row.name:<20}{row.section:<6}{state}\n    {line['bar']}")
        for name, why in NOT_CLAIMED.items():
            print(f"{name}: not claimed, {why}")
        return 0
    good = True
    if args.rows or not args.write:
        start = time.perf_counter()
        good = run_all(rows, args.seeds, args.quick, SAVED, ROOT / "runs" / "seeds")
        print(f"{len(rows)} rows in {(time.perf_counter() - start) / 60:.1f} minutes")
    if args.write:
        print(
            report.keep("seeds", "Mechanisms", "uv run benchmarks/seeds.py --write", markdown(ROWS, read_saved(SAVED)))
        )
        from benchmarks import figures  # here, as it imports this module

        for path in figures.refresh():
            print(path)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
