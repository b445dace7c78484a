"""The API reference: every public name has its place on a page, nothing is fetched from another host, no link is broken."""

import importlib
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import multimodal as mm

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "attention",
    "check",
    "count",
    "data",
    "generate",
    "heads",
    "layers",
    "look",
    "media",
    "train",
    "transcription",
    "zoo",
)

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings_handlers") is None,
    reason="the docs group is not installed: uv sync --group docs",
)


class _Page(HTMLParser):
    """What a page has: its anchors, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if "src" in given:
            self.fetched.append(given["src"])
        if tag == "link" and given.get("rel") != "canonical":
            self.fetched.append(given.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built from the docstrings with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / ".mkdocs.yml"),
        "-d",
        str(folder),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@needs_mkdocs
def test_every_public_name_has_an_anchor(site: Path):
    missing = []
    for room in ("", *ROOMS):
        module = importlib.import_module(f"multimodal.{room}" if room else "multimodal")
        anchors = _Page((site / "api" / f"{room or 'multimodal'}.html").read_text(encoding="utf-8")).anchors
        names = mm.__all__ if not room else module.__all__
        assert names
        missing += [f"{module.__name__}.{name}" for name in names if f"{module.__name__}.{name}" not in anchors]
    assert missing == []
    for path in ("model.html", "masks.html"):
        anchors = _Page((site / "api" / path).read_text(encoding="utf-8")).anchors
        assert {"model.html": "multimodal.model.Model.predict", "masks.html": "multimodal.masks.Window"}[
            path
        ] in anchors


@needs_mkdocs
def test_pages_fetch_nothing_from_another_host(site: Path):
    pages = sorted(site.rglob("*.html"))
    fetched = {target for path in pages for target in _Page(path.read_text(encoding="utf-8")).fetched}
    assert any(target.endswith(".css") for target in fetched)
    assert [target for target in fetched if re.match(r"(\w+:)?//", target)] == []
    styles = "\n".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", styles) == []


@needs_mkdocs
def test_descriptions_of_fields_and_errors_are_lists(site: Path):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (site / "api" / "train.html").read_text(encoding="utf-8")))
    assert "look_ahead ( int ) – samples among which each pack is chosen." in text
    assert "ConfigError | TaskError | CheckpointError" in text


def test_a_page_that_fetches_is_noticed():
    page = _Page(
        '<link rel="stylesheet" href="https://x/a.css"><a id="b" href="https://y"></a><script src="//z/c.js"></script>'
    )
    assert page.fetched == ["https://x/a.css", "//z/c.js"]
    assert page.anchors == {"b"}


def test_the_drawing_is_of_todays_stream():
    path = ROOT / "docs" / "drawings.py"
    spec = importlib.util.spec_from_file_location("drawings_of_docs", path)
    assert spec is not None
    assert spec.loader is not None
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    assert (ROOT / "docs" / "stream.svg").read_text(encoding="utf-8") == drawings.drawing(drawings.stream())
