"""Rows on whole streams: characters, pictures and few labels, a picture with a sound, places, speech in and speech out.

    uv run benchmarks/seeds.py language-model pretraining one-stream positions images transcription synthesis

Each `measure_...` returns its numbers by name; table.py has their bars. CPU-minutes on one thread: language-model 15,
transcription 14, synthesis 6, one-stream 5, positions 4, images 4, pretraining 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import multimodal as mm
from benchmarks import pretraining, shakespeare, speech, speech_data, writing
from benchmarks.data import Rows, digits_8x8, mnist, spoken
from multimodal.demo import disturbed
from multimodal.positions import sine_cosine
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBytes

DIGITS = tuple("0123456789")
READ = "image -> label"
Numbers = dict[str, float]


def encoded(tokenizer: mm.Tokenizer, rows: Rows, field: str) -> Rows:
    """The same samples with one field already tokens, so that nothing is read twice."""
    return [{**row, field: tokenizer(row[field])} for row in rows]


def share_right(model: mm.Model, task: str, rows: Rows) -> float:
    """The share of labels that are right."""
    answers = model.predict(task, rows, batch=256)
    return float(np.mean([str(a.value) == row["label"] for a, row in zip(answers, rows, strict=True)]))


def nearest_neighbour(train: Rows, test: Rows) -> float:
    """The share that the nearest training picture names rightly."""
    x, y = (torch.tensor(np.stack([row["image"] for row in rows])).float().flatten(1) for rows in (train, test))
    found = torch.cdist(y, x).argmin(1).tolist()
    return float(np.mean([train[i]["label"] == row["label"] for i, row in zip(found, test, strict=True)]))


def majority(train: Rows, test: Rows) -> float:
    """The share of the label that is the commonest in training."""
    names, counts = np.unique([row["label"] for row in train], return_counts=True)
    return float(np.mean([row["label"] == names[counts.argmax()] for row in test]))


def measure_language_model(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """benchmarks/shakespeare.py's model of nanoGPT's CPU shape, beside counting; nats a character of the last tenth."""
    train, test = ("to be or not to be " * 60, "to be or not to be " * 15) if quick else shakespeare.parts()
    core, size, recipe = shakespeare.RUNS["recipe"]
    if quick:
        core, size = core.replace(width=32, depth=1), 16
    model = mm.Model({"text": TextBytes()}, core, [shakespeare.TASK], seed=seed)
    recipe = mm.override(recipe, steps=2 if quick else recipe.steps, checkpoint_every=0, seed=seed)
    mm.fit(model, {shakespeare.TASK: shakespeare.Windows(train, size)}, recipe, quiet=True)
    found = {"nats": shakespeare.score(model, test, size, size // 2)}
    return found | {f"{n}-gram": shakespeare.counting(train, test, n) for n in (4, 5, 6)}


@dataclass(frozen=True)
class Moved:
    """Samples whose pictures are moved by up to two pixels each time."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "image": moved(self.rows[index]["image"])}


def moved(image_YX: np.ndarray) -> np.ndarray:
    """Moved by up to two pixels."""
    return np.roll(image_YX, tuple(np.random.randint(-2, 3, 2)), (0, 1))


@dataclass(frozen=True)
class Rolled(Sequence[mm.Tokens]):
    """A picture as tokens: as it is, and moved by up to two pixels; made when asked for."""

    image: np.ndarray
    patches: ImagePatches

    def __len__(self) -> int:
        return 25

    def __getitem__(self, index: Any) -> Any:
        down, right = divmod((index + 12) % 25, 5)  # number 0 stays where it is
        return self.patches(np.roll(self.image, (down - 2, right - 2), (0, 1)))


