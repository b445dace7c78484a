"""Whether evidence, a read-out of the X-ray, knows pictures that a model was not trained on: beside softmax confidence.

    uv run benchmarks/evidence.py [--seeds 0 1 2] [--write]         about 2 CPU-minutes a seed on one thread

One small model learns scikit-learn's digits. Known pictures are the held-out fifth; foreign ones are digits upside down (2 3 4 5 7,
which are no other digit then), the held-out pictures with their pixels in another order, noise, characters of Omniglot, and pieces
of the two photographs of scikit-learn. `Evidence.fit` gets 400 pictures that were trained on. AUROC: how often a foreign picture
counts as more unusual than a known one (scikit-learn; 50 % is chance). "found" is the share of pictures that `Evidence` calls
unusual at alpha 0.05; of held-out digits this is the share of false alarms. --write writes the table to
benchmarks/results/evidence.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import report, script
from benchmarks.data import DATA, Rows, digits_8x8, example
from multimodal import Classify, Core, Model, Recipe, Task, fit
from multimodal.augment import Augmented
from multimodal.look import Evidence, xray
from multimodal.progress import progress_bar
from multimodal_tokenizers import ImagePatches, Labels

TASK = "image -> label"
UPRIGHT = "23457"  # the digits that are no other digit upside down
COUNT = 180  # pictures of each foreign kind
FITTED = 400
ALPHA = 0.05
SCORES = ("evidence", "softmax confidence")


def trained(seed: int, steps: int, folder: Path | None) -> Model:
    """A model of the training part of the digits."""
    train, _ = digits_8x8(seed)
    changes = example("image_sets").digits(seed).train.changes
    tokenizers = {"image": ImagePatches(patch=2, channels=1, mean=0.3, std=0.37), "label": Labels(tuple("0123456789"))}
    model = Model(tokenizers, Core.tiny(), [Task(TASK, head=Classify())], seed=seed)
    recipe = Recipe(steps=steps, batch=32, lr=2e-3, ema=0.99, weight_decay=0.1)
    fit(
        model, {TASK: Augmented(train, {"image": changes})}, recipe, seed=seed, folder=folder, resume=folder is not None
    )
    return model


def foreign(test: Rows, seed: int) -> dict[str, list[np.ndarray]]:
    """Pictures of 8 x 8 pixels that are no digits, by kind."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(seed)
    digits = [row["image"] for row in test]
    found = {
        "digits upside down (2 3 4 5 7)": [np.rot90(row["image"], 2) for row in test if row["label"] in UPRIGHT],
        "digits, pixels in another order": [draw.permuted(x.ravel()).reshape(8, 8) for x in digits],
        "noise": list(draw.integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)),
        "photographs": [_piece(draw, Image.fromarray(x).convert("L")) for x in load_sample_images().images * COUNT],
    }
    if (DATA / "omniglot.npz").is_file():
        found["characters of Omniglot"] = _characters(draw)
    return {kind: [np.ascontiguousarray(x) for x in pictures[:COUNT]] for kind, pictures in found.items()}


def _piece(draw: np.random.Generator, photo: Image.Image) -> np.ndarray:
    """A square of a photograph, 64 to 256 pixels a side before it is scaled down."""
    side = int(draw.integers(64, 257))
    left, top = (int(draw.integers(0, length - side)) for length in photo.size)
    return np.asarray(photo.resize((8, 8), Image.Resampling.BOX, (left, top, left + side, top + side)))


def _characters(draw: np.random.Generator) -> list[np.ndarray]:
    """Drawings of Omniglot, white on black, as bright as the digits are."""
    with np.load(DATA / "omniglot.npz", allow_pickle=False) as file:
        bits = file["bits"][draw.choice(len(file["bits"]), COUNT, replace=False)]
    strokes = np.unpackbits(bits, axis=-1)[..., :105].astype(np.float32)
    if strokes.mean() > 0.5:  # paper is 1 in these bits
        strokes = 1 - strokes
    small = [np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BOX)) for x in strokes]
    return [(255 * x / max(float(x.max()), 1e-6)).astype(np.uint8) for x in small]


