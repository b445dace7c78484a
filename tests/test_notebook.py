"""What notebooks show of predictions, runs and models."""

import dataclasses
import importlib
import pkgutil
import re
from html.parser import HTMLParser
from pathlib import Path

import torch

import multimodal as mm
from multimodal.count import plan
from multimodal.data.account import Tally
from multimodal.declare import Declared
from multimodal.look import xray
from multimodal.notebook import field_meanings
from multimodal.train import Run
from multimodal.transcription.transcript import Word
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


def evil_model() -> mm.Model:
    """A model whose names are as hostile as names can be, and whose classes are many."""
    names = (EVIL, *(f"class {i}" for i in range(5000)))
    kinds = {"text": TextBytes(), "label": Labels(names)}
    return mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), ["text -> label"])


def test_a_model_with_thousands_of_hostile_labels_is_short_and_escaped():
    html = evil_model()._repr_html_()
    shown = Parsed(html)
    assert "script" not in shown.tags
    assert "text -> label" in shown.text
    assert len(html) < 10_000
    counts = evil_model().parameter_counts()
    assert all(f"{count:,}" in shown.text for count in counts.values())


def test_a_declaration_shows_the_value_and_meaning_of_every_field_and_marks_what_is_set():
    recipe = mm.Recipe(steps=7)
    shown = Parsed(recipe._repr_html_())
    for field in dataclasses.fields(recipe):
        assert field.name in shown.text
    assert "number of optimiser steps" in shown.text
    assert shown.text.count("set") >= 1
    labels = Labels((EVIL, *(f"class {i}" for i in range(5000))))
    assert "script" not in Parsed(labels._repr_html_()).tags
    assert len(labels._repr_html_()) < 5000


def test_a_stream_is_drawn_with_its_samples_and_kinds():
    model = evil_model()
    stream = model.pack("text -> label", [{"text": "a" * n} for n in (3, 9, 5)], answers=False)
    shown = Parsed(stream._repr_html_())
    assert f"Stream, 3 samples, {len(stream)} tokens" in shown.text
    assert f"text {3 + 9 + 5}" in shown.text
    # each sample is its text and one learned token, from the shortest on
    assert [int(n) for n in re.findall(r"(\d+) tokens", shown.text)[1:]] == [3, 1, 5, 1, 9, 1]
    many = model.pack("text -> label", [{"text": "a"}] * 500, answers=False)
    assert len(many._repr_html_()) < 20_000
    assert "484 more samples" in Parsed(many._repr_html_()).text


def test_tokens_transcripts_accounts_plans_and_xrays():
    tokens = TextBytes()("a" * 1000)
    assert "1,000 ids" in Parsed(tokens._repr_html_()).text
    assert len(tokens._repr_html_()) < 3000
    words = tuple(Word(EVIL, i / 10, i / 10 + 0.05, 0.9) for i in range(1000))
    transcript = mm.Transcript(EVIL * 1000, words, 100.0, complete=False)
    shown = Parsed(transcript._repr_html_())
    assert "script" not in shown.tags
    assert "950 more" in shown.text
    assert "cut" in shown.text
    assert len(transcript._repr_html_()) < 50_000
    tally = Tally("files")
    tally.leave(EVIL, EVIL)
    tally.used = 3
    shown = Parsed(tally.account(notes=["a note"])._repr_html_())
    assert "script" not in shown.tags
    assert "saw 4 files" in shown.text
    assert "a note" in shown.text
    model = evil_model()
    ray = xray(model, "text -> label", {"text": EVIL})
    shown = Parsed(ray._repr_html_())
    assert "script" not in shown.tags
    assert "XRay of text -> label" in shown.text
    planned = plan(
        model, mm.Recipe(steps=3, batch=2), data={"text -> label": [{"text": "abc", "label": EVIL}]}, gpu="h100"
    )
    shown = Parsed(planned._repr_html_())
    assert "fits on 1 x" in shown.text
    assert "FLOPs of the run" in shown.text


def test_dir_of_the_package_and_help_show_what_is_public():
    assert not {"Any", "importlib", "old_names"} & set(dir(mm))
    assert {"Model", "fit", "attention", "sklearn", "__version__"} <= set(dir(mm))
    for name in dir(mm):
        if not name.startswith("__"):
            assert getattr(mm, name) is not None


def declared() -> list[type]:
    """Every public dataclass of both packages."""
    found = {}
    for package in ("multimodal", "multimodal_tokenizers"):
        root = importlib.import_module(package)
        for module in pkgutil.walk_packages(root.__path__, f"{package}."):
            if any(part.startswith("_") for part in module.name.split(".")):
                continue
            for name, part in vars(importlib.import_module(module.name)).items():
                if (
                    isinstance(part, type)
                    and dataclasses.is_dataclass(part)
                    and not name.startswith("_")
                    and part.__module__ == module.name
                ):
                    found[f"{module.name}.{name}"] = part
    return list(found.values())


def test_every_field_of_every_declaration_is_explained():
    """In the docstring, by a line "name: meaning"; help() and an editor show it there."""
    parts = [part for part in declared() if issubclass(part, Declared)]
    assert {mm.Recipe, mm.Core, TextBytes} <= set(parts)
    missing = {
        f"{part.__module__}.{part.__name__}": names
        for part in parts
        if (names := [f.name for f in dataclasses.fields(part) if f.name not in field_meanings(part)])
    }
    assert missing == {}
