"""Estimators of scikit-learn: `Classifier` and `Regressor` for tables, pictures, texts and sounds, in pipelines and searches."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from multimodal.core import Core
from multimodal.declare import override
from multimodal.heads import Head, Prediction, Regress
from multimodal.model import Model
from multimodal.shapes import ConfigError, check_whole
from multimodal.task import Task
from multimodal.texts import listed
from multimodal.tokenizer import Tokenizer
from multimodal.train import Recipe, fit
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, Number, TableRow, TextBytes

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        _check_feature_names,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        f"multimodal.sklearn needs scikit-learn 1.6 or newer: pip install 'multimodal-stream[sklearn]' ({error})"
    ) from error

__all__ = ["Classifier", "Regressor"]

KINDS: dict[str, Any] = {"table": TableRow, "image": ImagePatches, "text": TextBytes, "audio": AudioFrames}
READ, ANSWER = "x", "y"  # the fields of a sample


class _Estimator(BaseEstimator):
    """What both estimators have: their settings, how X becomes samples, and how the model is trained and asked."""

    def __init__(
        self,
        kind: str = "table",
        *,
        tokenizer: Tokenizer | None = None,
        core: Core | None = None,
        steps: int = 1000,
        batch: int = 64,
        lr: float = 1e-3,
        recipe: Recipe | None = None,
        random_state: Any = None,
    ) -> None:
        self.kind = kind
        self.tokenizer = tokenizer
        self.core = core
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.recipe = recipe
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        table = self.kind == "table"
        tags.target_tags.required = True
        tags.input_tags.two_d_array = table
        tags.input_tags.allow_nan = tags.input_tags.categorical = table
        tags.input_tags.string = self.kind in ("table", "text")
        return tags

    def _train(self, X: Any, y: Sequence[Any], answer: Tokenizer, head: Head | None) -> Self:
        """Make a model for these samples and answers, and train it."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        settings = {"steps": self.steps, "batch": min(self.batch, len(X)), "lr": float(self.lr), "seed": seed}
        recipe = override(self.recipe or Recipe(precision="float32"), **settings)
        kinds = {READ: self.tokenizer or self._tokenizer(X), ANSWER: answer}
        task = f"{READ} -> {ANSWER}"
        model = Model(kinds, Core.tiny() if self.core is None else self.core, [Task(task, head)], seed=seed)
        data = [{READ: row, ANSWER: one} for row, one in zip(self._rows(X, model), y, strict=True)]
        fit(model, {task: data}, recipe, quiet=True)
        self.model_ = model.eval()
        return self

    def _tokenizer(self, X: Any) -> Tokenizer:
        if self.kind != "table":
            return KINDS[self.kind]()
        there = [name for name, column in X.columns.items() if not all(map(_is_missing, column))]
        if not there:
            raise ConfigError(f"{type(self).__name__}: no column of X has a value")
        return TableRow.of(X.rows(there), categories=[name for name in X.categories if name in there], unseen=True)

    def _rows(self, X: Any, model: Model) -> list[Any]:
        """The values of the field that is read."""
        if self.kind != "table":
            return X
        tokenizer = model.packer.tokenizers[READ]
        names = [column.name for column in tokenizer.columns] if isinstance(tokenizer, TableRow) else list(X.columns)
        if missing := [name for name in names if name not in X.columns]:
            raise ConfigError(f"{type(self).__name__}: X has no column {missing[0]!r}; there are {listed(X.columns)}")
        return X.rows(names)

    def _answers(self, X: Any) -> list[Prediction]:
        """The answers of the model. On CPUs they are computed in float64, so that rows do not depend on those beside them."""
        check_is_fitted(self)
        X = self._values(X, reset=False)
        model = self.model_
        if model.device.type == "cpu" and model.dtype == torch.float32 and model.quantization is None:
            model = copy.deepcopy(model).double()
        return list(model.predict_each(f"{READ} -> {ANSWER}", [{READ: row} for row in self._rows(X, model)]))

    def _values(self, X: Any, *, reset: bool) -> Any:
        """X as a table or as a list of values, after the checks of scikit-learn.

        Raises:
            ValueError: X is no such data; the message says what came.
        """
        if self.kind not in KINDS:
            raise ConfigError(f"{type(self).__name__}: kind={self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "table":
            dtypes = X.dtypes.items() if hasattr(getattr(X, "dtypes", None), "items") else ()  # of pandas
            categories = [str(name) for name, kind in dtypes if str(kind) in ("category", "bool", "boolean")]
            checked: Any = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan")
            names = [str(n) for n in getattr(self, "feature_names_in_", ())]
            return _Table(names or [f"x{i}" for i in range(checked.shape[1])], checked, categories)
        values = _one_column(type(self).__name__, X)
        if not values:
            raise ConfigError(f"{type(self).__name__}: X is empty; wanted one {self.kind} or more")
        if reset or hasattr(self, "feature_names_in_"):
            _check_feature_names(self, X, reset=reset)
        return values


class _Table:
    """The columns of a table by name, and the names of those that are categories whatever their values are."""

    def __init__(self, names: list[str], cells: np.ndarray, categories: list[str]) -> None:
        self.columns = {name: [_cell(value) for value in cells[:, i].tolist()] for i, name in enumerate(names)}
        self.categories = categories

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def rows(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        return [dict(zip(names, cells, strict=True)) for cells in zip(*(self.columns[n] for n in names), strict=True)]


def _cell(value: Any) -> Any:
    """A cell whose missing value is None."""
    return None if _is_missing(value) else value.item() if isinstance(value, np.generic) else value


def _is_missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _one_column(who: str, X: Any) -> list[Any]:
    """The values of a list, an array whose first axis counts them, a Series, or a DataFrame of one column."""
    if hasattr(X, "columns"):
        if len(X.columns) != 1:
            raise ConfigError(f"{who}: X has the columns {listed(X.columns)}; choose one, as in X[['{X.columns[0]}']]")
        X = X[X.columns[0]]
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1 and X.dtype == object:
        X = X[:, 0]
    if isinstance(X, (str, bytes)) or not hasattr(X, "__len__") or not hasattr(X, "__iter__"):
        raise ConfigError(f"{who}: X is a {type(X).__name__}; wanted a list of values")
    return list(X)


class Classifier(ClassifierMixin, _Estimator):
    """A classifier for scikit-learn: `Classifier(random_state=0).fit(X, y).predict(X)`.

    It works in pipelines, searches and cross-validation, and is cloned and pickled like others of scikit-learn.

    kind: what a row of X is: "table", with numbers, categories and missing values in its columns; or "image", "text" or "audio":
        X is a list, an array or one column of pictures, texts or sounds, or of their files.
    tokenizer: of what is read; None: `TableRow.of(X)`, `ImagePatches()`, `TextBytes()` or `AudioFrames()`.
    core: the transformer; None: `Core.tiny()`.
    steps: number of optimiser steps.
    batch: samples of a step; at most as many as X has.
    lr: the learning rate at its peak.
    recipe: further settings of training, a `Recipe`, in which steps, batch, lr and seed are replaced by those given here; None: in
        float32, which gives the same model on every CPU of one kind.
    random_state: decides the first weights and the order of the data; None: another one each time.

    After `fit`: classes_, the classes in ascending order; model_, the `Model`, whose task is "x -> y"; n_features_in_ and
    feature_names_in_ of a table.

    Examples:
        >>> X, y = [[0.0, 1.0], [1.0, 0.0], [0.1, 0.9], [0.9, 0.2]] * 4, ["low", "high", "low", "high"] * 4
        >>> wise = mm.sklearn.Classifier(core=mm.Core(width=16, depth=1, heads=2), steps=40, lr=1e-2, random_state=0).fit(X, y)
        >>> wise.predict([[0.05, 0.95]]).tolist(), wise.classes_.tolist()
        (['low'], ['high', 'low'])
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model.

        Raises:
            ValueError: X or y that do not fit, or fewer than two classes.
        """
        X, y = _checked(self, X, y)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ConfigError(f"Classifier: y has one class, {self.classes_[0]!r}; wanted two classes or more")
        names = tuple(map(str, range(len(self.classes_))))
        return self._train(X, [names[i] for i in numbers], Labels(names), None)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, C): the probability of each class, in the order of classes_."""
        answers = self._answers(X)
        names = list(map(str, range(len(self.classes_))))
        return np.array([[answer.probability[name] for name in names] for answer in answers])

    def predict(self, X: Any) -> np.ndarray:
        """(N,): the most probable class of each row."""
        numbers = [int(answer.value) for answer in self._answers(X)]
        return self.classes_[numbers]


class Regressor(RegressorMixin, _Estimator):
    """A regression of one number for scikit-learn, by least squares: `Regressor(random_state=0).fit(X, y).predict(X)`.

    kind: what a row of X is: "table", "image", "text" or "audio"; see `Classifier`.
    tokenizer: of what is read; None: that of the kind.
    core: the transformer; None: `Core.tiny()`.
    steps: number of optimiser steps.
    batch: samples of a step; at most as many as X has.
    lr: the learning rate at its peak.
    recipe: further settings of training, a `Recipe`; see `Classifier`.
    random_state: decides the first weights and the order of the data; None: another one each time.

    After `fit`: model_, the `Model`; n_features_in_ and feature_names_in_ of a table.

    Examples:
        >>> X, y = [[0.0], [1.0], [2.0], [3.0]] * 4, [0.0, 10.0, 20.0, 30.0] * 4
        >>> line = mm.sklearn.Regressor(core=mm.Core(width=16, depth=1, heads=2), steps=60, lr=1e-2, random_state=0).fit(X, y)
        >>> bool(line.predict([[0.0]])[0] < line.predict([[3.0]])[0])
        True
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model.

        Raises:
            ValueError: X or y that do not fit, or numbers that are not finite.
        """
        X, y = _checked(self, X, y)
        try:
            y = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Regressor: y holds no numbers: {error}") from error
        if not np.isfinite(y).all():
            raise ConfigError("Regressor: y holds NaN or infinity; leave these rows out")
        return self._train(X, y.tolist(), Number(float(y.mean()), float(y.std()) or 1.0), Regress())

    def predict(self, X: Any) -> np.ndarray:
        """(N,): the number of each row."""
        return np.array([answer.value for answer in self._answers(X)], dtype=np.float64)


def _checked(estimator: Any, X: Any, y: Any) -> tuple[Any, np.ndarray]:
    """X as a table or list, and y (N,).

    Raises:
        ValueError: y is missing, of another length, or not one column.
    """
    if y is None:
        raise ConfigError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is None; give an answer for each row"
        )
    check_whole(type(estimator).__name__, least=1, steps=estimator.steps, batch=estimator.batch)
    X = estimator._values(X, reset=True)
    y = column_or_1d(y, warn=True)
    check_consistent_length(X if isinstance(X, list) else range(len(X)), y)
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ConfigError(f"{type(estimator).__name__}: Input y contains NaN or infinity; leave these rows out")
    if y.dtype.kind == "c":
        raise ConfigError(f"{type(estimator).__name__}: Complex data not supported; y is complex")
    return X, y