def scores(model: Model, known: Evidence, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """For each picture how unusual it is by either score, and whether `Evidence` calls it so."""
    found = []
    with progress_bar("looking", len(pictures)) as bar:
        for picture in pictures:
            ray = xray(model, TASK, {"image": picture})
            novelty = known.judge(ray, alpha=ALPHA)
            found.append((novelty.distance, -max(ray.prediction.probability.values()), float(novelty.unusual)))
            bar.advance()
    return dict(zip((*SCORES, "found"), np.array(found).T, strict=True))


def measured(
    model: Model, seed: int, count: int | None = None
) -> tuple[tuple[float, float], dict[str, dict[str, float]]]:
    """Of held-out digits the shares that are read right and that `Evidence` calls unusual; by foreign kind AUROC and "found"."""
    train, test = digits_8x8(seed)
    right = [
        answer.value == row["label"]
        for answer, row in zip(model.predict(TASK, test[:count]), test[:count], strict=True)
    ]
    fitted = [{"image": row["image"]} for row in train[:FITTED]]
    known = Evidence.fit(model, TASK, fitted[:count])
    usual = scores(model, known, [row["image"] for row in test][:count])
    found: dict[str, dict[str, float]] = {}
    for kind, pictures in foreign(test, seed).items():
        unusual = scores(model, known, pictures[:count])
        found[kind] = {name: auroc(usual[name], unusual[name]) for name in SCORES}
        found[kind]["found"] = float(unusual["found"].mean())
    return (float(np.mean(right)), float(usual["found"].mean())), found


def auroc(usual: np.ndarray, unusual: np.ndarray) -> float:
    """How often one of the unusual has the larger score."""
    return float(roc_auc_score(np.repeat([0, 1], [len(usual), len(unusual)]), np.concatenate([usual, unusual])))


def table(found: Mapping[int, tuple[tuple[float, float], Mapping[str, Mapping[str, float]]]]) -> str:
    """Markdown: a line for each foreign kind, and what follows from them in words."""
    kinds = next(iter(found.values()))[1]
    of = {kind: {name: [by[kind][name] for _, by in found.values()] for name in (*SCORES, "found")} for kind in kinds}
    lines = [[kind, *(_range(values[name]) for name in SCORES), _range(values["found"])] for kind, values in of.items()]
    right, alarms = zip(*(facts for facts, _ in found.values()), strict=True)
    lines.append(["held-out digits", "", "", _range(alarms)])
    head = ["against held-out digits", *(f"AUROC, {name}" for name in SCORES), f"found at alpha {ALPHA:g}"]
    better = [kind for kind in kinds if np.mean(of[kind]["evidence"]) > np.mean(of[kind]["softmax confidence"])]
    means = {name: np.mean([of[kind][name] for kind in kinds]) for name in SCORES}
    said = (
        f"Evidence has the higher AUROC for {len(better)} of {len(kinds)} kinds; mean over kinds "
        f"{means['evidence']:.1%}, softmax confidence {means['softmax confidence']:.1%}."
    )
    if worse := [kind for kind in kinds if kind not in better]:
        said += f" Softmax confidence is as good or better for: {', '.join(worse)}."
    first = (
        f"Seeds {' '.join(map(str, found))}, which read {_range(right)} of held-out digits right: mean (least to most)."
    )
    return f"{first}\n\n{script.table(head, lines)}\n{said}\n"


def _range(values: Sequence[float]) -> str:
    mean, least, most = (f"{x:.1%}" for x in (np.mean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def main() -> None:
    options = script.parser(__doc__, "seeds", "folder", "steps", "write", seeds=[0, 1, 2], steps=1000)
    args = script.parsed(options)
    found = {}
    for seed in args.seeds:
        with script.cpu_time(f"seed {seed}:"):
            model = trained(seed, args.steps, args.folder and args.folder / f"seed{seed}")
            found[seed] = measured(model, seed)
    text = table(found)
    print(text)
    if args.write:
        print(report.keep("evidence", "Evidence", "uv run benchmarks/evidence.py --write", text))


if __name__ == "__main__":
    main()
