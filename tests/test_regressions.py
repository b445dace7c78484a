"""Faults that were found by trying to break things; each test names what went wrong."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.attention import Backend
from multimodal.masks import Prefix
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

TASK = "text -> label"


def make(**settings) -> mm.Model:
    tokenizers = {"text": TextBytes(), "label": Labels(("a", "b")), "image": ImagePatches(patch=2, channels=1)}
    core = mm.Core(width=32, depth=2, heads=2).replace(**settings)
    return mm.Model(tokenizers, core, [TASK, "image text -> text"])


def data(count: int = 12) -> list[dict]:
    return [{"text": "xyz"[i % 3] * (i % 4 + 1), "label": "ab"[i % 2]} for i in range(count)]


def test_two_threads_give_the_same_bits_twice():
    """The learned query's gradient was added up by indexing, in any order once it was large."""
    torch.set_num_threads(2)
    try:
        ends = []
        for _ in range(2):
            model = make(width=128)
            mm.fit(model, {TASK: data(256)}, steps=3, batch=256, quiet=True)
            ends.append(model.state_dict())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize(
    "rule",
    [
        mm.masks.Causal() | Prefix(),
        ~mm.masks.Window(3),
        mm.masks.SameSample() & (mm.masks.Causal() | ~mm.masks.SameSegment()),
        mm.masks.SameSample() & (mm.masks.Causal() | ~mm.masks.Window(3)),
    ],
    ids=["no SameSample", "far only", "other segments", "far future"],
)
def test_no_rule_gives_away_packing_or_the_order_of_writing(rule: mm.masks.Rule, backend: Backend):
    """Rules without SameSample mixed samples, and others showed written tokens what comes after them."""
    model = make(mask=rule).eval()
    task = "image text -> text"
    image = np.random.default_rng(0).random((4, 6), dtype=np.float32)
    first = {"image": image, "text": "why", "answer": "because"}

    def logits(answer: str, neighbour: str) -> torch.Tensor:
        other = {"image": image, "text": neighbour, "answer": "because"}
        stream = model.pack(task, [{**first, "answer": answer}, other])
        with torch.inference_mode():
            rows = model.logits(stream, backend=backend)[task].split(list(stream.readings[task].lengths))
        return rows[stream.readings[task].samples.index(0)]

    plain = logits("because", "who")
    assert torch.equal(plain[:-1], logits("becausX", "who")[:-1])  # all but the last row come before the change
    assert torch.equal(plain, logits("because", "how"))
    assert not torch.equal(plain[-1], logits("becausX", "who")[-1])


def test_a_second_run_leaves_the_first_where_it_can_be_found(tmp_path, capsys):
    """A new run in a used folder kept the old state, and a later resume took it for its own."""
    folder = tmp_path / "run"
    for label in "ab":
        samples = [{"text": "x", "label": label}] * 4
        mm.fit(make(), {TASK: samples}, steps=4, batch=4, lr=1e-2, folder=folder)
    assert "the run that was in" in capsys.readouterr().out
    assert str(mm.Model.load(tmp_path / "run.1").predict(TASK, text="x")) == "a"
    assert str(mm.Model.load(folder).predict(TASK, text="x")) == "b"  # a run's folder stands for its model


def test_resuming_with_another_model_is_refused_by_name(tmp_path):
    mm.fit(make(), {TASK: data()}, steps=2, batch=4, folder=tmp_path / "run", quiet=True)
    with pytest.raises(mm.CheckpointError, match=r"core\.config\.dropout was 0\.0 and is 0\.5"):
        mm.fit(make(dropout=0.5), {TASK: data()}, steps=2, batch=4, folder=tmp_path / "run", resume=True, quiet=True)


@dataclass(frozen=True)
class Wide(mm.Classify):
    """A head whose width is a setting."""

    extra: int = 0

    def vocab(self, tokenizer: mm.Tokenizer) -> int:
        return super().vocab(tokenizer) + self.extra


def test_heads_that_do_not_fit_each_other_do_not_share_weights():
    tokenizers = {"text": TextBytes(), "label": Labels(("a", "b")), "image": ImagePatches(patch=2, channels=1)}
    tasks = [mm.Task(TASK, Wide()), mm.Task("image -> label", Wide(extra=3))]
    with pytest.raises(mm.ConfigError, match="'image -> label' would share the weights of another head"):
        mm.Model(tokenizers, mm.Core.tiny(), tasks)


def test_errors_count_samples_from_the_start_of_the_data():
    """Within a batch of 64, sample 130 was called sample 2."""
    samples = [{"text": "x", "label": "a"} for _ in range(140)]
    samples[130] = {"text": 7, "label": "a"}
    for call in (lambda: make().predict(TASK, samples), lambda: mm.evaluate(make(), TASK, samples)):
        with pytest.raises(mm.MediaError, match="sample 130 of task 'text -> label', field 'text'"):
            call()
    with pytest.raises(mm.MediaError, match=r"sample 130 of the data \(step \d+\) of task"):
        mm.fit(make(), {TASK: samples}, steps=5, batch=64, quiet=True)


class Broken(list):
    def __getitem__(self, index):
        raise KeyError(f"file-{index}")


def test_a_data_set_that_fails_says_at_which_sample():
    with pytest.raises(mm.MediaError, match=r"sample \d+ of the data \(step 1\) of task .* KeyError: 'file-"):
        mm.fit(make(), {TASK: Broken(data())}, steps=1, batch=4, quiet=True)


def test_held_out_data_are_looked_at_before_training(tmp_path):
    for held_out, problem in (
        ([], "are empty"),
        ([{"text": "x"}], "no field 'label'"),
        (iter(data()), "are an iterator, which ends"),
    ):
        with pytest.raises(ValueError, match=problem):
            mm.fit(make(), {TASK: Broken(data())}, evaluation={TASK: held_out}, steps=1, batch=4, quiet=True)


def test_predict_leaves_frozen_parts_in_their_mode():
    model = make().train()
    model.embeds["text"].eval()
    model.predict(TASK, text="x")
    assert model.training
    assert not model.embeds["text"].training


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: mm.fit(make(), [data()]), "data is list; give data by task"),
        (lambda: mm.fit(make(), {TASK: {"text": ["a"], "label": ["a"]}}), "are dict; wanted a list"),
        (lambda: mm.fit(make(), {TASK: data()}, mix={"image -> label": 1}), "mix gives 1 to 'image -> label'"),
        (lambda: mm.Recipe(clip=-1), "clip=-1 must be 0 or more"),
        (lambda: mm.Recipe(lr=float("nan")), "lr=nan must be positive"),
        (lambda: mm.Recipe(workers=-1), "workers=-1 must be a whole number"),
        (lambda: mm.Classify(label_smoothing=3), "label_smoothing=3 is not in 0 to 1"),
        (lambda: make().predict(TASK, {"text": "x"}), "samples is one mapping"),
        (lambda: make().packer([(TASK, {"txt": "x", "label": "a"})]), "rename 'txt' to 'text'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_common_mistakes_are_answered_in_words(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()
