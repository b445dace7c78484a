"""MissingCells: the share of cells that are missing, the same again with the same seed, and what it refuses."""

import numpy as np
import pytest

from multimodal.data import MissingCells
from multimodal.shapes import ConfigError, MediaError

SAMPLES = [{"row": {f"c{j}": float(i + j) for j in range(10)}, "label": "a"} for i in range(50)]


def test_other_cells_are_missing_each_time_and_the_rest_is_as_it_was():
    cells = MissingCells(SAMPLES, share=0.4)
    np.random.seed(0)  # the generator that fit seeds
    first = [cells[i] for i in range(50)]
    second = [cells[i] for i in range(50)]
    np.random.seed(0)
    assert [cells[i] for i in range(50)] == first != second
    gone = [value is None for sample in first for value in sample["row"].values()]
    assert 0.33 < np.mean(gone) < 0.47
    for sample, whole in zip(first, SAMPLES, strict=True):
        assert sample["label"] == "a"
        assert all(value in (None, whole["row"][name]) for name, value in sample["row"].items())
    assert len(cells) == 50


def test_what_is_no_row_is_refused():
    with pytest.raises(MediaError, match=r"the field 'row' of sample 0 is NoneType, wanted a mapping"):
        MissingCells([{"row": None}])[0]
    with pytest.raises(ConfigError, match=r"share=1 must be from 0 to below 1"):
        MissingCells(SAMPLES, share=1)
