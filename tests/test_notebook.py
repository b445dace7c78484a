"""What notebooks show of predictions, runs and models."""

from html.parser import HTMLParser
from pathlib import Path

import torch

import multimodal as mm
from multimodal.train import Run
from multimodal_tokenizers import Labels, TextBytes

EVIL = "<script>alert(1)</script>"


class Parsed(HTMLParser):
    """Tags in order, the text between them, and an error for tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_prediction_shows_its_most_probable_classes_and_escapes_them():
    names = [f"class {i}" for i in range(11)]
    probability = {EVIL: 0.5} | {name: 0.05 - i / 1000 for i, name in enumerate(names)}
    shown = Parsed(mm.Prediction(EVIL, 0.5, probability)._repr_html_())
    assert "script" not in shown.tags
    assert shown.text.count(EVIL) == 2  # the answer, and its class
    assert "50.0%" in shown.text
    assert "class 8" in shown.text
    assert "class 9" not in shown.text
    assert "... 2 more" in shown.text
    assert shown.tags.count("tr") == 11


def test_a_prediction_that_is_a_picture_shows_its_shape():
    shown = Parsed(mm.Prediction(torch.zeros(3, 8, 9), 1.0)._repr_html_())
    assert "Tensor (3, 8, 9)" in shown.text
    assert "table" not in shown.tags


def test_a_run_shows_its_curve_and_its_last_rows():
    history = [{"step": step, "loss": 4.0 - step, EVIL: "x"} for step in range(1, 4)] + [
        {"step": 4, "loss": float("nan")}
    ]
    shown = Parsed(Run(Path("runs/a"), history, finished=True)._repr_html_())
    assert "script" not in shown.tags
    assert "training loss 3 to 1" in shown.text
    assert shown.tags.count("tr") == 5
    assert "polyline" in shown.tags
    html = Run(None, history)._repr_html_()
    assert 'points="0.0,0.0 120.0,30.0 240.0,60.0"' in html  # a straight line, downwards
    assert Parsed(Run(None)._repr_html_()).text.startswith("Run(no steps")


def test_a_printed_model_names_tasks_tokenizers_core_and_parameters():
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, mm.Core.tiny(), ["text -> label"])
    text = repr(model)
    for part in (
        "text -> label  by Classify()",
        "text: TextBytes()",
        "Labels(names=('a', 'b'))",
        "Core(width=64, depth=4, heads=4)",
    ):
        assert part in text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
