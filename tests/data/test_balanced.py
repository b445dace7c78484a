"""Balanced sampling and class weights: shares counted by hand, weights compared with scikit-learn's."""

from collections import Counter

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

import multimodal as mm
from multimodal.data import Balanced, class_weights
from multimodal.data.sources import index_at
from multimodal.shapes import ConfigError
from multimodal_tokenizers import Labels, TextBytes

SIZES = {"a": 90, "b": 10, "c": 25}
DATA = [{"label": name, "number": i} for name, size in SIZES.items() for i in range(size)]
DATA = [DATA[i] for i in np.random.default_rng(0).permutation(len(DATA))]


def epoch(source: Balanced, number: int) -> list:
    return [source[index_at(source, "key", number * len(source) + place)] for place in range(len(source))]


@pytest.mark.parametrize(("power", "shares"), [(1.0, (90, 90, 90)), (0.0, (90, 10, 25)), (0.5, (90, 30, 48))])
def test_shares_are_as_declared_and_every_sample_comes(power, shares):
    source = Balanced(DATA, "label", power=power)
    assert {name: source.shares[name] for name in SIZES} == dict(zip(SIZES, shares, strict=True))
    assert len(source) == sum(shares)
    for number in range(3):
        found = epoch(source, number)
        assert Counter(s["label"] for s in found) == source.shares
        times = Counter((s["label"], s["number"]) for s in found)
        assert len(times) == len(DATA)
        for (name, _), count in times.items():  # as evenly as it can be
            assert count in (shares["abc".index(name)] // SIZES[name], -(-shares["abc".index(name)] // SIZES[name]))


def test_epochs_differ_and_the_same_key_gives_the_same_order():
    source = Balanced(DATA, "label", power=0.5)
    assert epoch(source, 0) == epoch(Balanced(DATA, "label", power=0.5), 0)
    assert epoch(source, 0) != epoch(source, 1)
    # who of a class comes once more is drawn anew in each epoch
    more = [{s["number"] for s in epoch(source, n) if s["label"] == "c"} for n in range(2)]
    twice = [
        {n for n, count in Counter(s["number"] for s in epoch(source, k) if s["label"] == "c").items() if count > 1}
        for k in range(2)
    ]
    assert more[0] == more[1]
    assert twice[0] != twice[1]


def test_by_index_it_is_the_same_multiset():
    source = Balanced(DATA, "label", power=0.5)
    assert Counter(source[i]["label"] for i in range(len(source))) == source.shares
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"there is no sample {index}; there are {len(source)}"):
            source[index]


def test_given_classes_read_no_sample():
    class Unread(list):
        def __getitem__(self, index):
            raise AssertionError("a sample was read")

    source = Balanced(Unread(DATA), [s["label"] for s in DATA])
    assert source.shares == dict.fromkeys(source.shares, 90)


def test_training_on_it_has_equal_classes():
    samples = [{"text": "x" * (i % 5 + 1), "label": "no" if i % 8 else "yes"} for i in range(40)]
    model = mm.Model({"text": TextBytes(), "label": Labels(("no", "yes"))}, mm.Core.tiny(), ["text -> label"])
    seen: Counter = Counter()

    class Seen(Balanced):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            seen[sample["label"]] += 1
            return sample

    run = mm.fit(model, {"text -> label": Seen(samples, "label")}, epochs=2, batch=7, device="cpu", quiet=True)
    assert run.history[-1]["step"] == 20  # 2 x 70 samples
    assert abs(seen["no"] - seen["yes"]) < 10  # but for the few that `fit` looks at


@pytest.mark.parametrize("large", [False, True])
def test_a_source_too_large_for_a_stored_order(monkeypatch, large):
    import multimodal.data.balanced

    if large:
        monkeypatch.setattr(multimodal.data.balanced, "LARGEST_STORED", 50)
    source = Balanced(DATA, "label")
    order = source.shuffled("k")
    assert sorted(Counter(source[order(p)]["label"] for p in range(len(source))).values()) == [90, 90, 90]
    assert len({(source[order(p)]["label"], source[order(p)]["number"]) for p in range(len(source))}) == len(DATA)


@pytest.mark.parametrize(
    ("samples", "field", "settings", "message"),
    [
        ([], "label", {}, r"Balanced: the data of task 'samples' are empty"),
        (DATA, "lable", {}, r"sample 0 has no field 'lable'; it has label, number"),
        ([{"label": None}], "label", {}, r"the class of sample 0 is None"),
        ([{"label": float("nan")}], "label", {}, r"the class of sample 0 is nan"),
        ([{"label": ["a"]}], "label", {}, r"the class of sample 0 is \['a'\]"),
        ([{"label": np.zeros(2)}], "label", {}, r"the class of sample 0 is array"),
        (DATA, ["a"], {}, r"1 classes were given for 125 samples"),
        (DATA, "label", {"power": 2}, r"power=2 must be a number from 0 .* to 1"),
        (DATA, "label", {"power": float("nan")}, r"power=nan must be"),
        (iter(DATA), "label", {}, r"iterator"),
    ],
)
def test_what_cannot_be_balanced_is_named(samples, field, settings, message):
    with pytest.raises(ConfigError, match=message):
        Balanced(samples, field, **settings)


def test_one_class_and_unicode_names():
    source = Balanced([{"label": "é\U0001f600"}] * 3, "label")
    assert (len(source), source.shares) == (3, {"é\U0001f600": 3})


def test_class_weights_are_those_of_scikit_learn():
    names = Labels(("c", "a", "b"))
    wanted = compute_class_weight("balanced", classes=np.array(["c", "a", "b"]), y=[s["label"] for s in DATA])
    assert class_weights(DATA, "label", names) == pytest.approx(wanted.tolist())
    assert class_weights(DATA, "label", names, power=0.5) == pytest.approx(np.sqrt(wanted).tolist())
    assert class_weights(DATA, "label", names, power=0) == (1, 1, 1)
    assert class_weights([{"label": "a"}], "label", Labels(("a", "b"))) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (TextBytes(), r"the values of TextBytes are not single classes"),
        (Labels(("a", "b")), r"class_weights: .*'c'"),
        (Labels(("a", "b", "c"), several=True), r"the values of Labels are not single classes"),
    ],
)
def test_weights_of_what_are_no_classes(tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        class_weights(DATA, "label", tokenizer)
