"""The list in mutations.py stays true: each mutation applies in one place, each test that must fail is there; one is run."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", HERE / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations = _load()


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.symbol.rpartition(':')[0]}-{m.name}")
def test_every_mutation_changes_one_place_of_its_symbol_into_python(mutation):
    source = mutations.path_of(mutation, ROOT).read_text(encoding="utf-8")
    changed = mutations.mutated(mutation, source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert mutation.tests


def test_every_test_that_must_fail_exists():
    wanted = {test.split("[")[0] for mutation in mutations.MUTATIONS for test in mutation.tests}
    there = {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in HERE.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert wanted <= there


def test_symbol_and_name_identify_a_mutation():
    names = [(mutation.symbol, mutation.name) for mutation in mutations.MUTATIONS]
    assert len(set(names)) == len(names)


SOURCE = """
def other(a): return f(a, 1, scale=2)
class Made:
    def read(self, q_BK, mask, rows):
        held = f(q_BK, 1, scale=mask, more=rows)
        rows[held.free] = g(held)
        return held - q_BK
"""
RENAMED = """
class Made:
    '''Elsewhere, with other variables, over several lines.'''
    def read(self, query, where, these):
        # a comment
        found = f(
            query, 1, more=these, scale=where
        )
        these[found.bidirectional] = g(found)
        return (found - query)
def other(a): return f(a, 1, scale=2)
"""


@pytest.mark.parametrize("source", [SOURCE, RENAMED], ids=["source", "renamed"])
@pytest.mark.parametrize(
    ("symbol", "find", "put", "changed"),
    [
        ("Made.read", "_x - _y", "_y - _x", "return {q} - {held}"),
        ("Made.read", "_x - _y", "_x - _arg2", "return {held} - {mask}"),
        ("Made", "f(_q, 1, scale=_mask, **_more)", "f(_q, 2, **_more)", "{held} = f({q}, 2, more={rows})"),
        ("Made", "f(*_all, scale=_mask, **_more)", "f(*_all, scale=0, **_more)", "{held} = f({q}, 1, scale=0, more={rows})"),
        ("Made.read", "_rows[_held._free] = _g(_held)", "pass", "pass"),
        ("Made.read", "_rows[_held._free]", "_rows[_held._free + 1]", "{rows}[{held}.{free} + 1] = g({held})"),
        ("other", "f(_a, 1, scale=2)", "f(_a, 1)", "return f(a, 1)"),
    ],
)  # fmt: skip
def test_a_mutation_survives_other_variables_and_other_layout(source, symbol, find, put, changed):
    names = {"held": "held", "q": "q_BK", "mask": "mask", "rows": "rows", "free": "free"}
    if source is RENAMED:
        names = {"held": "found", "q": "query", "mask": "where", "rows": "these", "free": "bidirectional"}
    before = [line.strip() for line in ast.unparse(ast.parse(source)).splitlines()]
    after = mutations.mutated(mutations.Mutation("it", f"m:{symbol}", find, put, ()), source).splitlines()
    (line,) = [line.strip() for line in after if line.strip() not in before]
    assert line == changed.format(**names)


@pytest.mark.parametrize(
    ("symbol", "find", "put", "message"),
    [
        ("Made.write", "_x - _y", "_x", r"it: symbol masks:Made\.write is not there; candidates: "),
        (
            "Made.read",
            "_x - _y.off",
            "_x",
            r"symbol masks:Made\.read has no '_x - _y\.off'; candidates: .*'held - q_BK'",
        ),
        ("Made.read", "h(_x)", "_x", "has no"),
        (
            "Window.raech",
            "self.size",
            "0",
            r"Window\.raech is not there; candidates: masks:Window\.reach, .*masks:Window\.reach",
        ),
        ("Made", "_x", "0", r"has '_x' \d+ times; take in more of what surrounds it"),
        ("Made.read", "_x - _y", "_x - _z", r"'_x - _z' has the names \['_z'\], which are not there"),
        ("Made.read", "_x - _y", "torhc.f(_x)", r"has the names \['torhc'\], which are not there"),
    ],
)
def test_a_mutation_that_no_longer_applies_names_candidates(symbol, find, put, message):
    with pytest.raises(ValueError, match=message):
        mutations.mutated(mutations.Mutation("it", f"masks:{symbol}", find, put, ()), SOURCE)


def test_a_symbol_that_moved_is_found_by_what_is_in_it():
    (mutation,) = [m for m in mutations.MUTATIONS if m.name == "gate inverted"]
    moved = mutation._replace(symbol="attention.scores:somewhere")
    with pytest.raises(ValueError, match=r"is not there; candidates: .*attention\.reads:reweighted"):
        mutations.mutated(moved, "x = 1")


def test_a_name_stands_for_all_its_parameters_and_no_other_test():
    assert mutations.among("a.py::test_x", {"a.py::test_x[1]"})
    assert mutations.among("a.py::test_x[1]", {"a.py::test_x[1]"})
    assert not mutations.among("a.py::test_x[1]", {"a.py::test_x[2]", "a.py::test_x"})
    assert not mutations.among("a.py::test_x", {"a.py::test_xy", "a.py::test_y[1]"})


def test_the_list_is_shown_without_running_it():
    done = subprocess.run(
        [sys.executable, str(HERE / "mutations.py"), "--list", "gamma ignored"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "gamma ignored, in layers.base:Gated.merge:\n    _weights.gamma * _update\n    -> _update\n"
    )


@pytest.mark.training
def test_a_mutation_is_caught_on_a_copy_and_the_tree_is_left_alone():
    before = (ROOT / "multimodal" / "layers" / "base.py").read_text(encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "mutations.py"), "gamma ignored"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"caught +layers\.base:Gated\.merge +gamma ignored", done.stdout)
    assert "1 mutations, 0 not caught" in done.stdout
    assert (ROOT / "multimodal" / "layers" / "base.py").read_text(encoding="utf-8") == before


@pytest.mark.training
def test_all_mutations_are_caught():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "mutations.py")], capture_output=True, text=True, env=env, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
