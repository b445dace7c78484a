"""The READMEs show what benchmarks/results holds, to the letter; their blocks run in test_contributing.py."""

import pytest

from benchmarks.report import READMES, with_results


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_no_figure_in_a_readme_is_typed_by_hand(readme):
    text = readme.read_text(encoding="utf-8")
    assert text.count("<!-- benchmarks/results/") >= 2
    assert "not measured yet" not in text
    assert with_results(text) == text, "run: uv run benchmarks/report.py"


def test_a_changed_figure_is_noticed():
    text = READMES[0].read_text(encoding="utf-8")
    assert with_results(text.replace("%", "percent")) != text.replace("%", "percent")
