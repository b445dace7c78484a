"""A task's samples are asked whether what is read holds the answer: each planted leak is named, and honest samples pass."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import TASK_CHECKS, check_task, task_checks
from multimodal_tokenizers import ImagePatches, Labels, TextBytes
from tests.check.planted import Numbers, Wave

NAMES = ("cat", "dog")
KIND = Labels(NAMES)


def pairs(make, count=8):
    return [{"x": make(i, NAMES[i % 2]), "label": NAMES[i % 2]} for i in range(count)]


def noise(i, extra=()):
    return np.append(np.random.default_rng(i).standard_normal(5), extra).astype(np.float32)


@dataclass(frozen=True)
class Early(Wave):
    """Begins three steps before time 0, inside the field before."""

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA - torch.tensor([3.0, 0, 0]))


@dataclass(frozen=True)
class ReadsNames(ImagePatches):
    """Puts the length of the file's name into the first number."""

    def encode(self, value):
        tokens = super().encode(value)
        tokens.content[0, 0] += len(str(value)) / 100
        return tokens


@dataclass(frozen=True)
class Row(mm.Tokenizer):
    """A mapping of numbers, a token for each."""

    feature_size = 1

    def encode(self, value):
        if not isinstance(value, dict):
            raise mm.MediaError("Row.encode: wanted a mapping")
        return mm.Tokens(torch.tensor([[float(x)] for x in value.values()]), self.places(len(value)))


def same_object(i):
    value = [i, i + 1]
    return {"x": value, "answer": value}


LEAKS = [
    (
        "the target column is left in",
        Row(),
        lambda: pairs(lambda i, n: {"a": i, "y": NAMES.index(n)}),
        "as its entry 'y'",
    ),
    ("a column is the class", Wave(), lambda: pairs(lambda i, n: noise(i, [NAMES.index(n)])), "as number 5"),
    ("the text says it", TextBytes(), lambda: pairs(lambda i, n: f"{i} kg, label: {n}", 4), "behind ' kg, label: '"),
    ("the text begins with it", TextBytes(), lambda: pairs(lambda i, n: f"{n} weighs {i}"), "at its beginning"),
    ("the text is it", TextBytes(), lambda: pairs(lambda i, n: n), "is equal to the answer"),
]


@pytest.mark.parametrize(("kind", "samples", "where"), [pytest.param(*x[1:], id=x[0]) for x in LEAKS])
def test_an_answer_that_is_read_is_named_with_its_place(kind, samples, where):
    (failed,) = check_task("x -> label", {"x": kind, "label": KIND}, samples(), raises=False).failed
    assert failed.name == "answer_unread"
    assert where in failed.detail


def test_the_same_object_read_and_written_is_named():
    task, kinds = "x:numbers -> answer:numbers", {"numbers": Numbers()}
    (failed,) = check_task(task, kinds, [same_object(i) for i in range(3)], raises=False).failed
    assert (failed.name, "are the same object" in failed.detail) == ("answer_unread", True)
    apart = [{"x": [i, i + 1], "answer": [i, i + 1]} for i in range(3)]
    assert "is equal to the answer" in check_task(task, kinds, apart, raises=False).failed[0].detail
    assert not check_task(task, kinds, [{**s, "answer": [7, i]} for i, s in enumerate(apart)]).failed


def test_the_name_of_a_file_that_says_the_answer_is_named(tmp_path):
    text = pairs(lambda i, n: f"photos/{n}/{i}.png")
    (failed,) = check_task("x -> label", {"x": TextBytes(), "label": KIND}, text, raises=False).failed
    assert failed.name == "file_names_unread"
    assert "'photos/cat/0.png', the name of a file that says the answer 'cat'" in failed.detail
    from PIL import Image

    def photo(i, name):
        (tmp_path / name).mkdir(exist_ok=True)
        draw = np.random.default_rng(i)
        Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
        return str(tmp_path / name / f"{i}.png")

    kinds = {"x": ImagePatches(patch=4, channels=1), "label": KIND}
    assert not check_task("x -> label", kinds, pairs(photo)).failed
    (failed,) = check_task("x -> label", {**kinds, "x": ReadsNames(4, 1)}, pairs(photo), raises=False).failed
    assert failed.name == "file_names_unread"
    assert "has other tokens under another name" in failed.detail


def test_two_kinds_whose_places_collide_are_named():
    kinds = {"numbers": Numbers(), "wave": Early(), "label": KIND}
    samples = [{"numbers": [1, 2, i], "wave": noise(i), "label": NAMES[i % 2]} for i in range(4)]
    (failed,) = check_task("numbers wave -> label", kinds, samples, raises=False).failed
    assert failed.name == "fields_apart"
    assert "sample 0: numbers and wave both have a token at (" in failed.detail
    assert not check_task("numbers wave -> label", {**kinds, "wave": Wave()}, samples).failed


def test_one_answer_for_all_and_a_sample_that_cannot_be_read_are_named():
    kinds = {"x": Wave(), "label": KIND}
    same = [{"x": noise(i), "label": "cat"} for i in range(4)]
    assert (
        "all 4 samples have the answer str 'cat'"
        in check_task("x -> label", kinds, same, raises=False).failed[0].detail
    )
    report = check_task("x -> label", kinds, [*same, {"x": "no wave", "label": "dog"}], raises=False)
    assert [r.name for r in report.failed] == ["samples_encode"]
    assert re.search("sample 4.*field 'x'.*no array", report.failed[0].detail)
    with pytest.raises(mm.ConfigError, match="1 samples came"):
        check_task("x -> label", kinds, same[:1])


def test_honest_samples_pass_every_check():
    kinds = {"text": TextBytes(), "wave": Wave(), "label": KIND, "numbers": Numbers()}
    samples = [
        {"text": f"is this a {NAMES[(i // 2) % 2]}? {i}", "wave": noise(i), "label": NAMES[i % 2], "numbers": [i, 5]}
        for i in range(8)
    ]
    for task in ("text wave -> label", "wave <-> text", "text -> numbers"):
        assert [r.status for r in check_task(task, kinds, samples)] == ["ok"] * len(TASK_CHECKS)
    hidden = mm.Task("numbers -> numbers", mm.Masked(0.5))
    assert not check_task(hidden, kinds, samples).failed
    for check in task_checks("wave -> label", kinds, samples):
        check()
