"""Boxes as tokens: conformance, numbers by hand, what is refused, and rectangles that are found."""

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.check.values import plausible_values
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Boxes, ImagePatches

BOXES = Boxes(("cat", "dog", "bird"), bins=50)
CAT = {"box": (0.1, 0.2, 0.5, 1.0), "label": "cat"}
DOG = {"box": (0.0, 0.0, 0.0, 0.019), "label": "dog"}


@pytest.mark.parametrize("check", tokenizer_checks(BOXES, BOXES.examples()), ids=str)
def test_conformance(check):
    check()


def test_examples_are_values():
    assert len(plausible_values(BOXES)) == 4


def test_a_box_is_its_four_numbers_and_its_class():
    tokens = BOXES([CAT, DOG])
    assert tokens.content.tolist() == [5, 10, 25, 49, 50, 0, 0, 0, 0, 51]
    assert tokens.position_NA[:, 0].tolist() == list(range(10))
    assert BOXES.token_names(tokens)[3:7] == ["bottom 0.99", "cat", "left 0.01", "top 0.01"]
    assert BOXES.decode(tokens)[0] == {"box": pytest.approx((0.11, 0.21, 0.51, 0.99)), "label": "cat"}


def test_numbers_come_back_within_half_a_bin():
    for value in BOXES.examples():
        for given, found in zip(value, BOXES.decode(BOXES(value)), strict=True):
            assert np.allclose(given["box"], found["box"], rtol=0, atol=0.5 / 50 + 1e-6)
            assert given["label"] == found["label"]


@pytest.mark.parametrize("same", [list, np.array, torch.tensor])
def test_boxes_in_another_form(same):
    assert torch.equal(BOXES([{**CAT, "box": same(CAT["box"])}]).content, BOXES([CAT]).content)


def test_no_boxes_are_an_answer_and_no_value():
    assert len(BOXES([], empty=True)) == 0
    with pytest.raises(MediaError, match="gave no tokens"):
        BOXES([])


def test_what_is_no_box_is_left_out():
    ids = torch.tensor(
        [50, 1, 2, 51, 30, 40, 10, 20, 52, 7, 7]
    )  # a class alone, two numbers alone, a box turned, the rest
    assert BOXES.decode(mm.Tokens(ids, BOXES.places(11))) == [
        {"box": pytest.approx((0.21, 0.41, 0.61, 0.81)), "label": "bird"}
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (CAT, "wanted a list of boxes, not dict"),
        ([CAT, "dog"], "box 1 is str 'dog', wanted"),
        ([{"box": (0, 0, 1, 1)}], "box 0 is dict"),
        ([{**CAT, "score": 1.0}], "box 0 is dict"),
        ([{**CAT, "box": (0, 0, 1)}], "box 0 has box=.*, wanted four numbers: left, top, right, bottom"),
        ([{**CAT, "box": (0, 0, 1, np.nan)}], "wanted four numbers"),
        ([{**CAT, "box": (0, 0, 14, 20)}], "box 0 has right=14, wanted 0 to 1; divide pixels by the width"),
        ([{**CAT, "box": (0.5, 0, 0.2, 1)}], "whose left is more than its right, or its top"),
        ([{**CAT, "label": "birds"}], "label=str 'birds', not one of cat, dog, bird; did you mean 'bird'?"),
        ([{**CAT, "label": 1}], "label=int 1, not one of"),
    ],
)
def test_bad_values_are_refused_by_name(value, message):
    with pytest.raises(MediaError, match=f"^Boxes.encode: .*{message}"):
        BOXES(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": "cat"}, "names='cat' is not a list of names"),
        ({"names": ()}, "no names were given"),
        ({"names": ("a", "a")}, "names occur twice: a"),
        ({"names": ("a",), "bins": 1}, "bins=1 must be a whole number, 2 or more"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=f"^Boxes: .*{message}"):
        Boxes(**settings)


def test_alone_packed_and_cached_are_the_same(lively):
    kinds = {"boxes": BOXES, "image": ImagePatches(patch=4, channels=1)}
    result = verify(lively(mm.Model(kinds, mm.Core(width=32, depth=2, heads=2), ["image -> boxes"])))
    assert result.passed, str(result)
    assert {row.check for row in result.rows} >= {"packed", "gradient", "cached"}
