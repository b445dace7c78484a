"""Fine-tuning on little data, beside training from nothing and plain baselines in the same program.

    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/finetuning.py clothing --seeds 0 1 2 --write        about 15 CPU-minutes a seed

clothing: 30 photographs of each of ten classes, scored on the 341 of the official validation part, from DINOv2-S.
sounds: ESC-10, folds 1 and 2 to train (160 clips of 5 s), fold 3 to score (80), from Whisper-base's encoder.
pairs: two captions of each of 1,000 photographs; which of 242 others describes the same photograph, from MiniLM.
speech: 15 minutes of LJ Speech, scored on the other 5, from Whisper-base, without padding to 30 seconds.

The weights are those of benchmarks/fetched_weights.py. One thread.
"""

import dataclasses
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from benchmarks import report, script
from benchmarks.data import DATA, manifest, recordings, records
from benchmarks.fetched_weights import ready
from benchmarks.pretrained import at_16_khz, plain, their_whisper
from multimodal import Classify, Core, EncoderDecoder, Model, Task, evaluate, fit, override, pretrained
from multimodal.heads import FirstAndMean, Mean
from multimodal.pretrained import Pretrained
from multimodal_tokenizers import AudioFrames, Features, ImagePatches, Labels
from multimodal_tokenizers.fit import Fit

EACH = 30  # photographs of a class to train on
SIDE = 126  # pixels at which DINOv2 reads a photograph, whose longest side is 128
HERTZ = 16000  # of all sounds
BLOCKS = 3  # of Whisper-base's six; the upper ones tell words apart, and sounds less well
HELD_OUT = 46  # the first clips of LJ Speech, 5.2 minutes; the other 140 have 14.8
Samples = list[dict[str, Any]]


class Found(NamedTuple):
    """One figure of a table."""

    what: str
    value: float
    unit: str = "%"


class Varied:
    """Samples of which each visit shows another variant, made by `vary(value)` of one field."""

    def __init__(self, samples: Samples, field: str, vary: Callable[[Any], Any]) -> None:
        self.samples, self.field, self.vary = samples, field, vary

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample = self.samples[index]
        return {**sample, self.field: self.vary(sample[self.field])}


def cropped(image: Image.Image) -> Image.Image:
    """Another part of at least a half of a picture, mirrored or not, in other brightness."""
    side = np.random.uniform(0.5, 1.0) ** 0.5
    width, height = round(image.width * side), round(image.height * side)
    x, y = np.random.randint(image.width - width + 1), np.random.randint(image.height - height + 1)
    part = image.resize(image.size, Image.Resampling.BICUBIC, (x, y, x + width, y + height))
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if np.random.rand() < 0.5 else part
    factor = np.random.uniform(0.8, 1.2)
    return ImageEnhance.Brightness(part).enhance(factor)


def rolled(frames_NF: np.ndarray) -> np.ndarray:
    """Frames that start elsewhere; what stood before comes at the end."""
    return np.roll(frames_NF, np.random.randint(len(frames_NF)), 0)


