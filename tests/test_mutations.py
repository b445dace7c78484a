"""The list in mutations.py stays true: each text occurs once, each test that must fail is there; a few are run for good."""

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


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{Path(m.file).stem}-{m.name}")
def test_every_mutation_changes_one_place_of_its_file_into_python(mutation):
    source = (ROOT / "multimodal" / mutation.file).read_text(encoding="utf-8")
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


def test_mutations_are_told_apart_by_file_and_name():
    names = [(mutation.file, mutation.name) for mutation in mutations.MUTATIONS]
    assert len(set(names)) == len(names)


def test_a_text_that_is_gone_is_named():
    gone = mutations.Mutation("sign", "masks.py", "not there", "", ("tests/test_masks.py::test_x",))
    with pytest.raises(ValueError, match=r"sign: 'not there' occurs 0 times in masks\.py"):
        mutations.mutated(gone, "x = 1")


def test_a_name_stands_for_all_its_parameters_and_no_other_test():
    assert mutations.among("a.py::test_x", {"a.py::test_x[1]"})
    assert mutations.among("a.py::test_x[1]", {"a.py::test_x[1]"})
    assert not mutations.among("a.py::test_x[1]", {"a.py::test_x[2]", "a.py::test_x"})
    assert not mutations.among("a.py::test_x", {"a.py::test_xy", "a.py::test_y[1]"})


@pytest.mark.training
def test_a_mutation_is_caught_on_a_copy_and_the_tree_is_left_alone():
    before = (ROOT / "multimodal" / "layers" / "base.py").read_text(encoding="utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "mutations.py"), "gamma ignored"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"caught +layers/base\.py +gamma ignored", done.stdout)
    assert "1 mutations, 0 not caught" in done.stdout
    assert (ROOT / "multimodal" / "layers" / "base.py").read_text(encoding="utf-8") == before
