"""Sources that augment: exact replay, what a run saves of them, mixtures, and bad input."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import multimodal as mm
from multimodal import augment as A
from multimodal.data import Blanked, Mixed, Wrapped
from multimodal.tokenizer import AfterEncoding
from multimodal_tokenizers import ImagePatches, Labels, TextBytes
from tests.augment.draws import Largest

TASK = "image -> label"
SAMPLES = [
    {"image": torch.full((1, 8, 8), i / 10), "label": "dark" if i < 5 else "light", "text": f"number {i}"}
    for i in range(10)
]
CHANGES = (A.RandomScale(0.5, 2.0, smallest=4), A.RandAugment(), A.PictureNoise(), A.TokenDropout(0.3))
PLAIN = {"batch": 4, "lr": 1e-2, "device": "cpu", "precision": "float32", "quiet": True}


def make() -> mm.Model:
    kinds = {"image": ImagePatches(patch=4, channels=1), "label": Labels(("dark", "light")), "text": TextBytes()}
    return mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), [TASK, "text -> label"])


def varied(changes=CHANGES) -> A.Augmented:
    return A.Augmented(SAMPLES, {"image": changes})


def trained(steps: int = 6, **settings) -> dict[str, Tensor]:
    model = make()
    mm.fit(model, {TASK: varied()}, **{**PLAIN, "steps": steps, **settings})
    return model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{}, {"batch": 64, "tokens": 40, "look_ahead": 8}])
def test_workers_and_a_stop_change_nothing(tmp_path: Path, budget: dict):
    whole = trained(**budget)
    assert not same(whole, trained(**budget, seed=1))
    assert same(whole, trained(**budget, workers=2))
    stop = {"folder": tmp_path, "trackers": [lambda row: row["step"] == 3 and signal.raise_signal(signal.SIGTERM)]}
    run = mm.fit(make(), {TASK: varied()}, **{**PLAIN, "steps": 6, **budget, **stop})
    assert not run.finished
    assert same(whole, trained(**budget, folder=tmp_path, resume=True))


def test_a_visit_decides_what_is_seen_and_the_next_epoch_differs():
    np.random.seed(4)
    first = [varied((A.PictureNoise(),))[i]["image"] for i in range(3)]
    np.random.seed(4)
    assert all(torch.equal(varied((A.PictureNoise(),))[i]["image"], image) for i, image in enumerate(first))
    assert not torch.equal(varied((A.PictureNoise(),))[0]["image"], first[0])
    assert torch.equal(SAMPLES[0]["image"], torch.zeros(1, 8, 8))  # the samples themselves stay


def test_a_run_saves_the_changes_and_does_not_resume_with_others(tmp_path: Path):
    mm.fit(make(), {TASK: varied()}, **PLAIN, steps=2, folder=tmp_path, checkpoint_every=1)
    saved = json.loads((tmp_path / "config.json").read_text())["sources"]
    assert [part["type"].split(":")[1] for part in saved[TASK]["Augmented"]["fields"]["image"]] == [
        "RandomScale",
        "RandAugment",
        "PictureNoise",
        "TokenDropout",
    ]
    assert saved[TASK]["Augmented"]["fields"]["image"][0]["config"] == {"least": 0.5, "largest": 2.0, "smallest": 4}
    mm.fit(make(), {TASK: varied()}, **PLAIN, steps=2, folder=tmp_path, resume=True)  # the same ones
    for other in (varied(A.HorizontalFlip()), SAMPLES, Blanked(varied(), ("image",), 0.1)):
        with pytest.raises(mm.CheckpointError, match=r"other settings: sources\.image -> label"):
            mm.fit(make(), {TASK: other}, **PLAIN, steps=2, folder=tmp_path, resume=True)


def test_a_state_that_says_nothing_of_sources_resumes(tmp_path: Path):
    from multimodal.train.state import MANIFEST, STATE, write_manifest

    mm.fit(make(), {TASK: SAMPLES}, **PLAIN, steps=4, folder=tmp_path, checkpoint_every=2)
    for state in (tmp_path / "checkpoints").glob("step-*"):
        saved = json.loads((state / STATE).read_text())
        assert saved.pop("sources") == {}
        (state / STATE).write_text(json.dumps(saved))
        (state / MANIFEST).unlink()
        write_manifest(state)
    assert mm.fit(make(), {TASK: varied()}, **PLAIN, steps=4, folder=tmp_path, resume=True).finished


def test_sources_within_sources_declare_all_of_it():
    inner = {
        "Augmented": {"fields": {"image": [{"type": "multimodal.augment.pictures:Blur", "config": {"largest": 1.0}}]}}
    }
    assert varied(A.Blur()).declared == inner
    blanked = Blanked(varied(A.Blur()), ("text",), 0.2)
    assert blanked.declared == {"Blanked": {"fields": ["text"], "share": 0.2}, "samples": inner}
    assert Mixed(SAMPLES, varied(A.Blur())).declared == [None, inner]
    assert Mixed(SAMPLES, SAMPLES).declared is None
    mixed = A.Mixup(varied(A.Blur()), alpha=0.3)
    assert mixed.declared == {
        "Mixup": {"image": "image", "label": "label", "alpha": 0.3, "share": 1.0},
        "samples": inner,
    }


def test_a_source_of_ones_own_may_declare_itself_in_json():
    class Own(Wrapped):
        samples = SAMPLES
        declared = frozenset(("rain", "sun"))

        def __getitem__(self, index: int):
            return SAMPLES[index]

    with pytest.raises(mm.ConfigError, match="'image -> label' have an attribute `declared` that is no JSON value"):
        mm.fit(make(), {TASK: Own()}, **PLAIN, steps=1)


def test_the_order_of_the_samples_is_passed_on():
    mixed = Mixed(SAMPLES, SAMPLES[:2])
    for source in (A.Augmented(mixed, {"image": A.Blur()}), Blanked(mixed, ("text",)), A.CutMix(mixed)):
        assert [source.shuffled("key")(i) for i in range(12)] == [mixed.shuffled("key")(i) for i in range(12)]
        assert len(source) == 12
    assert not hasattr(varied(), "shuffled")


def test_lists_and_missing_values():
    images = [torch.rand(1, 8, 8) for _ in range(3)]
    source = A.Augmented(
        [{"image": images, "text": None}], {"image": (A.HorizontalFlip(1.0),), "text": A.WordDropout()}
    )
    assert all(torch.equal(a, b.flip(2)) for a, b in zip(source[0]["image"], images, strict=True))
    assert source[0]["text"] is None
    assert A.Augmented([{"image": []}], {"image": A.Blur()})[0]["image"] == []
    assert A.Augmented([{"image": None}], {"image": A.TokenDropout()})[0]["image"] is None
    sound = [torch.rand(80), 8000]
    assert torch.equal(A.Augmented([{"audio": sound}], {"audio": A.Gain(0, 0)})[0]["audio"][0], sound[0])
    both = A.Augmented([{"text": "a b"}], {"text": (A.WordDropout(0.0), A.TokenDropout())})[0]["text"]
    assert isinstance(both, AfterEncoding)
    assert both.value == "a b"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: A.Augmented(SAMPLES, {}), "names no field; give changes by field"),
        (lambda: A.Augmented(SAMPLES, (A.Blur(),)), "names no field"),  # type: ignore[arg-type]
        (lambda: A.Augmented(SAMPLES, {"image": ()}), "field 'image' has no changes; leave it out"),
        (lambda: A.Augmented(SAMPLES, {"image": "flip"}), r"fields\['image'\]='flip' is no Augmentation"),  # type: ignore[dict-item]
        (lambda: A.Augmented(SAMPLES, {"image": (A.Blur,)}), "call it"),  # type: ignore[dict-item]
        (lambda: A.Augmented(SAMPLES, {"image": (A.Blur(), A.Noise())}), "has changes of a picture and of a sound"),
        (lambda: A.Augmented(SAMPLES, {"image": (A.TokenDropout(), A.Blur())}), "TokenDropout changes tokens, so it comes behind"),
        (lambda: A.Augmented([], {"image": A.Blur()}), "are empty"),
        (lambda: A.Augmented((s for s in SAMPLES), {"image": A.Blur()}), "iterator"),
        (lambda: A.Augmented(None, {"image": A.Blur()}), "NoneType"),
        (lambda: A.Augmented(SAMPLES, {"imag": A.Blur()})[0], "has no field 'imag'; it has image, label, text; did you mean"),
        (lambda: A.Augmented([(1, 2)], {"image": A.Blur()})[0], "a sample is tuple, wanted a mapping of fields"),
        (lambda: A.Mixup(varied(), share=1.0)[0], "Mixup: the samples within have changes of tokens"),
        (lambda: A.Augmented(varied(), {"image": A.Blur()})[0], "put the Augmented that makes them around this Augmented"),
        (lambda: A.Mixup(SAMPLES, alpha=0.0), "Mixup: alpha=0.0 must be"),
        (lambda: A.CutMix(SAMPLES, share=2), "CutMix: share=2 must be"),
        (lambda: A.Mixup(SAMPLES, label="lable")[0], "Mixup: a sample has no field 'lable'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(make, words: str):
    with pytest.raises(mm.ConfigError, match=words):
        make()


def test_values_that_cannot_be_changed_name_the_field_and_count_as_broken():
    with pytest.raises(mm.MediaError, match=r"Augmented: field 'text': .*wanted a file or a pair"):
        A.Augmented([{"text": 7}], {"text": A.Noise()})[0]
    with pytest.raises(mm.MediaError, match="Mixup: field 'text':"):
        A.Mixup(SAMPLES, image="text")[0]
    small = [*SAMPLES, {"image": torch.rand(1, 2, 2), "label": "dark"}]
    source = A.Augmented(small, {"image": A.RandomCrop(4, 4)})
    run = mm.fit(make(), {TASK: source}, **PLAIN, steps=8, max_bad=1)
    assert [bad.sample for bad in run.bad] == ["sample 10"]
    assert "the picture is 2x2 pixels, smaller than the part of 4x4" in run.bad[0].error
    with pytest.raises(mm.MediaError, match="smaller than the part"):
        mm.fit(make(), {TASK: source}, **PLAIN, steps=8)
    with pytest.raises(mm.ConfigError, match="has no field 'photo'"):  # no broken sample: the setup is wrong
        mm.fit(make(), {TASK: A.Augmented(SAMPLES, {"photo": A.Blur()})}, **PLAIN, steps=1, max_bad=5)


@pytest.mark.parametrize("source", [A.Mixup, A.CutMix])
def test_drawn_labels_have_the_gradient_of_mixed_targets(source, monkeypatch: pytest.MonkeyPatch):
    """By enumeration: over all values of the number that decides, the mean gradient is that of the weighted target."""
    two = [{"image": torch.ones(1, 10, 10), "label": "light"}, {"image": torch.zeros(1, 10, 10), "label": "dark"}]
    made = []
    for i in range(200):
        draw = Largest((i + 0.5) / 200)  # its beta is 0.7, and its partner the last sample
        monkeypatch.setattr("multimodal.augment.sources.generator", lambda draw=draw: draw)
        made.append(source(two, share=1.0)[0])
    share = float(made[0]["image"].mean())  # ones and zeros: the mean is the share of the first picture
    assert abs(share - 0.7) < 0.06
    assert all(torch.equal(one["image"], made[0]["image"]) for one in made)
    weights = torch.randn(100, 2, dtype=torch.float64, requires_grad=True)
    logits = (made[0]["image"].double().reshape(1, 100) @ weights).expand(200, 2)
    ids = torch.tensor([1 if one["label"] == "light" else 0 for one in made])
    (drawn,) = torch.autograd.grad(F.cross_entropy(logits, ids), weights)
    target = torch.tensor([[1 - share, share]], dtype=torch.float64)
    (soft,) = torch.autograd.grad(F.cross_entropy(made[0]["image"].double().reshape(1, 100) @ weights, target), weights)
    assert torch.allclose(drawn, soft, atol=0.006)
    assert float(soft.abs().max()) > 0.05


def test_mixtures_are_those_of_the_papers():
    two = [{"image": torch.rand(1, 10, 10), "label": "a"}, {"image": torch.rand(3, 20, 5), "label": "b"}]
    np.random.seed(0)
    for _ in range(20):
        mixed = A.Mixup(two, alpha=1.0)[0]["image"]
        assert mixed.shape in ((1, 10, 10), (3, 10, 10))  # with itself, or with the other one at its own size
        cut = A.CutMix(two, share=1.0)[0]["image"]
        equal_YX = (cut == two[0]["image"]).all(0)
        rows, columns = (~equal_YX).any(1), (~equal_YX).any(0)
        assert int((~equal_YX).sum()) == int(rows.sum()) * int(columns.sum())  # one rectangle
    assert A.Mixup(two, share=0.0)[1] is two[1]
    lacking = [{"image": None, "label": "a"}, {"image": None, "label": "b"}]
    assert A.Mixup(lacking)[0] == lacking[0]
    alpha = [{"image": torch.rand(4, 6, 6), "label": "a"}, {"image": torch.rand(1, 6, 6), "label": "b"}]
    assert {A.Mixup(alpha)[1]["image"].shape[0] for _ in range(30)} == {1, 4}