def shifted(sound: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
    """A sound that starts elsewhere, at another loudness, with a little noise."""
    wave_S, rate = sound
    wave_S = np.roll(wave_S, np.random.randint(len(wave_S))) * np.float32(np.random.uniform(0.5, 1.5))
    noise_S = np.random.standard_normal(len(wave_S)).astype(np.float32)
    return wave_S + noise_S * np.float32(np.random.uniform(0, 0.005)), rate


def photographs(seed: int) -> tuple[Samples, Samples]:
    """Training and validation photographs of clothes with their classes."""
    parts: dict[bool, Samples] = {True: [], False: []}
    for row, file in records("clothing.zip"):
        parts[row["split"] == "train"].append({"image": Image.open(file).convert("RGB"), "label": row["label"]})
    by_class: dict[str, Samples] = {}
    for i in np.random.default_rng(seed).permutation(len(parts[True])):
        by_class.setdefault(parts[True][i]["label"], []).append(parts[True][i])
    return [sample for some in by_class.values() for sample in some[:EACH]], parts[False]


def clips() -> tuple[Samples, Samples]:
    """Clips of folds 1 and 2, and of fold 3, with their classes."""
    found: dict[bool, Samples] = {True: [], False: []}
    for row, wave_S, rate in recordings("esc10_folds1-3.zip"):
        wave_S = at_16_khz(wave_S, rate)
        found[row["fold"] < 3].append({"audio": (wave_S, HERTZ), "label": row["category"]})
    return found[True], found[False]


def classes(samples: Samples) -> Labels:
    return Labels(tuple(sorted({sample["label"] for sample in samples})))


def right(model: Model, task: str, held_out: Samples) -> float:
    """Right answers in percent."""
    return 100 * evaluate(model, task, held_out)["exact"]


def both_ways(model: Model, task: str, held_out: Samples) -> float:
    """Right answers in percent, by the mean probability of a picture and of its mirror image."""
    mirrored = [s["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT) for s in held_out]
    told = [model.predict(task, [{"image": x} for x in part]) for part in ([s["image"] for s in held_out], mirrored)]
    sums = [{name: p + b.probability[name] for name, p in a.probability.items()} for a, b in zip(*told, strict=True)]
    found = [max(some, key=some.__getitem__) for some in sums]
    return 100 * float(np.mean([name == s["label"] for name, s in zip(found, held_out, strict=True)]))


def plain_learners(features: Sequence[np.ndarray], train: Samples, held_out: Samples, seed: int) -> tuple[float, float]:
    """Right answers, in percent, of a random forest and of a logistic regression; `features` are those of both parts."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, held = features[: len(train)], features[len(train) :]
    names, wanted = ([sample["label"] for sample in part] for part in (train, held_out))
    forest = RandomForestClassifier(500, random_state=seed)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    forest_share, regression_share = (100 * float(x.fit(rows, names).score(held, wanted)) for x in (forest, regression))
    return forest_share, regression_share


def clothing(seed: int) -> Iterator[Found]:
    train, held_out = photographs(seed)
    labels, task = classes(train), "image -> label"
    pixels = [np.asarray(s["image"].resize((32, 32))).ravel() / 255 for s in (*train, *held_out)]
    forest, regression = plain_learners(pixels, train, held_out, seed)
    yield Found("random forest on 32 x 32 pixels", forest)
    yield Found("logistic regression on them", regression)

    data = {task: Varied(train, "image", cropped)}
    scratch = Model(
        {"image": ImagePatches(patch=8, mean=0.5, std=0.3, fit=Fit(size=(48, 48))), "label": labels},
        Core(width=128, depth=4, heads=4, dropout=0.1, drop_path=0.1),
        [Task(task, Classify(pool=Mean(), label_smoothing=0.1))],
        seed=seed,
    )
    fit(scratch, data, steps=500, batch=64, lr=1e-3, optimizer="muon", seed=seed, quiet=True)
    yield Found("ours from nothing", right(scratch, task, held_out))

    loaded = pretrained(ready("dinov2-s"))
    eye: Any = loaded.tokenizers["image"]
    eye = dataclasses.replace(eye, of=dataclasses.replace(eye.of, fit=Fit(size=(SIDE, SIDE))))
    model = dataclasses.replace(loaded, tokenizers={"image": eye}).model(
        [Task(task, Classify(pool=FirstAndMean(), label_smoothing=0.1))], {"label": labels}, seed=seed
    )
    tuned = {"freeze": ("image", "core[:4]"), "layer_decay": 0.75, "lr": 3e-4, "warmup": 0.1, "weight_decay": 0.05}
    fit(model, data, steps=150, batch=32, seed=seed, quiet=True, **tuned)
    yield Found("ours from DINOv2-S", right(model, task, held_out))
    yield Found("the same, mean of each photograph and its mirror image", both_ways(model, task, held_out))


def sounds(seed: int) -> Iterator[Found]:
    train, held_out = clips()
    labels, task = classes(train), "audio -> label"
    frames = AudioFrames(stack=1, normalise="fixed")
    log_mel = [frames(sample["audio"]).content.numpy() for sample in (*train, *held_out)]
    statistics = [np.concatenate([x.mean(0), x.std(0), np.diff(x, axis=0).std(0)]) for x in log_mel]
    forest, regression = plain_learners(statistics, train, held_out, seed)
    yield Found("random forest on log-mel means and deviations, also of differences", forest)
    yield Found("logistic regression on them", regression)

    mean_F, std_F = (getattr(np.concatenate(log_mel[: len(train)]), name)(0) for name in ("mean", "std"))
    scaled = [{**sample, "audio": (x - mean_F) / std_F} for sample, x in zip((*train, *held_out), log_mel, strict=True)]
    scratch = Model(
        {"audio": Features(frames.mels, stack=4, deltas=1, normalise="none", hidden=128), "label": labels},
        Core(width=96, depth=2, heads=4, dropout=0.2, drop_path=0.1),
        [Task(task, Classify(pool=Mean(), label_smoothing=0.1))],
        seed=seed,
    )
    turned = {task: Varied(scaled[: len(train)], "audio", rolled)}
    fit(scratch, turned, steps=300, batch=32, lr=1e-3, optimizer="muon", seed=seed, quiet=True)
    yield Found("ours from nothing", right(scratch, task, scaled[len(train) :]))

    data = {task: Varied(train, "audio", shifted)}
    loaded = unpadded()
    assert isinstance(loaded.core, EncoderDecoder)
    model = Model(
        {"audio": loaded.tokenizers["audio"], "label": labels},
        override(loaded.core.reader, depth=BLOCKS),
        [Task(task, Classify(pool=Mean(), label_smoothing=0.1))],
        seed=seed,
    )
    known = {name.replace("core.reader.", "core."): weight for name, weight in loaded.weights.items()}
    model.load_state_dict({name: known.get(name, weight) for name, weight in model.state_dict().items()})
    tuned = {"freeze": ("audio", "core[:1]"), "layer_decay": 0.7, "lr": 5e-4, "warmup": 0.1, "weight_decay": 0.05}
    fit(model, data, steps=100, batch=16, seed=seed, quiet=True, **tuned)
    yield Found(f"ours from the first {BLOCKS} blocks of Whisper-base", right(model, task, held_out))


def unpadded() -> Pretrained:
    """Whisper-base that reads a sound at its own length."""
    loaded = pretrained(ready("whisper-base"))
    ear = override(loaded.tokenizers["audio"], pad_seconds=None)
    return dataclasses.replace(loaded, tokenizers={**loaded.tokenizers, "audio": ear})


def pairs(seed: int) -> Iterator[Found]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    with zipfile.ZipFile(DATA / "flickr8k.zip") as archive:
        rows = manifest(archive)
    train, held_out = (
        [{"text": row["en"][0], "other": row["en"][1]} for row in rows if row["split"] == split]
        for split in ("train", "val")
    )
    order = np.random.default_rng(seed).permutation(len(train))[:1000]
    train, task = [train[i] for i in order], "text <-> other:text"
    counts = TfidfVectorizer(sublinear_tf=True).fit([text for sample in train for text in sample.values()])
    left, right = (counts.transform([sample[field] for sample in held_out]) for field in ("text", "other"))
    score_NN = (left @ right.T).toarray()
    hits = [(score_NN.argmax(axis) == np.arange(len(held_out))).mean() for axis in (0, 1)]
    yield Found("cosine of word counts (TF-IDF)", 100 * float(np.mean(hits)))

    model = pretrained(ready("minilm")).model(seed=seed)
    yield Found("MiniLM as it is", first(model, task, held_out))
    tuned = {"freeze": ("text", "core[:2]"), "lr": 1e-4, "warmup": 0.1}
    fit(model, {task: train}, steps=60, batch=64, seed=seed, quiet=True, **tuned)
    yield Found("ours from MiniLM", first(model, task, held_out))


def first(model: Model, task: str, held_out: Samples) -> float:
    """How often the right one comes first, in percent, as the mean of both directions."""
    found = evaluate(model, task, held_out, batch=len(held_out))
    return 100 * (found["R@1 left"] + found["R@1 right"]) / 2


@cache
def read_aloud() -> tuple[Samples, Samples]:
    """Clips of LJ Speech to train on and to score, with what is read."""
    read = [
        {
            "audio": (at_16_khz(wave_S, rate), HERTZ),
            "text": row["normalized"],
        }
        for row, wave_S, rate in recordings("ljspeech.zip")
    ]
    return read[HELD_OUT:], read[:HELD_OUT]


@cache
def untrained() -> tuple[Found, ...]:
    """What needs no training, and so no seed."""
    padded = heard("transformers, padded to 30 s", their_whisper(ready("whisper-base")))
    return *padded, *heard("ours as it is, not padded", _ours(unpadded().model()))


def speech(seed: int) -> Iterator[Found]:
    yield from untrained()
    model = unpadded().model(seed=seed)
    tuned = {"freeze": ("audio", "text", "reader[:2]"), "lr": 5e-5, "warmup": 0.1}
    fit(model, {"audio -> text": read_aloud()[0]}, steps=40, batch=8, seed=seed, quiet=True, **tuned)
    yield from heard("ours from Whisper-base, not padded", _ours(model))


def heard(who: str, write: Callable[[Any], str]) -> tuple[Found, Found]:
    """Errors of words, and CPU-seconds a clip, one after the other."""
    import jiwer

    start, held_out = time.process_time(), read_aloud()[1]
    told = [write(sample["audio"][0]) for sample in held_out]
    seconds = (time.process_time() - start) / len(held_out)
    wanted = [plain(sample["text"]) for sample in held_out]
    errors = 100 * jiwer.wer(wanted, list(map(plain, told)))
    return Found(f"{who}: word errors", errors), Found(f"{who}: a clip", seconds, "s")


def _ours(model: Model) -> Callable[[Any], str]:
    return lambda wave_S: str(model.generate("audio -> text", audio=(wave_S, HERTZ), max_tokens=200))


PARTS = {"clothing": clothing, "sounds": sounds, "pairs": pairs, "speech": speech}


def main() -> None:
    options = script.parser(__doc__, "seeds", "write")
    options.add_argument("part", choices=PARTS)
    args = script.parsed(options)
    values: dict[tuple[str, str], list[float]] = {}
    start = time.process_time()
    for seed in args.seeds:
        for found in PARTS[args.part](seed):
            values.setdefault((found.what, found.unit), []).append(found.value)
            print(f"  seed {seed}: {found.what} {found.value:.2f} {found.unit}", flush=True)
    rows = [
        [what, ", ".join(f"{value:.2f}" for value in some), f"{np.mean(some):.2f} {unit}"]
        for (what, unit), some in values.items()
    ]
    table = script.table(["", f"seeds {', '.join(map(str, args.seeds))}", "mean"], rows)
    body = f"{table}\n{(time.process_time() - start) / 60:.0f} CPU-minutes in all"
    print(body)
    if args.write:
        command = f"benchmarks/finetuning.py {args.part} --seeds {' '.join(map(str, args.seeds))} --write"
        report.keep(f"finetuning_{args.part}", f"Fine-tuning: {args.part}", command, body)


if __name__ == "__main__":
    main()
