"""Promise 1: a new kind of data is one class in one file, and adding it changes no old weight.

The time-series example: its tokenizer fits in 40 lines, passes every check, and learns in a reduced run.
"""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import tokenizer_checks
from multimodal_tokenizers import AudioFrames, Labels
from tests import test_model

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "new_tokenizer.py"
model = test_model.model  # a fixture


@pytest.fixture
def run(program, tmp_path) -> Callable[..., str]:
    """run("--steps", "3"): the example in a process of its own, in an empty folder."""
    return lambda *arguments, data=tmp_path: program(SOURCE, *arguments, cwd=tmp_path, MULTIMODAL_DATA=str(data))


def _accuracy(out: str, name: str) -> tuple[float, float]:
    line = next(line for line in out.splitlines() if line.startswith(f"{name}: "))
    right, commonest = (
        float(part.split("%")[0].split()[-1]) for part in line.split(" of ", 1)[0:1] + line.split("alone:")[1:]
    )
    return right, commonest


def test_the_tokenizer_is_one_class_of_at_most_40_lines():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    series = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Channels")
    assert series.end_lineno - series.decorator_list[0].lineno + 1 <= 40
    elsewhere = [
        name
        for name in ("multimodal", "tokenizers")
        for p in (ROOT / name).rglob("*.py")
        if "Channels(" in p.read_text("utf-8")
    ]
    assert not elsewhere


@pytest.fixture(scope="module")
def example():
    """The program as a module that workers and pickle find by name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("new_tokenizer_example", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("stack", [1, 3])
def test_the_tokenizer_passes_every_check(example, stack):
    series = [np.random.default_rng(i).standard_normal((2, 7 + i)).astype(np.float32) for i in range(3)]
    for check in tokenizer_checks(example.Channels((0.1, 0.2), (1.0, 2.0), stack), series):
        assert check.result().status in ("ok", "skipped"), check.result()


def test_stacked_moments_stay_in_order_and_places_count_moments(example):
    tokens = example.Channels((0.0, 10.0), (1.0, 2.0), stack=2)(np.array([[1, 2, 3], [10, 12, 14]]))
    assert tokens.content.tolist() == [[1, 0, 2, 1], [3, 2, 3, 2]]  # moment by moment, the last one repeated
    assert tokens.position_NA[:, 0].tolist() == [0, 2]


@pytest.mark.parametrize("value", [np.zeros((3, 5)), np.zeros(5), np.zeros((2, 0)), [[1.0], [2.0]]])
def test_bad_series_are_refused_by_name(example, value):
    with pytest.raises(ValueError, match=r"Channels\.encode: .* wanted an array \(2 channels, time\)"):
        example.Channels((0.0, 0.0), (1.0, 1.0))(value)


@pytest.mark.slow
def test_without_the_archive_it_learns_made_up_tones(tmp_path, run):
    out = run("--steps", "75")
    right, commonest = _accuracy(out, "tones")
    assert commonest == 25.0
    assert right > 40, out
    assert "71 checks: 62 ok, 9 skipped" in out
    assert (tmp_path / "runs" / "new_tokenizer" / "config.json").is_file()


@pytest.mark.slow
def test_it_learns_the_official_split_of_the_archive(tmp_path, run):
    data = Path(os.environ.get("MULTIMODAL_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "timeseries.npz").is_file():
        pytest.skip("no timeseries.npz in the folder of MULTIMODAL_DATA")
    out = run("--steps", "60", data=data)
    right, commonest = _accuracy(out, "JapaneseVowels")
    assert commonest == 23.8
    assert right > 80, out
    assert "of 370 test cases" in out


def test_extending_changes_no_weight_and_no_answer(model, values, tokenizers):
    more = model.extended(
        {"colour": Labels(("red", "blue")), "tone": AudioFrames(rate_hz=8000, mels=4)},
        ["tone text -> colour", "text -> text"],
    )
    old, new = model.state_dict(), more.state_dict()
    assert set(old) < set(new)
    for name, weight in old.items():
        assert torch.equal(weight, new[name]), name
    samples = [values(i) for i in range(4)]
    for task in model.tasks:
        a, b = (m.eval().logits(m.pack(task, samples, answers=False))[task] for m in (model, more))
        assert torch.equal(a, b)
    colour = more.predict("tone text -> colour", tone=samples[0]["sound"], text="a")
    assert colour.value in ("red", "blue")


def test_an_added_tokenizer_changes_no_first_weight_of_the_others(tokenizers, core):
    few = mm.Model({k: tokenizers[k] for k in ("text", "label")}, core, ["text -> label"], seed=3)
    all_ = mm.Model(tokenizers, core, ["sound -> label", "text -> label", "image -> story"], seed=3)
    for name, weight in few.state_dict().items():
        assert torch.equal(weight, all_.state_dict()[name]), name
