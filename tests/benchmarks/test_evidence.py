"""benchmarks/evidence.py in a small form: its foreign pictures, its scores, and what its table says."""

import numpy as np
import pytest

from benchmarks import evidence
from multimodal import Classify, Core, Model, Task
from multimodal_tokenizers import ImagePatches, Labels

TOKENIZERS = {"image": ImagePatches(patch=2, channels=1, mean=0.3, std=0.37), "label": Labels(tuple("0123456789"))}


def test_foreign_pictures_are_as_digits_are_and_no_digits():
    _, test = evidence.digits_8x8(0)
    kinds = evidence.foreign(test, 0)
    assert len(kinds) >= 4
    digits = {row["image"].tobytes() for row in test}
    for pictures in kinds.values():
        assert len(pictures) > 100
        for picture in pictures:
            assert (picture.shape, picture.dtype) == ((8, 8), np.uint8)
            assert picture.tobytes() not in digits
            assert np.ptp(picture) > 0
    down = kinds["digits upside down (2 3 4 5 7)"][0]
    first = next(row["image"] for row in test if row["label"] in "23457")
    assert down[0, 2] == first[7, 5]
    shuffled = kinds["digits, pixels in another order"][0]
    assert sorted(shuffled.ravel()) == sorted(test[0]["image"].ravel())


def test_a_model_is_measured_and_noise_is_found():
    model = Model(TOKENIZERS, Core(width=16, depth=2, heads=2), [Task(evidence.TASK, head=Classify())]).eval()
    (right, alarms), found = evidence.measured(model, 0, count=40)
    assert 0 <= right <= 0.5
    assert 0 <= alarms <= 0.3
    assert found["noise"]["evidence"] > 0.9


def test_auroc_counts_pairs():
    usual, unusual = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    pairs = [(b > a) + 0.5 * (b == a) for a in usual for b in unusual]
    assert evidence.auroc(usual, unusual) == pytest.approx(np.mean(pairs))


def test_the_table_says_which_score_is_better():
    def kind(one: float, other: float) -> dict[str, float]:
        return {"evidence": one, "softmax confidence": other, "found": 0.5}

    text = evidence.table(
        {s: ((0.9, 0.04), {"noise": kind(0.9 + s / 100, 0.8), "others": kind(0.5, 0.7)}) for s in (0, 2)}
    )
    assert "Seeds 0 2, which read 90.0% of held-out digits right" in text
    assert "| noise | 91.0% (90.0% to 92.0%) | 80.0%" in text
    assert "higher AUROC for 1 of 2 kinds; mean over kinds 70.5%, softmax confidence 75.0%" in text
    assert "Softmax confidence is as good or better for: others." in text
