"""Runs the Python that the documents show: every ```python block, top to bottom, each document as one fresh module."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    path
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.is_file() and "```python" in path.read_text(encoding="utf-8")
]
_BLOCK = re.compile(r"^```python(?P<marks>[^\n]*)\n(?P<code>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """(line it starts at, code) of every block but those that are marked `notest`."""
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in _BLOCK.finditer(text)
        if "notest" not in match["marks"].split()
    ]


def run_blocks(text: str, name: str) -> dict[str, object]:
    """Run all blocks in one namespace; an error shows the line of the document. Gives the namespace."""
    module = ModuleType(name)
    sys.modules[name] = module  # what a document defines can be pickled and found like any installed class
    try:
        for line, code in blocks(text):
            exec(compile("\n" * line + code, name, "exec"), module.__dict__)
        return dict(module.__dict__)
    finally:
        del sys.modules[name]


def links(text: str) -> list[str]:
    """Targets of links to files, outside blocks of code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", prose)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_shows_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = document.read_text(encoding="utf-8")
    assert text.count("```python") == len(_BLOCK.findall(text)), "a block is not closed, or is indented"
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run_blocks(text, f"document_{re.sub('[^a-z0-9]', '_', document.name.lower())}")


def test_the_documents_we_owe_are_there():
    assert {"CONTRIBUTING.md", "seams.md", "writing.md"} <= {path.name for path in DOCUMENTS}


def test_blocks_share_a_namespace_and_skip_what_is_marked():
    skipped = "```python notest\nraise OSError\n```\n```bash\nfalse\n```\n"
    text = f"```python\na = 1\n```\ntext\n{skipped}```python\nb = a + 1\n```\n"
    assert [line for line, _ in blocks(text)] == [1, 11]
    assert run_blocks(text, "document_test")["b"] == 2


def test_an_error_names_the_line_of_the_document():
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks("# Title\n\n```python\na = 1\na / 0\n```\n", "document_test")
    assert caught.traceback[-1].lineno + 1 == 5


def test_relative_links_lead_somewhere():
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
        for target in links(path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert broken == []
    assert links("[a](b.md#part) [c](https://d.example) [e](#f)\n```python\nx[0](1)\n```\n") == ["b.md"]


def test_files_that_the_documents_name_are_there():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| change | file | test |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    assert len(rows) >= 10
    for change, files, tests in rows:
        paths, checked = re.findall(r"`([\w./]+/[\w./]*)`", files), re.findall(r"`(tests/[\w./]+)`", tests)
        assert paths, change
        assert checked, change
        assert [path for path in paths + checked if not (ROOT / path).exists()] == []
    seams = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
    there = {path.relative_to(ROOT / "multimodal").as_posix() for path in (ROOT / "multimodal").rglob("*.py")}
    named = set(re.findall(r"[\w/]+\.py\b", seams)) - {"tests/test_contributing.py"}
    assert len(named) > 10
    assert [name for name in named if not any(path == name or path.endswith(f"/{name}") for path in there)] == []
