"""What an attack on kinds of numbers found: masked and huge numbers, texts, and deviations that are errors of rounding."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import multimodal as mm
from multimodal_tokenizers import (
    Boxes,
    Events,
    Features,
    Graph,
    ImagePatches,
    Points,
    Series,
    VideoTubes,
    Waveform,
    Words,
)

SERIES, POINTS, FEATURES, GRAPH = (
    Series((0.0, 0.0), (1.0, 1.0)),
    Points((0.0, 0.0), 1.0),
    Features(2, normalise="none"),
    Graph(2),
)
READERS: list[Any] = [SERIES, POINTS, FEATURES, GRAPH]
ROWS = np.array([[1.0, 2.0], [3.0, 4.0]])


def given(kind: mm.Tokenizer, rows: Any) -> Any:
    return {"nodes": rows, "edges": [(0, 1)]} if kind is GRAPH else rows


def test_a_masked_number_is_a_missing_one():
    """numpy itself forgets the mask, and reads what lies under it."""
    masked = np.ma.masked_array(ROWS, mask=[[False, True], [False, False]])
    assert torch.equal(SERIES(masked).content, SERIES([[1.0, None], [3.0, 4.0]]).content)
    for kind in READERS[1:]:
        with pytest.raises(mm.MediaError, match="not finite"):
            kind(given(kind, masked))
        assert torch.equal(kind(given(kind, np.ma.masked_array(ROWS))).content, kind(given(kind, ROWS)).content)
    picture = np.ma.masked_array(np.zeros((4, 4)), mask=np.eye(4, dtype=bool))
    for kind, value in (
        (ImagePatches(patch=4, channels=1), picture),
        (VideoTubes(patch=4, channels=1), np.ma.stack([picture, picture])),
        (Waveform(), (np.ma.masked_array(np.zeros(800), mask=np.arange(800) == 3), 16000)),
    ):
        with pytest.raises(mm.MediaError, match=r"has masked numbers; put numbers there first, as value.filled\(0\)"):
            kind(value)


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize(
    "same",
    [
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: torch.tensor(x).bfloat16(),
        lambda x: torch.tensor(x).half(),
        lambda x: torch.tensor(x).to(torch.float8_e4m3fn),
        lambda x: torch.tensor(x).to(torch.int8),
        lambda x: torch.tensor(x).to_sparse(),
        lambda x: torch.tensor(x).T.contiguous().T,
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(">f4"),
        lambda x: x.astype(np.longdouble),
        lambda x: np.broadcast_to(x[None], (1, 2, 2))[0],
    ],
)
def test_the_same_numbers_in_another_form(kind, same):
    value = same(ROWS)
    before = copy.deepcopy(np.asarray(value)) if isinstance(value, np.ndarray) else None
    tokens = kind(given(kind, value))
    assert torch.equal(tokens.content, kind(given(kind, ROWS)).content)
    tokens.content.fill_(7.0)  # shares no memory with the value
    assert before is None or np.array_equal(before, value)


@pytest.mark.parametrize(
    "texts",
    [[["1", None], ["2", "3"]], np.array([["1", "2"], ["3", None]], dtype=object), [["1", "2"]], [[True, None]]],
)
def test_texts_are_no_numbers_also_where_they_look_like_some(texts):
    for kind in (SERIES, GRAPH):
        with pytest.raises(mm.MediaError, match="wanted an array, tensor or list"):
            kind(given(kind, texts))


def test_missing_values_of_pandas_are_missing():
    frame = pd.DataFrame({"a": pd.array([1.5, None], dtype="Float64"), "b": [3.0, np.nan]})
    assert SERIES(frame).content[0].tolist() == [1.5, 3.0, 1, 1, 1]
    assert SERIES(frame).content[1].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", [FEATURES, GRAPH], ids=["Features", "Graph"])
def test_whole_numbers_that_float32_changes_are_refused(kind):
    for number in (2**24 + 1, 1_700_000_001, 2**40 + 1):
        for rows in (
            np.array([[number, 0], [1, 2]]),
            torch.tensor([[number, 0], [1, 2]]),
            np.array([[number, 0.5]] * 2),
        ):
            with pytest.raises(
                mm.MediaError, match=f"{number} would become .* in float32, which tokens hold; subtract"
            ):
                kind(given(kind, rows))
    for number in (2**24, 2**30, 1.5e8 + 0.25, 6.02e23, -3e30):  # exact, or measured
        kind(given(kind, np.array([[number, 0], [1, 2]])))


def test_a_deviation_that_is_an_error_of_rounding_is_none():
    """Otherwise the first other number is 1e16 deviations away."""
    series = Series.of([np.full((1000, 1), 0.1)])
    assert series.std == (1.0,)
    cloud = np.concatenate([np.random.default_rng(0).random((1000, 2)), np.full((1000, 1), 0.1)], 1)
    assert Points.of([cloud], dims=2).std == (1.0,)
    assert Series.of([1e9 + 1e-3 * np.arange(10.0)]).std == pytest.approx((2.87e-3,), rel=1e-2)


@pytest.mark.parametrize("far", [9.96921e36, 2.0**62, -1.7e308])
def test_a_number_that_makes_the_others_one_is_refused(far):
    """A fill value, say, that stands for a missing one."""
    values = np.arange(100.0)[:, None]
    values[7] = far
    with pytest.raises(
        mm.ConfigError, match=r"Series.of: channel 0: a few numbers are so far from the others, in all "
    ):
        Series.of([values])
    clouds = np.concatenate([values, np.arange(200.0).reshape(100, 2)], 1)
    with pytest.raises(mm.ConfigError, match=r"Points.of: coordinate x: a few numbers are so far"):
        Points.of([clouds])
    with pytest.raises(mm.ConfigError, match=r"Points.of: feature 0: a few numbers are so far"):
        Points.of([clouds[:, [1, 2, 0]]], dims=2)
    values[7] = 1e6  # an outlier of a usual kind
    assert len(Series.of([values])(values).content[:, 0].unique()) == 100


def test_settings_of_numpy_are_saved_and_equal_after():
    kinds: list[Any] = [
        Boxes(("a",), bins=np.int64(10)),  # type: ignore[arg-type]
        Series(np.zeros(2, np.float32), np.ones(2), np.int32(2), np.float32(0.5), np.bool_(True)),  # type: ignore[arg-type]
        VideoTubes(patch=np.int64(4), frames=np.int8(2), fps=np.float32(8), size=np.array([2, 4, 8])),  # type: ignore[arg-type]
        Points(np.zeros(2), np.float32(2.0), count=np.int64(5)),  # type: ignore[arg-type]
        Waveform(hop=np.int64(320), strides=np.array([5, 4, 4])),  # type: ignore[arg-type]
    ]
    for kind in kinds:
        loaded = type(kind).from_config(json.loads(json.dumps(kind.config())))
        assert loaded == kind == copy.deepcopy(kind) == pickle.loads(pickle.dumps(kind))
        assert hash(loaded) == hash(kind)
        (value, *_) = loaded.examples() if hasattr(loaded, "examples") else [(np.zeros(800), 16000)]
        assert torch.equal(loaded(value).content, kind(value).content)


def test_numbers_of_notes_are_numbers():
    notes = Events()
    for wrong in (("0", 60, 1), (0, True, 1), (0, 60, b"1")):
        with pytest.raises(mm.MediaError, match=r"note 0: .* is (str|bool|bytes) .*, wanted a number"):
            notes([wrong])
    with pytest.raises(mm.MediaError, match=r"note 0: duration is .*, wanted 0.0833333 to"):
        notes([(0, 60, 10**400)])
    value = [(0, 60, 1), (1, 62, 2)]
    for same in (torch.tensor(value), torch.tensor(value).half(), [torch.tensor(note) for note in value]):
        assert torch.equal(notes(same).content, notes(value).content)


def test_classes_of_boxes_are_named_as_they_were_declared():
    boxes = Boxes((1, 2), bins=10)  # type: ignore[arg-type]
    for label in (1, np.int64(1), "1"):
        assert boxes([{"box": (0, 0, 1, 1), "label": label}]).content[-1] == 10
    for wrong in (1.5, None, np.array([1, 2]), ["1"], 3):
        with pytest.raises(mm.MediaError, match=r"box 0 has label=.*, not one of 1, 2"):
            boxes([{"box": (0, 0, 1, 1), "label": wrong}])


def test_words_of_any_length_and_number_take_no_more_than_they_need(monkeypatch):
    monkeypatch.setattr(Words, "max_tokens", 1000)
    monkeypatch.setattr(np, "zeros", lambda shape, dtype=float: pytest.fail(f"made {shape}"))
    with pytest.raises(mm.MediaError, match="2000 words, more than max_tokens=1000"):
        Words()("a " * 2000)
    monkeypatch.undo()
    assert torch.equal(Words(longest=2**40)(["word"]).content, Words(longest=6)(["word"]).content)


def test_a_long_note_is_refused_before_it_is_many_tokens(monkeypatch):
    monkeypatch.setattr(Events, "_split", lambda self, steps: pytest.fail(f"split {steps}"))
    with pytest.raises(mm.MediaError, match=r"gives more than 65536 tokens"):
        Events(longest=1)([(0, pitch, 2**20) for pitch in range(20)])
