"""Videos, point clouds, pages, and pictures with questions, each beside a control or a usual method.

    uv run benchmarks/kinds_space.py [--only motion points pages vqa] [--seeds 0 1 2] [--write]
    uv run benchmarks/kinds_space.py --tune [--only ..]                        on a part of the training data alone

About 45 CPU-minutes on one thread.

motion: in which of eight directions does a digit of scikit-learn's set move through a noisy frame? A digit that leaves on one side
comes back on the other, so that its position says nothing. The control reads the last frame of each clip alone.
points: the 8 x 8 digits as point clouds, a point with its ink for each pixel that has some, in no order; beside nearest neighbours
and logistic regression on the pixels. pages: which of four pages, each a digit and its name, has the wrong name? Beside the name
that is the least probable by logistic regression on the pixels, and beside a model that reads the captions alone. vqa: of the
4,000 pictures of easy-VQA's training part 800 are held out with their questions; beside a model that reads the question alone.
--write writes a table for each to benchmarks/results.
"""

import functools
import io
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import multimodal as mm
from benchmarks import report, script
from benchmarks.data import DATA, Rows, digits_8x8
from multimodal_tokenizers import ImagePatches, Labels, Points, Record, Sequence, TextBPE, TextBytes, VideoTubes

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0),
              "right down": (1, 1), "left up": (-1, -1), "right up": (-1, 1), "left down": (1, -1)}  # fmt: skip
SIDE, FRAMES = 24, 6  # of a clip, in pixels and frames
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAGES: dict[str, Any] = {"steps": 1500, "batch": 32, "lr": 4e-3, "ema": 0.99, "optimizer": "muon"}
PLAIN: dict[str, Any] = {"device": "cpu", "precision": "float32", "quiet": True}


def accuracy(
    kinds: dict[str, Any], core: mm.Core, task: str, parts: tuple[Any, Rows], seed: int, **recipe: Any
) -> float:
    """The share of the second part that is right, by a model that is trained on the first."""
    model = mm.Model(kinds, core, [task], seed=seed)
    mm.fit(model, {task: parts[0]}, seed=seed, **PLAIN, **recipe)
    return float(mm.evaluate(model, task, parts[1])["exact"])


def clips(pictures: Rows, count: int, seed: int) -> Rows:
    """Clips of digits that move by two pixels a frame, equally many in each direction."""
    random, samples = np.random.default_rng(seed), []
    names = list(DIRECTIONS)
    for i in range(count):
        name = names[i % len(names)]
        digit = np.asarray(pictures[random.integers(len(pictures))]["image"], np.float32) / 255
        frames = random.uniform(0, 0.3, (FRAMES, SIDE, SIDE)).astype(np.float32)
        start = random.integers(SIDE, size=2)
        for t in range(FRAMES):
            at = [int(s) + 2 * t * d for s, d in zip(start, DIRECTIONS[name], strict=True)]
            canvas = np.zeros((SIDE, SIDE), np.float32)
            canvas[: len(digit), : len(digit)] = digit
            frames[t] = np.maximum(frames[t], np.roll(canvas, at, (0, 1)))
        samples.append({"clip": frames, "frame": frames[-1:], "label": name})
    return samples


def motion(seed: int, tune: bool) -> dict[str, float]:
    train, test = digits_8x8(seed)
    if tune:
        train, test = train[::2], train[1::2]
    parts = clips(train, 4000, seed), clips(test, 800, seed + 100)
    found = {}
    for name, field in {"ours, clips of 6 frames": "clip", "ours, one frame (control)": "frame"}.items():
        kinds = {field: VideoTubes(patch=6, frames=2, fps=10.0, channels=1), "label": Labels(list(DIRECTIONS))}
        recipe = {"steps": 700, "batch": 32, "lr": 2e-3, "ema": 0.98}
        found[name] = accuracy(kinds, mm.Core(width=64, depth=3, heads=4), f"{field} -> label", parts, seed, **recipe)
        print(f"motion, seed {seed}: {name} {found[name]:.2%}", flush=True)
    return found


