"""The estimators: scikit-learn's own checks, its pipelines and searches, and what they say of data that do not fit."""

import pickle

import numpy as np
import pytest

import multimodal as mm
from multimodal_tokenizers import ImagePatches

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from multimodal.sklearn import Classifier, Regressor  # noqa: E402

TINY = {"core": mm.Core(width=16, depth=1, heads=2), "lr": 1e-2, "batch": 32}


@pytest.mark.training
@pytest.mark.filterwarnings("ignore")  # the checks use what warns
@parametrize_with_checks([Classifier(steps=30, **TINY), Regressor(steps=30, **TINY)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def blobs():
    random = np.random.default_rng(0)
    y = np.array(["left", "right"])[np.arange(60) % 2]
    return random.normal(0, 0.4, (60, 2)) + np.where(y == "left", -1, 1)[:, None], y


def test_cross_validation_pipelines_and_searches(blobs):
    X, y = blobs
    one = Classifier(steps=20, random_state=0, **TINY)
    assert min(cross_val_score(one, X, y, cv=2)) > 0.9
    search = GridSearchCV(make_pipeline(StandardScaler(), one), {"classifier__steps": [1, 20]}, cv=2).fit(X, y)
    assert search.best_params_ == {"classifier__steps": 20}
    assert search.best_score_ > 0.9


def test_the_same_state_gives_the_same_model_and_clones_and_pickles(blobs):
    X, y = blobs
    one = Classifier(steps=5, random_state=3, **TINY).fit(X, y)
    p = one.predict_proba(X)
    assert (clone(one).fit(X, y).predict_proba(X) == p).all()
    assert (pickle.loads(pickle.dumps(one)).predict_proba(X) == p).all()
    assert not (Classifier(steps=5, random_state=4, **TINY).fit(X, y).predict_proba(X) == p).any()
    assert one.classes_.tolist() == ["left", "right"]
    assert p.sum(1) == pytest.approx(1)
    with pytest.raises(NotFittedError):
        clone(one).predict(X)


def test_probabilities_are_those_of_the_model(blobs):
    X, y = blobs
    one = Classifier(steps=5, random_state=0, **TINY).fit(X, y)
    answers = one.model_.predict("x -> y", [{"x": {"x0": a, "x1": b}} for a, b in X.tolist()])
    assert one.predict_proba(X)[:, 1] == pytest.approx([answer.probability["1"] for answer in answers], abs=1e-5)


def test_a_frame_with_texts_and_gaps(blobs):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "colour": ["red", "blue"] * 20,
            "code": pandas.Categorical([1, 2, 3, 4] * 10),
            "size": [1.0, None] * 20,
            "empty": [None] * 40,
        }
    )
    frame["size"] = frame["size"].astype(float)
    y = frame["colour"] == "red"
    one = Classifier(steps=30, random_state=0, **TINY).fit(frame, y)
    assert one.score(frame, y) == 1
    assert one.feature_names_in_.tolist() == ["colour", "code", "size", "empty"]
    assert [bool(column.categories) for column in one.model_.packer.tokenizers["x"].columns] == [True, True, False]
    assert one.predict(frame.assign(colour="green")).shape == (40,)  # a category that was never seen
    with pytest.raises(ValueError, match="feature names should match"):
        one.predict(frame.rename(columns={"size": "length"}))


def test_a_regressor_finds_a_line_in_the_units_of_y():
    X = np.linspace(0, 1, 40)[:, None]
    one = Regressor(steps=150, random_state=0, **TINY).fit(X, 1000 + 500 * X[:, 0])
    assert one.score(X, 1000 + 500 * X[:, 0]) > 0.9
    assert Regressor(steps=1, random_state=0, **TINY).fit(X, np.full(40, 7)).predict(X) == pytest.approx(7, abs=5)


@pytest.mark.parametrize("kind", ["image", "text", "audio"])
def test_pictures_texts_and_sounds(kind):
    random = np.random.default_rng(0)
    y = np.arange(20) % 2
    X = {
        "image": [random.uniform(0, 0.3, (8, 8)).astype(np.float32) + 0.6 * one for one in y],
        "text": ["good day" if one else "bad night" for one in y],
        "audio": [(np.sin(np.arange(1600) / (4 if one else 20)).astype(np.float32), 16000) for one in y],
    }[kind]
    tokenizer = ImagePatches(patch=4, channels=1) if kind == "image" else None
    one = Classifier(kind, tokenizer=tokenizer, steps=40, random_state=0, **TINY).fit(X, y)
    assert one.score(X, y) > 0.9
    if kind == "text":
        pandas = pytest.importorskip("pandas")
        assert (one.predict(pandas.DataFrame({"words": X})) == one.predict(X)).all()
        assert (
            one.predict(np.array(X, dtype=object)[:, None]) == one.predict(pandas.Series(X, index=range(5, 25)))
        ).all()


@pytest.mark.parametrize(
    ("estimator", "X", "y", "message"),
    [
        (Classifier("video"), [[1.0]], [1], "kind='video' is none of table, image, text, audio"),
        (Classifier(), [[1.0], [2.0]], ["a", "a"], "y has one class"),
        (Classifier(), [[1.0], [2.0]], ["a", "b", "c"], "inconsistent numbers of samples"),
        (Classifier(), [[np.nan], [np.nan]], ["a", "b"], "no column of X has a value"),
        (Classifier(steps=0), [[1.0], [2.0]], ["a", "b"], "steps=0"),
        (Classifier(), [[np.inf], [1.0]], ["a", "b"], "infinity"),
        (Regressor(), [[1.0], [2.0]], ["a", "b"], "y holds no numbers"),
        (Regressor(), [[1.0], [2.0]], [1.0, np.inf], "infinity"),
        (Classifier("text"), [], [], "X is empty"),
        (Classifier("text"), "words", [1], "X is a str"),
    ],
)
def test_what_does_not_fit_is_refused(estimator, X, y, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(X, y)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    import importlib
    import sys

    for name in [
        name for name in sys.modules if name == "sklearn" or name.startswith(("sklearn.", "multimodal.sklearn"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'multimodal-stream\[sklearn\]'"):
        importlib.import_module("multimodal.sklearn")
