"""Callbacks: when they are called, what they see, how they end a run, fail, and go on after a kill."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.shapes import ConfigError
from multimodal.train import Answers, Callback, CallbackError, Histograms
from multimodal.train.callbacks import part_of
from multimodal.train.run_report import Record
from multimodal.train.trackers import TensorBoard
from multimodal_tokenizers import Labels, TextBytes

TASK = "text -> label"
PLAIN: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-2, "precision": "float32", "device": "cpu", "quiet": True}
DATA = [{"text": "abcdefgh"[: i % 7 + 1], "label": "yes" if i % 2 else "no"} for i in range(12)]


def make(tasks: tuple = (TASK,)) -> mm.Model:
    core = mm.Core(width=16, depth=2, heads=2)
    return mm.Model({"text": TextBytes(), "label": Labels(("no", "yes"))}, core, tasks)


class Noted(Callback):
    """Notes every call, and counts steps in its state."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.steps = 0

    def on_start(self, view) -> None:
        self.calls.append(("start", view.step))

    def on_step(self, view) -> None:
        self.steps += 1
        self.calls.append(("step", view.step, view.row["step"], "loss" in view.row))

    def on_evaluation(self, view) -> None:
        self.calls.append(("evaluation", view.step, f"{TASK} loss" in view.row, "loss" in view.row))

    def on_end(self, view) -> None:
        self.calls.append(("end", view.step, view.finished))

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state) -> None:
        self.steps = state["steps"]


def test_when_each_is_called():
    noted = Noted()
    settings = {**PLAIN, "steps": 4, "evaluate_every": 2}
    mm.fit(make(), {TASK: DATA}, evaluation={TASK: DATA}, callbacks=[noted], **settings)
    assert noted.calls == [
        ("start", 0),
        ("step", 1, 1, True),
        ("step", 2, 2, True),
        ("evaluation", 2, True, True),
        ("step", 3, 3, True),
        ("step", 4, 4, True),
        ("evaluation", 4, True, False),
        ("end", 4, True),
    ]


def test_they_change_nothing_and_see_the_gradients():
    seen = []

    class Looks(Callback):
        def on_step(self, view) -> None:
            total = sum(float(p.grad.square().sum()) for p in view.model.parameters() if p.grad is not None)
            seen.append((total**0.5, min(view.row["grad_norm"], 1.0)))
            torch.rand(3)  # draws from the global generator change nothing

    with_them = mm.fit(make(), {TASK: DATA}, callbacks=[Looks(), Answers(TASK, DATA[:2])], **PLAIN)
    without = mm.fit(make(), {TASK: DATA}, **PLAIN)
    assert [row["loss"] for row in with_them.history] == [row["loss"] for row in without.history]
    assert [one for one, _ in seen] == pytest.approx([other for _, other in seen], rel=1e-4)


def test_an_object_with_one_method_is_enough():
    class Bare:
        rows: list = []  # noqa: RUF012

        def on_step(self, view) -> None:
            self.rows.append(view.row)

    run = mm.fit(make(), {TASK: DATA}, callbacks=[Bare()], **PLAIN)
    assert Bare.rows == run.history


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, view) -> None:
        self.on_step(view)

    def on_step(self, view) -> None:
        if view.step == self.step:
            view.stop("enough")


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_callback_ends_the_run_as_finished(tmp_path, capsys, at):
    settings = {**PLAIN, "quiet": False}
    run = mm.fit(make(), {TASK: DATA}, callbacks=[StopAt(at)], folder=tmp_path / "a", **settings)
    assert run.finished
    assert run.ended == ("enough" if at < 6 else "")
    at = max(at, 1)  # in on_start: after the first step
    assert len(run.history) == at
    assert ("fit: ended after step" in capsys.readouterr().out) == (at < 6)
    assert mm.Model.load(tmp_path / "a" / "model")
    again = mm.fit(make(), {TASK: DATA}, callbacks=[StopAt(9)], folder=tmp_path / "a", resume=True, **PLAIN)
    assert (again.finished, len(again.history)) == (True, at)


class Fails(Callback):
    def __init__(self, moment: str, step: int) -> None:
        self.step = step
        setattr(self, moment, self.fail)

    def fail(self, view) -> None:
        if view.step == self.step:
            raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize(
    ("moment", "step"), [("on_start", 0), ("on_step", 3), ("on_evaluation", 4), ("on_evaluation", 6), ("on_end", 6)]
)
def test_an_error_ends_the_run_with_its_name_and_everything_is_saved(tmp_path, moment, step):
    noted, model = Noted(), make()
    settings = {**PLAIN, "evaluate_every": 2, "folder": tmp_path / "a", "evaluation": {TASK: DATA}}
    message = (
        f"the callback Fails failed in {moment} after step {step}: ZeroDivisionError: on purpose; everything is saved"
    )
    with pytest.raises(CallbackError, match=message) as error:
        mm.fit(model, {TASK: DATA}, callbacks=[Fails(moment, step), noted], **settings)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert noted.calls[-1] == ("end", step, step == 6)  # the others are called to the end
    assert model.training
    resumed = make()
    run = mm.fit(resumed, {TASK: DATA}, resume=True, **settings)
    straight = make()
    mm.fit(straight, {TASK: DATA}, **{**settings, "folder": tmp_path / "b"})
    assert run.finished
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))


