"""Time series: conformance, what a token holds by hand, what is refused, and learning where missing values and times matter."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import ConformanceError, tokenizer_checks, verify
from multimodal.check.values import plausible_values
from multimodal.heads import FlowMatching
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Labels, Series

PLAIN = Series((0.0, 1.0), (1.0, 2.0), patch=3)
TIMED = Series((0.0,), (1.0,), patch=2, step_s=0.5, timed=True, causal=True)
STEPS = np.array([[0.0, 5.0], [1.0, np.nan], [np.nan, np.nan], [3.0, 1.0]])


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, series in enumerate((PLAIN, TIMED))
        for check in tokenizer_checks(series, series.examples())
    ],
)
def test_conformance(check):
    check()


@dataclass(frozen=True)
class KnowsTheEnd(Series):
    """Declares itself causal, and subtracts the mean of the value."""

    def encode(self, value: Any) -> mm.Tokens:
        return super().encode(value - np.nanmean(value, 0))


def test_channels_are_no_beginning_and_end_to_the_check_of_causal_kinds():
    for kind, fails in ((Series, False), (KnowsTheEnd, True)):
        series = kind((0.0, 1.0), (1.0, 2.0), patch=2, causal=True)
        (check,) = [check for check in tokenizer_checks(series, series.examples()) if str(check) == "causal_prefix"]
        if fails:
            with pytest.raises(ConformanceError, match="tokens know the whole value"):
                check()
        else:
            check()


@pytest.mark.parametrize("series", [PLAIN, TIMED])
def test_examples_are_values(series):
    assert len(plausible_values(series)) == 4


def test_a_token_is_its_steps():
    tokens = PLAIN(STEPS)
    # of each step two channels in deviations, whether each is there, and whether the step is
    first = [0, 2, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1]
    assert tokens.content.tolist() == [first, [3, 0, 1, 1, 1, *[0] * 10]]
    assert tokens.position_NA.tolist() == [[0, 0, 0], [3, 0, 0]]
    assert PLAIN.step == (3, 1, 1)


def test_places_are_the_times_of_first_steps():
    tokens = TIMED((np.array([1.0, 2.0, 3.0]), [0.25, 1.0, 4.0]))
    assert tokens.position_NA[:, 0].tolist() == [0.25, 4.0]
    assert tokens.content.tolist() == [[1, 1, 1, 0, 2, 1, 1, 1.5], [3, 1, 1, 0, 0, 0, 0, 0]]
    array, time = TIMED.decode(tokens)
    assert (array.tolist(), time.tolist()) == ([[1.0], [2.0], [3.0]], [0.25, 1.0, 4.0])


def test_decode_gives_the_gaps_back():
    for steps in (STEPS, STEPS[:3], STEPS[:1]):
        np.testing.assert_allclose(PLAIN.decode(PLAIN(steps)), steps, rtol=1e-6)


def test_channels_are_scaled_as_numpy_says():
    values = [np.random.default_rng(i).normal(3, 5, (7 + i, 2)) for i in range(3)]
    values[0][2, 1] = np.nan
    series = Series.of(values, patch=2)
    together = np.concatenate(values)
    assert series.mean == pytest.approx(np.nanmean(together, 0))
    assert series.std == pytest.approx(np.nanstd(together, 0))
    assert Series.of([np.ones((4, 1))]).std == (1.0,)  # a channel that never changes
    assert Series.of([(np.arange(4.0), [0.0, 2.0, 4.0, 9.0])], timed=True).step_s == 2.0


@pytest.mark.parametrize(
    "same",
    [torch.tensor, lambda x: x.astype(np.float32), lambda x: [[None if n != n else n for n in r] for r in x.tolist()]],
)
def test_the_same_numbers_in_another_form(same):
    assert torch.equal(PLAIN(same(STEPS)).content, PLAIN(STEPS).content)


def test_one_channel_may_be_an_array_of_steps():
    one = Series((0.0,), (1.0,))
    assert torch.equal(one(np.arange(3)).content, one(np.arange(3)[:, None]).content)


@pytest.mark.parametrize(
    ("series", "value", "message"),
    [
        (PLAIN, "series.csv", "wanted an array, tensor or list of numbers, not str"),
        (PLAIN, STEPS.T, r"wanted an array \(steps, 2\), not ndarray \(2, 4\) float64; turn it round"),
        (PLAIN, STEPS[:, 0], r"wanted an array \(steps, 2\), not ndarray \(4,\)"),
        (PLAIN, STEPS[:0], "has no steps; to leave a field out, give None"),
        (PLAIN, np.full((2, 2), np.inf), "has an infinite number; NaN is a missing one"),
        (PLAIN, [[1.0, 2.0], [3.0]], "wanted an array, tensor or list of numbers"),
        (TIMED, STEPS[:, :1], r"timed=True wants a pair \(array, times in seconds\), not ndarray"),
        (TIMED, (STEPS[:, :1], [0, 1]), r"4 steps have times \(2,\), wanted \(4,\)"),
        (TIMED, (STEPS[:, :1], [0, 1, 1, 2]), "times must rise from step to step, and begin at 0 s or later"),
        (TIMED, (STEPS[:, :1], [-1, 0, 1, 2]), "times must rise"),
        (TIMED, (STEPS[:, :1], [0, 1, np.nan, 2]), "times must rise"),
        (TIMED, (STEPS[:, :1], np.arange(4) + 1.7e9), r"ends after 1.7e\+09 s, .* count times from the beginning"),
    ],
)
def test_bad_values_are_refused_by_name(series, value, message):
    with pytest.raises(MediaError, match=f"^Series.encode: .*{message}"):
        series(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Series((0.0,), (1.0, 2.0)), "mean has 1 numbers and std 2"),
        (lambda: Series((), ()), "mean has 0 numbers"),
        (lambda: Series((0.0,), (0.0,)), r"std=\(0.0,\) more than 0"),
        (lambda: Series((0.0,), (1.0,), patch=0), "patch=0 must be a whole number, 1 or more"),
        (lambda: Series((0.0,), (1.0,), step_s=0.0), "step_s=0.0 must be more than 0 seconds"),
        (lambda: Series.of([]), "there are no series"),
        (lambda: Series.of([np.ones((3, 1)), np.ones((3, 2))]), r"series have \[1, 2\] channels"),
        (lambda: Series.of([np.full((3, 2), [1.0, np.nan])]), "channel 1 has no value in any series"),
        (lambda: TIMED.places(2), "with timed=True it can be read but not written"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=f"^Series.*{message}"):
        make()


def test_alone_packed_and_cached_are_the_same(lively):
    tasks = ["plain -> label", "timed -> label", mm.Task("label -> plain", FlowMatching(width=16, depth=1, steps=2))]
    tokenizers = {"plain": PLAIN, "timed": TIMED, "label": Labels(("yes", "no"))}
    result = verify(lively(mm.Model(tokenizers, mm.Core(width=32, depth=2, heads=2), tasks)))
    assert result.passed, str(result)
    assert {row.check for row in result.rows} >= {"packed", "gradient", "cached"}


def waves(count: int, seed: int) -> list[dict[str, Any]]:
    """Slow or fast sines at irregular times, a quarter of their steps missing; the fast ones are measured as much more often."""
    random, samples = np.random.default_rng(seed), []
    for i in range(count):
        speed = (1.0, 3.0)[i % 2]
        time = np.cumsum(random.uniform(0.2, 1.8, 32)) * 0.2 / speed
        wave = np.sin(2 * np.pi * speed * time / 2 + random.uniform(0, 2 * np.pi))
        wave[random.random(32) < 0.25] = np.nan
        samples.append({"timed": (wave, time), "plain": wave, "label": ("slow", "fast")[i % 2]})
    return samples


def test_only_the_times_tell_slow_waves_from_fast_ones():
    """The values alone, step by step, are of the same distribution: without times the same model is at chance."""
    train, test = waves(192, 0), waves(128, 1)
    right = {}
    for kind, timed in (("timed", True), ("plain", False)):
        series = Series.of([sample[kind] for sample in train], patch=4, step_s=0.1 if timed else 1.0, timed=timed)
        task = f"{kind} -> label"
        model = mm.Model({kind: series, "label": Labels(("slow", "fast"))}, mm.Core(width=32, depth=1, heads=2), [task])
        mm.fit(model, {task: train}, steps=60, batch=32, lr=4e-3, device="cpu", precision="float32", quiet=True)
        right[kind] = mm.evaluate(model, task, test)["exact"]
    assert right["timed"] > 0.95
    assert right["plain"] < 0.65
