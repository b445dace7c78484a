"""What an attack on rows of tables found: numbers far apart, columns of one name, what a model may write, settings of numpy."""

import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch

import multimodal as mm
from multimodal_tokenizers import TableRow
from multimodal_tokenizers.table import Column

FAR = [{"x": float(i % 50)} for i in range(1000)]


@pytest.mark.parametrize("outlier", [1e12, -(2.0**62), 9.96921e36, 1.7e308])
def test_a_number_far_away_does_not_make_the_others_one(outlier):
    """Compared with numbers in float64: a table of such rows comes back, and has different finite embeddings."""
    rows = [*FAR, {"x": outlier}]
    table = TableRow.of(rows)
    embed = table.embed(8)
    tokens = torch.cat([table(row).content for row in rows[:50]])
    back = [table.decode(table(row))["x"] for row in rows[:50]]
    assert back == pytest.approx([row["x"] for row in rows[:50]], abs=1e-3)
    with torch.no_grad():
        embedded = embed(tokens)
        assert embedded.isfinite().all()
        assert len(embedded.unique(dim=0)) == 50
        if abs(outlier) < 1e38:
            assert embed(table(rows[-1]).content).isfinite().all()
    assert len(table.columns[0].edges) > 5
    # without it nothing changes: mean and deviation of all
    usual = TableRow.of(FAR).columns[0]
    assert (usual.mean, usual.std) == pytest.approx((24.5, np.std(np.arange(50))))


def test_edges_of_a_saved_column_that_float32_cannot_tell_apart_are_a_step():
    embed = TableRow((Column("x", 0.0, 1e9, (1.0, 1.0 + 1e-9, 2.0, 1e12)),)).embed(8)
    content = torch.tensor([[x, 0.0, 0.0] for x in (1e-9, 0.0, 1.0, -1.0, 1e30, -1e30, 3e38)])
    with torch.no_grad():
        rows = embed(content)
    assert rows.isfinite().all()
    torch.testing.assert_close(rows[4], rows[6])  # squashed, and not as the mean is
    assert not torch.allclose(rows[4], rows[1])


def test_a_column_of_equal_numbers_has_no_deviation():
    assert TableRow.of([{"x": 0.1}] * 1000).columns == (Column("x", 0.1, 1.0),)


@pytest.mark.parametrize(
    "rows",
    [
        [{1: 5.0, "1": "a"}, {1: 6.0, "1": "b"}],
        pd.DataFrame([[1, 2], [3, 4]], columns=["1", "1"]),
        pd.DataFrame([[1, 2], [3, 4]], columns=[1, "1"]),
        pyarrow.table([[1, 2], [3, 4]], names=["1", "1"]),
    ],
    ids=["mappings", "equal", "as texts", "arrow"],
)
def test_no_column_is_lost_to_another_of_its_name(rows):
    with pytest.raises(mm.ConfigError, match=r"TableRow.of: there are two columns '1'; rename one"):
        TableRow.of(rows)


def test_no_value_is_lost_to_another_of_its_name():
    table = TableRow((Column("1"),))
    for row in ({1: 5.0, "1": 6.0}, pd.Series([5.0, 6.0], index=["1", "1"])):
        with pytest.raises(mm.MediaError, match="the column '1' is there twice"):
            table(row)
    with pytest.raises(mm.MediaError, match=r"wanted a mapping from column to value, not DataFrame \(1, 1\)"):
        table(pd.DataFrame({"1": [5.0]}))


def test_names_and_categories_are_read_as_values_are():
    columns = (Column(1), Column("c", categories=(1, 2.0, True, np.int64(7), "01")))  # type: ignore[arg-type]
    table = TableRow(columns)
    for value in (1, 2.0, 2, True, 7.0, "01"):
        assert table.decode(table({1: 0.5, "c": value})) == {"1": 0.5, "c": str(value).removesuffix(".0")}
    with pytest.raises(mm.ConfigError, match=r"float 1.5 cannot be the name of a category"):
        Column("c", categories=(1.5,))  # type: ignore[arg-type]
    with pytest.raises(mm.ConfigError, match="mean='0' must be a number"):
        Column("c", mean="0")  # type: ignore[arg-type]


def test_what_a_model_writes_is_a_row_whatever_it_is():
    table = TableRow((Column("c", categories=("a", "b")), Column("x", 1.0, 2.0)))
    for x in (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.4):
        for missing in (math.nan, 0.0, 1.0):
            tokens = mm.Tokens(torch.tensor([[x, missing, 0], [x, missing, 1]]), table.places(2))
            row = table.decode(tokens)
            assert row["c"] in ("a", None)
            assert row["x"] is None or math.isfinite(row["x"])
            assert len(table(row)) == 2  # it can be read


def test_settings_of_numpy_are_saved_and_equal_after():
    column = Column("x", np.float32(1.5), np.float32(2.0), np.array([0, 1], np.float32))  # type: ignore[arg-type]
    table = TableRow((column,), unseen=np.bool_(True))  # type: ignore[arg-type]
    loaded = TableRow.from_config(json.loads(json.dumps(table.config())))
    assert loaded == table
    assert hash(loaded) == hash(table)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf])
def test_a_number_that_no_float_holds_is_refused(value):
    with pytest.raises(mm.MediaError, match=r"column 'x' is .*, wanted a finite number"):
        TableRow((Column("x"),))({"x": value})
    with pytest.raises(mm.ConfigError, match="column 'x' has an infinite number"):
        TableRow.of([{"x": value}, {"x": 1}])


def test_other_numbers_are_numbers_and_other_values_are_named():
    table = TableRow((Column("x"),))
    for value in (Fraction(1, 2), np.float16(0.5), np.longdouble(0.5)):
        assert table.decode(table({"x": value})) == {"x": 0.5}
    assert table.decode(table({"x": np.ma.masked})) == {"x": None}
    times = pd.DataFrame({"t": pd.date_range("2020", periods=3)})
    with pytest.raises(mm.ConfigError, match="which is no number and no category; make numbers or texts of it"):
        TableRow.of(times)
