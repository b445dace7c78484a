"""Augmentation of the tokens of time series, beside its formula."""

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal import augment as A
from multimodal_tokenizers import ImagePatches, Labels, Series

STEPS = np.arange(60)
ARRAY = np.stack([np.sin(STEPS / 5), 3 + 10 * np.cos(STEPS / 9)], 1)
KIND = Series.of([ARRAY], patch=7)


def changed(jitter: A.SeriesJitter, array: np.ndarray, seed: int = 0, kind: Series = KIND) -> np.ndarray:
    return kind.decode(jitter.change_tokens(kind(array), kind, np.random.default_rng(seed)))  # type: ignore[return-value]


def test_nothing_is_changed_at_strength_0():
    torch.testing.assert_close(changed(A.SeriesJitter(0, 0, 0), ARRAY), ARRAY, atol=1e-5, rtol=1e-5)


def test_noise_has_its_share_of_the_deviation_of_each_channel():
    added = np.stack([changed(A.SeriesJitter(0.2, 0, 0), ARRAY, seed) - ARRAY for seed in range(40)])
    np.testing.assert_allclose(added.std((0, 1)), 0.2 * ARRAY.std(0), rtol=0.05)
    assert abs(np.corrcoef(added.reshape(-1, 2).T)[0, 1]) < 0.05


def test_one_factor_scales_all_channels_about_their_means():
    factors = []
    for seed in range(60):
        found = changed(A.SeriesJitter(0, 0.3, 0), ARRAY, seed)
        mean, far = ARRAY.mean(0), ARRAY - ARRAY.mean(0)
        factor = ((found - mean)[:, 0] @ far[:, 0]) / (far[:, 0] @ far[:, 0])
        np.testing.assert_allclose(found, mean + factor * far, atol=1e-3)
        factors.append(np.log(factor))
    assert np.std(factors) == pytest.approx(0.3, rel=0.25)


def test_a_shift_moves_all_channels_and_holds_the_ends():
    found = {}
    for seed in range(60):
        array = changed(A.SeriesJitter(0, 0, 0.05), ARRAY, seed)
        # np.pad and a slice are the same shift
        shifts = [
            k
            for k in range(-3, 4)
            if np.allclose(np.pad(ARRAY, ((3, 3), (0, 0)), "edge")[3 + k : 63 + k], array, atol=1e-4)
        ]
        assert len(shifts) == 1
        found[shifts[0]] = True
    assert sorted(found) == [*range(-3, 4)]


def test_missing_values_stay_missing_and_times_stay():
    holes = ARRAY.copy()
    holes[5:9, 0] = np.nan
    found = changed(A.SeriesJitter(0.1, 0.1, 0), holes)
    assert (np.isnan(found) == np.isnan(holes)).all()
    assert np.isfinite(changed(A.SeriesJitter(), np.stack([ARRAY[:, 0], np.full(60, np.nan)], 1))[:, 0]).all()
    times = np.cumsum(np.full(60, 0.5))
    timed = Series.of([(ARRAY, times)], patch=7, timed=True)
    value, after = timed.decode(A.SeriesJitter().change_tokens(timed((ARRAY, times)), timed, np.random.default_rng(0)))
    np.testing.assert_allclose(after, times, rtol=1e-5)
    assert not np.allclose(value, ARRAY, atol=0.05)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_short_series_stay_as_long(steps: int):
    tokens = KIND(ARRAY[:steps])
    found = A.SeriesJitter(shift=1.0).change_tokens(tokens, KIND, np.random.default_rng(1))
    assert torch.equal(found.position_NA, tokens.position_NA)
    assert len(KIND.decode(found)) == steps


def test_it_is_declared_trained_with_and_refused_where_there_is_no_series():
    samples = [{"series": ARRAY[i : i + 20], "label": "ab"[i % 2]} for i in range(8)]
    model = mm.Model({"series": KIND, "label": Labels(("a", "b"))}, mm.Core.tiny(), ["series -> label"])
    varied = A.Augmented(samples, {"series": A.SeriesJitter()})
    assert mm.fit(model, {"series -> label": varied}, steps=2, batch=4, quiet=True).finished
    image, words = (
        ImagePatches(patch=2),
        r"SeriesJitter: the tokens of ImagePatches are no time series; it works on Series",
    )
    tokens = image(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(mm.ConfigError, match=words):
        A.SeriesJitter().change_tokens(tokens, image, np.random.default_rng(0))
    with pytest.raises(mm.ConfigError, match=r"SeriesJitter: noise=-1 must be a number from 0 to 1"):
        A.SeriesJitter(noise=-1)
