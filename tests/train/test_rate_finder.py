"""The learning-rate finder: what it suggests trains well, and it leaves everything as it was."""

import math
import random
import re

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.shapes import ConfigError
from multimodal.train.rate_finder import suggested
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

WORDS, PICTURES = "text -> label", "image -> label"
SETTINGS = {"precision": "float32", "device": "cpu", "batch": 16}
DRAWN = random.Random(0)
TEXTS = [{"text": "".join(DRAWN.choices("abcdef", k=6))} for _ in range(64)]
TEXTS = [{**sample, "label": "yes" if "a" in sample["text"] else "no"} for sample in TEXTS]
IMAGES = [
    {
        "image": np.full((8, 8, 3), i % 4 / 4 + DRAWN.random() / 6).astype(np.float32),
        "label": "no" if i % 4 < 2 else "yes",
    }
    for i in range(64)
]


def make(task: str = WORDS) -> mm.Model:
    kinds = {"text": TextBytes(), "image": ImagePatches(patch=4), "label": Labels(("no", "yes"))}
    core = mm.Core(width=16, depth=2, heads=2, dropout=0.1)
    return mm.Model(kinds, core, [task])


def test_model_and_generators_are_as_before():
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    training, flags = model.training, [p.requires_grad for p in model.parameters()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = mm.train.find_lr(model, {WORDS: TEXTS}, mm.Recipe(**SETTINGS, freeze=("text",)), steps=20)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert (model.training, [p.requires_grad for p in model.parameters()]) == (training, flags)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(generators[0], torch.get_rng_state())
    assert (generators[1], generators[2]) == (random.getstate(), np.random.get_state()[1].tolist())
    again = mm.train.find_lr(model, {WORDS: TEXTS}, mm.Recipe(**SETTINGS, freeze=("text",)), steps=20)
    assert again == found


def test_rates_rise_by_one_factor():
    found = mm.train.find_lr(make(), {WORDS: TEXTS}, mm.Recipe(**SETTINGS), first=1e-5, last=1e-2, steps=30)
    assert found.rates == pytest.approx(np.geomspace(1e-5, 1e-2, 30))
    # the loss of the first step is that of the untrained model, whatever the rate is
    first = mm.fit(make(), {WORDS: TEXTS}, mm.Recipe(**SETTINGS, steps=1), quiet=True).last("loss")
    assert found.losses[0] == pytest.approx(first)


def test_the_suggestion_is_the_steepest_place_of_a_known_curve():
    rates = np.geomspace(1e-6, 1, 121)
    log = np.log10(rates)
    falling = 2 - 1.5 / (1 + np.exp(-4 * (log + 3)))  # a logistic curve, steepest at 1e-3
    losses = np.where(log < -1.2, falling, falling + 20 * (log + 1.2))
    assert suggested(rates.tolist(), losses.tolist()) == pytest.approx(1e-3, rel=0.3)
    assert suggested(rates.tolist(), [2.0] * 121) is None
    assert suggested(rates.tolist(), np.linspace(1, 9, 121).tolist()) is None
    assert suggested([1e-6], [1.0]) is None


@pytest.mark.slow
@pytest.mark.parametrize(("task", "data"), [(WORDS, TEXTS), (PICTURES, IMAGES)])
def test_the_suggestion_trains_well_on_two_tasks(task, data):
    found = mm.train.find_lr(make(task), {task: data}, mm.Recipe(**SETTINGS), steps=80)
    assert found.suggestion is not None

    def loss(lr: float) -> float:
        model = make(task)
        mm.fit(model, {task: data}, mm.Recipe(**SETTINGS, steps=60), lr=lr, quiet=True)
        return mm.evaluate(model, task, data, measures=())["loss"]

    suggestion = loss(found.suggestion)
    untrained = mm.evaluate(make(task), task, data, measures=())["loss"]
    assert suggestion < 0.6 * untrained
    assert suggestion < loss(found.suggestion / 30)
    assert suggestion < loss(found.suggestion * 100)


def test_it_ends_when_the_loss_has_grown_or_is_not_finite(monkeypatch):
    model = make()
    found = mm.train.find_lr(model, {WORDS: TEXTS}, mm.Recipe(**SETTINGS, clip=0.0), last=1e4, steps=60)
    assert len(found.rates) < 60
    assert all(map(math.isfinite, found.losses))


def test_settings_of_a_whole_run_do_not_matter():
    plain = mm.Recipe(**SETTINGS)
    whole = mm.Recipe(
        **SETTINGS, epochs=9, patience=3, ema=0.9, schedule="wsd", cooldown=0.5, lr=0.3, evaluate_every=2, best="x"
    )
    found = [mm.train.find_lr(make(), {WORDS: TEXTS}, recipe, steps=20) for recipe in (plain, whole)]
    assert found[0] == found[1]


def test_its_picture(tmp_path):
    found = mm.train.find_lr(make(), {WORDS: TEXTS}, mm.Recipe(**SETTINGS), steps=30)
    found.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert found._repr_html_().count("data:image/png;base64,") == 1
    assert re.match(
        r"FoundRate\((lr=\d\.\de-\d\d|the loss fell at no rate), of 30 rates from 1\.0e-06 to 1\.0e\+00\)", repr(found)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 19}, r"find_lr: steps=19 must be a whole number, 20 or more"),
        ({"first": 0.0}, r"first=0\.0 and last=1\.0 must be rates above 0 that rise"),
        ({"first": 1.0, "last": 0.1}, r"must be rates above 0 that rise"),
        ({"last": float("nan")}, r"must be rates above 0 that rise"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        mm.train.find_lr(make(), {WORDS: TEXTS}, **settings)