class Moved:
    """Clouds for training, each time turned, stretched and moved by a little."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = script.random()
        angle, stretch = random.uniform(-0.2, 0.2), 1 + random.uniform(-0.1, 0.1, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        cloud = self.rows[index]["points"].copy()
        cloud[:, :2] = (cloud[:, :2] - 4) * stretch @ turn.T + 4 + random.uniform(-0.6, 0.6, 2)
        return {"points": cloud, "label": self.rows[index]["label"]}


def cloud_of(row: dict[str, Any]) -> dict[str, Any]:
    """A point (x, y, ink) for each pixel with ink, in the middle of the pixel."""
    image = np.asarray(row["image"], np.float64)
    y, x = np.nonzero(image)
    return {"points": np.stack([x + 0.5, y + 0.5, image[y, x]], 1), "label": row["label"]}


def points(seed: int, tune: bool) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    train, test = digits_8x8(seed)
    if tune:
        cut = len(train) * 4 // 5
        train, test = train[:cut], train[cut:]
    (x, y), (test_x, test_y) = (
        (np.stack([np.ravel(row["image"]) / 255 for row in part]), [row["label"] for row in part])
        for part in (train, test)
    )
    found = {
        "1 nearest neighbour on the pixels": KNeighborsClassifier(1).fit(x, y).score(test_x, test_y),
        "logistic regression on the pixels": LogisticRegression(max_iter=5000).fit(x, y).score(test_x, test_y),
    }
    clouds, test_clouds = ([cloud_of(row) for row in part] for part in (train, test))
    kinds = {
        "points": Points.of([row["points"] for row in clouds], dims=2),
        "label": Labels([str(i) for i in range(10)]),
    }
    core = mm.Core(width=64, depth=3, heads=4, rotary_split=(0, 1, 1), dropout=0.1)
    recipe = {"steps": 1500, "batch": 32, "lr": 2e-3, "ema": 0.99, "weight_decay": 0.1}
    found["ours"] = accuracy(kinds, core, "points -> label", (Moved(clouds), test_clouds), seed, **recipe)
    print(f"points, seed {seed}: " + ", ".join(f"{name} {share:.2%}" for name, share in found.items()), flush=True)
    return {name: float(share) for name, share in found.items()}


class Books:
    """Four pages with digits, one of which has the name of another; drawn anew each time one is read, or by index."""

    def __init__(self, pictures: Rows, count: int, seed: int | None = None) -> None:
        self.pictures, self.count, self.seed = pictures, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = script.random() if self.seed is None else np.random.default_rng((self.seed, i))
        chosen = [self.pictures[j] for j in random.choice(len(self.pictures), 4, replace=False)]
        said, wrong = [int(digit["label"]) for digit in chosen], int(random.integers(4))
        said[wrong] = (said[wrong] + int(random.integers(1, 10))) % 10
        pages = [{"picture": digit["image"], "caption": NAMES[name]} for digit, name in zip(chosen, said, strict=True)]
        return {"book": pages, "page": str(wrong), "captions": [page["caption"] for page in pages]}


def pages(seed: int, tune: bool) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    digits, test_digits = digits_8x8(seed)
    if tune:
        cut = len(digits) * 4 // 5
        digits, test_digits = digits[:cut], digits[cut:]
    train, test = Books(digits, 100_000), [Books(test_digits, 1000, seed)[i] for i in range(1000)]
    x = np.stack([np.ravel(row["image"]) / 255 for row in digits])
    judge = LogisticRegression(max_iter=5000).fit(x, [int(row["label"]) for row in digits])
    right = 0
    for book in test:
        shown = judge.predict_proba([np.ravel(page["picture"]) / 255 for page in book["book"]])
        sure = [p[NAMES.index(page["caption"])] for p, page in zip(shown, book["book"], strict=True)]
        right += str(int(np.argmin(sure))) == book["page"]
    found = {"the least probable name, by logistic regression on the pixels": right / len(test)}

    parts: dict[str, Any] = {"page": Labels([str(i) for i in range(4)])}
    page = Record(picture=ImagePatches(patch=4, channels=1, mean=0.3, std=0.37), caption=TextBytes())
    kinds = {"book": Sequence(of=page), "captions": Sequence(of=TextBytes())}
    for name, field in {"ours, the captions alone": "captions", "ours": "book"}.items():
        steps = PAGES["steps"] if field == "book" else 300
        recipe = {**PAGES, "steps": steps}
        core = mm.Core(width=64, depth=4, heads=4)
        found[name] = accuracy({field: kinds[field], **parts}, core, f"{field} -> page", (train, test), seed, **recipe)
        print(f"pages, seed {seed}: {name} {found[name]:.2%}", flush=True)
    return found


@functools.cache
def questions() -> list[Rows]:
    """By picture: its questions {"image", "question", "answer"}."""
    from PIL import Image

    with zipfile.ZipFile(DATA / "easy_vqa_train.zip") as archive:
        lines = archive.read("manifest.jsonl").decode("utf-8").splitlines()
        found = []
        for line in map(json.loads, lines):
            image = np.asarray(Image.open(io.BytesIO(archive.read(line["file"]))).convert("RGB"))
            found.append([{"image": image, "question": q, "answer": a} for q, a in line["qa"]])
    return found


def vqa(seed: int, tune: bool) -> dict[str, float]:
    pictures = questions()
    order = np.random.default_rng(seed).permutation(len(pictures))
    train, test = order[:3200], order[3200:]
    if tune:
        train, test = train[:2700], train[2700:]
    parts = tuple([row for i in part for row in pictures[i]] for part in (train, test))
    answers = Counter(row["answer"] for row in parts[0])
    usual: dict[str, Counter] = defaultdict(Counter)
    for row in parts[0]:
        usual[row["question"]][row["answer"]] += 1

    def best(question: str) -> str:
        return (usual.get(question) or answers).most_common(1)[0][0]

    found = {
        "the most frequent answer": np.mean([row["answer"] == answers.most_common(1)[0][0] for row in parts[1]]),
        "the most frequent answer to the question": np.mean(
            [row["answer"] == best(row["question"]) for row in parts[1]]
        ),
    }
    labels = Labels(sorted(answers))
    text = TextBPE.train([row["question"] for row in parts[0]], vocab_size=400)
    pixels = np.stack([pictures[i][0]["image"] for i in train]).reshape(-1, 3) / 255
    images = ImagePatches(patch=8, mean=tuple(pixels.mean(0).tolist()), std=tuple(pixels.std(0).tolist()))
    for name, task in {
        "ours, the question alone": "question:text -> answer",
        "ours": "image question:text -> answer",
    }.items():
        kinds: dict[str, Any] = {"text": text, "answer": labels}
        if "image" in task:
            kinds["image"] = images
        # which word means which colour or shape is learned late, with AdamW later still
        recipe = {
            "steps": 600 if "image" not in task else 4200,
            "batch": 32,
            "lr": 4e-3,
            "ema": 0.99,
            "optimizer": "muon",
        }
        found[name] = accuracy(kinds, mm.Core(width=64, depth=4, heads=4), task, parts, seed, **recipe)
        print(f"vqa, seed {seed}: {name} {found[name]:.2%}", flush=True)
    return {name: float(share) for name, share in found.items()}


ROWS: dict[str, tuple[str, Callable[[int, bool], dict[str, float]]]] = {
    "motion": ("Clips of moving digits: which of eight directions", motion),
    "points": ("Digits as clouds of points", points),
    "pages": ("Which of four pages has the wrong caption", pages),
    "vqa": ("Questions about pictures", vqa),
}


def main() -> None:
    options = script.parser(__doc__, "seeds", "write", seeds=[0, 1, 2])
    options.add_argument("--only", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    options.add_argument("--tune", action="store_true", help="hold out a part of the training data, and test nothing")
    args = script.parsed(options)
    for row in args.only:
        title, run = ROWS[row]
        found: dict[str, list[float]] = {}
        with script.cpu_time(f"{row}:"):
            for seed in args.seeds:
                for name, share in run(seed, args.tune).items():
                    found.setdefault(name, []).append(share)
        lines = [[name, *(f"{x:.2%}" for x in shares), f"{np.mean(shares):.2%}"] for name, shares in found.items()]
        body = script.table(["right", *(f"seed {seed}" for seed in args.seeds), "mean"], lines)
        print(f"{row}\n{body}", flush=True)
        if args.write and not args.tune:
            report.keep(f"kinds_{row}", title, f"uv run benchmarks/kinds_space.py --only {row} --write", body)


if __name__ == "__main__":
    main()
