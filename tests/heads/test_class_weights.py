"""Class weights of `Classify`, against torch's cross_entropy(weight=..), through every path that computes a loss."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.heads import Classify
from multimodal.heads.pool import Mean
from multimodal.shapes import ConfigError
from multimodal.train.run_report import Record
from multimodal_tokenizers import Labels, TextBytes

TASK, WEIGHTS = "text -> label", (0.2, 3.0, 1.5)
NAMES = ("no", "yes", "maybe")
DATA = [{"text": "abcdefgh"[: i % 7 + 1], "label": NAMES[(0, 0, 0, 0, 1, 2)[i % 6]]} for i in range(24)]
PLAIN = {"batch": 12, "precision": "float32", "device": "cpu", "quiet": True, "lr": 1e-2, "steps": 4}


def make(weights: tuple = WEIGHTS, **settings) -> mm.Model:
    head = Classify(class_weights=weights, **settings)
    core = mm.Core(width=16, depth=1, heads=2)
    return mm.Model({"text": TextBytes(), "label": Labels(NAMES)}, core, [mm.Task(TASK, head)])


def of_torch(model: mm.Model, samples: list, smoothing: float = 0.0) -> torch.Tensor:
    stream = model.pack(TASK, samples)
    logits, target = model.logits(stream)[TASK], torch.tensor([NAMES.index(s["label"]) for s in samples])
    # the stream may have another order
    target = target[list(stream.readings[TASK].samples)]
    return F.cross_entropy(logits, target, torch.tensor(WEIGHTS), label_smoothing=smoothing)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"pool": Mean()}], ids=str)
def test_the_loss_is_that_of_torch(settings):
    model = make(**settings)
    wanted = of_torch(model, DATA, settings.get("label_smoothing", 0.0))
    assert model.loss(model.pack(TASK, DATA)).item() == pytest.approx(wanted.item(), rel=1e-5)
    plain = make((), **settings)
    assert plain.loss(plain.pack(TASK, DATA)).item() != pytest.approx(wanted.item(), rel=1e-3)


def test_its_gradients_are_those_of_torch():
    ours, theirs = make(), make()
    ours.loss(ours.pack(TASK, DATA)).backward()
    of_torch(theirs, DATA).backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_weights_below_one_in_all_are_divided_by_too():
    samples = [s for s in DATA if s["label"] == "no"][:2]  # 2 x 0.2
    model, plain = make(), make(())
    assert model.loss(model.pack(TASK, samples)).item() == pytest.approx(plain.loss(plain.pack(TASK, samples)).item())


def test_loss_and_rows_agree():
    model = make(label_smoothing=0.1)
    head, stream = model.packer.head(TASK), model.pack(TASK, DATA)
    logits, r = model.logits(stream)[TASK], stream.readings[TASK]
    whole = head.loss(logits, r.lengths, r.target, r.target_lengths)
    assert head.row_losses(logits, r.target).sum().item() == pytest.approx(whole.item(), rel=1e-5)
    assert model.losses(stream)[TASK].item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("change", [{"accumulate": 3}, {"batch": 64, "tokens": 4096, "look_ahead": 12}])
def test_micro_batches_and_packs(change):
    def losses(**settings) -> list[float]:
        return [row["loss"] for row in mm.fit(make(), {TASK: DATA[:12]}, **{**PLAIN, **settings}).history]

    found = losses(**change)
    if "tokens" in change:
        first = make()
        # a pack holds every sample equally often, so its first loss is that of the data
        assert found[0] == pytest.approx(of_torch(first, DATA[:12]).item(), rel=2e-2)
        assert found[0] != pytest.approx(make(()).loss(make(()).pack(TASK, DATA[:12])).item(), rel=1e-3)
    else:
        assert found == pytest.approx(losses(), rel=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, program):
    settings = {"steps": 4, "batch": 12, "accumulate": 2, "class_weights": [0.2, 3.0], "lr": 0.01}
    found = []
    for ranks in (1, 2):
        given = {**settings, "accumulate": 2 // ranks}
        program("tests/programs/ranks.py", tmp_path / str(ranks), json.dumps(given), ranks=ranks)
        found.append([row["loss"] for row in Record.read(tmp_path / str(ranks)).history])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_held_out_losses_are_weighed_and_answers_are_not_changed():
    model = make()
    found = mm.evaluate(model, TASK, DATA, batch=5)
    assert found["loss"] == pytest.approx(of_torch(model, DATA).item(), rel=1e-5)
    plain = make(())
    plain.load_state_dict(model.state_dict())
    assert [a.probability for a in model.predict(TASK, DATA)] == [a.probability for a in plain.predict(TASK, DATA)]


def test_it_is_saved_with_the_model(tmp_path):
    model = make()
    model.save(tmp_path / "m")
    again = mm.Model.load(tmp_path / "m")
    assert again.packer.head(TASK) == model.packer.head(TASK)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    text = json.dumps(config)
    assert "class_weights" in text
    for task in config["tasks"]:  # one of an earlier version
        task["head"]["config"].pop("class_weights")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert mm.Model.load(tmp_path / "m").packer.head(TASK) == replace(model.packer.head(TASK), class_weights=())


def test_a_small_class_is_learned_sooner():
    samples = [{"text": "a" * (i % 9 + 1), "label": "no"} for i in range(58)] + [{"text": "b", "label": "yes"}] * 2

    def after(weights: tuple) -> float:
        model = make(weights)
        mm.fit(model, {TASK: samples}, **{**PLAIN, "steps": 12})
        return model.predict(TASK, text="b").probability["yes"]

    assert after((0.5, 20.0, 1.0)) > after(()) + 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, 2.0), r"2 class_weights were given for 3 classes of Labels"),
        ((1.0, 0.0, 1.0), r"must be a tuple of numbers above 0"),
        ((1.0, float("nan"), 1.0), r"must be a tuple of numbers above 0"),
        ((1.0, float("inf"), 1.0), r"must be a tuple of numbers above 0"),
        ([1.0, 1.0, 1.0], r"must be a tuple of numbers above 0"),
        (("1", 1, 1), r"must be a tuple of numbers above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        make(weights)


def test_sets_of_classes_have_none():
    kinds = {"text": TextBytes(), "label": Labels(NAMES, several=True)}
    with pytest.raises(ConfigError, match="Labels writes a set of classes; leave them out"):
        mm.Model(kinds, mm.Core.tiny(), [mm.Task(TASK, Classify(class_weights=WEIGHTS))])
