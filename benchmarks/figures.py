"""Shows in documents and in the headers of examples what results/seeds.json holds: no figure of a mechanism is typed by hand.

    uv run benchmarks/figures.py                  show it anew; seeds.py --write does so too

In a document, what lies between `<!-- seeds ROW: NAME; NAME -->` and `<!-- / -->` is what these numbers of the row came to, beside
their bars (without names: every number that has a bar); after `<!-- seeds programs -->` comes a table of all rows of
examples/attention/. In the header of a program there, everything behind the line `Measured` is made by this program.
"""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.script import table
from benchmarks.seed_rows.table import EXAMPLES, ROWS, Bar, Row
from benchmarks.seeds import BY_NAME, SAVED, Saved, cells, judged, read_saved, spread

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / EXAMPLES
DOCUMENTS = (PROGRAMS / "README.md", ROOT / "docs" / "documents.md")
MARKED = re.compile(r"<!-- seeds (?P<what>[^\n]+?) -->(?P<shown>.*?)<!-- / -->", re.DOTALL)
TITLE = "Measured (all numbers: benchmarks/results/seeds.json):"
NOT_RUN = "not run yet"
WIDTH = 120  # of a line of a header


def reached(row: Row, saved: Saved, names: Sequence[str] = ()) -> str:
    """What numbers of a row came to, each beside its bars: "a = 0.75 (0.7 to 0.8; bar >= 0.5); b = 0.1 (bar >= 0.2, missed)".

    names: those that are shown; every number that has a bar unless given.

    Raises:
        ValueError: a row that was run has no number of this name.
    """
    entries = saved.get(row.of or row.name)
    if not entries:
        return NOT_RUN
    runs = {seed: entries[seed]["values"] for seed in sorted(entries, key=int)}
    said = []
    for name in names or dict.fromkeys(bar.value for bar in row.bars):
        if not any(name in values for values in runs.values()):
            raise ValueError(f"row {row.name!r} measured no {name!r}; it has {', '.join(next(iter(runs.values())))}")
        number, _, extent = spread(name, list(runs.values())).partition(" (")
        facts = [extent.removesuffix(")")] if extent else []
        facts += [_bar(bar, runs) for bar in row.bars if bar.value == name]
        said.append(f"{name} = {number}" + (f" ({'; '.join(facts)})" if facts else ""))
    return "; ".join(said)


def _bar(bar: Bar, runs: Mapping[str, Mapping[str, float]]) -> str:
    """A bar without the name of its number, and with which seeds it was missed."""
    failed = [seed for seed, values in runs.items() if not judged(bar, values)[0]]
    missed = ", missed" if failed else ""
    if failed and len(runs) > 1:
        missed += f" with seed{'s' * (len(failed) > 1)} {' '.join(failed)}"
    return f"bar {'size ' if bar.absolute else ''}{bar.requirement}{missed}"


def minutes(row: Row, saved: Saved) -> str:
    """CPU-minutes of a run, and its seeds: "0.2 CPU-minutes, seeds 0 1 2"."""
    line = cells(row, saved)
    seeds = line["seeds"].split()
    return f"{line['CPU-minutes']} CPU-minutes, seed{'s' if len(seeds) > 1 else ''} {' '.join(seeds)}" if seeds else ""


def rows_of(program: str) -> list[Row]:
    """The rows that a program of examples/attention/ measures."""
    return [row for row in ROWS if row.file == f"{EXAMPLES}{program}.py"]


def header(doc: str, program: str, saved: Saved) -> str:
    """The header of a program with what its rows reached at the end."""
    lines = []
    for row in rows_of(program):
        if not row.of:
            facts = ", ".join(filter(None, (row.title, minutes(row, saved))))
            beside = cells(row, saved)["beside"]
            lines += textwrap.wrap(
                f"{facts}: {reached(row, saved)}{f'; beside: {beside}' if beside else ''}",
                WIDTH,
                initial_indent="- ",
                subsequent_indent="  ",
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join([doc.partition("\nMeasured (")[0].rstrip() + "\n", TITLE, *lines]) + "\n"


def with_header(source: str, program: str, saved: Saved) -> str:
    """A program's source with its header anew."""
    opening, doc, rest = source.split('"""', 2)
    return '"""'.join([opening, header(doc, program, saved), rest])


def programs_table(saved: Saved) -> str:
    """Markdown: every row that a program of examples/attention/ measures."""
    lines = []
    for row in (row for row in ROWS if row.file.startswith(EXAMPLES)):
        shared = f"as {BY_NAME[row.of].title}: " if row.of else ""
        line = cells(row, saved)
        where = [f"`{row.name}`", f"`{Path(row.file).name}`"]
        lines.append([row.title, *where, shared + reached(row, saved), line["met"], line["CPU-minutes"], line["seeds"]])
    head = ["mechanism", "row", "program", "reached", "bars met", "CPU-minutes", "seeds"]
    return table(head, ([_cell(text) for text in line] for line in lines))


def with_figures(text: str, saved: Saved) -> str:
    """A document with everything between its marks anew.

    Raises:
        ValueError: a mark names a row or a number that there is not.
    """

    def shown(match: re.Match[str]) -> str:
        row, _, names = match["what"].partition(": ")
        if row == "programs":
            body = f"\n\n{programs_table(saved)}\n"
        elif row in BY_NAME:
            body = _cell(reached(BY_NAME[row], saved, list(filter(None, names.split("; ")))))
        else:
            raise ValueError(
                f"<!-- seeds {match['what']} -->: there is no row {row!r}; benchmarks/seeds.py --list shows all"
            )
        return f"<!-- seeds {match['what']} -->{body}<!-- / -->"

    return MARKED.sub(shown, text)


def _cell(text: str) -> str:
    return text.replace("|", "/")


def stale(saved: Saved) -> dict[Path, str]:
    """The files that show something else than is saved, with their text as it should be."""
    wanted: list[tuple[Path, Callable[[str], str]]] = [
        (path, lambda text: with_figures(text, saved)) for path in DOCUMENTS
    ]
    for path in sorted(PROGRAMS.glob("*.py")):
        if rows_of(path.stem):
            wanted.append((path, lambda text, name=path.stem: with_header(text, name, saved)))
    found = {}
    for path, change in wanted:
        text = path.read_text(encoding="utf-8")
        if (new := change(text)) != text:
            found[path] = new
    return found


def refresh() -> list[Path]:
    """Write the files that are stale; returns them."""
    found = stale(read_saved(SAVED))
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    return list(found)


if __name__ == "__main__":
    for path in refresh():
        print(path.relative_to(ROOT))