def measure_pretraining(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """MNIST with 10 labels a class: a model that first rebuilt hidden patches of 8,000 pictures, and one that did not.

    Both are fitted alike, over five draws of the labels; controls: a linear probe of either's mean state, trained or fresh.
    """
    patches = ImagePatches(patch=7, channels=1, position="rotary")
    pool, test = (
        [pretraining.Item(Rolled(row["image"], patches), row["label"], row["image"]) for row in rows]
        for rows in mnist(quick)
    )
    study = pretraining.Study(
        field="image",
        tokenizer=patches,
        head=mm.Masked(0.6),
        core=mm.Core(width=64, depth=4, heads=4),
        recipe=mm.Recipe(steps=2 if quick else 3000, batch=64, lr=3e-3, optimizer="muon"),
        pool=pool,
        test=test,
        each=2 if quick else 10,
    )
    alike: dict[str, tuple[int, float]] = dict.fromkeys(("pretrained", "scratch"), (2 if quick else 300, 1e-3))
    found = pretraining.compared(study, study.pretrained(seed), alike, seed, draws=1 if quick else 5)
    gain = np.array(found["pretrained"]) - np.array(found["scratch"])
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {"gain": float(gain.mean()), "least gain of a draw": float(gain.min())}


@dataclass(frozen=True)
class Sums:
    """A digit that is seen and a digit that is heard, with the name of their sum; drawn when asked for."""

    seen: Rows
    heard: Rows

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return added(self.seen[index], self.heard[np.random.randint(len(self.heard))])


def added(seen: dict[str, Any], heard: dict[str, Any]) -> dict[str, Any]:
    return {**seen, "audio": heard["audio"], "label": str(int(seen["label"]) + int(heard["label"]))}


def measure_one_stream(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """The sum of a handwritten and a spoken digit, in 19 classes, from one stream; and what is left of it without either."""
    task = "image audio -> label"
    patches, frames = ImagePatches(patch=7, channels=1), AudioFrames(rate_hz=8000, mels=40, stack=4)
    seen, seen_test = (encoded(patches, rows, "image") for rows in mnist(quick))
    clips, clips_test = spoken(quick)
    np.random.seed(seed)
    torch.manual_seed(seed)
    heard = [  # as recorded, and a little faster or slower with noise
        {**row, "audio": frames((wave, 8000))}
        for row in clips
        for wave in (
            row["audio"][0],
            *(disturbed(torch.from_numpy(row["audio"][0])) for _ in range(5)),
        )
    ]
    heard_test = encoded(frames, clips_test, "audio")
    names = tuple(str(n) for n in range(19))
    tokenizers = {"image": patches, "audio": frames, "label": Labels(names)}
    model = mm.Model(tokenizers, mm.Core(width=96, depth=3, heads=4), [task], seed=seed)
    recipe = mm.Recipe(
        steps=2 if quick else 2400, batch=64, lr=3e-3, optimizer="muon", ema=0.99, weight_decay=0.05, seed=seed
    )
    mm.fit(model, {task: Sums(seen, heard)}, recipe, quiet=True)
    random = np.random.default_rng(seed)
    pairs = [(row, heard_test[random.integers(len(heard_test))]) for row in seen_test]
    right = [added(*pair) for pair in pairs]
    others = [pairs[i] for i in random.permutation(len(pairs))]
    wrong = {
        "only the image": [{**row, "audio": None} for row in right],
        "only the audio": [{**row, "image": None} for row in right],
        "another's image": [{**row, "image": other["image"]} for row, (other, _) in zip(right, others, strict=True)],
        "another's recording": [
            {**row, "audio": other["audio"]} for row, (_, other) in zip(right, others, strict=True)
        ],
    }
    found = {"sum": share_right(model, task, right)}
    found |= {name: share_right(model, task, rows) for name, rows in wrong.items()}
    found["largest ablation"] = max(found[name] for name in wrong)
    return found | {"majority": majority(right, right)}


@dataclass(frozen=True)
class PlacedPatches(mm.Tokenizer):
    """Patches of 7 x 7 pixels whose place is only in what is added: sines and cosines of row and column, of one of them, or none.

    For a core without rotary places, so that it knows no other positions.
    """

    given: str = "row and column"

    @property
    def numbers(self) -> int:
        return {"row and column": 2, "index": 1, "column": 1, "none": 0}[self.given]

    @property
    def feature_size(self) -> int:
        return 49 + self.numbers

    def encode(self, value: Any) -> mm.Tokens:
        tokens = ImagePatches(patch=7, channels=1, position="rotary").encode(value)
        row_column = tokens.position_NA[:, 1:]
        index = torch.arange(float(len(tokens)))[:, None]
        places = {"row and column": row_column, "index": index, "column": row_column[:, 1:], "none": index[:, :0]}
        content = torch.cat([tokens.content, places[self.given]], 1)
        return mm.Tokens(content, tokens.position_NA)

    def embed(self, width: int) -> nn.Module:
        return _PixelsAndPlaces(width)


class _PixelsAndPlaces(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(49, width)

    def forward(self, content_NF: Tensor) -> Tensor:
        embedded_ND = self.linear(content_NF[:, :49])
        place_NA = content_NF[:, 49:]
        return embedded_ND + sine_cosine(place_NA, embedded_ND.shape[1]) if place_NA.shape[1] else embedded_ND


def measure_positions(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """MNIST by 16 patches that know row and column, a running number, the column, or no position."""
    train, test = mnist(quick)
    # the digit 7 pixels further right on a canvas that is half as wide again: numbers then mean other rows
    wide = [{**row, "image": np.pad(row["image"], ((0, 0), (7, 7)))} for row in test]
    found: Numbers = {}
    variants = {"2-D": "row and column", "1-D": "index", "column only": "column", "none": "none"}
    for name, places in variants.items():
        patches = PlacedPatches(places)
        core = mm.Core(width=64, depth=3, heads=4, rotary_split=(0, 0, 0))
        model = mm.Model({"image": patches, "label": Labels(DIGITS)}, core, [READ], seed=seed)
        recipe = mm.Recipe(steps=2 if quick else 1000, batch=64, lr=2e-3, seed=seed)
        mm.fit(model, {READ: encoded(patches, train, "image")}, recipe, quiet=True)
        found[name] = share_right(model, READ, encoded(patches, test, "image"))
        found[f"{name}, wider canvas"] = share_right(model, READ, encoded(patches, wide, "image"))
    return found | {"1 nearest neighbour": nearest_neighbour(train, test), "majority": majority(train, test)}


def measure_images(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """MNIST's 8,000 / 2,000 and scikit-learn's digits by the default picture tokenizer and core, beside nearest neighbours."""
    found: Numbers = {}
    sets = {"MNIST": (*mnist(quick), 4), "digits": (*digits_8x8(seed), 2)}
    for name, (train, test, patch) in sets.items():
        test = test[:20] if quick else test
        tokenizers = {"image": ImagePatches(patch=patch, channels=1, mean=0.2, std=0.35), "label": Labels(DIGITS)}
        model = mm.Model(tokenizers, mm.Core(width=64, depth=4, heads=4), [READ], seed=seed)
        recipe = mm.Recipe(
            steps=2 if quick else 1200, batch=64, lr=3e-3, optimizer="muon", ema=0.99, weight_decay=0.05, seed=seed
        )
        mm.fit(model, {READ: Moved(train) if patch == 4 else train}, recipe, quiet=True)
        found[name] = share_right(model, READ, test)
        found[f"{name}, 1 nearest neighbour"] = nearest_neighbour(train, test)
        found[f"{name}, majority"] = majority(train, test)
    return found


def measure_transcription(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Strings of spoken digits by benchmarks/speech.py's program, in a third of its steps; again without one of the speakers."""
    clips = dict(zip((False, True), spoken(quick), strict=True))
    steps = 2 if quick else 1200
    found: Numbers = {}

    def strings(rows: Rows) -> list[speech_data.Digit]:
        return [speech_data.Digit(row["audio"][0], row["label"]) for row in rows]

    def fitted(train: Rows) -> mm.Model:
        model = speech.build(speech.SETTINGS["digits"], seed)
        recipe = mm.override(speech.SETTINGS["digits"].recipe, seed=seed, steps=steps, checkpoint_every=0)
        samples = speech_data.DigitStrings(strings(train))
        mm.fit(model, {speech.BY_CTC: samples, speech.BY_TOKEN: samples}, recipe, quiet=True)
        return model

    def tested(rows: Rows) -> list[dict[str, Any]]:
        random = np.random.default_rng(0)
        return [speech_data.joined(strings(rows), random, disturb=False) for _ in range(4 if quick else 300)]

    model, tests = fitted(clips[False]), tested(clips[True])
    wanted = [row["text"] for row in tests]
    found["digit error rate"], found["whole string"] = _rates(wanted, speech.heard(model, tests, speech.greedy))
    silent = [{**row, "audio": (np.zeros_like(row["audio"][0]), 8000)} for row in tests]
    found["digit error rate, silence"] = _rates(wanted, speech.heard(model, silent, speech.greedy))[0]
    random = np.random.default_rng(seed)
    guessed = ["".join(str(d) for d in random.integers(10, size=len(text))) for text in wanted]
    found["digit error rate, random digits"] = _rates(wanted, guessed)[0]
    left_out = sorted({row["speaker"] for row in clips[False]})[-1]
    known = [row for row in clips[False] if row["speaker"] != left_out]
    tests = tested([row for part in clips.values() for row in part if row["speaker"] == left_out])
    model = fitted(known)
    read = _rates([row["text"] for row in tests], speech.heard(model, tests, speech.greedy))
    found["digit error rate, unknown speaker"], found["whole string, unknown speaker"] = read
    return found


def _rates(wanted: Sequence[str], found: Sequence[str]) -> tuple[float, float]:
    """The error rate of digits, and the share of whole strings."""
    import jiwer

    whole = sum(a == b for a, b in zip(wanted, found, strict=True)) / len(wanted)
    return float(jiwer.cer(list(wanted), list(found))), whole


def measure_synthesis(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Digits said by a model that writes codes of sound, read by judges of words and of voices that never heard such codes."""
    clips, test = spoken(quick)
    speakers = tuple(sorted({row["speaker"] for row in clips}))
    frames = AudioFrames(rate_hz=8000, mels=48, hop_ms=16, window_ms=32, stack=1, normalise="fixed")
    sounds = [row["audio"] for row in clips]
    codes = Codes.train(frames, sounds, size=16 if quick else 512, rounds=2 if quick else 100, quiet=True)
    task = "label speaker -> sound"
    tokenizers = {"label": Labels(DIGITS), "speaker": Labels(speakers), "sound": codes}
    core = mm.Core(width=32, depth=1, heads=2) if quick else mm.Core(width=128, depth=4, heads=4, dropout=0.1)
    model = mm.Model(tokenizers, core, [task], seed=seed)
    rows = [{**row, "sound": codes(row["audio"])} for row in clips]
    recipe = mm.Recipe(steps=2 if quick else 700, batch=64, lr=3e-3, optimizer="muon", ema=0.99, seed=seed)
    mm.fit(model, {task: rows}, recipe, quiet=True)

    def heard(sounds: Sequence[Any]) -> list[Tensor]:
        return [writing.heard(torch.as_tensor(wave)) for wave, _ in sounds]

    real, steps = heard(sounds), 2 if quick else 900
    classes = {"digit": DIGITS, "speaker": speakers}
    field = {"digit": "label", "speaker": "speaker"}
    judges = {
        name: writing.judge(real, [names.index(row[field[name]]) for row in clips], writing.moved, steps, seed=1)
        for name, names in classes.items()
    }

    def read(sounds: Sequence[Any], asked: Rows, name: str) -> float:
        return writing.share_read(judges[name], heard(sounds), [classes[name].index(r[field[name]]) for r in asked])

    asked = [{"label": d, "speaker": s} for d in DIGITS for s in speakers for _ in range(1 if quick else 8)]
    found: Numbers = {}
    for temperature in (0.3, 0.7, 1.0):
        answers = model.generate(
            task, asked, temperature=temperature, max_tokens=4 if quick else 120, seed=seed, batch=128
        )
        said = [answer.value for answer in answers]
        for name in classes:
            found[f"{name}, temperature {temperature}"] = read(said, asked, name)
        length = float(np.mean([len(wave) for wave, _ in said]) / np.mean([len(row["audio"][0]) for row in test]))
        found[f"duration / real, temperature {temperature}"] = length
        if temperature == 0.7:
            swapped = [{**row, "label": str((int(row["label"]) + 3) % 10)} for row in asked]
            found["digit, another asked for"] = read(said, swapped, "digit")
    back = [codes.decode(codes(row["audio"])) for row in test]
    for name in classes:
        found[f"{name}, real"] = read([row["audio"] for row in test], test, name)
        found[f"{name}, real after coding"] = read(back, test, name)
    unigram, random = _unigram(codes, rows), np.random.default_rng(seed)
    lengths = [len(row["sound"]) for row in rows]
    drawn = [random.choice(codes.vocab_size, size=random.choice(lengths), p=unigram) for _ in asked]
    noise = [codes.decode(mm.Tokens(torch.from_numpy(ids), codes.places(len(ids)))) for ids in drawn]
    found["digit, unigram frames"] = read(noise, asked, "digit")
    held = [codes(row["audio"]).content.numpy() for row in test]
    found["nats a frame, unigram"] = float(-np.log(unigram[np.concatenate(held)]).mean())
    pairs = [{**row, "sound": mm.Tokens(torch.from_numpy(ids), codes.places(len(ids)))} for row, ids in
             zip(test, held, strict=True)]  # fmt: skip
    with model.inference_mode():
        streams = [model.pack(task, pairs[i : i + 50]) for i in range(0, len(pairs), 50)]
        nats = sum(float(model.losses(s)[task]) for s in streams) / sum(s.readings[task].count for s in streams)
    return found | {"nats a frame": nats}


def _unigram(codes: Codes, rows: Rows) -> np.ndarray:
    """How often each code is used, one added to each."""
    counts = np.bincount(torch.cat([row["sound"].content for row in rows]).numpy(), minlength=codes.vocab_size) + 1.0
    return counts / counts.sum()
