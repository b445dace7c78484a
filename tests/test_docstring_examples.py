"""The examples in docstrings run as they stand, and the names that are used most have one."""

import copy
import doctest
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal as mm
from multimodal.check import check_task, check_tokenizer, verify
from multimodal.data import Balanced, class_weights
from multimodal.look import inside, mixture, xray
from multimodal.pretrained import pretrained
from multimodal.sklearn import Classifier, Regressor
from multimodal_tokenizers import (
    AudioFrames,
    Boxes,
    Chat,
    Events,
    Features,
    Graph,
    Ids,
    ImagePatches,
    Joint,
    Labels,
    Number,
    Points,
    Record,
    Segments,
    Sequence,
    Series,
    TableRow,
    TextBytes,
    VideoTubes,
    Words,
)
from tests.pretrained.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("circle", "square")
MOST_USED = {
    "Model": mm.Model,
    "Model.predict": mm.Model.predict,
    "Model.predict_each": mm.Model.predict_each,
    "Model.generate": mm.Model.generate,
    "Model.save": mm.Model.save,
    "Model.load": mm.Model.load,
    "Model.from_pretrained": mm.Model.from_pretrained,
    "Balanced": Balanced,
    "Boxes": Boxes,
    "sklearn.Classifier": Classifier,
    "sklearn.Regressor": Regressor,
    "CTC": mm.CTC,
    "Callback": mm.train.Callback,
    "Chat": Chat,
    "Composite": mm.Composite,
    "Contrast": mm.Contrast,
    "Core": mm.Core,
    "Engine": mm.Engine,
    "Events": Events,
    "Fields": mm.Fields,
    "Graph": Graph,
    "Ids": Ids,
    "Joint": Joint,
    "Labels.from_data": Labels.from_data,
    "Masked": mm.Masked,
    "Points": Points,
    "Prediction": mm.Prediction,
    "Recipe": mm.Recipe,
    "Record": Record,
    "Segments": Segments,
    "Sequence": Sequence,
    "Number": Number,
    "Regress": mm.Regress,
    "quantize": mm.quantize,
    "quick": mm.quick,
    "Run": mm.Run,
    "Series": Series,
    "Shards": mm.Shards,
    "TableRow": TableRow,
    "Task": mm.Task,
    "Tokenizer": mm.Tokenizer,
    "Tokens": mm.Tokens,
    "TopP": mm.TopP,
    "Tower": mm.Tower,
    "VideoTubes": VideoTubes,
    "Words": Words,
    "Augmented": mm.augment.Augmented,
    "CutMix": mm.augment.CutMix,
    "Mixup": mm.augment.Mixup,
    "Sometimes": mm.augment.Sometimes,
    "for_pictures": mm.augment.for_pictures,
    "for_sounds": mm.augment.for_sounds,
    "cached": mm.train.cached,
    "class_weights": class_weights,
    "check_task": check_task,
    "check_tokenizer": check_tokenizer,
    "evaluate": mm.evaluate,
    "find_lr": mm.train.find_lr,
    "fit": mm.fit,
    "inside": inside,
    "pretrained": pretrained,
    "transcribe": mm.transcribe,
    "verify": verify,
    "write_shards": mm.write_shards,
    "xray": xray,
    "mixture": mixture,
}


def picture(name: str, size: int) -> np.ndarray:
    """A white shape on black, `size` pixels high and wide."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return np.float32(x**2 + y**2 < 0.6 if name == "circle" else np.maximum(abs(x), abs(y)) < 0.7)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """What examples may use without making it: the usual imports, data, and a small model that has learned them."""
    samples = [
        {"image": picture(name, size), "label": name, "text": name}
        for name in NAMES
        for size in (12, 14, 16, 20, 22, 24)
    ]
    model = mm.Model(
        {
            "image": ImagePatches(patch=4, channels=1),
            "label": Labels(NAMES),
            "text": TextBytes(),
            "audio": AudioFrames(rate_hz=8000),
        },
        mm.Core(width=64, depth=2, heads=2),
        ["image -> label", "image -> text", mm.Task("audio -> text", mm.CTC())],
    )
    data = {"image -> label": samples, "image -> text": samples}
    mm.fit(model, data, steps=80, batch=24, lr=0.005, quiet=True)
    wave = torch.sin(torch.arange(16000) * 0.1).numpy()
    shapes = {name: picture(name, 20) for name in NAMES}
    modules = {"mm": mm, "np": np, "torch": torch, "Path": Path, "dataclass": dataclass}
    tools = {
        "check_task": check_task,
        "check_tokenizer": check_tokenizer,
        "inside": inside,
        "verify": verify,
        "mixture": mixture,
        "xray": xray,
    }
    kinds = {"AudioFrames": AudioFrames, "ImagePatches": ImagePatches, "Labels": Labels, "TextBytes": TextBytes}
    kinds |= {"Chat": Chat, "Features": Features, "Ids": Ids, "Joint": Joint, "Record": Record, "Sequence": Sequence}
    kinds |= {"Ids": Ids, "Series": Series, "TableRow": TableRow}
    kinds |= {"Boxes": Boxes, "Points": Points, "Segments": Segments, "VideoTubes": VideoTubes}
    kinds |= {"Events": Events, "Number": Number, "Graph": Graph, "Words": Words}
    return {**modules, **tools, **kinds, **shapes, "model": model.eval(), "samples": samples, "wave": wave}


def run_examples(name: str, docstring: str, namespace: dict[str, Any]) -> int:
    """Run what follows >>> in a docstring; returns the number of examples. A failure shows what came and what was wanted."""
    test = doctest.DocTestParser().get_doctest(docstring, dict(namespace), name, None, None)
    lines: list[str] = []
    found = doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
    assert not found.failed, "".join(lines)
    return found.attempted


@pytest.mark.parametrize("name", MOST_USED)
def test_an_example_runs(name: str, namespace: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.uint8(255 * picture("square", 20))).save("square.png")
    tiny_llama(tmp_path / "smollm2")
    own = {**namespace, "model": copy.deepcopy(namespace["model"])}  # an example may train it
    docstring = inspect.getdoc(MOST_USED[name]) or ""
    assert run_examples(name, docstring, own) >= 1, f"{name} has no example"


def test_no_example_is_left_out():
    folders = (ROOT / "multimodal", ROOT / "tokenizers")
    written = [
        path for folder in folders for path in folder.rglob("*.py") for _ in path.read_text().split("Examples:\n")[1:]
    ]
    assert len(written) == len(MOST_USED)
    elsewhere = [path for folder in folders for path in folder.rglob("*.py") if ">>> " in path.read_text()]
    assert set(elsewhere) == set(written)


def test_a_wrong_example_is_noticed():
    with pytest.raises(AssertionError, match=r"Expected:\s+2\s+Got:\s+3"):
        run_examples("sum", "Adds.\n\n>>> 1 + 2\n2\n", {})
    assert run_examples("none", "Adds.", {}) == 0
