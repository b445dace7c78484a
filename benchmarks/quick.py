"""The quick path's own choices beside two baselines of scikit-learn and three hand-tuned settings, on the same parts, in one run.

    uv run benchmarks/quick.py [--only wine digits] [--seeds 0 1 2] [--minutes 5] [--tuned 1] [--no-augment] [--write]

Twelve sets. Digits, wine and breast cancer come with scikit-learn, as does diabetes, whose answers are numbers. Penguins come with
the package palmerpenguins, as in `kinds_tabular.py`. Spoken digits by unknown speakers, environmental sounds, clothes, slots of
coffee orders, languages of short texts, questions about pictures and GunPoint lie in the folder of data. `mm.quick` gets the
samples and divides them; the baselines train on all that is not its test part. Pictures are pixels and histograms of gradients,
sounds the mean and deviation of mel bands, texts TF-IDF. The hand-tuned settings are what a user would try next, on the same parts
in the same minutes, with the first --tuned seeds; the best is known only from the test part, which favours it.
Figures are means over the seeds of the share of test samples that is right, of diabetes of R2. --write writes
benchmarks/results/quick.md, where the rows of sets that are not run stay.
"""

import io
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

import multimodal as mm
from benchmarks import kinds_tabular, report, script
from benchmarks.data import DATA, recordings, records
from multimodal_tokenizers import AudioFrames

Samples = list[dict[str, Any]]
SIDE = 32  # pixels of a side of photographs for the baselines
CELLS, ANGLES = 4, 8  # of the histograms of gradients


def of_sklearn(load: Callable[[], Any], numbers: bool = False) -> Samples:
    found = load()
    names = [str(name) for name in found.feature_names]
    answers = [float(y) if numbers else str(found.target_names[y]) for y in found.target]
    return [dict(zip(names, x, strict=True)) | {"target": y} for x, y in zip(found.data.tolist(), answers, strict=True)]


def penguins() -> Samples | str:
    """The species of penguins, from numbers and categories of which some are missing; or why it is left out."""
    found = kinds_tabular.penguins()
    return found if isinstance(found, str) else [{**one["row"], "label": one["label"]} for one in found]


def digits() -> Samples:
    found: Any = load_digits()
    return [
        {"image": np.uint8(x * (255 / 16)), "label": str(y)} for x, y in zip(found.images, found.target, strict=True)
    ]


def spoken() -> Samples:
    """Spoken digits; two of four speakers are unknown in the test part."""
    rows = recordings("fsdd.zip", lambda rows: [row for row in rows if row["take"] < 20])
    return [
        {
            "audio": (wave_S, rate),
            "label": str(row["digit"]),
            "split": "test" if row["speaker"] in ("george", "theo") else "train",
        }
        for row, wave_S, rate in rows
    ]


def sounds() -> Samples:
    rows = recordings("esc10_folds1-3.zip")
    return [
        {"audio": (wave_S, rate), "label": row["category"], "split": "test" if row["fold"] == 3 else "train"}
        for row, wave_S, rate in rows
    ]


def clothes() -> Samples:
    def some(rows: Samples) -> Samples:
        return [row for i, row in enumerate(rows) if i % 2 == 0 or row["split"] != "train"]

    return [
        {
            "image": Image.open(file).convert("RGB"),
            "label": row["label"],
            "split": "train" if row["split"] == "train" else "test",
        }
        for row, file in records("clothing.zip", some)
    ]


def orders() -> Samples:
    """The size that is ordered, where one is."""
    rows = recordings("coffee_orders.zip", lambda rows: [row for row in rows if "size" in row["slots"]])
    return [{"audio": (wave_S, rate), "label": row["slots"]["size"]} for row, wave_S, rate in rows]


def languages() -> Samples:
    """Which of four languages the first three words of a caption are in."""
    import zipfile

    with zipfile.ZipFile(DATA / "multi30k_train_val.zip") as archive:
        lines = archive.read("val.tsv").decode().split("\n")[:-1]
    names = lines[0].split("\t")
    return [
        {"text": " ".join(text.split()[:3]), "label": name}
        for line in lines[1:501]
        for name, text in zip(names, line.split("\t"), strict=True)
        if name != "image"
    ]


def questions() -> Samples:
    """Questions about pictures of shapes, of which there are thirteen answers."""
    rows = records("easy_vqa_train.zip", lambda rows: rows[:400])
    found = []
    for row, file in rows:
        data = file.getvalue()
        for question, answer in row["qa"][:5]:
            found.append(
                {
                    "image": Image.open(io.BytesIO(data)).convert("RGB"),
                    "text": question,
                    "label": answer,
                    "picture": row["file"],
                }
            )
    return found


