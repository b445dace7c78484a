"""Early stopping: where it ends and what the model becomes, against runs that go on and rules applied by hand."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import multimodal as mm
import multimodal.train.loop
from multimodal.shapes import ConfigError
from multimodal.train.run_report import Record
from multimodal_tokenizers import Labels, TextBytes

TASK, LOSS = "text -> label", "text -> label loss"
PLAIN = {
    "steps": 60,
    "batch": 6,
    "lr": 1e-2,
    "precision": "float32",
    "device": "cpu",
    "quiet": True,
    "evaluate_every": 3,
}
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "yes" if "a" in word else "no"} for word in WORDS]
# learned at first, then unlearned: some labels are not those of the training
HELD_OUT = [*DATA[:6], *({**s, "label": "no" if s["label"] == "yes" else "yes"} for s in DATA[6:10])]


def make(seed: int = 0) -> mm.Model:
    core = mm.Core(width=16, depth=1, heads=2)
    return mm.Model({"text": TextBytes(), "label": Labels(("yes", "no"))}, core, [TASK], seed=seed)


def fit(model: mm.Model, **settings) -> mm.train.Run:
    return mm.fit(model, {TASK: DATA}, evaluation={TASK: HELD_OUT}, **{**PLAIN, **settings})


def measured(run: mm.train.Run, key: str = LOSS) -> dict[int, float]:
    return {row["step"]: row[key] for row in run.history if key in row and "loss" in row}


def by_hand(values: dict[int, float], patience: int, sign: int = 1) -> tuple[int, int | None]:
    """(best step, step at which the run ends or None)."""
    steps, best = list(values), min(values)
    for i, step in enumerate(steps):
        if sign * values[step] < sign * values[best]:
            best = step
        if i - steps.index(best) >= patience:
            return best, step
    return best, None


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("folder", [False, True])
def test_it_ends_where_the_rule_says_and_the_model_is_the_best(tmp_path, capsys, folder, ema):
    whole = make()
    going_on = fit(whole, ema=ema)
    values = measured(going_on)
    best, end = by_hand(values, 3)
    assert best < end < 60  # else this shows nothing
    model = make()
    run = fit(model, patience=3, ema=ema, quiet=False, **({"folder": tmp_path / "a"} if folder else {}))
    assert (run.finished, run.best_step, run.history[-1]["step"]) == (True, best, end)
    assert measured(run) == {step: value for step, value in values.items() if step <= end}
    assert mm.evaluate(model, TASK, HELD_OUT)["loss"] == pytest.approx(values[best], abs=1e-6)
    assert run.history[-1] == {
        "step": end,
        "best_step": best,
        **{k: v for k, v in run.history[-1].items() if k[:4] == "text"},
    }
    assert run.last(LOSS) == values[best]
    out = capsys.readouterr().out
    assert f"fit: ended after step {end} of 60: 3 evaluations had no better held-out loss" in out
    assert f"fit: the model is that of step {best}, whose held-out loss is {values[best]:.4f}" in out
    # the weights are those of a run that was stopped at the best step
    if folder:
        for name in ("model", "best"):
            assert same(mm.Model.load(run.folder / name).state_dict(), model.state_dict())


def test_the_weights_are_those_of_the_best_step():
    kept: dict[int, dict] = {}
    model = make()

    def keep(row: dict) -> None:
        kept.setdefault(row["step"], {name: t.clone() for name, t in model.state_dict().items()})

    run = fit(model, patience=3, trackers=[keep])
    assert same(kept[run.best_step], model.state_dict())
    assert not same(kept[run.history[-2]["step"]], model.state_dict())


def test_another_measure_and_a_run_that_reaches_its_end(tmp_path):
    exact = f"{TASK} exact"
    going_on = measured(fit(make()), exact)
    best, end = by_hand(going_on, 4, sign=-1)
    assert end is not None
    run = fit(make(), patience=4, best=exact)
    assert (run.best_step, run.history[-1]["step"]) == (best, end)
    # the last step is evaluated too, although no evaluation is due, and the best model is taken nevertheless
    model = make()
    run = fit(model, patience=50, steps=50)
    values = measured(run)
    assert list(values)[-2:] == [48, 50]
    assert (run.ended, run.best_step) == ("", by_hand(values, 50)[0])
    assert mm.evaluate(model, TASK, HELD_OUT)["loss"] == pytest.approx(min(values.values()), abs=1e-6)


def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path):
    straight = fit(make(), patience=3, folder=tmp_path / "a", checkpoint_every=1, keep=100)
    wanted = load_file(tmp_path / "a" / "model" / "weights.safetensors")

    def timeless(run: mm.train.Run) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in run.history]

    end = straight.history[-1]["step"]
    for step in range(1, end + 1, 2):  # everything but the states is newer than the state, as after a kill
        folder = tmp_path / f"b{step}"
        shutil.copytree(tmp_path / "a", folder)
        for state in (folder / "checkpoints").glob("step-*"):
            if int(state.name[5:]) > step:
                shutil.rmtree(state)
        run = fit(make(), patience=3, folder=folder, checkpoint_every=1, keep=100, resume=True)
        assert timeless(run) == timeless(straight)
        assert (run.best_step, run.ended) == (straight.best_step, straight.ended)
        assert same(load_file(folder / "model" / "weights.safetensors"), wanted)


def test_a_run_that_ended_early_is_finished(tmp_path):
    run = fit(make(), patience=2, folder=tmp_path / "a")
    assert run.ended
    record = Record.read(tmp_path / "a")
    assert record.finished
    assert record.ended
    model = make()
    again = fit(model, patience=2, folder=tmp_path / "a", resume=True)
    assert (again.finished, again.ended, again.best_step, again.history) == (
        True,
        run.ended,
        run.best_step,
        run.history,
    )
    assert same(model.state_dict(), mm.Model.load(tmp_path / "a" / "best").state_dict())


def test_values_that_are_no_numbers_are_never_better(monkeypatch):
    values = iter([math.nan, 1.0, math.nan, math.nan])
    monkeypatch.setattr(multimodal.train.loop, "evaluate_share", lambda *args: {"loss": next(values), "exact": 0.0})
    run = fit(make(), patience=2)
    assert (run.best_step, run.history[-1]["step"]) == (6, 12)
    always = iter([math.nan] * 9)
    monkeypatch.setattr(multimodal.train.loop, "evaluate_share", lambda *args: {"loss": next(always), "exact": 0.0})
    run = fit(make(), patience=2)
    assert (run.best_step, run.history[-1]["step"]) == (None, 6)


def test_without_evaluate_every_it_evaluates_after_each_epoch():
    run = fit(make(), patience=99, evaluate_every=0, steps=5)
    assert list(measured(run)) == [2, 4, 5]


def test_a_lost_best_model_is_said(tmp_path):
    class Losing(list):
        def __call__(self, row: dict) -> None:
            if row["step"] == 20:
                shutil.rmtree(tmp_path / "a" / "best", ignore_errors=True)

    with pytest.warns(
        UserWarning, match=r"the best model, of step \d+, is lost \(.*no saved model\); the last one stays"
    ):
        run = fit(
            make(),
            patience=99,
            steps=20,
            evaluate_every=3,
            folder=tmp_path / "a",
            best=f"{TASK} exact",
            trackers=[Losing()],
        )
    assert run.best_step is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"patience": 2, "evaluation": None, "evaluate_every": 0},
            r"patience=2 would do nothing beside no held-out data",
        ),
        ({"patience": -1}, r"patience=-1 must be a whole number, 0 or more"),
        (
            {"patience": 2, "tokens": 64, "batch": 64, "evaluate_every": 0},
            r"not known when an epoch ends; give evaluate_every",
        ),
        ({"patience": 2, "best": "loss"}, r"best='loss' is no measure of the held-out data"),
    ],
)
def test_what_cannot_be_waited_for_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        mm.fit(make(), {TASK: DATA}, **{"evaluation": {TASK: HELD_OUT}, **PLAIN, **settings})


def test_a_state_without_the_new_parts_is_resumed(tmp_path):
    settings = {"steps": 30, "folder": tmp_path / "a", "checkpoint_every": 9, "keep": 9}
    straight = fit(make(), **settings)
    for state in (tmp_path / "a" / "checkpoints").glob("step-*"):
        if int(state.name[5:]) > 9:
            shutil.rmtree(state)
            continue
        saved = json.loads((state / "state.json").read_text())
        saved = {k: v for k, v in saved.items() if k not in ("ended", "stopping")} | {"best": None}
        for name in ("epochs", "patience"):
            saved["recipe"].pop(name, None)
        (state / "state.json").write_text(json.dumps(saved))
        mm.train.state.write_manifest(state) if (state / "manifest.json").unlink() is None else None
    run = fit(make(), **settings, resume=True)
    assert run.last("loss") == straight.last("loss")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_end_together(tmp_path, program, parallel):
    settings = {
        "steps": 60,
        "batch": 8,
        "lr": 0.02,
        "evaluate_every": 2,
        "patience": 2,
        "ema": 0.5,
        "parallel": parallel,
    }
    out = tmp_path / "two"
    program("tests/programs/ranks.py", out, json.dumps(settings), ranks=2)
    record = Record.read(Path(out))
    assert record.finished
    assert record.ended
    values = {row["step"]: row[LOSS] for row in record.history if "loss" in row and LOSS in row}
    best, end = by_hand(values, 2)
    assert (record.history[-1]["best_step"], record.history[-1]["step"]) == (best, end)
    assert same(*(load_file(out / name / "weights.safetensors") for name in ("model", "best")))
