"""Rows of tables: conformance, the paper's formula, what is refused, and a real table beside logistic regression."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.check.values import plausible_values
from multimodal.heads import FlowMatching
from multimodal.shapes import ConfigError, MediaError
from multimodal_tokenizers import Labels, TableRow
from multimodal_tokenizers.table import Column

ROWS: list[dict[str, Any]] = [
    {"age": 31, "ship": "Titanic", "class": 1, "crew": False},
    {"age": None, "ship": "Olympic", "class": 2, "crew": False},
    {"age": 40.5, "ship": "Titanic", "class": None, "crew": True},
    {"age": 10, "ship": None, "class": 3, "crew": False},
    {"age": 2, "ship": "Olympic", "class": 3, "crew": False},
]
TABLE = TableRow.of(ROWS, categories=["class"], bins=3)
NUMBERS = TableRow((Column("x", 2.0, 0.5), Column("y", edges=(0.0, 1.0, 3.0))))


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{i}-{check}")
        for i, (tokenizer, values) in enumerate([(TABLE, ROWS), (NUMBERS, NUMBERS.examples())])
        for check in tokenizer_checks(tokenizer, values)
    ],
)
def test_conformance(check):
    check()


@pytest.mark.parametrize("table", [TABLE, NUMBERS, TableRow((Column("c", categories=("a", "b", "d")),))])
def test_examples_are_values(table):
    assert len(plausible_values(table)) >= 3


def test_columns_of_rows():
    age, ship, klass, crew = TABLE.columns
    ages = np.array([31, 40.5, 10, 2])
    assert (age.mean, age.std) == pytest.approx((ages.mean(), ages.std()))
    assert age.edges == pytest.approx(np.quantile(ages, [0, 1 / 3, 2 / 3, 1]))
    assert (ship.categories, klass.categories, crew.categories) == (
        ("Olympic", "Titanic"),
        ("1", "2", "3"),
        ("False", "True"),
    )
    assert TABLE.token_names(TABLE(ROWS[1])) == ["age", "ship", "class", "crew"]
    assert TABLE(ROWS[1]).content[:, :2].tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]
    assert TABLE(ROWS[0]).content[0, 0] == pytest.approx((31 - ages.mean()) / ages.std())


def test_a_frame_is_its_rows():
    frame = pd.DataFrame(ROWS).astype({"class": "category", "ship": "string"})
    assert frame["class"].dtype == "category"
    table = TableRow.of(frame, bins=3)
    assert table == TABLE
    assert TableRow.of(pyarrow.Table.from_pylist(ROWS), categories="class", bins=3) == TABLE
    for (_, series), row in zip(frame.iterrows(), ROWS, strict=True):  # these hold pandas' own missing values
        assert torch.equal(table(series).content, TABLE(row).content)


def test_what_is_missing():
    wanted = TABLE({"age": None, "ship": "Titanic"}).content
    assert wanted[:, 1].tolist() == [1, 0, 1, 1]
    for missing in (float("nan"), np.float32("nan"), pd.NA, pd.NaT):
        assert torch.equal(TABLE({"age": missing, "ship": "Titanic"}).content, wanted)
    assert TABLE.decode(TABLE({"ship": "Titanic"})) == {"age": None, "ship": "Titanic", "class": None, "crew": None}


def test_codes_with_gaps_are_the_codes_that_pandas_makes_floats_of():
    assert torch.equal(TABLE({"class": 2.0}).content, TABLE({"class": 2}).content)
    assert torch.equal(TABLE({"class": np.int64(2)}).content, TABLE({"class": "2"}).content)


def test_numbers_are_embedded_by_the_formula_of_the_paper():
    """Gorishniy et al. 2022, equation 1, within the bins, beside a straight line that is squashed far from the mean."""
    table = TableRow((Column("x", 1.0, 2.0, (-1.0, 0.0, 4.0, 5.0)), Column("z", categories=("a",)), Column("y")))
    embed: Any = table.embed(8)
    for x in (-1.0, -0.25, 0.0, 1.5, 4.0, 4.9, 5.0):
        bins = [max(0.0, min(1.0, (x - a) / (b - a))) for a, b in ((-1, 0), (0, 4), (4, 5))]
        scaled = (x - 1) / 2
        line = scaled / np.sqrt(1 + (scaled / 3) ** 2)
        slopes = embed.slope_ND.detach().reshape(3, 4, 8)[0]
        wanted = embed.column.weight[0] + torch.tensor([line, *bins]).float() @ slopes
        got = embed(table({"x": x, "z": "a", "y": 0.0}).content)[0]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    far = embed(torch.tensor([[1e6, 0.0, 0.0], [2e6, 0.0, 0.0]]))  # squashed: no outlier decides a row
    torch.testing.assert_close(far[0], far[1], atol=1e-3, rtol=0)


def test_categories_and_missing_values_are_rows_of_tables():
    embed: Any = TABLE.embed(8)
    rows = embed(TABLE({"age": None, "ship": "Titanic", "class": 3, "crew": None}).content)
    column, category = embed.column.weight, embed.category.weight
    wanted = [column[1], column[2] + category[1], column[4] + category[3 + 2], column[7]]  # two ships and an unseen one
    torch.testing.assert_close(rows, torch.stack(wanted))
    between = embed(torch.tensor([[0.25, 0.0, 1.0]]))[0]  # as a model may write it
    torch.testing.assert_close(between, column[2] + 0.75 * category[0] + 0.25 * category[1])


def test_half_precision_keeps_columns_and_categories_apart():
    """Weights in bfloat16, as quantization makes them: 300 columns are more than it counts exactly."""
    names = {f"c{i}": tuple(map(str, range(i % 7 + 1))) for i in range(300)}
    table = TableRow((*(Column(name, categories=c) for name, c in names.items()), Column("x", edges=(0.0, 1.0))))
    content = table({name: c[-1] for name, c in names.items()} | {"x": 0.5}).content
    model = mm.Model({"row": table, "label": Labels(("yes",))}, mm.Core(width=16, depth=0, heads=2), ["row -> label"])
    wanted = model.embed("row", content)
    assert len(wanted.round(decimals=4).unique(dim=0)) == 301
    torch.testing.assert_close(model.bfloat16().embed("row", content).float(), wanted, atol=5e-3, rtol=0)


def test_unseen_categories_are_refused_or_read_as_one():
    with pytest.raises(
        MediaError, match=r"column 'ship' is str 'Titanik', wanted one of Olympic, Titanic; did you mean 'Titanic'"
    ):
        TABLE({"ship": "Titanik"})
    rare = TableRow.of([*ROWS, {"ship": "Britannic"}], categories=["class"], rarest=2)
    assert rare.unseen
    assert [c.categories for c in rare.columns] == [(), ("Olympic", "Titanic"), ("3",), ("False",)]
    tokens = [rare({"ship": ship}) for ship in ("Britannic", "Lusitania", "Titanic")]
    assert torch.equal(tokens[0].content, tokens[1].content)
    assert not torch.equal(tokens[0].content, tokens[2].content)
    embed: Any = rare.embed(8)  # nothing is added to the column until it has learned something
    torch.testing.assert_close(embed(tokens[0].content)[1], embed.column.weight[2])
    assert rare.decode(tokens[0])["ship"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], r"wanted a mapping from column to value, not list"),
        ({"ages": 3}, r"there is no column 'ages'; there are age, ship, class, crew; did you mean 'age'"),
        ({"age": "31"}, r"column 'age' is str '31', wanted a finite number, or None where it is missing"),
        ({"age": True}, r"column 'age' is bool True"),
        ({"age": float("inf")}, r"column 'age' is float inf"),
        ({"crew": 0.5}, r"column 'crew' is float 0.5, wanted one of False, True$"),
        ({"ship": ["Titanic"]}, r"column 'ship' is list"),
        (pd.DataFrame(ROWS), r"wanted a mapping from column to value, not DataFrame"),
    ],
)
def test_bad_rows_are_refused_by_name(row, message):
    with pytest.raises(MediaError, match=f"^TableRow.encode: {message}"):
        TABLE(row)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "there are no rows, or they have no columns"),
        ({"a": [1, 2]}, {}, "wanted a DataFrame or a list of mappings, not dict"),
        ([[1, 2]], {}, "wanted a mapping from column to value for each row, not list"),
        ([{"a": None}, {"a": float("nan")}], {}, "column 'a' has no value in 2 rows; leave it out"),
        ([{"a": 1}, {"a": np.inf}], {}, "column 'a' has an infinite number"),
        ([{"a": "x"}, {"a": [1]}], {}, "column 'a' has list .*, which is no number and no category"),
        ([{"a": pd.Timestamp(2026, 1, 1)}], {}, "column 'a' has Timestamp .*, which is no number and no category"),
        (
            [{"a": f"name {i}"} for i in range(50)],
            {},
            "column 'a' has 50 different texts in 50 rows, too many for categories",
        ),
        ([{"a": 1}], {"categories": ["b"]}, "categories names 'b', but the columns are a"),
        ([{"a": "x"}], {"rarest": 2}, "no category of column 'a' has 2 rows"),
        ([{"a": 1}], {"bins": -1}, "bins=-1 must be a whole number, 0 or more"),
    ],
)
def test_bad_tables_are_refused_by_name(rows, settings, message):
    with pytest.raises(ConfigError, match=f"^TableRow.of: {message}"):
        TableRow.of(rows, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Column("a", std=0.0), "Column 'a': mean=0.0 must be finite, and std=0.0 more than 0"),
        (lambda: Column("a", edges=(1.0, 1.0)), "edges=1.0, 1.0 must be two or more rising numbers"),
        (lambda: Column("a", edges=(1.0,)), "edges=1.0 must be two or more"),
        (
            lambda: Column("a", edges=(1.0, 2.0), categories=("x",)),
            "edges are for numbers, and categories are given too",
        ),
        (lambda: Column("a", categories=("x", "x")), "categories occur twice: x"),
        (lambda: Column("a", categories="xy"), "categories='xy' is not a tuple"),  # type: ignore[arg-type]
        (lambda: TableRow(()), "columns must be one Column or more"),
        (lambda: TableRow((Column("a"), Column("a"))), "columns have the same name: a"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_alone_packed_and_cached_are_the_same(lively):
    """Read, and written token by token: missing values, numbers and categories."""
    tasks = ["row -> label", mm.Task("label -> row", FlowMatching(width=16, depth=1, steps=2))]
    model = lively(mm.Model({"row": TABLE, "label": Labels(("yes", "no"))}, mm.Core(width=32, depth=2, heads=2), tasks))
    result = verify(model)
    assert result.passed, str(result)
    assert {row.check for row in result.rows} >= {"packed", "gradient", "cached"}
    written = model.generate("label -> row", label="yes").value
    assert list(written) == ["age", "ship", "class", "crew"]


def test_wine_is_told_as_logistic_regression_tells_it():
    """scikit-learn's 178 wines of three cultivars, 13 numbers each; 59 are held out."""
    found = load_wine()
    rows = [dict(zip(found.feature_names, x, strict=True)) for x in found.data.tolist()]
    labels = [found.target_names[y] for y in found.target]
    samples = [{"row": row, "label": label} for row, label in zip(rows, labels, strict=True)]
    test, train = samples[::3], [sample for i, sample in enumerate(samples) if i % 3]
    hidden = np.arange(len(rows)) % 3 == 0
    other = make_pipeline(StandardScaler(), LogisticRegression()).fit(found.data[~hidden], found.target[~hidden])
    baseline = other.score(found.data[hidden], found.target[hidden])
    tokenizers = {
        "row": TableRow.of([sample["row"] for sample in train]),
        "label": Labels.from_data(sample["label"] for sample in train),
    }
    core = mm.Core(width=32, depth=2, heads=4, dropout=0.1, rotary_split=(0, 0, 0))
    model = mm.Model(tokenizers, core, ["row -> label"])
    mm.fit(model, {"row -> label": train}, steps=80, batch=32, lr=3e-3, device="cpu", precision="float32", quiet=True)
    right = mm.evaluate(model, "row -> label", test)["exact"]
    assert baseline > 0.9
    assert right >= baseline - 0.05
