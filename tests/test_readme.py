"""The READMEs show what benchmarks/results holds, and the README the tree and the test of each promise.

Their blocks run in test_contributing.py.
"""

import re
from pathlib import Path

import pytest

from benchmarks.report import READMES, with_results

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_figure_in_a_readme_is_typed_by_hand(readme):
    text = readme.read_text(encoding="utf-8")
    assert "<!-- benchmarks/results/" in text
    assert "not measured yet" not in text
    assert with_results(text) == text, "run: uv run benchmarks/report.py"


def test_a_changed_figure_is_noticed():
    text = READMES[0].read_text(encoding="utf-8")
    assert with_results(text.replace("%", "percent")) != text.replace("%", "percent")


def test_the_map_names_every_file_and_room_of_the_library():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.split("<!-- map -->")[1].split("<!-- / -->")[0].splitlines()
    named = [match[1] for line in lines if (match := re.match(r"[a-z ]{12}([a-z_]+(?:\.py|/))  +\S", line))]
    library = ROOT / "multimodal"
    there = {p.name for p in library.glob("*.py") if not p.name.startswith("__")}
    there |= {f"{p.parent.name}/" for p in library.glob("*/__init__.py")}
    assert sorted(named) == sorted(there)


def test_each_promise_names_its_own_test():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    promises = re.split(r"^\d\. ", readme.split("## What is promised")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
    named = [re.findall(r"\]\((tests/promises/[^)]+)\)", promise) for promise in promises]
    files = sorted(f"tests/promises/{path.name}" for path in (ROOT / "tests" / "promises").glob("test_*.py"))
    assert [len(paths) for paths in named] == [1] * 7
    assert sorted(path for paths in named for path in paths) == files
    for number, (path,) in enumerate(named, 1):
        assert (ROOT / path).read_text(encoding="utf-8").startswith(f'"""Promise {number}: ')
