"""Regress: its loss against a sum written out by hand, its answers against least squares, and what it refuses."""

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import check_tokenizer
from multimodal.heads.pool import Mean
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Labels, Number, TableRow, TextBytes


def test_the_loss_is_the_sum_of_squared_differences():
    logits, target = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[0.0], [-2.0], [2.5]])
    assert float(mm.Regress().loss(logits, [1] * 3, target, [1] * 3)) == pytest.approx(1 + 0 + 4)
    assert mm.Regress().row_losses(logits, target).tolist() == pytest.approx([1, 0, 4])


@pytest.mark.parametrize("pool", [None, Mean()])
def test_a_line_is_learned_as_least_squares_finds_it(pool):
    x = np.linspace(-1, 1, 40)
    y = 3 * x + 100
    slope, start = np.polyfit(x, y, 1)
    samples = [{"row": {"x": float(a)}, "number": float(b)} for a, b in zip(x, y, strict=True)]
    tokenizers = {"row": TableRow.of([sample["row"] for sample in samples]), "number": Number.of(y)}
    model = mm.Model(tokenizers, mm.Core(width=16, depth=1, heads=2), [mm.Task("row -> number", mm.Regress(pool=pool))])
    mm.fit(model, {"row -> number": samples}, steps=60, batch=20, lr=1e-2, precision="float32", quiet=True)
    found = [answer.value for answer in model.predict("row -> number", [{"row": s["row"]} for s in samples])]
    assert np.abs(np.array(found) - (slope * x + start)).mean() < 0.5
    assert mm.evaluate(model, "row -> number", samples)["R2"] > 0.9


def test_kinds_without_numbers_are_refused():
    core = mm.Core(width=16, depth=1, heads=2)
    for kind, words in ((Labels(("a", "b")), "its values are classes; use Classify"), (TextBytes(), "use NextToken")):
        with pytest.raises(ConfigError, match=words):
            mm.Model({"text": TextBytes(), "answer": kind}, core, [mm.Task("text -> answer", mm.Regress())])
    with pytest.raises(ConfigError, match=r"Regress: pool=3 is no Pool"):
        mm.Regress(pool=3)  # type: ignore[arg-type]


def test_a_number_keeps_what_is_promised_of_kinds():
    report = check_tokenizer(Number.of([1.0, 2.0, 5.0]), [1.0, 2.0, -7.5, 4])
    assert report.failed == [], str(report)


def test_numbers_that_are_none_are_refused():
    for value in ("3", None, float("nan"), True, [1.0]):
        with pytest.raises(MediaError, match=r"Number.encode: wanted a finite number, not"):
            Number().encode(value)
    with pytest.raises(ConfigError, match=r"Number.of: value 1 is .*, wanted a finite number"):
        Number.of([1.0, float("inf")])
    with pytest.raises(ConfigError, match=r"Number.of: there are no values"):
        Number.of([])
    with pytest.raises(ConfigError, match=r"std=0.0 more than 0"):
        Number(std=0)
