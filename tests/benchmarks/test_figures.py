"""No figure of a mechanism is typed by hand: documents and headers of examples show what results/seeds.json holds."""

import ast
import copy
import importlib
import re
from pathlib import Path

import pytest

import multimodal as mm
from benchmarks import figures, seeds
from benchmarks.seed_rows.table import NOT_CLAIMED, ROWS, Row, row

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "documents.md"
PROGRAMS = sorted(path for path in figures.PROGRAMS.glob("*.py") if figures.rows_of(path.stem))
NUMBER = re.compile(r"(?<![\w.])(?:\d[\d,]*\.?\d*|\.\d+)(?![\w])")

COUNTS = {*range(6), 179, 1014, 1999, 29_000}  # of parts, and of samples of data sets


def saved() -> seeds.Saved:
    return copy.deepcopy(seeds.read_saved(seeds.SAVED))


def test_documents_and_headers_show_what_is_saved():
    assert list(figures.stale(saved())) == [], "run: uv run benchmarks/figures.py"
    assert len(PROGRAMS) == 15


@pytest.mark.parametrize("path", [*figures.DOCUMENTS, *PROGRAMS], ids=lambda path: path.name)
def test_a_number_that_changed_is_noticed(path: Path):
    shown = [one for one in ROWS if path == PAGE or one.file.startswith("examples/")]
    rows = shown if path in figures.DOCUMENTS else figures.rows_of(path.stem)
    for one in (one for one in rows if saved().get(one.of or one.name)):
        other = saved()
        for entry in other[one.of or one.name].values():
            entry["values"] = {name: value + 1000 for name, value in entry["values"].items()}
        assert path in figures.stale(other), one.name


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_number_changed_by_hand_is_noticed(path: Path):
    source = path.read_text(encoding="utf-8")
    begin = source.index("\nMeasured (")
    match = re.compile(r"= -?[\d.]+").search(source, begin, source.index('"""', begin))
    assert match is not None
    changed = f"{source[: match.start()]}= 0.12345{source[match.end() :]}"
    assert figures.with_header(changed, path.stem, saved()) == source


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_rest_of_a_header_has_settings_and_no_results(path: Path):
    """A number before `Measured` is one of the program's own, of the paper, or counts data."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree) or ""
    prose = re.sub(r"(section|figure|equation)s? [\d.]+|\b(19|20)\d\d\b", "", doc.partition("\nMeasured (")[0])
    code = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    }
    found = {match[0]: float(match[0].rstrip(".,").replace(",", "")) for match in NUMBER.finditer(prose)}
    assert [text for text, number in found.items() if number not in code | COUNTS] == []
    assert "Expected" not in prose
    assert "%" not in prose


@pytest.fixture
def own(monkeypatch) -> tuple[Row, seeds.Saved]:
    """A row of our own with two seeds, of which the second misses a bar."""
    one = row(
        "own", "own row", "0", "-", "examples/attention/own.py", "a >= 0.5; a >= (b) +0.1; abs(c) <= 2", beats="b"
    )
    monkeypatch.setitem(seeds.BY_NAME, "own", one)
    runs = {"0": {"a": 0.75, "b": 0.25, "c": -1.0}, "1": {"a": 0.5, "b": 0.5, "c": -1.0}}
    return one, {"own": {seed: {"values": values, "cpu_s": 60, "date": "2026-01-01"} for seed, values in runs.items()}}


def test_a_number_stands_beside_its_bars_and_what_missed_them(own):
    one, found = own
    a = "a = 0.625 (0.5 to 0.75; bar >= 0.5; bar >= (b) +0.1, missed with seed 1)"
    assert figures.reached(one, found) == f"{a}; c = -1 (bar size <= 2)"
    assert figures.reached(one, found, ["b"]) == "b = 0.375 (0.25 to 0.5)"
    assert figures.reached(one, {}) == "not run yet"
    first = {"own": {"1": found["own"]["1"]}}
    assert figures.reached(one, first, ["a"]) == "a = 0.5 (bar >= 0.5; bar >= (b) +0.1, missed)"
    text = "before <!-- seeds own: b; c -->old<!-- / --> between <!-- seeds own: a --><!-- / -->"
    b = "b = 0.375 (0.25 to 0.5); c = -1 (bar size <= 2)"
    wanted = f"before <!-- seeds own: b; c -->{b}<!-- / --> between <!-- seeds own: a -->{a}<!-- / -->"
    assert figures.with_figures(text, found) == wanted
    assert figures.with_figures(wanted, found) == wanted


def test_a_mark_that_names_nothing_is_an_error(own):
    with pytest.raises(ValueError, match=r"<!-- seeds owm -->: there is no row 'owm'"):
        figures.with_figures("<!-- seeds owm --><!-- / -->", own[1])
    with pytest.raises(ValueError, match=r"row 'own' measured no 'd'; it has a, b, c"):
        figures.with_figures("<!-- seeds own: a; d --><!-- / -->", own[1])


def test_the_page_of_the_documents_has_every_row_once_or_more():
    page = PAGE.read_text(encoding="utf-8")
    marked = re.findall(r"<!-- seeds ([\w-]+)", page)
    assert set(marked) == set(seeds.BY_NAME)
    assert len(marked) == page.count("<!-- seeds ") == page.count("<!-- / -->")
    for name in NOT_CLAIMED:
        assert name in page.split("Not claimed: ")[1]


def test_what_the_page_of_the_documents_names_is_there():
    page = PAGE.read_text(encoding="utf-8")
    programs = set(re.findall(r"`(\w+\.py)", page)) - {"x.py"}
    assert programs == {path.name for path in PROGRAMS}
    assert set(re.findall(r"`seeds ([\w-]+)`", page)) - {"ROW"} <= set(seeds.BY_NAME)
    strips = (figures.PROGRAMS / "strips.py").read_text(encoding="utf-8")
    for variant in re.findall(r"--variant (\w+)", page):
        assert f'"{variant}"' in strips
    for path in re.findall(r"`((?:benchmarks|examples|tests|docs)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`mm\.([\w.]+)", page):
        found = mm
        for part in name.split("."):
            found = getattr(found, part)
    for name in re.findall(r"`(?:multimodal\.)?((?:zoo|look)\.[\w.]+)`", page):
        room, _, last = name.rpartition(".")
        if not hasattr(importlib.import_module(f"multimodal.{room}"), last):
            importlib.import_module(f"multimodal.{name}")