def gunpoint() -> Samples:
    with np.load(DATA / "timeseries.npz", allow_pickle=False) as archive:
        return [
            {"series": np.float64(x.T), "label": y, "split": part}
            for part in ("train", "test")
            for x, y in zip(archive[f"GunPoint_{part}_x"], archive[f"GunPoint_{part}_y"].tolist(), strict=True)
        ]


SETS: dict[str, tuple[Callable[[], Samples | str], dict[str, Any]]] = {
    "wine": (lambda: of_sklearn(load_wine), {}),
    "breast_cancer": (lambda: of_sklearn(load_breast_cancer), {}),
    "diabetes": (lambda: of_sklearn(load_diabetes, numbers=True), {"write": "number=target"}),
    "penguins": (penguins, {}),
    "digits": (digits, {}),
    "gunpoint": (gunpoint, {}),
    "languages": (languages, {}),
    "spoken_digits": (spoken, {}),
    "sounds": (sounds, {}),
    "clothes": (clothes, {}),
    "orders": (orders, {}),
    "questions": (questions, {"read": ["image", "text"], "group": "picture"}),
}

LARGER = ["core.width=96", "core.depth=4", "lr=1e-3"]
PLAIN = ["core.dropout=0", "weight_decay=0", "ema=0"]
SMALLER = ["core.width=32", "core.depth=2", "lr=3e-3"]
TRIED: dict[str, dict[str, list[str]]] = {
    "row": {"larger core": LARGER, "900 steps": ["core.depth=2", "steps=900"], "no regularisation": PLAIN},
    "series": {"larger core": LARGER, "900 steps": ["steps=900"], "no regularisation": PLAIN},
}
"""By what is read, the hand-tuned settings; of other kinds those of OTHERS, which all take the minutes."""
OTHERS = {"larger core": LARGER, "smaller core": SMALLER, "no regularisation": PLAIN}


# baselines


def gradients(picture: np.ndarray) -> np.ndarray:
    """Histograms of the directions of gradients in CELLS x CELLS cells (Dalal & Triggs 2005, without blocks)."""
    grey = picture.mean(-1)
    dy, dx = np.gradient(grey)
    size, angle = np.hypot(dy, dx), np.arctan2(dy, dx) % np.pi
    bins = np.minimum((angle / np.pi * ANGLES).astype(int), ANGLES - 1)
    edges = np.linspace(0, len(grey), CELLS + 1).astype(int)
    found = [
        np.bincount(bins[a:b, c:d].ravel(), size[a:b, c:d].ravel(), minlength=ANGLES)
        for a, b in pairwise(edges)
        for c, d in pairwise(edges)
    ]
    flat = np.concatenate(found)
    return flat / (np.linalg.norm(flat) + 1e-6)


def numbers_of(sample: dict[str, Any], mel: AudioFrames) -> np.ndarray:
    """A sample without its text as numbers."""
    parts = []
    if (value := sample.get("image")) is not None:
        picture = Image.fromarray(value) if isinstance(value, np.ndarray) else value
        if picture.width <= 8:
            parts.append(np.asarray(picture, dtype=float).ravel() / 255)
        else:
            small = np.asarray(picture.convert("RGB").resize((SIDE, SIDE)), dtype=float) / 255
            parts += [small[::4, ::4].ravel(), gradients(small)]
    if (value := sample.get("audio")) is not None:
        frames = mel(value).content.numpy().reshape(-1, mel.mels)
        parts += [frames.mean(0), frames.std(0)]
    if (value := sample.get("series")) is not None:
        parts.append(np.asarray(value).ravel())
    return np.concatenate(parts) if parts else np.zeros(0)


def baselines(train: Samples, test: Samples, seed: int) -> dict[str, float]:
    """Scores of two methods of scikit-learn."""
    mel = AudioFrames(rate_hz=8000, mels=40, stack=1, normalise="fixed")
    answer = "number" if "number" in train[0] else "label"
    wanted = [[sample[answer] for sample in part] for part in (train, test)]
    if "row" in train[0]:
        table = kinds_tabular.table(train + test)
        rows = [table[: len(train)], table[len(train) :]]
        linear = (
            ("ridge regression", RidgeCV(np.logspace(-2, 3, 11)))
            if answer == "number"
            else ("logistic regression", LogisticRegression(max_iter=3000))
        )
        boosting = HistGradientBoostingRegressor if answer == "number" else HistGradientBoostingClassifier
        models: dict[str, Any] = {
            linear[0]: make_pipeline(kinds_tabular.prepared(table, True), linear[1]),
            "histogram gradient boosting": make_pipeline(
                kinds_tabular.prepared(table, False), boosting(random_state=seed)
            ),
        }
        return scores(models, rows, wanted)
    x = [np.stack([numbers_of(sample, mel) for sample in part]) for part in (train, test)]
    if "text" in train[0]:
        words = make_union(TfidfVectorizer(ngram_range=(1, 2)), TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4)))
        texts = [[sample["text"] for sample in part] for part in (train, test)]
        bags = [words.fit_transform(texts[0]), words.transform(texts[1])]
        if not x[0].shape[1]:
            models = {
                "TF-IDF, logistic regression": LogisticRegression(max_iter=3000, C=10),
                "TF-IDF, random forest": RandomForestClassifier(300, random_state=seed),
            }
            return scores(models, bags, wanted)
        x = [np.concatenate([numbers, bag.toarray()], 1) for numbers, bag in zip(x, bags, strict=True)]
    models = {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000)),
        "random forest": RandomForestClassifier(300, random_state=seed),
    }
    return scores(models, x, wanted)


