"""The model: answers keep the order of samples, a batch is its samples alone, and growing changes nothing that was there."""

import re

import pytest
import torch

import multimodal as mm
from multimodal.shapes import ConfigError, TaskError
from multimodal_tokenizers import TextBytes


@pytest.fixture
def model(tokenizers, core, lively) -> mm.Model:
    return lively(
        mm.Model(
            tokenizers,
            core,
            ["text -> label", "image text -> label", mm.Task("sound -> story", mm.CTC()), "text -> story"],
        )
    )


def test_answers_come_in_the_order_of_the_samples(model, values):
    samples = [values(i) for i in range(9)]
    stream = model.pack("image text -> label", samples, answers=False)
    assert stream.readings["image text -> label"].samples != tuple(range(9))  # the packer did sort
    answers = model.predict("image text -> label", samples)
    for sample, answer in zip(samples, answers, strict=True):
        alone = model.predict("image text -> label", image=sample["image"], text=sample["text"])
        assert answer.value == alone.value
        assert answer.probability == pytest.approx(alone.probability, abs=1e-5)
    assert len({round(a.confidence, 4) for a in answers}) > 5  # they differ, so that the order shows


def test_prediction_needs_no_answer_and_changes_no_mode(model, values):
    model.train()
    answer = model.predict("text -> label", text="abc")
    assert set(answer.probability) == {"circle", "square", "star"}
    assert sum(answer.probability.values()) == pytest.approx(1.0, abs=1e-5)
    assert model.training
    model.eval()
    model.predict("text -> label", text="abc")
    assert not model.training


def test_generate_and_predict_are_the_same_question(model, values):
    samples = [values(i) for i in range(3)]
    assert [a.value for a in model.generate("text -> label", samples)] == [
        a.value for a in model.predict("text -> label", samples)
    ]
    assert model.predict("text -> story", text="ab").value == model.generate("text -> story", text="ab").value


@pytest.mark.parametrize("verb", ["predict", "generate"])
def test_an_unknown_task_or_a_missing_field_is_named(model, verb):
    with pytest.raises(TaskError, match=r"there is no task 'text -> lable'.*did you mean 'text -> label'"):
        getattr(model, verb)("text -> lable", text="a")
    with pytest.raises(
        TaskError, match=r"task 'text -> label': the sample has no field 'text'; it has 'txet'; rename 'txet' to 'text'"
    ):
        getattr(model, verb)("text -> label", txet="a")


def test_extending_by_a_taken_name_is_refused(model):
    with pytest.raises(ConfigError, match=r"there is already a tokenizer named 'text'; choose another name"):
        model.extended({"text": TextBytes()})
    with pytest.raises(TaskError, match="task 'text -> label' is given twice"):
        model.extended(tasks=["text -> label"])


def test_tasks_that_write_the_same_kind_share_a_head(model):
    assert model.readout("text -> label") is model.readout("image text -> label")
    assert model.readout("sound -> story") is not model.readout("text -> story")
    assert set(model.readouts) == {"label_Classify", "story_CTC", "story_NextToken"}


@pytest.mark.parametrize("name", ["my text", "2nd", "keys", "forward", "a.b", ""])
def test_a_bad_tokenizer_name_is_refused(core, name):
    with pytest.raises(ConfigError, match=re.escape(f"a tokenizer cannot be named {name!r}: ")):
        mm.Model({name: TextBytes()}, core, ["text -> text"])


def test_a_core_that_is_none_is_refused(tokenizers):
    with pytest.raises(ConfigError, match=r"core is str; give a Core, for instance Core\.small\(\)"):
        mm.Model(tokenizers, "small", ["text -> label"])  # type: ignore[arg-type]


def test_one_task_need_not_be_a_list(tokenizers, core):
    assert list(mm.Model(tokenizers, core, "text -> label").tasks) == ["text -> label"]
    assert list(mm.Model(tokenizers, core, mm.Task("text -> label", weight=2.0)).tasks) == ["text -> label"]


def test_the_report_sums_up(model):
    lines = dict(re.split(r"\s{2,}", line.strip()) for line in model.report().splitlines())
    counts = {name: int(count.replace(",", "")) for name, count in lines.items()}
    total = counts.pop("all")
    assert total == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["core"] == model.core.core.parameters
    assert counts["tokenizer text"] == 256 * 32
    assert counts["head label_Classify"] == 32 * 3 + 3 + 32


def test_the_backend_is_chosen_by_whoever_asks(model, values):
    stream = model.pack("image text -> label", [values(i) for i in range(5)])
    with torch.no_grad():
        dense, runs = (model.logits(stream, backend=b)["image text -> label"] for b in ("dense", "runs"))
    torch.testing.assert_close(dense, runs, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="attention backend 'fast' is unknown"):
        model.logits(stream, backend="fast")