def test_a_tracker_fails_with_its_name():
    def my_tracker(row: dict) -> None:
        raise ValueError("no connection")

    with pytest.raises(
        CallbackError, match="the callback my_tracker failed in on_step after step 1: ValueError: no conn"
    ):
        mm.fit(make(), {TASK: DATA}, trackers=[my_tracker], **PLAIN)


def test_its_state_is_saved_and_goes_on(tmp_path):
    settings = {**PLAIN, "checkpoint_every": 1, "keep": 9}
    whole, other = Noted(), Noted()
    mm.fit(make(), {TASK: DATA}, callbacks=[whole, other], folder=tmp_path / "a", **settings)
    assert whole.steps == 6
    for state in (tmp_path / "a" / "checkpoints").glob("step-*"):
        if int(state.name[5:]) > 4:
            shutil.rmtree(state)
    saved = json.loads((tmp_path / "a" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert saved["callbacks"] == [{"name": "Noted", "state": {"steps": 4}}] * 2
    resumed, new = Noted(), StopAt(99)
    mm.fit(make(), {TASK: DATA}, callbacks=[new, resumed], folder=tmp_path / "a", resume=True, **settings)
    assert resumed.calls[0] == ("start", 4)
    assert resumed.steps == 6


def test_a_state_that_is_no_json_is_an_error_with_its_name(tmp_path):
    class Wrong(Callback):
        def state_dict(self) -> dict:
            return {"model": object()}

    with pytest.raises(CallbackError, match=r"the callback Wrong failed in state_dict.*not JSON serializable"):
        mm.fit(make(), {TASK: DATA}, callbacks=[Wrong()], folder=tmp_path / "a", **PLAIN)
    assert Record.read(tmp_path / "a").step == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callbacks": 5}, r"callbacks is int; give a list"),
        ({"callbacks": [print]}, r"callbacks are objects with on_start.*a function of a row goes into trackers="),
        ({"callbacks": [Noted]}, r"callbacks has the class Noted; give an object, Noted\(\.\.\)"),
        ({"trackers": "x"}, r"trackers is str; give a list"),
    ],
)
def test_what_is_no_callback_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        mm.fit(make(), {TASK: DATA}, **PLAIN, **given)


def test_histograms_are_those_of_numpy():
    class Drawn:
        def __init__(self) -> None:
            self.found: dict = {}

        def __call__(self, row) -> None: ...

        def histogram(self, name, values, step) -> None:
            self.found[name, step] = values.clone()

    drawn, model = Drawn(), make()
    mm.fit(model, {TASK: DATA}, trackers=[drawn], callbacks=[Histograms(every=3)], **PLAIN)
    assert {step for _, step in drawn.found} == {3, 6}
    wanted = np.concatenate(
        [p.detach().numpy().ravel() for n, p in model.named_parameters() if n.startswith("core.blocks.1.")]
    )
    assert np.array_equal(drawn.found["weights/core.blocks.1", 6].numpy(), wanted)
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert {name for name, _ in drawn.found if name.startswith("weights/")} == {f"weights/{part}" for part in parts}
    assert {"core.blocks.0", "embeds.text", "readouts.label_Classify"} < parts
    assert "gradients/core.blocks.0" in {name for name, _ in drawn.found}
    with pytest.raises(CallbackError, match="no tracker of this run draws histograms"):
        mm.fit(make(), {TASK: DATA}, callbacks=[Histograms()], **PLAIN)


def test_tensorboard_takes_histograms_and_texts(tmp_path):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path / "board")
    called = [Histograms(every=3), Answers(TASK, DATA[:2])]
    mm.fit(make(), {TASK: DATA}, evaluation={TASK: DATA}, trackers=[board], callbacks=called, **PLAIN)
    board.close()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    assert "weights/core.blocks.0" in read.Tags()["histograms"]
    assert f"answers/{TASK}/text_summary" in read.Tags()["tensors"]
    assert "training/loss" in read.Tags()["scalars"]


def test_answers_are_printed_after_each_evaluation(capsys):
    writing = "text -> text"
    data = [{"text": "ab", "answer": "é\U0001f600"}, {"text": "b"}]
    model, settings = make((writing,)), {**PLAIN, "quiet": False, "evaluate_every": 3}
    called = [Answers(writing, data)]
    mm.fit(model, {writing: data[:1]}, evaluation={writing: data[:1]}, callbacks=called, **settings)
    out = capsys.readouterr().out
    assert out.count("answers of text -> text:") == 2
    assert "(wanted 'é\U0001f600')" in out
    with pytest.raises(CallbackError, match="there is no task"):
        mm.fit(make(), {TASK: DATA}, callbacks=[Answers("text -> lable", DATA)], **PLAIN)
    with pytest.raises(ConfigError, match="Answers: no samples were given"):
        Answers(TASK, [])


def test_a_job_has_callbacks(tmp_path):
    noted = Noted()
    recipe = mm.Recipe(**{k: v for k, v in PLAIN.items() if k != "quiet"})
    mm.TrainingJob(model=make(), data={TASK: DATA}, recipe=recipe, callbacks=[noted]).run(tmp_path / "a", quiet=True)
    assert noted.steps == 6
    with pytest.raises(ConfigError, match="TrainingJob: callbacks is int, wanted a list of callbacks"):
        mm.TrainingJob(model=make(), data={TASK: DATA}, callbacks=5)
