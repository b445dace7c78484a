"""`multimodal evaluate`: the figures of the library, a report that opens, a calibrated model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal as mm
from multimodal_tokenizers import ImagePatches, Labels

TASK = "image -> label"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model that tells dark from light, some of whose pictures are in the wrong folder."""
    folder = tmp_path_factory.mktemp("home")
    random, samples = np.random.default_rng(0), []
    for i in range(40):
        light, wrong = i % 2, i % 10 == 0
        pixels = np.clip(random.normal(60 + 140 * light, 30, (8, 8)), 0, 255).astype(np.uint8)
        name = ("dark", "light")[light != wrong]
        path = folder / "photos" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        samples.append({"image": pixels, "label": name})
    torch.manual_seed(0)
    kinds = {"image": ImagePatches(patch=4, channels=1), "label": Labels(("dark", "light"))}
    model = mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [TASK], seed=0)
    mm.fit(model, {TASK: samples}, steps=30, batch=20, lr=1e-2, device="cpu", quiet=True)
    model.save(folder / "model")
    return folder


def test_what_it_prints_is_what_the_library_says_and_the_report_opens(say, home):
    code, out, err = say("evaluate", "model", "photos", "--out", "report", "--resamples", "50")
    assert code == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:] if line.startswith("  "))
    model = mm.Model.load(home / "model")
    samples = [{"image": path, "label": path.parent.name} for path in sorted((home / "photos").rglob("*.png"))]
    found = mm.evaluate(model, TASK, samples)
    assert lines["exact"].startswith(f"{found['exact']:.1%} (")
    assert 0.5 < found["exact"] < 1
    stored = json.loads((home / "report" / "report.json").read_text())
    assert stored["figures"]["exact"]["value"] == found["exact"]
    assert (home / "report" / "report.html").stat().st_size > 5000
    with Image.open(home / "report" / "report.png") as picture:
        assert picture.size[0] > 500


def test_as_json_with_chosen_measures(say):
    code, out, err = say("evaluate", "model", "photos", "--json", "--measures", "calibration error", "--resamples", "0")
    assert code == 0, err
    (found,) = json.loads(out)
    assert set(found["figures"]) == {"loss", "exact", "calibration error"}
    assert found["figures"]["exact"]["interval"] is None


def test_a_calibrated_model_gives_the_same_answers_with_other_confidence(say, home):
    code, out, err = say("evaluate", "model", "photos", "--calibrate", "calibrated", "--resamples", "0")
    assert code == 0, err
    assert "temperature" in out
    assert "20 samples" in out  # the other half
    before, after = (mm.Model.load(home / name) for name in ("model", "calibrated"))
    paths = sorted((home / "photos").rglob("*.png"))
    answers = [model.predict(TASK, [{"image": path} for path in paths]) for model in (before, after)]
    assert [a.value for a in answers[0]] == [a.value for a in answers[1]]
    assert answers[0][0].confidence != pytest.approx(answers[1][0].confidence, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "photos", "--measures", "BLEU"], "'BLEU' is of other answers"),
        (["model", "photos", "--calibrate", "model"], "--calibrate model: a model is here already"),
        (["model", "nowhere"], "nowhere"),
        (["model", "photos", "--resamples", "-1"], "resamples=-1"),
    ],
)
def test_mistakes_are_named(refused, arguments, message):
    assert message in refused("evaluate", *arguments)
