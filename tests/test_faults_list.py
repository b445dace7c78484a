"""FAULTS.md stays true: every fault has its row, and every test that a row names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LAST = 86  # faults are numbered from 0; letters behind a number are further examples of its kind
ROW = re.compile(r"^\| *(\d+)([a-z]*) *\| *(\S+) *\| *(.+?) *\|$", re.MULTILINE)


def rows() -> list[tuple[int, str, str, str]]:
    """(number, letters, test or "-", what is so now) of every row."""
    text = (HERE / "FAULTS.md").read_text(encoding="utf-8")
    return [(int(number), letters, test, now) for number, letters, test, now in ROW.findall(text)]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_fault_has_a_row():
    assert {number for number, letters, _, _ in rows() if not letters} == set(range(LAST + 1))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}{row[1]}-{row[2].rpartition('::')[2]}"[:60])
def test_the_test_of_a_row_exists(row: tuple[int, str, str, str]):
    _, _, test, now = row
    assert len(now) > 10
    if test != "-":  # a row without a test says why
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in names_in(file)


def test_every_test_named_after_a_fault_is_in_the_list():
    listed = {test.partition("[")[0] for _, _, test, _ in rows()}
    there = {
        f"{path.relative_to(ROOT)}::{name}"
        for path in HERE.rglob("test_*.py")
        for name in names_in(str(path.relative_to(ROOT)))
        if re.match(r"test_fault_\d", name)
    }
    assert there - listed == set()
