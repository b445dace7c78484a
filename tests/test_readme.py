"""README.md shows what benchmarks/results holds, to the letter; its blocks run in test_contributing.py."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_figure_in_the_readme_is_typed_by_hand():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- benchmarks/results/") >= 2
    assert "not measured yet" not in text
    assert report().with_results(text) == text, "run: uv run benchmarks/report.py"


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report().with_results(text.replace("%", "percent")) != text.replace("%", "percent")
