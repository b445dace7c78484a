"""Where the progress bar is shown."""

import sys
from types import ModuleType
from typing import Any

import pytest
import rich.console

from multimodal.progress import progress_bar


class Output:
    """Stands in for the widget of ipywidgets."""

    closed = False

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def clear_output(self, wait: bool = False) -> None:
        pass


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A notebook with ipywidgets; what was displayed."""
    shown: list[Any] = []
    widgets, python, display = ModuleType("ipywidgets"), ModuleType("IPython"), ModuleType("IPython.display")
    widgets.Output = Output  # type: ignore[attr-defined]
    display.display = shown.append  # type: ignore[attr-defined]
    for name, module in {"ipywidgets": widgets, "IPython": python, "IPython.display": display}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("multimodal.progress.has_widgets", lambda: True)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    return shown


def test_a_notebook_with_widgets_shows_the_bar(notebook: list[Any]) -> None:
    with progress_bar("training", 10) as bar:
        assert bar.visible
        bar.update(3, "loss 0.5")
    widget, *drawn = notebook
    assert isinstance(widget, Output)
    assert widget.closed, "the bar disappears"
    text = "".join(item._repr_mimebundle_([], [])["text/plain"] for item in drawn)
    assert "training" in text


def test_a_notebook_without_widgets_shows_none(notebook: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.progress.has_widgets", lambda: False)
    with progress_bar("training", 10) as bar:
        assert not bar.visible
    assert not notebook


def test_a_pipe_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("training", 10) as bar:
        assert not bar.visible
        bar.update(3)
    assert capsys.readouterr() == ("", "")
