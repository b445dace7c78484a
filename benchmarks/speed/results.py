"""What was measured: one line of JSON a row and run, and pages with the newest of each row."""

import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.report import refresh
from benchmarks.speed.row import Row
from multimodal.files import save_figure

RESULTS = Path(__file__).parents[1] / "results"
LINES, TABLE, PROFILES, PICTURE = "bench.jsonl", "bench.md", "bench_profiles.md", "bench.png"


def record(row: Row, found: dict[str, Any], threads: int, rounds: int) -> dict[str, Any]:
    """A line of the record: what was found, when, where, and with which versions."""
    return {
        "row": row.name,
        "date": str(date.today()),
        "commit": _commit(),
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: _version(name) for name in ("torch", *row.needs)},
        "peer": row.peer,
        "goal": row.goal,
        **found,
    }


def add(line: dict[str, Any], folder: Path = RESULTS) -> None:
    """Append it, and write the pages anew."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LINES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    lines = read(folder)
    (folder / TABLE).write_text(page([x for x in lines if "profile" not in x]), encoding="utf-8")
    draw(lines, folder / PICTURE)
    (folder / PROFILES).write_text(profiles_page([x for x in lines if "profile" in x]), encoding="utf-8")
    if folder == RESULTS:
        refresh()


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All lines, the oldest first."""
    path = folder / LINES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def page(lines: list[dict[str, Any]]) -> str:
    """The newest result of each row, as Markdown."""
    newest = {line["row"]: line for line in lines}
    out = _head("Ours beside theirs", "uv run multimodal bench", newest)
    out += table([line for line in newest.values() if "ratio" in line])
    for line in newest.values():
        if "ratio" not in line:
            out += ["", f"**{line['row']}**", "", *line["lines"]]
    return "\n".join(out) + "\n"


def profiles_page(lines: list[dict[str, Any]]) -> str:
    """Where the time of each row goes, as Markdown."""
    newest = {line["row"]: line for line in lines}
    out = _head("Where the time goes", "uv run multimodal bench --profile", newest)
    for line in newest.values():
        for side, texts in line["profile"].items():
            out += [f"- **{line['row']}, {'ours' if side == 'ours' else line['peer']}**: {'; '.join(texts)}"]
    return "\n".join(out) + "\n"


def _head(title: str, command: str, newest: dict[str, dict[str, Any]]) -> list[str]:
    """Title, command, and when and where: the form of every page in results."""
    places = dict.fromkeys(
        f"{x['date']}, {x['machine']}, {x['threads']} threads, torch {x['versions']['torch']}" for x in newest.values()
    )
    return [f"# {title}", "", f"`{command}`", *places, ""]


def newest_ratios(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest result of each row that has a peer."""
    return list({line["row"]: line for line in lines if "ratio" in line}.values())


def in_words(line: dict[str, Any]) -> str:
    """How fast ours is beside the peer."""
    return f"{line['ratio']:.2f} times as fast as {line['peer']}"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The newest ratio of each row as a dot, from its slowest round to its fastest as a line, its goal as a mark."""
    from matplotlib.figure import Figure

    newest = newest_ratios(lines)[::-1]
    if not newest:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(newest)), layout="constrained")
    axes = figure.subplots()
    for y, x in enumerate(newest):
        missed = x["goal"] is not None and x["ratio"] < x["goal"]
        colour = "tab:red" if missed else "tab:blue"
        axes.plot([x["ratios"][0], x["ratios"][-1]], [y, y], color=colour, linewidth=2, alpha=0.5)
        axes.plot(x["ratio"], y, "o", color=colour)
        axes.annotate(f"{x['ratio']:.2f}", (x["ratio"], y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        if x["goal"] is not None:
            axes.plot(x["goal"], y, "|", color="black", markersize=12)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16) if t / 2 <= max(x["ratios"][-1] for x in newest)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(newest)), [f"{x['row']}, beside {x['peer']}" for x in newest], fontsize=7)
    axes.set_xlabel("times as fast as the peer; |: the goal; red: missed")
    axes.grid(axis="x", alpha=0.3)
    save_figure(path, figure, 110)


def table(lines: list[dict[str, Any]]) -> list[str]:
    """Markdown of rows with a peer; above 1 ours is faster."""
    out = [
        "| row | peer | ours | theirs | times as fast | rounds from .. to | of CPU | goal | outputs differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        met = "" if x["goal"] is None else f"{x['goal']:g}" + ("" if x["ratio"] >= x["goal"] else ", missed")
        differ = "not compared" if x["difference"] is None else f"{x['difference']:.1g}"
        ours, theirs = (speed(x[side]["wall"], x["unit"]) for side in ("ours", "theirs"))
        spread = f"{x['ratios'][0]:.2f} .. {x['ratios'][-1]:.2f} ({len(x['ratios'])})"
        cells = (x["row"], x["peer"], ours, theirs, f"{x['ratio']:.2f}", spread, f"{x['ratio_cpu']:.2f}", met, differ)
        out.append(f"| {' | '.join(cells)} |")
    return out


def speed(seconds: float, unit: str) -> str:
    """The time of a unit, or the number of units in a second."""
    if unit in ("step", "program", "import"):
        return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
    return f"{1 / seconds:,.0f} {unit}/s"


def machine() -> str:
    """Its processor, cores and GPU; no name of its own."""
    import torch

    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().split("\n") if line.startswith("model name")]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{model}, {os.cpu_count()} cores, {gpu}"


def _commit() -> str:
    """Short name of the commit, with + if the files differ from it; empty outside of a checkout."""
    try:
        run = {"cwd": RESULTS.parent, "capture_output": True, "text": True, "check": True}
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name + "+" * any(line and "benchmarks/results" not in line for line in changed)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