def scores(models: dict[str, Any], x: list[Any], wanted: list[list[Any]]) -> dict[str, float]:
    """The scores on the test part of models that are trained on the other."""
    return {name: float(model.fit(x[0], wanted[0]).score(x[1], wanted[1])) for name, model in models.items()}


def ours(
    samples: Samples, options: dict[str, Any], seed: int, minutes: float, augment: bool, settings: list[str]
) -> tuple[float, Any]:
    """The score, and what `quick` made."""
    torch.manual_seed(seed)
    found = mm.quick(samples, seed=seed, minutes=minutes, augment=augment, settings=settings, quiet=True, **options)
    assert found.evaluation is not None
    return found.evaluation["R2"] if "R2" in found.evaluation else found.evaluation["exact"], found


HEADER = [
    "set",
    "samples",
    "baselines",
    "hand-tuned",
    "quick",
    "beside the best baseline",
    "beside the best tuned",
    "options",
]


def with_others(rows: list[list[str]]) -> list[list[str]]:
    """These rows, and those of other sets that were measured before, in the order of the sets."""
    path = report.ROOT / "benchmarks" / "results" / "quick.md"
    before = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in before if line.startswith("|")]
    found = {row[0]: row for row in lines + rows if len(row) == len(HEADER) and row[0] in SETS}
    return [found[name] for name in SETS if name in found]


def main() -> None:
    options = script.parser(__doc__, "seeds", "write", seeds=[0])
    options.add_argument("--only", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--tuned", type=int, help="of so many of the seeds (default: all)")
    options.add_argument("--no-augment", action="store_true")
    args = script.parsed(options)
    rows = []
    for name in args.only:
        load, given = SETS[name]
        samples = load()
        if isinstance(samples, str):
            print(f"{name}: left out, {samples}")
            continue
        peers: dict[str, list[float]] = {}
        tuned: dict[str, list[float]] = {}
        own: list[float] = []
        first = args.seeds[: args.tuned]
        for seed in args.seeds:
            start = time.process_time()
            limits = (seed, args.minutes, not args.no_augment)
            score, found = ours(samples, given, *limits, [])
            own.append(score)
            train, test = (
                [found.parts[part][i] for part in some for i in range(len(found.parts[part]))]
                for some in (("train", "held_out"), ("test",))
            )
            kind = next(iter(found.report.fields.values()))["kind"]
            tried = TRIED.get(kind, OTHERS) if seed in first else {}
            mine = {method: ours(samples, given, *limits, settings)[0] for method, settings in tried.items()}
            others = baselines(train, test, seed)
            for scores_of, values in ((peers, others), (tuned, mine)):
                for method, value in values.items():
                    scores_of.setdefault(method, []).append(value)
            shown = listed({**others, **mine, "quick": score})
            seconds = time.process_time() - start
            print(f"{name}, seed {seed}: {len(train):,} + {len(test):,} samples, {seconds:.0f} CPU-seconds: {shown}")
            print(f"  {found.says}", flush=True)
        mean = float(np.mean(own))
        beside = [
            f"{100 * (np.mean(own[:count]) - max(means(some).values())):+.1f}" if some else ""
            for some, count in ((peers, len(own)), (tuned, len(first)))
        ]
        used = f"--minutes {args.minutes:g} --seeds {' '.join(map(str, args.seeds))}"
        used += f" --tuned {args.tuned}" if args.tuned is not None else ""
        used += " --no-augment" if args.no_augment else ""
        rows.append(
            [name, f"{len(samples):,}", listed(means(peers)), listed(means(tuned)), f"{mean:.1%}", *beside, used]
        )
        if args.write:
            body = script.table(HEADER, with_others(rows))
            command = "uv run benchmarks/quick.py --only SET OPTIONS --write"
            title = "The quick path beside scikit-learn and hand-tuned settings, on the same parts"
            report.keep("quick", title, command, body)
    print(script.table(HEADER, rows))


def means(found: dict[str, list[float]]) -> dict[str, float]:
    return {method: float(np.mean(values)) for method, values in found.items()}


def listed(found: dict[str, float]) -> str:
    return ", ".join(f"{method} {value:.1%}" for method, value in found.items())


if __name__ == "__main__":
    main()
