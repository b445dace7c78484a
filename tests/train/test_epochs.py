"""Epochs beside steps: counted by which samples a run has really read."""

import json
from collections import Counter

import pytest

import multimodal as mm
from multimodal.count import plan
from multimodal.shapes import ConfigError
from multimodal_tokenizers import Labels, TextBytes

TASK, OTHER = "text -> label", "text -> text"
PLAIN = {"batch": 6, "precision": "float32", "device": "cpu", "quiet": True}
DATA = [{"text": chr(97 + i) * (1 + i % 3), "label": "yes" if i % 2 else "no"} for i in range(20)]
WRITING = [{"text": chr(65 + i), "answer": "x"} for i in range(7)]


class Counted(list):
    """A list that counts which of its samples are read."""

    def __init__(self, samples: list) -> None:
        super().__init__(samples)
        self.read: Counter = Counter()

    def __getitem__(self, index):
        self.read[index] += 1
        return super().__getitem__(index)


def make(*tasks: str) -> mm.Model:
    return mm.Model({"text": TextBytes(), "label": Labels(("no", "yes"))}, mm.Core.tiny(), tasks or [TASK])


def test_an_epoch_is_every_sample_once():
    data = Counted(DATA)
    mm.fit(make(), {TASK: data}, epochs=3, **{**PLAIN, "batch": 5})
    looked_at = Counted(DATA)
    mm.fit(make(), {TASK: looked_at}, steps=1, **{**PLAIN, "batch": 5})
    # `fit` also looks at some samples before it trains
    before = Counter(range(20)) + (looked_at.read - Counter(looked_at.read.keys()))
    assert all(2 < n <= 3 + before[i] for i, n in data.read.items())
    assert len(data.read) == 20


@pytest.mark.parametrize(
    ("epochs", "batch", "steps"),
    [(1, 5, 4), (2.5, 5, 10), (1, 6, 4), (3, 6, 10), (0.1, 2, 1), (0.3, 1, 6), (0.001, 6, 1)],
)
def test_steps_are_rounded_up_so_that_every_sample_has_come(epochs, batch, steps):
    run = mm.fit(make(), {TASK: DATA}, epochs=epochs, **{**PLAIN, "batch": batch})
    assert run.history[-1]["step"] == steps
    assert run.finished


def test_of_several_tasks_the_one_that_takes_longest_decides(tmp_path):
    data = {TASK: Counted(DATA), OTHER: Counted(WRITING)}
    # 6 samples a step in the ratio 1 to 2: 20 / 2 steps for the first, 7 / 4 for the other
    settings = {"epochs": 1, "mix": {TASK: 1, OTHER: 2}, **PLAIN}
    run = mm.fit(make(TASK, OTHER), data, folder=tmp_path / "a", **settings)
    assert run.history[-1]["step"] == 10
    assert set(data[TASK].read) == set(range(20))
    recipe = json.loads((tmp_path / "a" / "config.json").read_text())["recipe"]
    assert (recipe["steps"], recipe["epochs"]) == (10, 1)


def test_each_row_has_its_epoch_and_the_run_says_both(capsys):
    run = mm.fit(make(), {TASK: DATA}, epochs=2, **{**PLAIN, "batch": 5, "quiet": False})
    assert [row["epoch"] for row in run.history] == [0.25 * step for step in range(1, 9)]
    assert "2 epochs = 8 steps of 5 samples" in capsys.readouterr().out
    assert [row["epoch"] for row in mm.fit(make(), {TASK: DATA}, steps=3, **PLAIN).history] == [0.3, 0.6, 0.9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2, "steps": 5}, r"steps=5 contradicts epochs=2, which are 7 steps of these data; give one of them"),
        ({"epochs": 2, "tokens": 64, "batch": 64}, r"epochs=2 cannot be worked out beside tokens=64.*give steps"),
        ({"epochs": -1}, r"epochs=-1 must be 0 or more"),
        ({"epochs": float("nan")}, r"epochs=nan must be 0 or more"),
        ({"epochs": float("inf")}, r"epochs=inf must be 0 or more"),
        ({"epochs": "2"}, r"epochs='2' is str, wanted a number"),
    ],
)
def test_what_cannot_be_worked_out_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        mm.fit(make(), {TASK: DATA}, **{**PLAIN, **settings})


def test_steps_that_agree_are_no_contradiction(tmp_path):
    mm.fit(make(), {TASK: DATA}, epochs=2, folder=tmp_path / "a", **PLAIN)
    saved = json.loads((tmp_path / "a" / "config.json").read_text())["recipe"]
    run = mm.fit(make(), {TASK: DATA}, epochs=saved["epochs"], steps=saved["steps"], **PLAIN)
    assert run.history[-1]["step"] == 7


def test_a_run_of_steps_is_the_run_of_as_many_epochs(tmp_path):
    mm.fit(make(), {TASK: DATA}, steps=7, folder=tmp_path / "a", **PLAIN)
    run = mm.fit(make(), {TASK: DATA}, epochs=2, folder=tmp_path / "a", resume=True, **PLAIN)
    assert run.history[-1]["step"] == 7


def test_a_plan_knows_epochs():
    recipe = mm.Recipe(epochs=2, batch=6)
    assert plan(make(), recipe, data={TASK: DATA}, gpu="cpu").steps == 7
    with pytest.raises(ConfigError, match="cannot be worked out"):
        plan(make(), mm.Recipe(epochs=2, tokens=64), data={TASK: DATA}, gpu="cpu")
